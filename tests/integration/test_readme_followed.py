"""The README followed from top to bottom by somebody who types what it says.

What is typed here is what stands there but for the rows of CHANGES. Every job file is written from its block, and every
command is typed once; one that the README gains, loses or changes fails here until it is. Sections come one after the
other, but for the second example, which is tried while the first still serves.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.lab import program
from fedepth.data.idx import write_idx
from fedepth.job import load_config, model_spec
from tests.field.command_pages import PROGRAMS
from tests.pages import README, blocks

TEXT = README.read_text(encoding="utf-8")
# As it stands in the README, and what is typed here. {port} is the one that the last coordinator chose.
CHANGES = (
    ("/usr/share/datasets/fashion-mnist", "fashion-mnist"),
    ("127.0.0.1:8970", "127.0.0.1:{port}"),
    ("fedepth-coordinator serve", "fedepth-coordinator serve --port 0 --port-file port"),
    ("127.0.0.1:8971 --token TOKEN", "{enrollment}"),
    ("rounds = 20", "rounds = 2"),
    ("batch = 128", "batch = 16"),
    ("rollback --state runs/fashion --round 3", "rollback --state runs/fashion --round 1"),
    # The same commands in less time.
    ("plan preresnet20 --budget 120MiB", "plan digits-cnn --budget 40MiB"),
    ("report preresnet20 --batch 32", "report digits-cnn --batch 8 --samples 8 --budget 8MiB"),
    ("--clients 100 --partition dirichlet:0.3 --tiers fair", "--clients 2 --workers 1"),
)
# Not typed here, because of what they need: a network, root, or minutes. tests/test_readme.py looks at the targets of
# make and the extras of pip, and test_demo_interrupted.py starts the demo.
NOT_TYPED = ("make", "pip", "apt")
IMAGES = 16  # of a device, and to test with
WAIT_S = 600.0


class Reader:
    """Somebody in a folder with a terminal for every program that keeps running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = ""
        self.enrollment = ""  # what the last enroll printed for a device to type, behind its program
        self.changed: set[str] = set()
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str) -> str:
        """What is typed here for a text of the README."""
        for there, instead in CHANGES:
            if there in text:
                self.changed.add(there)
                text = text.replace(
                    there, instead.replace("{port}", self.port).replace("{enrollment}", self.enrollment)
                )
        return text

    def argv(self, line: str) -> list[str]:
        name, *arguments = shlex.split(self.here(line), comments=True)
        assert name in PROGRAMS, line
        return [program(name), *arguments]

    def types(self, line: str) -> str:
        """A command that ends by itself, and well; what it prints."""
        line, _, into = line.partition(" > ")
        argv = self.argv(line)
        ended = subprocess.run(argv, cwd=self.folder, capture_output=True, text=True, timeout=WAIT_S, check=False)
        assert ended.returncode == 0, (argv, ended.stdout, ended.stderr)
        assert "Traceback" not in ended.stderr
        if into:
            (self.folder / into).write_text(ended.stdout, encoding="utf-8")
        return ended.stdout

    def starts(self, terminal: str, line: str) -> None:
        """A command that runs until it is stopped."""
        with open(self.folder / f"{terminal}.log", "wb") as log:
            self.running[terminal] = subprocess.Popen(
                self.argv(line), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def log(self, terminal: str) -> str:
        return (self.folder / f"{terminal}.log").read_text(encoding="utf-8")

    def waits(self, terminal: str, found: Callable[[], object]) -> None:
        """Until something is so, while the program of a terminal runs."""
        end = time.monotonic() + WAIT_S
        while not found():
            assert self.running[terminal].poll() is None and time.monotonic() < end, self.log(terminal)[-3000:]
            time.sleep(0.05)

    def reads(self, terminal: str, pattern: str) -> None:
        """Waits until a program has said something."""
        self.waits(terminal, lambda: re.search(pattern, self.log(terminal)))

    def serves(self, terminal: str, line: str) -> None:
        (self.folder / "port").unlink(missing_ok=True)
        self.starts(terminal, line)
        self.waits(terminal, (self.folder / "port").exists)
        self.port = (self.folder / "port").read_text().strip()

    def enrolls(self, here: str, there: str, *options: str) -> None:
        """Both commands that enrol a device."""
        self.enrollment = self.types(here).strip().splitlines()[-1].partition("fedepth-client enroll ")[2]
        assert "until" in self.types(" ".join((there, *options)))

    def stops(self, terminal: str, number: signal.Signals, status: int = 0) -> None:
        process = self.running.pop(terminal)
        process.send_signal(number)
        assert process.wait(WAIT_S) == status, self.log(terminal)[-3000:]
        assert "Traceback" not in self.log(terminal)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_STATE_HOME", "FEDEPTH_DATABASE", "FEDEPTH_FILES", "FEDEPTH_CERTS", "FEDEPTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    made = Reader(tmp_path)
    yield made
    for process in made.running.values():
        process.terminate()
    for process in made.running.values():
        process.wait(WAIT_S)


def write_fashion(folder: Path) -> None:
    """Four IDX files as Debian's package has them: ten classes of noise, each brighter than the one before."""
    draw = np.random.default_rng(1)
    folder.mkdir()
    for name in ("train", "t10k"):
        labels = np.arange(IMAGES, dtype=np.uint8) % 10
        images = draw.integers(0, 20, (IMAGES, 28, 28), np.uint8) + 20 * labels[:, None, None]
        write_idx(folder / f"{name}-images-idx3-ubyte", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels)


def write_class_folders(folder: Path, classes: Sequence[str]) -> None:
    """DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg."""
    draw = np.random.default_rng(2)
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                image = Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8))
                image.save(folder / split / name / f"{number}.jpg")


def write_photos(folder: Path) -> None:
    folder.mkdir()
    Image.new("L", (40, 30), 200).save(folder / "light.jpg")
    Image.new("RGB", (28, 28), (9, 9, 9)).save(folder / "dark.png")


def with_sections(job: str, sections: str) -> str:
    """A job file in which some sections are others."""
    parts = {part.partition("\n")[0]: part for part in re.split(r"(?m)^(?=\[)", job) if part.strip()}
    others = {part.partition("\n")[0]: part for part in re.split(r"(?m)^(?=\[)", sections) if part.strip()}
    return "\n".join({**parts, **others}.values())


def said(pattern: str) -> str:
    """Something that stands in a sentence of the README."""
    found = re.search(pattern, TEXT)
    assert found, pattern
    return found[1]


def test_the_readme_works_as_it_says(reader: Reader, calibration_told: Path) -> None:
    console = [block.text.splitlines() for block in blocks(README) if block.kind == "console"]
    ours = [[line for line in lines if line.split()[0] not in NOT_TYPED] for lines in console]
    (init,), fashion, cifar, inspect, deploy, plan, report, simulation = (lines for lines in ours if lines)
    # Rows of files have a federation of their own (test_rows.py); that their block loads, tests/test_readme.py sees.
    fashion_job, cifar_sections, _ = (block.text for block in blocks(README) if block.kind == "toml")

    # Fashion-MNIST: a coordinator, a device, and a second one with a state directory of its own.
    write_fashion(reader.folder / "fashion-mnist")
    job = reader.folder / said(r"`(fashion\.toml)`:")
    job.write_text(reader.here(fashion_job), encoding="utf-8")
    classes = model_spec(load_config(job)).classes
    serve, enroll, enroll_here, run = fashion
    assert "certificates: made" in reader.types(init)
    reader.serves("coordinator", serve)
    port = reader.port
    reader.enrolls(enroll, enroll_here)
    reader.starts("device", run)
    own = said(r"its own state directory: `(--state [^ `]+)`")
    reader.enrolls(enroll.replace("kitchen", "hall"), enroll_here, own)
    reader.starts("device-2", f"{run} {own}")

    # Inspecting a run, while it runs.
    probe, status, watch, record, export, backup, rollback = inspect
    assert "Memory of this device" in reader.types(probe)
    reader.starts("watch", watch)
    reader.reads("coordinator", r"round 2 is exported to .*\.onnx")
    reader.reads("watch", "finished")
    assert re.search(r"fashion: round 2 of 2, finished.*\naccuracy \d+\.\d\d%, .*\.onnx", reader.types(status))

    # CIFAR-10 in class folders, with its own coordinator.
    serve, run = cifar
    job = reader.folder / "cifar.toml"
    job.write_text(reader.here(with_sections(fashion_job, cifar_sections)), encoding="utf-8")
    (reader.folder / "cifar10").mkdir()
    write_class_folders(reader.folder / "cifar10", model_spec(load_config(job)).classes)
    reader.serves("other-coordinator", serve)
    # The device of before is still running, and an agent has its state directory for itself.
    reader.enrolls(enroll.replace("kitchen", "attic"), enroll_here, "--state runs/other-device")
    reader.starts("other-device", f"{run} --state runs/other-device")
    reader.reads("other-coordinator", r"round 1: accuracy \d+\.\d\d%")
    reader.stops("other-device", signal.SIGINT)
    reader.stops("other-coordinator", signal.SIGTERM)
    reader.port = port

    # What it leaves behind.
    shown = reader.types(record)
    assert re.search("round.*devices.*samples.*accuracy", shown) and "predicted" in shown and "measured" in shown
    assert "largest difference" in reader.types(export)
    assert "job fashion after round 2" in reader.types(backup)
    reader.stops("device", signal.SIGTERM)
    reader.stops("device-2", signal.SIGINT)
    reader.stops("coordinator", signal.SIGINT)
    assert reader.running.pop("watch").wait(WAIT_S) == 0  # it ends with its coordinator
    assert "round 1 is the last one again" in reader.types(rollback)

    # Deploying the model.
    write_photos(reader.folder / "photos")
    again, infer = deploy
    assert "largest difference" in reader.types(again)
    assert tuple((reader.folder / "labels.txt").read_text().split()) == classes
    shown = reader.types(infer)
    assert "light.jpg" in shown and "dark.png" in shown
    assert sum(shown.count(name) for name in classes) >= 6  # of each photo three, with "shirt" in "t-shirt"

    # What fits into a budget? With the device's own figures, for which the fixture has typed the command.
    shutil.copy(calibration_told, reader.folder / said(r"`fedepth-client calibrate --json > (device\.json)`"))
    own = said(r"pass `(--calibration device\.json)` here")
    (line,) = plan
    assert "digits-cnn, batch 128, sgd, policy paper, budget 40.0 MiB" in reader.types(f"{line} {own}")
    assert (reader.folder / "plan.png").stat().st_size > 0

    # What can this device train?
    (line,) = report
    shown = reader.types(line)
    assert all(word in shown for word in ("predicted", "rehearsed", "measured", "8.0"))
    assert (reader.folder / "report.png").stat().st_size > 0
    assert json.loads(calibration_told.read_text())["calibration"]["allocator"] in ("glibc", "tcmalloc")

    # A hundred clients on one machine, or two.
    simulate, compare = simulation
    assert re.search(r"accuracy \d+\.\d\d% after round 2", reader.types(simulate))
    assert re.search(r"fashion +1 +2 ", reader.types(compare))

    assert {there for there, _ in CHANGES} == reader.changed
    # Of the first device, and the certificates.
    kept = sorted(path.name for path in reader.folder.glob("home/.local/state/*"))
    assert kept == ["fedepth-client", "fedepth-coordinator"]
