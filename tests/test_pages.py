"""Every command and every setting that README.md and docs/*.md show is one that the programs take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedepth.job import read_job
from tests.field.command_pages import PROGRAMS, commands
from tests.pages import PAGES, ROOT, Block, Typed, blocks, commands_of, parse

NOT_OURS = {"make", "pip", "apt"}
TYPED = [(page, command) for page in PAGES for command in commands_of(page) if command.program not in NOT_OURS]
SETTINGS = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(each for each in blocks(page) if each.kind == "toml")
    if page.name != "README.md"  # whose job files are whole
]
JOB = """
[job]
name = "x"
rounds = 20
devices_per_round = 10

[model]
name = "digits-cnn"
classes = 10
input_shape = [1, 32, 32]
mean = [0.3]
std = [0.35]

[training]
batch = 32
learning_rate = 0.05

[test]
data = "test"

"""
# In a sentence, where an option may stand without its value.
IN_WORDS = re.compile(r"(?<![\w.-])(fedepth(?:-client|-coordinator)? [a-z]+(?: [^`\n]*)?)`")


@pytest.mark.parametrize(
    "command", [command for _, command in TYPED], ids=[f"{page.name}: {command.line}" for page, command in TYPED]
)
def test_a_command_can_be_typed_as_it_stands(command: Typed) -> None:
    assert parse(command)


def test_what_is_wrong_in_a_command_is_found() -> None:
    for line in ("plan preresnet20", "plan preresnet20 --budget 1MiB --no-such"):
        with pytest.raises(Exception, match=r"[Mm]issing|[Nn]o such option"):
            parse(Typed(line, "fedepth", tuple(line.split())))
    with pytest.raises(AssertionError):
        parse(Typed("no-such", "fedepth", ("no-such",)))


def test_so_can_what_stands_in_sentences() -> None:
    found = {command for page in PAGES for command in IN_WORDS.findall(page.read_text(encoding="utf-8"))}
    assert len(found) > 5
    for line in found:
        program, *words = line.split()
        known = commands(program)
        name, rest = words[0], words[1:]
        if name not in known and rest:  # such as certs init
            name, rest = f"{name} {rest[0]}", rest[1:]
        assert name in known, line
        options = {option for each in known[name].params for option in each.opts}
        assert {word for word in rest if word.startswith("--")} <= options | {"--help"}, line


def test_every_program_is_shown_and_every_block_says_what_it_is() -> None:
    assert {command.program for _, command in TYPED} >= set(PROGRAMS)
    for page in PAGES:
        assert {block.kind for block in blocks(page)} <= {"console", "toml", "text", "python", "mermaid"}, page.name
        # No block is overlooked.
        assert len(re.findall("^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) == 2 * len(blocks(page))


@pytest.mark.parametrize(
    "block", [block for *_, block in SETTINGS], ids=[f"{page.name}-{number}" for page, number, _ in SETTINGS]
)
def test_settings_are_taken_in_a_job_file(block: Block, tmp_path: Path) -> None:
    """A section of the page takes the place of the job's own; the files that it names need not be there."""
    sections = {part.partition("\n")[0]: part for part in re.split(r"(?m)^(?=\[)", JOB + block.text) if part.strip()}
    (tmp_path / "job.toml").write_text("\n".join(sections.values()), encoding="utf-8")
    config, _ = read_job(tmp_path / "job.toml")
    assert config.job.name == "x"


def test_the_pages_are_there() -> None:
    assert [page.relative_to(ROOT) for page in PAGES[:1]] == [Path("README.md")]
    assert len(PAGES) > 8
