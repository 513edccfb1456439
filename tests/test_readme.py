"""The README's commands exist, with the options that it shows; its job files load."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fedepth.job import load_config

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip() for kind, block in BLOCKS if kind == "console" for line in block.splitlines() if line
]
JOBS = [block for kind, block in BLOCKS if kind == "toml"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("fedepth")])
def test_a_program_has_the_subcommand_and_its_options(command: str) -> None:
    program, subcommand, *rest = command.split()
    path = Path(sysconfig.get_path("scripts")) / program
    shown = subprocess.run(
        [path, subcommand, "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={"COLUMNS": "200", "NO_COLOR": "1", "PATH": ""},
    ).stdout
    for option in (word for word in rest if word.startswith("--")):
        assert option in shown, f"{program} {subcommand} has no {option}"


def test_make_has_the_targets() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("section", range(len(JOBS)))
def test_the_job_files_are_valid(section: int, tmp_path: Path) -> None:
    text = re.sub(r'^data = ".*"$', 'data = "digits"', JOBS[section], flags=re.MULTILINE)  # theirs may not be here
    if "[job]" not in text:  # the second example shows only what differs
        text += '[job]\nname = "x"\n'
    (tmp_path / "job.toml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "job.toml").model.name == "preresnet20"
