"""A device gets its certificate, with the code of both sides, over a real enrolment port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fedepth_wire.tls import read_identity, write_identity
from fedepth_wire.tokens import Token, parse_token
from fedepth_wire.v1 import trust_pb2 as pb
from structlog.testing import capture_logs

from coordinator.security.authority import make_enrollment
from coordinator.security.enrolling import EnrollmentService, enrollment_credentials, enrollment_server
from coordinator.security.registry import Registry
from edge_client import enroll
from edge_client.certificate.client import bundle_of
from edge_client.certificate.keys import facts_of
from edge_client.enroll import enroll_with_bundle, enroll_with_token
from edge_client.identity import device_id
from fedepth.address import Address
from fedepth.errors import StateError, TransportError, TrustError
from tests.coordinator.security.conftest import DAY_S, DEVICE, Made


@contextmanager
def enrolling(made: Made) -> Iterator[Address]:
    """The enrolment server in a thread of its own, and where it listens."""
    ready, ports, stop = threading.Event(), [], asyncio.Event()

    async def serve() -> None:
        server = enrollment_server(made.certificates)
        ports.append(server.add_secure_port("127.0.0.1:0", enrollment_credentials(made.certificates.enrollment())))
        await server.start()
        loops.append(asyncio.get_running_loop())
        ready.set()
        await stop.wait()
        await server.stop(0)

    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield Address("127.0.0.1", ports[0])
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()


def token_for(made: Made, name: str = "kitchen", lifetime_s: float = 3600) -> Token:
    return made.certificates.make_token(name, lifetime_s)[0]


def test_a_device_makes_its_own_key_and_keeps_its_id(made: Made, tmp_path: Path) -> None:
    with enrolling(made) as address:
        state = tmp_path / "state"
        state.mkdir()
        before = device_id(state)
        facts = enroll_with_token(address, token_for(made), state)
        assert (facts.uri, facts.name) == (f"urn:fedepth:device:{before}", "kitchen")
        assert facts == facts_of(read_identity(bundle_of(state)))
        assert sorted(path.name for path in state.iterdir()) == ["device-id", "identity.pem"]
        (entry,) = [each for each in made.certificates.registry.entries() if each.how == "enrolled"]
        assert entry.issued.subject.id == before


def test_a_token_is_good_once(made: Made, tmp_path: Path) -> None:
    token = token_for(made)
    with enrolling(made) as address:
        enroll_with_token(address, token, tmp_path / "first")
        for state in ("first", "second"):  # another key of the same device, another device
            with pytest.raises(TrustError, match="the token for kitchen has been used; make another one"):
                enroll_with_token(address, token, tmp_path / state)
        assert not bundle_of(tmp_path / "second").exists()


def test_a_device_whose_answer_was_lost_tries_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator has recorded it, the device has not heard of it, and the token has expired since."""
    token, state = token_for(made), tmp_path / "state"
    with enrolling(made) as address:
        enroll = EnrollmentService.Enroll

        async def unheard(service: Any, request: Any, context: Any) -> Any:
            await enroll(service, request, context)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")

        with monkeypatch.context() as broken:
            broken.setattr(EnrollmentService, "Enroll", unheard)
            with enrolling(made) as breaking, pytest.raises(TransportError, match="again, with the same token"):
                enroll_with_token(breaking, token, state)
        assert not bundle_of(state).exists()
        made.time.now += DAY_S
        facts = enroll_with_token(address, token, state)
        (entry,) = [each for each in made.certificates.registry.entries() if each.how == "enrolled"]
        assert entry.issued.not_after == facts.not_after


def test_an_expired_token_is_refused(made: Made, tmp_path: Path) -> None:
    token = token_for(made, lifetime_s=60)
    made.time.now += 61
    with enrolling(made) as address, pytest.raises(TrustError, match="the token for kitchen has expired; make another"):
        enroll_with_token(address, token, tmp_path / "state")


def test_a_token_of_somebody_who_was_revoked_is_refused(made: Made, tmp_path: Path) -> None:
    token = token_for(made)
    made.certificates.registry.revoke("kitchen")
    with enrolling(made) as address, pytest.raises(TrustError, match="has expired"):
        enroll_with_token(address, token, tmp_path / "state")
    used = token_for(made)
    with enrolling(made) as address:
        enroll_with_token(address, used, tmp_path / "state")
        made.certificates.registry.revoke("kitchen")
        with pytest.raises(TrustError):
            enroll_with_token(address, used, tmp_path / "state")


def test_who_types_it_a_second_time_is_told_what_the_first_has_done(made: Made, tmp_path: Path) -> None:
    token = token_for(made)
    with enrolling(made) as address:
        enroll_with_token(address, token, tmp_path / "state")
        with pytest.raises(TrustError, match=r"has been used; .*\. This device has a certificate: it is kitchen un"):
            enroll_with_token(address, token, tmp_path / "state")


@pytest.mark.parametrize("file", ["authority.pem", "record.sqlite"])
def test_trouble_with_the_folder_is_not_the_fault_of_a_device_and_is_not_told_to_strangers(
    made: Made, tmp_path: Path, file: str
) -> None:
    token = token_for(made)
    path = made.certificates.folder / file
    with enrolling(made) as address, capture_logs() as logs:
        path.rename(tmp_path / file)
        with pytest.raises(TransportError, match="busy: no certificate can be made now") as caught:
            enroll_with_token(address, token, tmp_path / "state")
        assert file not in str(caught.value)
        assert file in next(line for line in logs if line["event"] == "enrolment refused")["reason"]
        (tmp_path / file).rename(path)
        assert enroll_with_token(address, token, tmp_path / "state").name == "kitchen"


def test_a_name_of_several_words_is_advised_as_one(made: Made, tmp_path: Path) -> None:
    token = token_for(made, "kitchen; left")
    with enrolling(made) as address:
        enroll_with_token(address, token, tmp_path / "first")
        with pytest.raises(TrustError, match=r"make another one: fedepth-coordinator enroll 'kitchen; left'$"):
            enroll_with_token(address, token, tmp_path / "second")
        other = token_for(made, "hall")
        with pytest.raises(TrustError, match="fedepth-coordinator certs revoke 'kitchen; left', then try again"):
            enroll_with_token(address, other, tmp_path / "first")


@pytest.mark.parametrize(("years", "said"), [(20, "is not valid yet: the clock of this machine"), (-20, "has expired")])
def test_a_clock_that_is_wrong_by_years_is_named(made: Made, tmp_path: Path, years: int, said: str) -> None:
    """Small boards have no battery. Here, the certificate is of another time than this machine's."""
    identity = make_enrollment(made.time.now + years * 365 * DAY_S)
    write_identity(made.certificates.folder / "enrollment.pem", identity)
    with enrolling(made) as address, pytest.raises(TransportError) as caught:
        enroll_with_token(address, token_for(made), tmp_path / "state")
    assert said in str(caught.value) and "Here it is 20" in str(caught.value)
    assert "try again, with the same token" in str(caught.value)


def test_who_listens_and_says_nothing_is_not_waited_for_for_ever(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_client.enroll.TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(
            TransportError, match=r"^127\.0\.0\.1:[0-9]+ does not answer within 0\.1 s; is it the enrolment"
        ):
            enroll_with_token(address, token_for(made), tmp_path / "state")


def test_a_guessed_token_is_refused(made: Made, tmp_path: Path) -> None:
    guessed = Token(bytes(16), token_for(made).server_digest)
    with enrolling(made) as address, pytest.raises(TrustError, match="this token is not known here"):
        enroll_with_token(address, guessed, tmp_path / "state")


def test_nothing_is_sent_to_a_server_that_the_token_does_not_name(
    made: Made, make: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[object] = []
    monkeypatch.setattr(Registry, "enroll", lambda self, *told: heard.append(told))
    token = token_for(make("others"))
    with enrolling(made) as address:
        with pytest.raises(TrustError, match="not the coordinator that made the token; nothing was sent to it"):
            enroll_with_token(address, token, tmp_path / "state")
        assert heard == []


def test_an_id_that_another_device_has_is_refused(made: Made, tmp_path: Path) -> None:
    made.device("kitchen", DEVICE)
    (tmp_path / "device-id").write_text(f"{DEVICE}\n")
    with enrolling(made) as address, pytest.raises(TrustError, match="is known as kitchen, and now asks to be hall"):
        enroll_with_token(address, token_for(made, "hall"), tmp_path)


def test_a_port_that_is_none_for_enrolment(made: Made, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"nobody answers at 127\.0\.0\.1:1 .*with the same token"):
        enroll_with_token(Address("127.0.0.1", 1), token_for(made), tmp_path / "state")


@pytest.mark.parametrize("field", ["secret", "request", "device_id"])
def test_a_request_out_of_bounds_is_refused(made: Made, field: str) -> None:
    fields = {"secret": bytes(16), "request": b"x", "device_id": DEVICE}
    fields[field] = fields[field] * 2000  # type: ignore[assignment]

    async def ask(address: Address) -> grpc.aio.AioRpcError:
        root = grpc.ssl_channel_credentials(made.certificates.enrollment().certificate)
        options = [("grpc.ssl_target_name_override", "enrollment.fedepth.internal")]
        async with grpc.aio.secure_channel(str(address), root, options) as channel:
            call = channel.unary_unary(
                "/fedepth_wire.v1.Enrollment/Enroll", request_serializer=pb.EnrollRequest.SerializeToString
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(pb.EnrollRequest(**fields))
            return caught.value

    with enrolling(made) as address:
        error = asyncio.run(ask(address))
    assert error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_the_record_holds_no_secret(made: Made) -> None:
    token = token_for(made)
    stored = (made.folder / "record.sqlite").read_bytes()
    assert token.secret not in stored and str(token).encode() not in stored
    assert "secret" not in repr(token)


@pytest.mark.parametrize("text", ["", "abc", "x" * 63, "é" * 64, "*" * 64])
def test_what_is_no_token_is_not_repeated(text: str) -> None:
    with pytest.raises(TrustError) as caught:
        parse_token(text)
    assert not text or text not in str(caught.value)


def test_a_token_survives_being_copied(made: Made) -> None:
    token = token_for(made)
    assert parse_token(f" {str(token)[:30]}\n {str(token)[30:]} ") == token


# --- bundles


def test_a_bundle_that_has_expired_replaces_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, state = tmp_path / "old.pem", tmp_path / "state"
    write_identity(old, made.device(days=30))
    monkeypatch.setattr(enroll, "time", made)  # whose time is the test's
    made.time.now += 40 * DAY_S
    with pytest.raises(TrustError, match=r"old\.pem is for kitchen until 20.*if the clock is right, have .* another"):
        enroll_with_bundle(old, state)
    assert not state.exists()


def test_a_bundle_brings_its_id_along(made: Made, tmp_path: Path) -> None:
    bundle, state = tmp_path / "kitchen.pem", tmp_path / "state"
    write_identity(bundle, made.device())
    bundle.chmod(0o755)  # as on a stick with FAT, where nothing else can be
    assert enroll_with_bundle(bundle, state).name == "kitchen"
    assert device_id(state) == DEVICE
    assert read_identity(bundle_of(state)) == read_identity(bundle, carried=True)
    enroll_with_bundle(bundle, state)  # again
    other = tmp_path / "other"
    other.mkdir()
    own = device_id(other)
    with pytest.raises(StateError, match=rf"is {own} already .*--id {own}"):
        enroll_with_bundle(bundle, other)
    for name, who in (("operator", "an operator"), ("coordinator", "a coordinator")):
        with pytest.raises(TrustError, match=rf"{name}\.pem is for {who}, not for a device"):
            enroll_with_bundle(made.folder / f"{name}.pem", tmp_path / "third")
