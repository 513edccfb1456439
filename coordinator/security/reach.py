"""Under which address a device may reach this machine, as far as it can know."""

from __future__ import annotations

import ipaddress
import socket

from fedepth.address import ENROLL_PORT, Address, heard_address, parse_address

# Nothing is sent there: the system only says which of our addresses it would use (RFC 5737, RFC 3849).
_ELSEWHERE = {4: (socket.AF_INET, "192.0.2.1"), 6: (socket.AF_INET6, "2001:db8::1")}


def reachable(listening: str) -> str:
    """The address to dial for one that is listened on: of 0.0.0.0 or ::, this machine's on its way out.

    Without one, loopback; without a port, that of enrolment.

    Raises:
        ConfigError: it is no address.
    """
    if not listening:
        return str(Address("127.0.0.1", ENROLL_PORT))
    heard = heard_address(listening, ENROLL_PORT)
    try:
        ip = ipaddress.ip_address(heard.host)
    except ValueError:
        ip = None
    if ip is None or not ip.is_unspecified:
        return str(parse_address(listening, ENROLL_PORT))
    return str(Address(_own_address(ip.version), heard.port))


def _own_address(version: int) -> str:
    for family, elsewhere in (_ELSEWHERE[4], _ELSEWHERE[version]):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((elsewhere, 9))
                return str(probe.getsockname()[0])
        except OSError:
            continue  # no way out
    return "127.0.0.1" if version == 4 else "::1"
