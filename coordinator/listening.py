"""Where the coordinator listens: one port at every address that a host stands for, and why not if not."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path
from typing import Protocol

import grpc
import psutil
import structlog

from fedepth.address import Address, listening_address
from fedepth.errors import TransportError
from fedepth.files import raise_open_files
from fedepth.printable import printable, quoted

_TRIES = 20  # to find one port that is free at all addresses
_FIRST_FREE_TO_ALL = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_log = structlog.get_logger()

# Of the descriptors that this process may have: what the enrolment port takes, and files, databases and children.
ENROLLMENT_CONNECTIONS = 128
_OTHER_FILES = 256


class Server(Protocol):
    """What is asked of a gRPC server."""

    def add_insecure_port(self, address: str) -> int: ...

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int: ...


class NoServer:
    """Takes the place of one, to find out whether it could listen."""

    def add_insecure_port(self, address: str) -> int:
        return 0

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        return 0


def listen(
    server: Server,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None = None,
    option: str = "--port",
) -> Address:
    """Makes `server` listen at all addresses of `host`. Port 0 lets the system choose one.

    Args:
        credentials: of a server over TLS; plain text without.
        option: of the command line, which sets this port.

    Returns: the host as it was written, and the port.

    Raises:
        ConfigError: `host` is none.
        TransportError: nobody can listen there. Says why, and what to do.
    """
    wanted = listening_address(host, port)
    free, port = _free_at_all(_resolved(wanted), port, option)
    for address in free:
        where = str(Address(address.host, port))
        try:
            if credentials is None:
                server.add_insecure_port(where)
            else:
                server.add_secure_port(where, credentials)
        except RuntimeError as error:  # it was free a moment ago
            raise TransportError(f"cannot listen on {where}: {error}; try again, or choose another {option}") from None
    return Address(wanted.host, port)


def most_connections() -> int:
    """How many connections the port for devices takes: more would leave no descriptors for files. Raises this process's
    limit as far as it may."""
    limit = raise_open_files()
    return max(limit // 4, limit - ENROLLMENT_CONNECTIONS - _OTHER_FILES)


def _resolved(wanted: Address) -> list[Address]:
    """The IP addresses of a host, as the system resolves it."""
    try:
        found = socket.getaddrinfo(
            wanted.ascii_host, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE, proto=socket.IPPROTO_TCP
        )
    except OSError as error:  # gaierror: not known, or nobody to ask; else an interface that is not there
        raise TransportError(
            f"cannot listen on {quoted(wanted.host)}: this machine cannot resolve it ({error.strerror or error}); "
            "give --host one of its own addresses, or 0.0.0.0 for all of them"
        ) from None
    scoped = wanted.host.rpartition("%")[2] if "%" in wanted.host else ""
    addresses = []
    for _, _, _, _, sockaddr in found:
        ip = str(sockaddr[0]).partition("%")[0]
        zone = scoped or _zone(sockaddr)
        addresses.append(Address(f"{ip}%{zone}" if zone else ip, wanted.port))
    return list(dict.fromkeys(addresses))


def _zone(sockaddr: tuple[object, ...]) -> str:
    index = sockaddr[3] if len(sockaddr) == 4 else 0
    return socket.if_indextoname(index) if isinstance(index, int) and index else ""


def _free_at_all(addresses: list[Address], port: int, option: str) -> tuple[list[Address], int]:
    """The addresses that this machine has, and one port that is free at all of them.

    A name may stand for an address of a family that is switched off here. It is left out if another one remains.
    """
    for _ in range(_TRIES):
        free: list[Address] = []
        absent: list[tuple[Address, OSError]] = []
        chosen, taken = port, False
        for address in addresses:
            try:
                chosen = _try_port(address, chosen)
                free.append(address)
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    absent.append((address, error))
                elif error.errno == errno.EADDRINUSE and not port:
                    taken = True  # what the system chose at the first address
                    break
                else:
                    raise _cannot(Address(address.host, chosen), error, option) from None
        if taken:
            continue
        if not free:
            raise _cannot(*absent[0], option) from None
        for address, failure in absent:
            _log.warning("an address of this name cannot be listened on", address=address.host, error=str(failure))
        return free, chosen
    raise TransportError(
        f"no port was found that is free at {', '.join(each.host for each in addresses)}; give {option}"
    )


def _try_port(address: Address, port: int) -> int:
    """Binds as gRPC will, and lets go again; the port. With gRPC, the reason would be a line in a log of its own."""
    ip, _, zone = address.host.partition("%")
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # "::" stands for those of IPv4, too
            trial.bind((ip, port, 0, socket.if_nametoindex(zone) if zone else 0))
        else:
            trial.bind((ip, port))
        trial.listen(1)
        return int(trial.getsockname()[1])


def _cannot(address: Address, error: OSError, option: str) -> TransportError:
    reasons = {
        errno.EADDRINUSE: f"{_holder(address.port)} has the port; stop it, or choose another {option} (0 lets the "
        "system choose)",
        errno.EADDRNOTAVAIL: f"{address.host} is not an address of this machine; give --host one that it has "
        "(`ip addr` lists them), or 0.0.0.0 for all of IPv4, or :: for all",
        errno.EAFNOSUPPORT: "this machine has no IPv6; give --host an IPv4 address, or 0.0.0.0 for all of them"
        if ":" in address.host
        else "this machine has no IPv4; give --host an IPv6 address, or :: for all of them",
        errno.EACCES: f"ports below {_first_free_to_all()} need privileges; choose another {option}, such as 8970",
        errno.EPERM: f"this machine's rules forbid it (a firewall, or a container's profile); choose another {option}",
    }
    why = reasons.get(error.errno or 0, f"{error.strerror or error}; choose another --host or {option}")
    return TransportError(f"cannot listen on {address}: {why}")


def _holder(port: int) -> str:
    """Who listens on a port, as far as the system says so to us."""
    with contextlib.suppress(psutil.Error, OSError, ValueError, RuntimeError):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.pid and each.laddr and each.laddr.port == port:
                return f"process {each.pid} ({printable(psutil.Process(each.pid).name())})"
    return "another program"


def _first_free_to_all() -> int:
    try:
        return int(_FIRST_FREE_TO_ALL.read_text())
    except (OSError, ValueError):
        return 1024
