"""Addresses as people write them. A new case is a line in one of the tables."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fedepth_wire.channel import open_channel, target
from fedepth_wire.tls import INSECURE
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import coordinator.cli
from coordinator import listening
from edge_client.config import load
from fedepth.address import ENROLL_PORT, Address, listening_address, parse_address
from fedepth.errors import ConfigError, TransportError

# What is written, and what it means.
ADDRESSES = [
    ("192.168.1.10:9000", "192.168.1.10:9000"),
    ("192.168.1.10", "192.168.1.10:8970"),
    ("kitchen.local", "kitchen.local:8970"),
    ("kitchen:1", "kitchen:1"),
    ("kitchen:65535", "kitchen:65535"),
    ("kitchen:008970", "kitchen:8970"),
    ("my_service:9000", "my_service:9000"),  # as Docker Compose names them
    ("kitchen.example.:9000", "kitchen.example.:9000"),
    ("unix:9000", "unix:9000"),  # hosts of these names
    ("http:9000", "http:9000"),
    ("bücher.example:9000", "bücher.example:9000"),
    ("::1", "[::1]:8970"),
    ("[::1]", "[::1]:8970"),
    ("[::1]:9000", "[::1]:9000"),
    ("[2001:DB8:0:0::1]:9000", "[2001:db8::1]:9000"),
    ("1:2:3:4:5:6:7:8", "[1:2:3:4:5:6:7:8]:8970"),
    ("::ffff:192.168.1.10", "[::ffff:192.168.1.10]:8970"),
    ("fe80::1%eth0", "[fe80::1%eth0]:8970"),
    ("[fe80::1%eth0]:9000", "[fe80::1%eth0]:9000"),
    ("[fe80::1%25eth0]:9000", "[fe80::1%eth0]:9000"),  # as in a URL
]

# What is written, and what its refusal says.
REFUSED = [
    ("", "the address is empty; write HOST:PORT"),
    (" ", "the address is empty"),
    ("kitchen :8970", "it has a blank"),
    (" kitchen", "it has a blank"),
    ("kitchen\n", r"'kitchen\n' .* it has a blank"),
    ("\x1b[2Jkitchen", r"'\x1b[2Jkitchen' .* cannot be shown"),
    ("localhost:84507", "the port must be 1 to 65535, is 84507"),
    ("localhost:0", "the port must be 1 to 65535, is 0"),
    ("localhost:" + "9" * 5000, "the port must be 1 to 65535, is 99999999999999999999…"),
    ("localhost:", "no port follows the colon"),
    ("localhost:-1", "the port must be a number from 1 to 65535, is '-1'"),
    ("localhost:+1", "the port must be a number"),
    ("localhost:８０", "full-width characters or digits of another script; write plain ones, such as 'localhost:80'"),
    ("１９２.168.1.10", "write plain ones, such as '192.168.1.10'"),
    ("192．168．1．10：8970", "write plain ones, such as '192.168.1.10:8970'"),
    ("ｋｉｔｃｈｅｎ", "write plain ones, such as 'kitchen'"),
    ("١٢٧.0.0.1:٨٠", "write plain ones, such as '127.0.0.1:80'"),
    ("user:secret＠kitchen", "such as '…@kitchen'"),
    ("localhost:http", "the port must be a number"),
    ("8970", "it names no host"),
    (":8970", "it names no host"),
    ("http://kitchen:9000/", "leave out 'http://', and write kitchen:9000"),
    ("https://kitchen", "leave out 'https://', and write kitchen:8970"),
    ("grpc://[::1]:9000", r"leave out 'grpc://', and write [::1]:9000"),
    ("dns:///kitchen:9000", "leave out 'dns:///', and write kitchen:9000"),
    ("ipv4:192.168.1.10:9000", "leave out 'ipv4:', and write 192.168.1.10:9000"),
    ("kitchen:9000/", "leave out the slash and what follows it, and write kitchen:9000"),
    ("kitchen/path", "leave out the slash and what follows it, and write kitchen:8970"),
    ("unix:/run/fedepth.sock", "coordinators listen on TCP only"),
    ("unix:///run/fedepth.sock", "coordinators listen on TCP only"),
    ("::1:8970", r"two ways; write [::1]:8970 for port 8970 of ::1, or [::1:8970]:8970 for the address ::1:8970"),
    ("1:2:3:4:5:6:7:8:9000", r"in brackets before a port; write [1:2:3:4:5:6:7:8]:9000"),
    ("::ffff:192.168.1.10:9000", r"write [::ffff:192.168.1.10]:9000"),
    ("[::1", "a bracket is not closed"),
    ("[::1]9000", "after the closing bracket"),
    ("[192.168.1.10]:9000", "brackets are for IPv6 addresses, such as [::1]:8970, .*; leave them out"),
    ("[kitchen]:9000", "; leave them out"),
    ("[]:9000", "brackets are for IPv6 addresses"),
    ("a:1,b:2", "neither one HOST:PORT"),
    ("0.0.0.0:9000", "stands for all addresses of the machine that listens; .*: 127.0.0.1:9000"),
    ("::", "stands for all addresses"),
    ("224.0.0.1:9000", "stands for many machines"),
    ("255.255.255.255", "stands for many machines"),
    ("fe80::1", r"needs the name of the interface .*; write fe80::1%eth0"),
    ("256.1.1.1:9000", "an IPv4 address has four numbers from 0 to 255"),
    ("192.168.1", "an IPv4 address has four numbers"),
    ("0x7f.1", "an IPv4 address has four numbers"),
    ("192.168.1.010", "without zeros in front"),
    ("a..b:9000", "an empty part between its dots"),
    (".", "an empty part between its dots"),
    ("-kitchen", "a host's name is made of letters"),
    ("kitchen!", "a host's name is made of letters"),
    ("x" * 64, "a host's name has at most 253 characters, and 63 between two dots"),
    ("x." * 127 + "x", "a host's name has at most 253 characters"),
    ("user:secret@kitchen:9000", "leave out the '@' and what stands before it, and write kitchen:9000"),
    ("http://user:secret@kitchen:9000", "leave out 'http://'"),
]


def refusal(pattern: str) -> str:
    """Of a message: ".*" is for anything, all else for itself."""
    return ".*".join(re.escape(part) for part in pattern.split(".*"))


@pytest.mark.parametrize(("text", "meaning"), ADDRESSES)
def test_an_address_and_what_it_means(text: str, meaning: str) -> None:
    assert str(parse_address(text)) == meaning
    assert parse_address(meaning) == parse_address(text)  # what is shown can be typed


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=lambda text: ascii(text)[:40])
def test_what_is_no_address_is_refused_with_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=refusal(says)) as caught:
        parse_address(text)
    assert str(caught.value).isprintable()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:",
        ":8971",
        "[::1",
        "[::1]8",
        "a:b:c",
        "http://host",
        "a_b c",
        "host/x",
        "user@host",
        "fe80::1:1",
        "ho$t",
    ],
)
def test_what_to_write_has_the_port_of_what_is_asked_for(text: str) -> None:
    """Whoever enrols, and follows what a message says, must not dial the port for devices."""
    with pytest.raises(ConfigError) as caught:
        parse_address(text, ENROLL_PORT)
    assert "8970" not in str(caught.value) and "{" not in str(caught.value)


@settings(max_examples=60)
@given(st.text(max_size=40) | st.text("[]:.%/@0123456789abcfx", max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError as error:
        assert str(error).isprintable()
    else:
        assert 0 < address.port < 65536
        assert parse_address(str(address)) == address
        assert target(address).isascii()


def test_every_program_takes_addresses_through_the_one_parser(tmp_path: Path) -> None:
    assert load(None, {"coordinator": "::1"}).coordinator == "[::1]:8970"
    (tmp_path / "client.toml").write_text('coordinator = "http://kitchen"\n')
    with pytest.raises(ConfigError, match=r"client\.toml: coordinator: .*, and write kitchen:8970"):
        load(tmp_path / "client.toml")
    for command in ("status", "watch"):
        result = CliRunner().invoke(coordinator.cli.app, [command, "--coordinator", "localhost:84507"])
        assert "the port must be 1 to 65535" in str(result.exception)
    with pytest.raises(ConfigError, match="is 84507"):
        open_channel("localhost:84507", INSECURE)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("127.0.0.1:1", "ipv4:127.0.0.1:1"),
        ("[::1]:1", "ipv6:[::1]:1"),
        ("[fe80::1%eth0]:1", "ipv6:[fe80::1%25eth0]:1"),
        ("unix:1", "dns:///unix:1"),
        ("bücher.example:1", "dns:///xn--bcher-kva.example:1"),
    ],
)
def test_grpc_is_told_what_kind_of_address_it_is(text: str, wanted: str) -> None:
    assert target(parse_address(text)) == wanted


# --- where one listens

LISTENING = [
    ("0.0.0.0", "0.0.0.0:1"),
    ("::", "[::]:1"),
    ("[::1]", "[::1]:1"),
    ("::1:8970", "[::1:8970]:1"),  # a port is given apart, so this is an address
    ("localhost", "localhost:1"),
]
NOT_LISTENING = [
    ("*", "write 0.0.0.0"),
    ("", "the address is empty"),
    ("127.0.0.1:9000", "it has a port, which is given apart"),
    ("[::1]:9000", "it has a port, which is given apart"),
    ("http://kitchen", "leave out 'http://'"),
    ("224.0.0.1", "nobody can listen there"),
    ("fe80::1", "write fe80::1%eth0"),
    ("１２７.0.0.1", "write plain ones, such as '127.0.0.1'"),
]


@pytest.mark.parametrize(("text", "meaning"), LISTENING)
def test_a_host_to_listen_at(text: str, meaning: str) -> None:
    assert str(listening_address(text, 1)) == meaning


@pytest.mark.parametrize(("text", "says"), NOT_LISTENING)
def test_what_is_no_host_to_listen_at(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=refusal(says)):
        listening_address(text, 1)


class Bound:
    """Takes the place of a gRPC server; keeps its ports until it is closed."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def add_insecure_port(self, address: str) -> int:
        self.addresses.append(address)
        return 1


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which this process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_who_has_the_port_is_said(taken: int) -> None:
    with pytest.raises(TransportError, match=rf"127\.0\.0\.1:{taken}: process {os.getpid()} \(.+\) has the port; stop"):
        listening.listen(Bound(), "127.0.0.1", taken)


@pytest.mark.parametrize("errors", [RuntimeError, PermissionError], ids=lambda kind: kind.__name__)
def test_a_system_that_does_not_say_who_has_the_port(
    errors: type[Exception], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(kind: str) -> list[object]:
        raise errors("hidepid")

    monkeypatch.setattr("psutil.net_connections", refuse)
    with pytest.raises(TransportError, match="another program has the port"):
        listening.listen(Bound(), "127.0.0.1", taken)


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("no-such-host.invalid", "'no-such-host.invalid': this machine cannot resolve it"),
        ("192.0.2.1", "192.0.2.1 is not an address of this machine"),
        ("2001:db8::1", "cannot listen on [2001:db8::1]:9000: .*--host"),
        ("fe80::1%nosuchif0", "this machine cannot resolve it"),
    ],
)
def test_the_true_reason_is_said(host: str, says: str) -> None:
    with pytest.raises(TransportError, match=refusal(says)) as caught:
        listening.listen(Bound(), host, 9000)
    assert "has the port" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (13, r"ports below \d+ need privileges; choose another --port"),
        (1, "this machine's rules forbid it"),
        (97, "this machine has no IPv4"),
        (99, "is not an address of this machine"),
        (105, "No buffer space available; choose another"),
    ],
)
def test_what_the_system_answers_is_told(number: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: Address, port: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(listening, "_try_port", refuse)
    with pytest.raises(TransportError, match=rf"cannot listen on 127\.0\.0\.1:80: .*{says}"):
        listening.listen(Bound(), "127.0.0.1", 80)


def test_a_name_of_several_addresses_has_one_port_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first choice of the system is taken at the second address, and a third address is not here."""
    tries = iter([40001, OSError(98, "in use"), 40002, 40002, OSError(99, "absent")])
    asked: list[tuple[str, int]] = []

    def resolve(wanted: Address) -> list[Address]:
        return [Address("127.0.0.1", 0), Address("::1", 0), Address("2001:db8::1", 0)]

    def attempt(address: Address, port: int) -> int:
        asked.append((address.host, port))
        answer = next(tries)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(listening, "_resolved", resolve)
    monkeypatch.setattr(listening, "_try_port", attempt)
    server = Bound()
    assert str(listening.listen(server, "localhost", 0)) == "localhost:40002"
    assert server.addresses == ["127.0.0.1:40002", "[::1]:40002"]
    assert asked == [("127.0.0.1", 0), ("::1", 40001), ("127.0.0.1", 0), ("::1", 40002), ("2001:db8::1", 40002)]


@pytest.mark.parametrize(
    ("host", "reached_at"),
    [
        pytest.param("::1", ["[::1]"], marks=needs_ipv6),
        pytest.param("::", ["[::1]", "127.0.0.1", "localhost"], marks=needs_ipv6),
        ("0.0.0.0", ["127.0.0.1", "localhost"]),
        ("localhost", ["localhost", "127.0.0.1"]),
    ],
)
def test_a_coordinator_is_reached_where_it_listens(host: str, reached_at: list[str]) -> None:
    async def scene() -> None:
        server = grpc.aio.server()
        port = listening.listen(server, host, 0).port
        await server.start()
        for name in reached_at:
            async with open_channel(f"{name}:{port}", INSECURE) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/nobody/answers")(b"", timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, caught.value.details()
        await server.stop(None)

    asyncio.run(scene())


def test_names_are_looked_up_as_the_system_does_and_proxies_do_not_count() -> None:
    """In a process of its own: what decides it is read when grpc is loaded."""
    code = """
import asyncio, sys
import edge_client
import grpc
from fedepth_wire.channel import open_channel
from fedepth_wire.tls import INSECURE
async def ask(address):
    async with open_channel(address, INSECURE) as channel:
        try:
            await channel.unary_unary("/a/b")(b"", timeout=10)
        except grpc.aio.AioRpcError as error:
            print(error.details())
asyncio.run(ask("no-such-host.invalid"))
asyncio.run(ask("127.0.0.1:1"))
"""
    proxy = {
        "http_proxy": "http://192.0.2.1:1",
        "https_proxy": "http://192.0.2.1:1",
        "grpc_proxy": "http://192.0.2.1:1",
    }
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **proxy}, timeout=60)
    name, number = told.stdout.splitlines()
    assert "getaddrinfo" in name
    assert "127.0.0.1:1" in number
    assert "192.0.2.1" not in told.stdout
