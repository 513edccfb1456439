"""The README: its commands are those that are tested, its job files load, and what it shows of a program's output is
what the program prints. The commands that need a federation are run in tests/integration/test_readme_followed.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coordinator.store.records import RoundRecord, Store
from fedepth.errors import FedepthError
from fedepth.job import load_config, model_spec
from fedepth.job_changes import settings_of
from tests.field.command_pages import PROGRAMS
from tests.pages import README, ROOT, blocks, commands_of

TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks(README)
COMMANDS = commands_of(README)
JOBS = [block.text for block in BLOCKS if block.kind == "toml"]


def run(command: str, **environment: str) -> Any:
    program, *arguments = shlex.split(command)
    return CliRunner().invoke(PROGRAMS[program], arguments, env={"COLUMNS": "200", **environment}, prog_name=program)


def test_every_program_is_shown_and_every_block_is_of_a_known_kind() -> None:
    assert {command.program for command in COMMANDS} == {*PROGRAMS, "make", "pip", "apt"}
    assert {block.kind for block in BLOCKS} == {"console", "toml", "text"}


def test_pip_is_told_extras_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"\.\[([\w,]+)\]'", TEXT))
    assert extras
    for extra in {name for each in extras for name in each.split(",")}:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for command in COMMANDS if command.program == "make" for target in command.arguments}
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def job(section: int, folder: Path) -> Path:
    """A job file of the README, with data that is here."""
    here = "job.toml" if "[text]" in JOBS[section] else "digits"  # of rows only whether the file is there is looked at
    (folder / "job.toml").touch()
    text = re.sub(r'^data = ".*"$', f'data = "{here}"', JOBS[section], flags=re.MULTILINE)
    if "[job]" not in text:  # the second example shows only what differs
        text += '[job]\nname = "x"\n'
    (folder / "fashion.toml").write_text(text, encoding="utf-8")
    return folder / "fashion.toml"


@pytest.mark.parametrize("section", range(len(JOBS)))
def test_the_job_files_are_valid(section: int, tmp_path: Path) -> None:
    expected = "text-transformer" if "[text]" in JOBS[section] else "preresnet20"
    assert load_config(job(section, tmp_path)).model.name == expected


def test_a_run_is_inspected_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The block of "Inspecting a run" after four rounds, but for what needs a running coordinator or the model."""
    monkeypatch.chdir(tmp_path)
    config = load_config(job(0, tmp_path))
    store = Store.open(Path("runs/fashion"), config.job.name, model_spec(config), settings=settings_of(config))
    for number in range(5):
        partial = store.directory / "weights" / "new.partial"
        partial.write_bytes(b"weights %d" % number)
        sealed = store.seal_weights(partial, number)
        store.record_round(RoundRecord(number, sealed.digest, sealed.size_bytes, 0.0, 2, 20, accuracy=number / 8))
    store.close()
    block = next(each.text for each in BLOCKS if each.kind == "console" and "fedepth-client probe" in each.text)
    shown: dict[str, Callable[[str], bool]] = {
        "probe": lambda text: "Memory of this device" in text,
        "record": lambda text: "fashion" in text and "50.00%" in text,
        "backup": lambda text: "job fashion after round 4" in text,
        "rollback": lambda text: "round 3 is the last one again" in text,
    }
    skipped = {"status", "watch", "export"}
    for command in block.splitlines():
        name = command.split()[1]
        if name in skipped:
            continue
        told = run(command)
        assert not isinstance(told.exception, FedepthError), (command, told.exception)
        assert (told.exit_code, shown.pop(name)(told.stdout)) == (0, True), (command, told.stdout)
    assert shown == {}


def test_the_plan_that_is_shown_is_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (place,) = (index for index, block in enumerate(BLOCKS) if block.text.startswith("fedepth plan "))
    told = run(BLOCKS[place].text.strip()).stdout
    printed = [line.rstrip() for line in told.splitlines()]
    for line in BLOCKS[place + 1].text.splitlines():
        if line.strip(" …─"):  # what is left out, and the line of the table's width
            assert any(each.startswith(line.rstrip("… ")) for each in printed), line
    assert (tmp_path / "plan.png").stat().st_size > 0
