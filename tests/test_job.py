"""The job file: every field is checked, and every message names the field. Learning rates, in exact numbers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fedepth.aggregation.rules import Krum, Median, NormClipping, PrivateMean, Rule, TrimmedMean, WeightedMean
from fedepth.errors import ConfigError
from fedepth.job import aggregation_rule, learning_rate, load_config, model_spec, training_spec
from fedepth.job_sections import MOST_DEVICES, MOST_SAMPLES, JobConfig
from fedepth.layout import Encoding

GOOD = """
[job]
name = "demo"
rounds = 4
devices_per_round = 3
[model]
name = "digits-cnn"
classes = 10
input_shape = [1, 8, 8]
mean = [0.3]
std = [0.4]
[training]
batch = 16
[test]
data = "digits"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_file_is_read_and_has_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert (config.job.rounds, config.job.gather_s, config.job.lease_s) == (4, 5.0, 60.0)
    assert config.job.needed == 2
    assert config.training.batch == 16
    assert config.export.every == 0
    spec = model_spec(config)
    assert spec.classes == tuple("0123456789")
    assert (spec.mean, spec.std) == ((0.3,), (0.4,))


def test_mean_and_std_default_to_one_number_per_channel(tmp_path: Path) -> None:
    text = GOOD.replace("mean = [0.3]\nstd = [0.4]\n", "").replace("[1, 8, 8]", "[3, 8, 8]")
    spec = model_spec(load_config(write(tmp_path, text)))
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_test_data_is_relative_to_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    config = load_config(write(tmp_path, GOOD.replace('data = "digits"', 'data = "images"')))
    assert config.test.data == str(tmp_path / "images")


@pytest.mark.parametrize(
    ("shape", "kind"), [("[64]", "float"), ("[8, 8]", "float"), ("[8]", "tokens"), ("[1, 8, 8]", "tokens")]
)
def test_views_are_of_images(tmp_path: Path, shape: str, kind: str) -> None:
    text = GOOD.replace("mean = [0.3]\nstd = [0.4]\n", f'input_type = "{kind}"\n').replace("[1, 8, 8]", shape)
    load_config(write(tmp_path, text))
    with pytest.raises(
        ConfigError, match=r"\[training\] augmentation: is for images .* must be \"none\" for samples of"
    ):
        load_config(write(tmp_path, text.replace("batch = 16", 'batch = 16\naugmentation = "crop-flip"')))


def test_numbers_that_float32_cannot_be_computed_with_are_told_as_that(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, with_value("training", "learning_rate", "1e39")))
    assert str(caught.value) == (
        "job.toml: [training] learning_rate: must be between 1e-18 and 1e+18, which float32 can be computed with, "
        "is 1e+39 (line 13, column 1: 'learning_rate = 1e39')"
    )
    for rate in ("1e18", "1e-18"):
        text = with_value("training", "learning_rate", rate)
        assert load_config(write(tmp_path, text)).training.learning_rate == float(rate)


def test_every_bad_value_is_told_with_its_section_and_field(tmp_path: Path) -> None:
    bad = {
        "job": {
            "name": ('""', "1", '"../up"'),
            "rounds": ("0", '"many"', "1.5"),
            "devices_per_round": ("0",),
            "quorum": ("0", "4"),
            "round_deadline_s": ("0", "inf"),
            "gather_s": ("-1", "nan"),
            "lease_s": ("0",),
            "seed": ("-1", "2147483648"),
            "policy": ('"fast"',),
        },
        "model": {
            "name": ('""', "3"),
            "classes": ("1", '["a"]', '["a", "a"]', '"ten"'),
            "input_shape": ("[]", "[1, 2, 3, 4]", "[0, 8, 8]", "8"),
            "mean": ("[0.1, 0.2]", "[nan]", '["x"]', "[1e39]", "[-1e39]"),
            "std": ("[0]", "[1, 1]", "[inf]", "[1e39]", "[1e-46]"),
        },
        "training": {
            "batch": ("0",),
            "local_epochs": ("0",),
            "optimizer": ('"adam"',),
            "learning_rate": ("0", "-0.1", "inf", '"high"', "1e39", "3e38", "1e-46"),
            "learning_rate_end": ("-1", "1", "1e-46"),
            "schedule": ('"step"',),
            "momentum": ("1", "-0.1", "1e-46"),
            "weight_decay": ("-1", "1e39"),
            "proximal_mu": ("-1", "inf", "1e39"),
            "augmentation": ('"mixup"',),
            "mutual": ("0", "9", "1.5", "true"),
            "mutual_weight": ("-1", "inf", "1e39"),
            "mutual_temperature": ("0", "-1", "nan", "1e39"),
            "batch_norm": ('"frozen"', '"fixed"'),  # without fixed_after
            "fixed_after": ("-1", "1.5", "2"),  # 2 belongs to batch_norm = "fixed"
        },
        "transfer": {"encoding": ('"int4"', '"FLOAT16"', "8", "true")},
        "tuning": {
            "embeddings": ('"thawed"', "true"),
            "last_units": ("-1", "513", '"all"'),
            "new_classifier": ("1", "true"),  # there is no file with another one
        },
        "test": {"data": ('"nowhere"', "7")},
        "export": {
            "every": ("-1", "true"),
            "opset": ("12", "24", '"18"'),
            "precision": ('"int8"',),
            "preprocessing": ("1",),
            "output": ('"classes"',),
            "input_name": ('""', '"two words"', "7"),
            "output_name": ('""', '"images"'),
        },
        "aggregation": {
            "rule": ('"best"', '"median-of-means"'),
            "trim": ("0", "0.5", "nan", "0.1"),  # 0.1 belongs to another rule than the default
            "max_change": ("0", "inf", "1.5"),
            "faulty": ("0", "1.5", "1"),
        },
    }
    for section, fields in bad.items():
        for field, values in fields.items():
            for value in values:
                with pytest.raises(ConfigError) as caught:
                    load_config(write(tmp_path, with_value(section, field, value)))
                assert str(caught.value).startswith(f"job.toml: [{section}] {field}"), (
                    value,
                    str(caught.value),
                )


def with_value(section: str, field: str, value: str) -> str:
    lines = [line for line in GOOD.splitlines() if not (line.startswith(f"{field} =") and in_section(line, section))]
    if f"[{section}]" not in lines:
        lines.append(f"[{section}]")
    at = lines.index(f"[{section}]")
    return "\n".join([*lines[: at + 1], f"{field} = {value}", *lines[at + 1 :]])


def in_section(line: str, section: str) -> bool:
    before = GOOD[: GOOD.index(f"[{section}]")]
    after = GOOD[len(before) + 1 :]
    return line in after.split("\n[")[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rounds = 4", "ruonds = 4", "job.toml: [job] ruonds: no such setting; did you mean rounds?"),
        ("batch = 16", "bach = 16", "job.toml: [training] bach: no such setting; did you mean batch?"),
        ("[training]", "[trainning]", "job.toml: [trainning]: no such section; did you mean training?"),
        ('name = "demo"', "", "job.toml: [job] name: is missing"),
        ("[test]\ndata", "[export]\nevery = 1\n[test]\ndatum", "did you mean data?"),
        ('data = "digits"\n', "", "job.toml: [test] data: is missing"),
    ],
)
def test_misspelt_and_missing_names_are_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, GOOD.replace(old, new)))
    assert message in str(caught.value)


def test_a_missing_or_broken_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"job\.toml: is not valid TOML"):
        load_config(write(tmp_path, "[job"))


def rates(schedule: str, end: float = 0.0) -> list[float]:
    return [learning_rate(number, 4, 0.8, end, schedule) for number in (1, 2, 3, 4)]


def test_constant_stays() -> None:
    assert rates("constant", 0.1) == [0.8, 0.8, 0.8, 0.8]


def test_linear_falls_evenly_and_the_last_round_still_trains() -> None:
    assert rates("linear") == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=1e-15)
    assert rates("linear", 0.4) == pytest.approx([0.8, 0.7, 0.6, 0.5], abs=1e-15)


def test_cosine_is_at_half_in_the_middle() -> None:
    # cos(pi/4) = 0.7071067811865476
    expected = [0.8, 0.4 * 1.7071067811865476, 0.4, 0.4 * (1 - 0.7071067811865476)]
    assert rates("cosine") == pytest.approx(expected, abs=1e-15)
    assert learning_rate(3, 4, 0.8, 0.2, "cosine") == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("number", [0, 5])
def test_rounds_outside_the_job_have_no_rate(number: int) -> None:
    with pytest.raises(ValueError, match="not within 1 to 4"):
        learning_rate(number, 4, 0.8, 0.0, "cosine")


def test_the_task_carries_the_rate_and_another_seed_every_round() -> None:
    config = msgspec.convert(
        {
            "job": {"name": "demo", "rounds": 4, "seed": 7},
            "model": {"name": "m", "classes": 2, "input_shape": [1, 8, 8]},
            "test": {"data": "digits"},
            "training": {
                "learning_rate": 0.8,
                "schedule": "linear",
                "proximal_mu": 0.25,
                "mutual": 2,
                "mutual_weight": 0.5,
                "mutual_temperature": 3.0,
            },
        },
        JobConfig,
    )
    second = training_spec(config, 2)
    assert (second.learning_rate, second.seed, second.proximal_mu) == (pytest.approx(0.6), 9, 0.25)
    assert (second.mutual, second.mutual_weight, second.mutual_temperature) == (2, 0.5, 3.0)
    assert training_spec(config, 5) == training_spec(config, 4)


def test_statistics_are_fixed_after_so_many_rounds(tmp_path: Path) -> None:
    def fixed_in(after: int) -> list[bool]:
        settings = f'[training]\nbatch_norm = "fixed"\nfixed_after = {after}\n'
        config = load_config(write(tmp_path, GOOD.replace("[training]\n", settings)))
        return [training_spec(config, number).fixed_statistics for number in (1, 2, 3, 4)]

    assert fixed_in(0) == [True] * 4
    assert fixed_in(1) == [False, True, True, True]
    assert fixed_in(3) == [False] * 3 + [True]
    with pytest.raises(
        ConfigError, match=r"\[training\] fixed_after: must be below \[job\] rounds \(4\), so that some"
    ):
        fixed_in(4)
    assert not any(training_spec(load_config(write(tmp_path, GOOD)), number).fixed_statistics for number in (1, 4))


def test_limits_have_defaults_and_bounds(tmp_path: Path) -> None:
    limits = load_config(write(tmp_path, GOOD)).limits
    assert (limits.samples_per_device, limits.devices) == (10_000_000, 10_000)
    own = "\n[limits]\nsamples_per_device = 500\ndevices = 3\n"
    limits = load_config(write(tmp_path, GOOD + own)).limits
    assert (limits.samples_per_device, limits.devices) == (500, 3)
    for field, value in (("samples_per_device", 0), ("samples_per_device", 2**41), ("devices", 0), ("devices", 2**21)):
        with pytest.raises(ConfigError, match=rf"\[limits\] {field}: "):
            load_config(write(tmp_path, GOOD + f"\n[limits]\n{field} = {value}\n"))
    with pytest.raises(ConfigError, match=r"devices_per_round: must be at most \[limits\] devices \(2\), is 3"):
        load_config(write(tmp_path, GOOD + "\n[limits]\ndevices = 2\n"))


def test_the_samples_of_a_round_can_be_added_up() -> None:
    assert MOST_SAMPLES * MOST_DEVICES < 2**63


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("classes = 10", "classes = 32769", r"\[model\] classes: must be 2 to 32768, is 32769"),
        ("classes = 10", f'classes = ["a", "{"b" * 201}"]', r"at most 200 characters, the longest has 201"),
        ("classes = 10", "classes = 10\nfirst_label = -1", r"\[model\] first_label: "),
        (
            "classes = 10",
            'classes = ["caf\u00e9", "cafe\u0301"]',
            r"\[model\] classes: must be unique, but 'café' occurs",
        ),
        ("classes = 10", 'classes = ["a", "b", "a"]', r"\[model\] classes: must be unique, but 'a' occurs"),
        ('name = "digits-cnn"', f'name = "{"x" * 201}"', r"\[model\] name: must have 1 to 200 characters, has 201"),
        ("[1, 8, 8]", "[131073]", r"\[model\] input_shape: must begin with at most 131072 channels"),
        ("rounds = 4", "rounds = 9223372036854775808", r"\[job\] rounds: "),
        ("rounds = 4", f"rounds = {'9' * 5000}", "not valid TOML"),
        ("rounds = 4", "round_deadline_s = 1e308", r"\[job\] round_deadline_s: "),
        ('data = "digits"', 'data = "a\\u0000b"', r"\[test\] data: 'a\\x00b' is not a path"),
        ('data = "digits"', f'data = "{"x" * 5000}"', r"is not a path: File name too long"),
        ('data = "digits"', 'data = "~nobody-of-this-name/x"', r"is not a path: Could not determine home"),
        ("[1, 8, 8]", "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_no_job_can_have_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(write(tmp_path, GOOD.replace(old, new)))
    assert len(str(caught.value)) < 500


def test_a_file_that_is_no_text_is_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(path).job.name == "demo"
    for data in (b"\xff\xfe[\x00j\x00", b"[job]\nname = \x00", b"\xc3\x28"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="is not valid TOML"):
            load_config(path)
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(ConfigError, match="has more than 4194304 bytes"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: embedded null byte"):
        load_config(tmp_path / "a\0b")


def with_section(section: str, devices: int = 3) -> str:
    return GOOD.replace("devices_per_round = 3", f"devices_per_round = {devices}") + section


@pytest.mark.parametrize(
    ("section", "devices", "rule"),
    [
        ("", 1, WeightedMean()),
        ('[aggregation]\nrule = "mean"', 1, WeightedMean()),
        ('[aggregation]\nrule = "trimmed-mean"', 10, TrimmedMean(0.1)),
        ('[aggregation]\nrule = "trimmed-mean"\ntrim = 0.3', 4, TrimmedMean(0.3)),
        ('[aggregation]\nrule = "median"', 3, Median()),
        ('[aggregation]\nrule = "norm-clipping"', 6, NormClipping(None)),
        ('[aggregation]\nrule = "norm-clipping"\nmax_change = 0.5', 1, NormClipping(0.5)),
        ('[aggregation]\nrule = "krum"', 5, Krum(1)),
        ('[aggregation]\nrule = "krum"\nfaulty = 2', 7, Krum(2)),
        ("[privacy]\nclip_norm = 2\nnoise_multiplier = 1.5", 8, PrivateMean(2.0, 1.5, 8)),
    ],
)
def test_the_rule_is_what_the_file_says(tmp_path: Path, section: str, devices: int, rule: Rule) -> None:
    config = load_config(write(tmp_path, with_section(section, devices)))
    assert aggregation_rule(config) == rule
    if devices > 1 and not isinstance(rule, WeightedMean | PrivateMean) and rule != NormClipping(0.5):
        with pytest.raises(ConfigError, match=rf"devices_per_round to be at least {devices}, is {devices - 1}: "):
            load_config(write(tmp_path, with_section(section, devices - 1)))


def test_without_its_section_there_is_no_privacy_and_with_it_delta_has_a_default(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD)).privacy is None
    privacy = load_config(write(tmp_path, with_section("[privacy]\nclip_norm = 2\nnoise_multiplier = 1"))).privacy
    assert privacy is not None
    assert privacy.delta == 1e-6


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("[privacy]\nclip_norm = 1", "[privacy] noise_multiplier: is missing"),
        ("[privacy]\nclip_norm = 0\nnoise_multiplier = 1", "[privacy] clip_norm: "),
        ("[privacy]\nclip_norm = inf\nnoise_multiplier = 1", "[privacy] clip_norm: must be a finite number"),
        ("[privacy]\nclip_norm = 1\nnoise_multiplier = 0", "[privacy] noise_multiplier: "),
        ("[privacy]\nclip_norm = 1\nnoise_multiplier = 1\ndelta = 1", "[privacy] delta: "),
        ("[privacy]\nclip_nrom = 1", "[privacy] clip_nrom: no such setting; did you mean clip_norm?"),
        (
            '[privacy]\nclip_norm = 1\nnoise_multiplier = 1\n[aggregation]\nrule = "median"',
            '[aggregation] rule: must be "mean" with [privacy], which clips by itself, is "median"',
        ),
        (
            '[aggregation]\nrule = "median"\nfaulty = 1',
            '[aggregation] faulty: is a setting of the rule "krum"; the rule is "median"',
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, section: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, with_section(section)))
    assert f"job.toml: {message}" in str(caught.value)


def test_the_encoding_of_updates_is_what_the_job_says_and_float32_where_it_does_not(tmp_path: Path) -> None:
    assert training_spec(load_config(write(tmp_path, GOOD)), 1).encoding is Encoding.FLOAT32
    for encoding in Encoding:
        config = load_config(write(tmp_path, f'{GOOD}\n[transfer]\nencoding = "{encoding.value}"\n'))
        spec = training_spec(config, 1)
        assert spec.encoding is encoding
        assert spec.asks_for == (() if encoding is Encoding.FLOAT32 else ("encoding",))
