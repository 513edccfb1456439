"""fedepth as a library: the names that it promises, for Python, for type checkers and in its documentation; and the
examples of the documentation, run."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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


TRAINING = fedepth.TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch": 0}, ">= 1 - at `batch`"),
        ({"local_epochs": -1}, "at `local_epochs`"),
        ({"optimizer": "lion"}, "Invalid enum value 'lion' - at `optimizer`"),
        ({"learning_rate": float("nan")}, "at `learning_rate`"),
        ({"heads": "none"}, "at `heads`"),
        ({"mutual": 0}, "at `mutual`"),
    ],
)
def test_what_no_job_file_may_say_no_training_spec_may(wrong: dict[str, Any], words: str, tmp_path: Path) -> None:
    training = replace(TRAINING, **wrong)
    spec = fedepth.named_spec("digits-cnn", None, 10)
    with pytest.raises(fedepth.FedepthError, match="^the TrainingSpec cannot be used: .*" + re.escape(words)):
        fedepth.prepare_model(spec, training, seed=1)
    plan = fedepth.Plan((), (), fedepth.Policy.AUTO, 0)
    with pytest.raises(fedepth.FedepthError, match=re.escape(words)):
        fedepth.train_task(tmp_path / "graph", tmp_path / "weights", "digits", spec, training, plan, tmp_path)


def test_what_names_no_model_is_refused() -> None:
    with pytest.raises(fedepth.FedepthError, match="-1 classes: a model needs one at least"):
        fedepth.named_spec("digits-cnn", None, -1)
    shape: Any = (1, 8, 8)
    with pytest.raises(fedepth.FedepthError, match=r"'\(1, 8, 8\)' is not a shape; write .* as 3x32x32"):
        fedepth.named_spec("digits-cnn", shape, 10)
