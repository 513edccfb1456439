"""The sections [text] and [table] of a job file: what they say of a model's input, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.start_checks import missing_libraries
from fedepth.data.text import tokenizer_digest
from fedepth.errors import ConfigError
from fedepth.job import load_config, model_spec
from fedepth.job_changes import differences, settings_of
from fedepth.task import Category, InputType, TableSpec, TextSpec

HEAD = '[job]\nname = "rows"\n[model]\nname = "m:f"\nclasses = ["a", "b"]\n'
TEXT = HEAD + '[text]\nlabel = "label"\ntext = ["title", "body"]\nlength = 64\n'
TABLE = HEAD + (
    '[table]\nlabel = "label"\nnumeric = ["x", "y"]\nmean = [1.0, 2.0]\nstd = [3.0, 4.0]\n'
    'categorical = { colour = ["red", "green"], " size " = ["s"] }\n'
)
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "cat": 1, "dog": 2}}}


def job(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_texts_make_token_ids(tmp_path: Path) -> None:
    spec = model_spec(load_config(job(tmp_path, TEXT)))
    assert spec.text == TextSpec("label", ("title", "body"), 8192)
    assert (spec.input_shape, spec.input_type, spec.mean, spec.std) == ((64,), InputType.TOKENS, (), ())
    one = model_spec(load_config(job(tmp_path, TEXT.replace('["title", "body"]', '"body"'))))
    assert one.text is not None and one.text.text == ("body",)


def test_a_table_makes_features(tmp_path: Path) -> None:
    spec = model_spec(load_config(job(tmp_path, TABLE)))
    categories = (Category("colour", ("red", "green")), Category("size", ("s",)))
    assert spec.table == TableSpec("label", ("x", "y"), (1.0, 2.0), (3.0, 4.0), categories)
    assert (spec.input_shape, spec.input_type, spec.mean, spec.std) == ((9,), InputType.FLOAT, (), ())
    assert (spec.sample_shape, spec.sample_type) == ((4,), "F64")


def test_a_tokenizer_is_named_by_its_digest(tmp_path: Path) -> None:
    contents = json.dumps(TOKENIZER)
    (tmp_path / "t.json").write_text(contents)
    config = load_config(job(tmp_path, TEXT + 'tokenizer = "t.json"\n'))
    spec = model_spec(config)
    assert spec.text == TextSpec("label", ("title", "body"), 3, tokenizer_digest(contents))
    assert config.tokenizer == str(tmp_path / "t.json")
    before = settings_of(config)
    assert before["text.tokenizer"] == f"sha256:{tokenizer_digest(contents)}"
    (tmp_path / "t.json").rename(tmp_path / "moved.json")
    moved = load_config(job(tmp_path, TEXT + 'tokenizer = "moved.json"\n'))
    assert differences(before, settings_of(moved)) == []
    (tmp_path / "moved.json").write_text(contents.replace("dog", "cow"))
    changed = differences(before, settings_of(load_config(tmp_path / "job.toml")))
    assert [change.setting for change in changed] == ["text.tokenizer"]
    assert [change.kind.value for change in changed] == ["refused"]


def test_a_tokenizer_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.json").write_text(json.dumps(TOKENIZER))
    config = load_config(job(tmp_path, (TEXT + 'tokenizer = "t.json"\n').replace("m:f", "text-transformer")))
    monkeypatch.setattr("coordinator.start_checks._can_be_imported", lambda module, *_: module != "tokenizers")
    assert missing_libraries(config) == [
        "tokenizers is not installed, which [text] tokenizer needs: pip install 'fedepth[text]'"
    ]


REFUSED: dict[str, tuple[str, str]] = {
    "neither": (HEAD, "[model] input_shape: is missing; only jobs with [text] or [table] need none"),
    "both": (TEXT + TABLE.removeprefix(HEAD), "[table]: a job trains on texts or on a table; remove [text] or [table]"),
    "no label": (TEXT.replace('label = "label"\n', ""), "[text] label: is missing"),
    "no text": (TEXT.replace('["title", "body"]', "[]"), "[text] text: must name 1 to 8192 columns, names 0"),
    "a text twice": (TEXT.replace('"body"', '" title "'), "[text] text: 'title' is named more than once"),
    "an empty name": (TEXT.replace('"body"', '" "'), "[text] text: names of columns have 1 to 200 characters"),
    "a label among texts": (TEXT.replace('"body"', '"label"'), "[text] label: 'label' is also among the columns"),
    "an empty label": (TEXT.replace('label = "label"', 'label = ""'), "[text] label: the name of a column has 1"),
    "a length of 0": (TEXT.replace("64", "0"), "[text] length: "),
    "a length without end": (TEXT.replace("64", "8193"), "[text] length: "),
    "a vocabulary of 3": (TEXT + "vocabulary = 3\n", "[text] vocabulary: "),
    "a vocabulary and a tokenizer": (
        TEXT + 'vocabulary = 9000\ntokenizer = "t.json"\n',
        "[text] vocabulary: is what the tokenizer says; leave it out",
    ),
    "no such tokenizer": (TEXT + 'tokenizer = "no.json"\n', "no.json does not exist"),
    "a tokenizer that is none": (TEXT + 'tokenizer = "job.toml"\n', "is not a file of the tokenizers library"),
    "a tokenizer that is a folder": (TEXT + 'tokenizer = "."\n', "is not a file"),
    "another shape": (
        TEXT.replace("[text]", "input_shape = [32]\n[text]"),
        "[model] input_shape: follows from [text] and is [64]; leave it out",
    ),
    "a mean": (TABLE.replace("[table]", "mean = [0.5]\n[table]"), "[model] mean: is for images; leave it out with"),
    "tokens": (TABLE.replace("[table]", 'input_type = "tokens"\n[table]'), "[model] input_type: is float with [table]"),
    "views of images": (TEXT + '[training]\naugmentation = "crop-flip"\n', '[training] augmentation: is for images'),
    "digits": (TEXT + '[test]\ndata = "digits"\n', "[test] data: digits are images, the job has [text]"),
    "pre-processing of texts": (TEXT + "[export]\npreprocessing = true\n", "[export] preprocessing: token ids"),
    "no columns": (HEAD + '[table]\nlabel = "l"\n', "[table] numeric: names no column, and categorical neither"),
    "too few means": (TABLE.replace("[1.0, 2.0]", "[1.0]"), "[table] mean: must have one number for each column"),
    "no deviations": (TABLE.replace("std = [3.0, 4.0]\n", ""), "(2), has 0; `fedepth columns FILE` writes the section"),
    "a deviation of 0": (TABLE.replace("3.0", "0.0"), "[table] std[0]: "),
    "a mean that is not finite": (TABLE.replace("[1.0,", "[inf,"), "[table] mean: must be a finite number"),
    "a column twice": (TABLE.replace('"y"', '"x"'), "[table] numeric: 'x' is named more than once"),
    "a column of both kinds": (TABLE.replace('"y"', '"colour"'), "[table] numeric: 'colour' is named more than once"),
    "a label among columns": (TABLE.replace('"y"', '"label"'), "[table] label: 'label' is also among the columns"),
    "a value twice": (TABLE.replace('"green"', '"red "'), "[table] categorical: 'colour': 'red' occurs more than once"),
    "no values": (TABLE.replace('["s"]', "[]"), "[table] categorical: ' size ': values must not be empty"),
    "an empty value": (TABLE.replace('["s"]', '[""]'), "values must not be empty, nor the list of them"),
    "a long value": (TABLE.replace('"s"', f'"{"s" * 201}"'), "values have at most 200 characters"),
    "too many features": (
        TABLE.replace('["s"]', json.dumps([str(each) for each in range(1 << 17)])),
        "features, at most 131072 are used",
    ),
    "too many names": (
        TABLE.replace('["s"]', json.dumps([f"{each:0199}" for each in range(6000)])),
        "at most 1048576 are sent",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_with_its_field(tmp_path: Path, case: str) -> None:
    text, words = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load_config(job(tmp_path, text))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600
