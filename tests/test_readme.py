"""The README from top to bottom: its commands exist and are run as far as a test can, its job files load, and what it
shows of a program's output is what the program prints."""

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
from tests.field.command_pages import PROGRAMS, commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip() for kind, block in BLOCKS if kind == "console" for line in block.splitlines() if line
]
OURS = [command for command in COMMANDS if command.split()[0] in PROGRAMS]
JOBS = [block for kind, block in BLOCKS if kind == "toml"]
ELSEWHERE = re.compile(r"(?<![\w.-])(fedepth(?:-client|-coordinator)? [a-z]+(?: [^`\n]*)?)`")  # in a sentence


def run(command: str, **environment: str) -> Any:
    program, *arguments = shlex.split(command)
    return CliRunner().invoke(PROGRAMS[program], arguments, env={"COLUMNS": "200", **environment}, prog_name=program)


@pytest.mark.parametrize("command", OURS)
def test_a_program_has_the_subcommand_and_its_options(command: str) -> None:
    check(command)


def test_so_has_what_stands_in_sentences_and_in_the_other_pages() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {command for page in pages for command in ELSEWHERE.findall(page.read_text(encoding="utf-8"))}
    assert len(found) > 5
    for command in found:
        check(command)


def check(command: str) -> None:
    program, name, *rest = command.split()
    known = commands(program)
    assert name in known, command
    options = {option for each in known[name].params for option in each.opts}
    assert {word for word in rest if word.startswith("--")} <= options | {"--help"}, command
    assert run(f"{program} {name} --help").exit_code == 0


def test_every_program_is_shown_and_every_block_is_of_a_known_kind() -> None:
    assert {command.split()[0] for command in OURS} == set(PROGRAMS)
    assert {command.split()[0] for command in COMMANDS} - set(PROGRAMS) == {"make", "pip", "apt"}
    assert {kind for kind, _ in BLOCKS} == {"console", "toml", "text"}


def test_pip_is_told_extras_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"\.\[([\w,]+)\]'", README))
    assert extras
    for extra in {name for each in extras for name in each.split(",")}:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
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
    block = next(block for kind, block in BLOCKS if kind == "console" and "fedepth-client probe" in block)
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
    places = [index for index, (_, block) in enumerate(BLOCKS) if block.startswith("fedepth plan ")]
    (place,) = places
    told = run(BLOCKS[place][1].strip()).stdout
    printed = [line.rstrip() for line in told.splitlines()]
    for line in BLOCKS[place + 1][1].splitlines():
        if line.strip(" …─"):  # what is left out, and the line of the table's width
            assert any(each.startswith(line.rstrip("… ")) for each in printed), line
    assert (tmp_path / "plan.png").stat().st_size > 0
