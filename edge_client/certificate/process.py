"""What runs in a certificate child: `python -m edge_client.certificate.process`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
from fedepth_wire.tls import read_identity

from edge_client.certificate.keys import certificate_request, facts_of, install, pending_key, renewal_key
from edge_client.certificate.protocol import Command, Event, Failed, Inspect, Install, Request
from fedepth.child import run_child
from fedepth.errors import FedepthError, ProtocolError


def main() -> None:
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        bundle: Path | None = None
        for line in sys.stdin.buffer:
            command: Command = msgspec.json.decode(line, type=Command)
            if isinstance(command, Inspect):
                bundle = Path(command.bundle)
            answers.write(msgspec.json.encode(answer(command, bundle)) + b"\n")
            answers.flush()


def answer(command: Command, bundle: Path | None) -> Event:
    """Carries out one command."""
    try:
        if bundle is None:
            raise ProtocolError("no bundle was named yet")
        pending = renewal_key(bundle)
        if isinstance(command, Inspect):
            return facts_of(read_identity(bundle))
        if isinstance(command, Install):
            return install(bundle, pending, command.certificate, read_identity(bundle).authority, command.now)
        return Request(certificate_request(pending_key(pending)))
    except FedepthError as error:
        return Failed(str(error))


if __name__ == "__main__":
    run_child(main)
