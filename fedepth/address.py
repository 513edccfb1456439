"""Addresses of coordinators, as people write them: one grammar for every program, option and settings file.

    HOST[:PORT]   HOST is a name, an IPv4 address, or an IPv6 address in brackets; PORT is 8970 if it is left out

An IPv6 address may stand without brackets if it can mean one thing only. Nothing is looked up here: what a name stands
for is asked of the system when it is used.

Sources: RFC 4291 (IPv6 text), RFC 4007 and 6874 (zones), RFC 1123 (names), RFC 3490 (names that are not ASCII).
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from dataclasses import dataclass

from fedepth.errors import ConfigError
from fedepth.printable import quoted

DEFAULT_PORT = 8970
ENROLL_PORT = DEFAULT_PORT + 1  # where devices get their certificates
EXAMPLE_HOST = "192.168.1.10"

MOST_PORT = 65535
_MOST_NAME = 253
_MOST_DIGITS = 20  # of a port in a message
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<slashes>/{1,3})(?P<rest>.*)", re.DOTALL)
# gRPC's own ways to name a target, which have no slashes.
_PREFIX = re.compile(r"(?P<scheme>dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):(?P<rest>.*)", re.DOTALL)
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_PORT = re.compile(r"[0-9]+")
# What inet_aton(3) takes for an IPv4 address: "127.1", "0x7f.1", "2130706433".
_NUMBERS = re.compile(r"(?:[0-9]+|0[xX][0-9A-Fa-f]*)(?:\.(?:[0-9]+|0[xX][0-9A-Fa-f]*))*\.?")
_LEADING_ZERO = re.compile(r"(?:^|\.)0[0-9]")
_ZONE = re.compile(r"[^\s/%\[\]]{1,64}")


@dataclass(frozen=True)
class Address:
    """Where a coordinator is, or listens.

    Attributes:
        host: a name as it was written, or an IP address in its usual form, with its zone if it has one; no brackets.
        port: 0 only where one listens: the system chooses.
    """

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def ascii_host(self) -> str:
        """The host as the system looks it up."""
        return self.host if self.host.isascii() else self.host.encode("idna").decode("ascii")


def parse_address(text: str, default_port: int = DEFAULT_PORT) -> Address:
    """Where to reach a coordinator.

    Args:
        default_port: of an address without one.

    Raises:
        ConfigError: it is not HOST or HOST:PORT, or nobody can be reached there. Says what to write.
    """
    address = heard_address(text, default_port)
    _check_destination(address, text)
    return address


def heard_address(text: str, default_port: int = DEFAULT_PORT) -> Address:
    """The same of one that somebody listens at, which may stand for all addresses of the machine.

    Raises:
        ConfigError: it is not HOST or HOST:PORT.
    """
    host, port = _split(text, default_port)
    return Address(_host(host, text, default_port), default_port if port is None else _port(port, text, default_port))


def listening_address(host: str, port: int) -> Address:
    """Where to listen: a host without a port, which may stand for all addresses of the machine, and a port.

    Raises:
        ConfigError: `host` is none. Says what to write.
    """
    if host == "*":
        raise _refused(host, "write 0.0.0.0 for all IPv4 addresses of this machine, or :: for those of IPv6 as well")
    _check_text(host, DEFAULT_PORT)
    bracketed = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if _ip(bracketed) is None:
        _, given = _split(host, DEFAULT_PORT)
        if given is not None:
            raise _refused(host, "it has a port, which is given apart: --host HOST --port PORT")
    found = Address(_host(host, host, DEFAULT_PORT), port)
    ip = _ip(found.host)
    if ip is not None and (ip.is_multicast or found.host == "255.255.255.255"):
        raise _refused(host, "it stands for many machines, and nobody can listen there")
    _check_zone(found, host)
    return found


def _split(text: str, default_port: int) -> tuple[str, str | None]:
    """Host, still in brackets if it has them, and the port's text; None if there is none."""
    _check_text(text, default_port)
    _check_prefix(text, default_port)
    if text.startswith("["):
        inside, closing, rest = text[1:].partition("]")
        if not closing:
            raise _refused(
                text, f"a bracket is not closed; write [{inside.partition(':')[0] or '::1'}…]:{default_port}"
            )
        if rest and not rest.startswith(":"):
            raise _refused(
                text, f"after the closing bracket only a colon and a port may follow, as in [::1]:{default_port}"
            )
        return f"[{inside}]", rest[1:] if rest else None
    if text.count(":") > 1:
        return _without_brackets(text, default_port), None
    host, colon, port = text.partition(":")
    if not host:
        raise _refused(text, f"it names no host; write HOST:PORT, such as {EXAMPLE_HOST}:{default_port}")
    return host, port if colon else None


def _without_brackets(text: str, default_port: int) -> str:
    """An IPv6 address without a port, if that is the only thing that it can be."""
    shorter, _, last = text.rpartition(":")
    with_port = _ip(shorter) is not None and _PORT.fullmatch(last) is not None
    if _ip(text) is None:
        if with_port:
            raise _refused(text, f"an IPv6 address stands in brackets before a port; write [{shorter}]:{last}")
        raise _refused(
            text,
            f"it is neither one HOST:PORT, such as {EXAMPLE_HOST}:{default_port}, nor an IPv6 address, such as "
            f"[::1]:{default_port}",
        )
    if with_port:
        raise _refused(
            text,
            f"it can be read in two ways; write [{shorter}]:{last} for port {last} of {shorter}, "
            f"or [{text}]:{default_port} for the address {text}",
        )
    return text


def _host(host: str, text: str, default_port: int) -> str:
    bracketed = host.startswith("[")
    if bracketed:
        host = host[1:-1]
    ip = _ip(host)
    if isinstance(ip, ipaddress.IPv6Address):
        return f"::ffff:{ip.ipv4_mapped}" if ip.ipv4_mapped else str(ip)
    if bracketed:
        raise _refused(
            text,
            f"brackets are for IPv6 addresses, such as [::1]:{default_port}, and {quoted(host)} is not one"
            + ("; leave them out" if ip is not None or _name_fault(host, default_port) == "" else ""),
        )
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if _NUMBERS.fullmatch(host):
        raise _refused(text, _number_fault(host, default_port))
    fault = _name_fault(host, default_port)
    if fault:
        raise _refused(text, fault)
    return host


def _number_fault(host: str, default_port: int) -> str:
    if host.isdecimal():
        return f"it names no host; write HOST:PORT, such as {EXAMPLE_HOST}:{default_port}"
    fault = "an IPv4 address has four numbers from 0 to 255"
    if _LEADING_ZERO.search(host):
        fault += ", without zeros in front, which some programs read as octal"
    return f"{fault}; write it like 192.168.1.10"


def _name_fault(name: str, default_port: int) -> str:
    """What is wrong with a host's name; "" if nothing is.

    Underscores are no part of what RFC 1123 allows, but Docker gives such names and systems resolve them. A dot at the
    end keeps the system from adding its search domains.
    """
    if not all(name.removesuffix(".").split(".")):
        return "the host's name has an empty part between its dots"
    try:
        ascii_name = name if name.isascii() else name.encode("idna").decode("ascii")
    except UnicodeError:
        return "the host's name cannot be written in ASCII, as the domain name system needs it"
    labels = ascii_name.removesuffix(".").split(".")
    if len(ascii_name) > _MOST_NAME or any(len(label) > 63 for label in labels):
        return f"a host's name has at most {_MOST_NAME} characters, and 63 between two dots"
    if not all(_LABEL.fullmatch(label) for label in labels):
        return (
            "a host's name is made of letters, digits, '-', '_' and '.'; write HOST:PORT, such as "
            f"{EXAMPLE_HOST}:{default_port}"
        )
    return ""


def _port(port: str, text: str, default_port: int) -> int:
    if not port:
        raise _refused(text, f"no port follows the colon; write one, or leave the colon out for port {default_port}")
    if not (port.isascii() and _PORT.fullmatch(port)):
        raise _refused(text, f"the port must be a number from 1 to {MOST_PORT}, is {quoted(port)}")
    digits = port.lstrip("0") or "0"
    if len(digits) > len(str(MOST_PORT)) or not 0 < int(digits) <= MOST_PORT:
        shown = digits if len(digits) <= _MOST_DIGITS else f"{digits[:_MOST_DIGITS]}…"
        raise _refused(text, f"the port must be 1 to {MOST_PORT}, is {shown}")
    return int(digits)


def _check_text(text: str, default_port: int) -> None:
    if not text.strip():
        raise ConfigError(f"the address is empty; write HOST:PORT, such as {EXAMPLE_HOST}:{default_port}")
    if any(character.isspace() or not character.isprintable() for character in text):
        raise _refused(
            text, f"it has a blank or a character that cannot be shown in it; write {EXAMPLE_HOST}:{default_port}, say"
        )
    if _plain(text) != text:
        raise _refused(
            text,
            "it has full-width characters or digits of another script; write plain ones, such as "
            f"{quoted(_without_user(_plain(text)))}",
        )


def _plain(text: str) -> str:
    """The text with ASCII characters for their full-width forms and for digits of other scripts."""
    found = []
    for each in text:
        narrow = unicodedata.normalize("NFKC", each)
        digit = unicodedata.decimal(each, None)
        found.append(narrow if narrow.isascii() else each if digit is None else str(digit))
    return "".join(found)


def _check_prefix(text: str, default_port: int) -> None:
    match = _SCHEME.fullmatch(text)
    prefix = match or _PREFIX.fullmatch(text)
    # "unix:8970" is a host of this name.
    if prefix and not (match is None and _PORT.fullmatch(prefix["rest"])):
        scheme = prefix["scheme"].lower()
        if scheme.startswith("unix") or scheme == "vsock":
            raise _refused(
                text, f"coordinators listen on TCP only; write HOST:PORT, such as {EXAMPLE_HOST}:{default_port}"
            )
        head = text[: prefix.start("rest")]
        raise _refused(
            text, f"leave out {quoted(_without_user(head))}{_rather(prefix['rest'].strip('/'), default_port)}"
        )
    if "/" in text:
        raise _refused(text, f"leave out the slash and what follows it{_rather(text, default_port)}")
    if "@" in text:
        raise _refused(
            text, f"leave out the '@' and what stands before it{_rather(text.rpartition('@')[2], default_port)}"
        )


def _rather(text: str, default_port: int) -> str:
    """The end of a message: what is left of an address, if that is one."""
    host = text.partition("/")[0]
    try:
        return f", and write {parse_address(host, default_port)}"
    except ConfigError:
        return f", and write HOST:PORT, such as {EXAMPLE_HOST}:{default_port}"


def _check_destination(address: Address, text: str) -> None:
    ip = _ip(address.host)
    if ip is None:
        return
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    if (mapped or ip).is_unspecified:
        raise _refused(
            text,
            f"{address.host} stands for all addresses of the machine that listens; write one at which it can be "
            f"reached: 127.0.0.1:{address.port} on the same machine",
        )
    if (mapped or ip).is_multicast or address.host == "255.255.255.255":
        raise _refused(text, f"{address.host} stands for many machines; write the address of one")
    _check_zone(address, text)


def _check_zone(address: Address, text: str) -> None:
    ip = _ip(address.host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.is_link_local and ip.scope_id is None:
        raise _refused(
            text,
            f"{address.host} is valid on one network only, so it needs the name of the interface (`ip link` lists "
            f"them); write {text.replace(address.host, f'{address.host}%eth0', 1)} if that is eth0",
        )


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for what is no IP address. A zone may begin with %25, as in a URL."""
    address, percent, zone = host.partition("%")
    if percent:
        if zone.startswith("25") and len(zone) > 2:
            zone = zone[2:]
        if not _ZONE.fullmatch(zone) or ":" not in address:
            return None
    try:
        return ipaddress.ip_address(f"{address}%{zone}" if percent else address)
    except ValueError:
        return None


def _refused(text: str, why: str) -> ConfigError:
    return ConfigError(f"{quoted(_without_user(text))} is not an address that can be used: {why}")


def _without_user(text: str) -> str:
    """What stands before an @ may be a password."""
    return re.sub(r"[^/]*[@＠﹫]", "…@", text)  # in full width, too
