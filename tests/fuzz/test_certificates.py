"""What others hand over to prove who they are: whatever it is, it ends in an error of ours or in an identity."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from fedepth_wire.tls import Identity, Role, caller_of, parse_uri, read_identity, uri_of
from fedepth_wire.tokens import Token, parse_token
from hypothesis import given
from hypothesis import strategies as st

from coordinator.security.authority import Subject, key_pem, make_authority, new_key, read_authority, requested_key
from edge_client.certificate.keys import certificate_request, facts_of
from fedepth.errors import TrustError
from tests.fuzz.damage import damaged, fuzzing

NOW = 1_800_000_000.0
DEVICE = "11111111-1111-4111-8111-111111111111"
AUTHORITY = make_authority(NOW)
KEY = new_key()
ISSUED = AUTHORITY.issue(Subject(Role.DEVICE, DEVICE, "kitchen"), KEY.public_key(), 30, NOW)
IDENTITY = Identity(key_pem(KEY), ISSUED.certificate, AUTHORITY.pem)
REQUEST = certificate_request(KEY)


@fuzzing(200)
@given(st.text(max_size=200))
def test_any_text_is_a_token_or_none(text: str) -> None:
    with contextlib.suppress(TrustError):
        assert parse_token(text) == parse_token(str(parse_token(text)))


@fuzzing(200)
@given(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))
def test_a_token_says_what_it_was_made_of(secret: bytes, digest: bytes) -> None:
    assert parse_token(str(Token(secret, digest))) == Token(secret, digest)


@fuzzing(200)
@given(damaged(REQUEST) | st.binary(max_size=300))
def test_any_bytes_are_a_request_or_none(data: bytes) -> None:
    with contextlib.suppress(TrustError):
        assert requested_key(data).curve.name == "secp256r1"


@fuzzing(200)
@given(st.sampled_from(("key", "certificate", "authority")), st.data())
def test_a_damaged_bundle_is_never_taken_for_another_device(part: str, data: st.DataObject) -> None:
    whole: Any = getattr(IDENTITY, part)
    identity = Identity(**{**vars(IDENTITY), part: data.draw(damaged(whole))})
    with contextlib.suppress(TrustError):
        assert facts_of(identity) == facts_of(IDENTITY)


@fuzzing(200)
@given(damaged(IDENTITY.key + IDENTITY.certificate + IDENTITY.authority))
def test_any_bytes_are_a_bundle_or_none(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bundle.pem"
    path.touch(0o600)
    path.write_bytes(data)
    with contextlib.suppress(TrustError):
        read_identity(path)
    with contextlib.suppress(TrustError):
        read_authority(path)


@fuzzing(200)
@given(
    st.dictionaries(
        st.sampled_from(("peer_uri", "x509_common_name", "x509_pem_cert")),
        st.lists(st.binary(max_size=60) | st.sampled_from((ISSUED.certificate, uri_of(Role.DEVICE, DEVICE).encode()))),
    )
)
def test_whatever_a_connection_says_names_one_caller_or_none(properties: dict[str, list[bytes]]) -> None:
    with contextlib.suppress(TrustError):
        caller = caller_of(properties)
        assert caller is None or parse_uri(uri_of(caller.role, caller.id)) == (caller.role, caller.id)


def test_the_samples_are_what_they_should_be() -> None:
    assert facts_of(IDENTITY).name == "kitchen"
    assert requested_key(REQUEST) == KEY.public_key()
    with pytest.raises(TrustError):
        requested_key(b"")
