"""Enrolment tokens, as an operator hands them to a device: a secret, and which server to tell it to.

base64url, 64 characters: 16 bytes of secret, 32 bytes of sha256 of the enrolment server's certificate
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass, field

from fedepth.errors import TrustError

SECRET_BYTES = 16
_DIGEST_BYTES = 32
_LENGTH = (SECRET_BYTES + _DIGEST_BYTES) * 4 // 3


@dataclass(frozen=True)
class Token:
    """What a token says.

    Attributes:
        secret: SECRET_BYTES that nobody can guess.
        server_digest: sha256 of the enrolment server's certificate in DER.
    """

    secret: bytes = field(repr=False)
    server_digest: bytes

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(self.secret + self.server_digest).decode("ascii")

    def is_for(self, certificate: bytes) -> bool:
        """Whether a server's certificate (DER) is the one that may hear the secret."""
        return hmac.compare_digest(hashlib.sha256(certificate).digest(), self.server_digest)


def parse_token(text: str) -> Token:
    """A token as it was copied.

    Raises:
        TrustError: it is not one, or not all of one. Does not repeat it: it may be most of a secret.
    """
    text = "".join(text.split())
    if len(text) != _LENGTH:
        raise TrustError(
            f"the token has {len(text)} characters instead of {_LENGTH}; copy all of what fedepth-coordinator enroll "
            "said"
        )
    try:
        data = base64.b64decode(text, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise TrustError(
            "the token holds characters that no token has; copy what fedepth-coordinator enroll said"
        ) from None
    return Token(data[:SECRET_BYTES], data[SECRET_BYTES:])
