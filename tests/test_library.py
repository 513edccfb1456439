"""fedepth as a library: the names that it promises, for Python, for type checkers and in its documentation; and the
examples of the documentation, run."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedepth

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "library.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_name_is_there_documented_and_known_to_type_checkers() -> None:
    stub = ast.parse((ROOT / "fedepth" / "__init__.pyi").read_text())
    typed = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = PAGE[PAGE.index("| name | what |") :]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.strip())))
    assert set(fedepth.__all__) == set(typed) == named
    assert fedepth.__all__ == sorted(fedepth.__all__)
    for name, place in typed.items():
        found = getattr(fedepth, name)
        assert f"{found.__module__}.{found.__qualname__}" == place
        assert found.__doc__
    assert set(fedepth.__all__) <= set(dir(fedepth))


def test_other_names_are_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        fedepth.train_everything  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, fedepth; dir(fedepth); print(sorted({'torch', 'numpy', 'PIL', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_of_the_documentation_runs(number: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:fedepth", "-c", EXAMPLES[number]],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d\.\d+", done.stdout), done.stdout


def test_the_examples_are_two() -> None:
    assert len(EXAMPLES) == 2
