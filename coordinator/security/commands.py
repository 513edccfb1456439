"""The commands that make certificates: `fedepth-coordinator certs …` and `fedepth-coordinator enroll`."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from fedepth_wire.tls import INSECURE, Identity, Insecure, Role, read_identity, write_identity
from rich.table import Table
from rich.text import Text

from coordinator.security.certificates import DEVICE_DAYS, MOST_DAYS, TOKEN_S, Certificates, default_folder
from coordinator.security.reach import reachable
from coordinator.security.registry import Entry
from fedepth.commands import JsonOption, command_group, examples
from fedepth.errors import ConfigError
from fedepth.files import disk_errors, not_writable
from fedepth.printable import as_typed, printable
from fedepth.terminal import console, print_json

CERTS = typer.Option(
    "--certs",
    envvar="FEDEPTH_CERTS",
    show_default=False,
    help="Folder of the certificates; default: one for all jobs of this user, in ~/.local/state.",
)
CertsOption = Annotated[Path | None, CERTS]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Plain text, without certificates: for tests on one machine.")
]
DeviceArgument = Annotated[str, typer.Argument(help="Name of the device, for people.")]

app = command_group("Make, revoke and list the certificates of devices, operators and the coordinator.")


def certificates_in(folder: Path | None) -> Certificates:
    """Those in --certs, or the user's own; not opened."""
    return Certificates(folder if folder is not None else default_folder())


def opened(folder: Path | None) -> Certificates:
    """The same, which must be there."""
    found = certificates_in(folder)
    found.check()
    return found


def operator(certs: Path | None, insecure: bool) -> Identity | Insecure:
    """Who an operator's command is: the operator of the folder, or of the bundle, that --certs names.

    Raises:
        TrustError: there is none, or it cannot be used.
    """
    if insecure:
        return INSECURE
    if certs is not None and certs.is_file():
        return read_identity(certs)
    return opened(certs).operator()


@app.command("init", epilog=examples("fedepth-coordinator certs init"))
def init_command(certs: CertsOption = None, as_json: JsonOption = False) -> None:
    """Make an authority of your own, once, with certificates for the coordinator and for you as its operator.

    Nothing that is there already is replaced.
    """
    found = certificates_in(certs)
    made = found.init()
    if as_json:
        print_json({"folder": str(found.folder), "made": made})
        return
    shown = printable(str(found.folder))
    print(f"{shown}: {'made' if made else 'nothing to do, all is there'}")
    if made:
        print("keep a copy of this folder where nobody else can read it: authority.pem can make anybody a device")
        print("next, for each device: fedepth-coordinator enroll DEVICE")


@app.command(
    "issue",
    epilog=examples(
        "fedepth-coordinator certs issue kitchen --output kitchen.pem",
        "fedepth-coordinator certs issue ann --operator --days 90 --output ann.pem",
    ),
)
def issue_command(
    name: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device, or of the operator.")],
    is_operator: Annotated[
        bool, typer.Option("--operator", help="For somebody who runs status and watch, and not for a device.")
    ] = False,
    days: Annotated[int, typer.Option(min=1, max=MOST_DAYS, help="How long it is valid.")] = DEVICE_DAYS,
    output: Annotated[
        Path | None, typer.Option(show_default=False, help="The bundle to write; default: DEVICE.pem in this folder.")
    ] = None,
    device_id: Annotated[
        str, typer.Option("--id", show_default=False, help="UUID in device-id of a device that has been in use.")
    ] = "",
    certs: CertsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make key and certificate of a device in one file, for you to take there. See also enroll.

    The file is all that it takes to be this device: whoever can read it can be.
    """
    if is_operator and device_id:
        raise ConfigError("--id is for a device, and an operator has none; leave it out")
    found = opened(certs)
    path = output or Path(f"{name}.pem")
    why = not_writable(path) or (f"{printable(str(path))} is there already" if path.exists() else "")
    if why:
        raise ConfigError(f"--output: {why}")
    identity = found.issue(Role.OPERATOR if is_operator else Role.DEVICE, name, days, device_id)
    with disk_errors("the bundle cannot be written", path.absolute().parent):
        write_identity(path, identity)
    if as_json:
        print_json({"name": name, "role": "operator" if is_operator else "device", "bundle": str(path)})
        return
    print(f"{printable(str(path))}: key and certificate of {printable(name)}, valid for {days} days")
    if is_operator:
        print(f"to use it: fedepth-coordinator status --coordinator HOST:PORT --certs {as_typed(str(path))}")
    else:
        print(f"take it to the device, and there: fedepth-client enroll --bundle {as_typed(path.name)}")


@app.command("revoke", epilog=examples("fedepth-coordinator certs revoke kitchen"))
def revoke_command(
    name: Annotated[str, typer.Argument(metavar="DEVICE", help="Name or id of the device, or of the operator.")],
    certs: CertsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke all certificates and unused tokens of a device. Running coordinators end its calls within seconds."""
    ended = opened(certs).registry.revoke(name)
    if as_json:
        print_json({"name": name, "revoked": len(ended)})
        return
    again = f"certs issue {as_typed(name)} --operator" if _are_operators(ended) else f"enroll {as_typed(name)}"
    print(
        f"{printable(name)}: valid certificates that were revoked: {len(ended)}; to let it in again: "
        f"fedepth-coordinator {again}"
    )


@app.command("list", epilog=examples("fedepth-coordinator certs list --json"))
def list_command(certs: CertsOption = None, as_json: JsonOption = False) -> None:
    """Show who has a certificate, until when, and what was revoked."""
    now = time.time()
    entries = opened(certs).registry.entries()
    if as_json:
        print_json([_fields(entry, now) for entry in entries])
        return
    table = Table("name", "role", "id", "how", "valid until", "state")
    for entry in entries:
        subject = entry.issued.subject
        until = _day(entry.issued.not_after)
        shown = (subject.name, subject.role.value, subject.id, entry.how, until, entry.state(now))
        table.add_row(*(Text(printable(text)) for text in shown))
    console().print(table)


def enroll_command(
    name: DeviceArgument,
    hours: Annotated[float, typer.Option(min=0.1, max=24 * 365, help="How long the token can be used.")] = TOKEN_S
    / 3600,
    address: Annotated[
        str,
        typer.Option(
            show_default=False,
            help="HOST:PORT of the enrolment port, as the device reaches it; default: where a coordinator last served.",
        ),
    ] = "",
    certs: CertsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a one-time token for a device, and the command with which it makes its key and gets its certificate.

    The device needs a running coordinator for it. Whoever has the token first can be this device.
    """
    found = opened(certs)
    where = reachable(address or found.enrollment_address())  # a token that nobody is told would be out there
    token, expires = found.make_token(name, hours * 3600)
    command = f"fedepth-client enroll {where} --token {token}"
    if as_json:
        print_json({"name": name, "token": str(token), "expires_at": expires, "command": command})
        return
    print(f"on the device, once, before {_time(expires)}:\n{command}")


def _are_operators(entries: list[Entry]) -> bool:
    return bool(entries) and all(entry.issued.subject.role is Role.OPERATOR for entry in entries)


def _fields(entry: Entry, now: float) -> dict[str, Any]:
    issued = entry.issued
    return {
        "name": issued.subject.name,
        "role": issued.subject.role.value,
        "id": issued.subject.id,
        "how": entry.how,
        "state": entry.state(now),
        "issued_at": entry.issued_at,
        "not_before": issued.not_before,
        "not_after": issued.not_after,
        "revoked_at": entry.revoked_at,
        "fingerprint": issued.fingerprint,
    }


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
