"""Certificates of real programs: revoked and renewed while they work, missing, and of the wrong role."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from fedepth_wire.tls import Role, read_identity, write_identity

from benchmarks.lab import LabDevice, program
from coordinator.security.certificates import Certificates
from edge_client.certificate.client import bundle_of
from edge_client.enroll import enroll_with_bundle

QUICK = "[retry]\nfirst_s = 0.2\nlongest_s = 1\n"


def command(rig: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [program("fedepth-coordinator"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def certificates(rig: Any) -> Certificates:
    return Certificates(rig.lab.certificates.folder)


def start_agent(rig: Any, name: str, *options: str) -> None:
    rig.calibrate()
    config = rig.folder / f"{name}.toml"
    config.write_text(QUICK)
    rig.lab.start_agent(LabDevice(name, rig.shard(0), 0), "--threads", "1", "--config", str(config), *options)


def test_a_revoked_device_is_told_at_once_and_goes_on_once_it_is_enrolled_again(rig: Any) -> None:
    """While its agent waits for work, and without starting that again."""
    rig.start_coordinator(rig.job(devices=2, quorum=2))
    start_agent(rig, "kitchen")
    rig.event("coordinator", "device_seen", device="kitchen")
    rig.wait("coordinator", lambda line: "waiting for 1 more of 2" in line.get("message", ""))
    certs = ("--certs", str(rig.lab.certificates.folder))
    told = command(rig, "certs", "revoke", "kitchen", *certs, "--json")
    assert json.loads(told.stdout) == {"name": "kitchen", "revoked": 1}
    said = rig.wait("kitchen", lambda line: "do not accept each other's certificates" in line["event"], 20)
    assert "the certificate of kitchen was revoked; for a new one: fedepth-coordinator enroll kitchen" in said["error"]

    told = command(rig, "enroll", "kitchen", *certs)
    line = told.stdout.splitlines()[-1].split()
    state = rig.folder / "kitchen"
    before = (state / "device-id").read_text()
    enrolled = subprocess.run(
        [program(line[0]), *line[1:], "--state", str(state)], capture_output=True, text=True, timeout=120
    )
    assert enrolled.returncode == 0, enrolled.stderr
    assert enrolled.stdout.startswith("this device is kitchen until ")
    assert (state / "device-id").read_text() == before
    rig.event("kitchen", "coordinator is back", 100)


def test_a_certificate_is_renewed_while_its_device_works(rig: Any) -> None:
    rig.start_coordinator(rig.job(devices=1, quorum=1), "--exit-when-done")
    state, bundle = rig.folder / "kitchen", rig.folder / "kitchen.pem"
    write_identity(bundle, certificates(rig).issue(Role.DEVICE, "kitchen", 0.4))  # of a day and 0.4, most is over
    enroll_with_bundle(bundle, state)
    start_agent(rig, "kitchen", "--exit-when-done")
    rig.event("coordinator", "certificate renewed", device="kitchen")
    rig.event("coordinator", "update_accepted", device="kitchen")
    assert rig.end("kitchen") == 0
    assert rig.end("coordinator") == 0
    assert read_identity(bundle_of(state)).key != read_identity(bundle).key
    assert rig.event("kitchen", "certificate renewed")["name"] == "kitchen"


def test_who_may_not_is_told_in_a_sentence(rig: Any, tmp_path: Path) -> None:
    address = rig.start_coordinator(rig.job())
    lab = rig.lab.certificates
    device = tmp_path / "device.pem"
    write_identity(device, lab.device("kitchen")[1])
    others = tmp_path / "others"
    assert command(rig, "certs", "init", "--certs", str(others)).returncode == 0
    asked = ("status", "--coordinator", address)
    told = command(rig, *asked, "--certs", str(lab.folder))
    assert (told.returncode, told.stderr) == (0, "")
    for options, said in (
        (("--certs", str(device)), "JobStatus is for operators, and kitchen is a device"),
        (("--certs", str(others)), "who answers is not the coordinator that this side's certificate is for"),
        (("--certs", str(tmp_path / "none")), "make them once: fedepth-coordinator certs init"),
        (("--insecure",), "leave out --insecure"),
    ):
        told = command(rig, *asked, *options)
        assert (told.returncode, told.stdout) == (1, ""), options
        assert said in told.stderr and told.stderr.count("\n") == 1, told.stderr
    assert "ssl_transport" not in rig.lab.log("coordinator").read_text()  # gRPC's own lines for every stranger


def test_plain_text_is_for_those_who_ask_for_it_on_both_sides(rig: Any) -> None:
    """A round without certificates; and an agent with one says what is wrong."""
    job = rig.job(devices=1, quorum=1)
    rig.start_coordinator(job, "--insecure", "--exit-when-done")
    start_agent(rig, "hall")
    said = rig.wait("hall", lambda line: "do not accept each other's certificates" in line["event"])
    assert "it speaks plain text, and this side wants TLS" in said["error"]
    start_agent(rig, "kitchen", "--insecure", "--exit-when-done")
    rig.event("coordinator", "update_accepted", device="kitchen")
    assert rig.end("kitchen") == 0
