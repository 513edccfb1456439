"""The job file: one TOML file that says what is trained, by how many devices, and how; and each round's learning rate.

Every message names the field, as `job.toml: [training] learning_rate: must be above 0, is -0.1`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import msgspec

from fedepth.aggregation.rules import (
    ENOUGH_NORMS,
    Krum,
    Median,
    NormClipping,
    PrivateMean,
    Rule,
    TrimmedMean,
    WeightedMean,
)
from fedepth.errors import ConfigError
from fedepth.job_sections import DIGITS, MOST_NAME, MOST_NAMES_BYTES, JobConfig, ModelSection, TestSection
from fedepth.plan import Policy
from fedepth.printable import printable, quoted
from fedepth.settings import read_toml, settings_path, suggestion, violation
from fedepth.task import MOST_CHANNELS, MOST_CLASSES, InputType, ModelSpec, TrainingSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MISSING = re.compile(r"missing required field `(\w+)`")


def load_config(path: Path) -> JobConfig:
    """Reads and checks a job file.

    Raises:
        ConfigError: the file cannot be read, or a field is missing, misspelt or out of range.
    """
    tables = read_toml(path)
    _refuse_unknown(tables, path.name)
    try:
        config = msgspec.convert(tables, JobConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(path.name, str(error))) from None
    _check_ranges(config, path.name)
    return _with_weights_path(_with_test_path(config, path), path)


def model_spec(config: JobConfig) -> ModelSpec:
    """The model as it is sent to devices and to the model worker."""
    section = config.model
    classes = section.classes
    names = tuple(str(label) for label in range(classes)) if isinstance(classes, int) else classes
    channels = section.input_shape[0]
    return ModelSpec(
        name=section.name,
        classes=names,
        input_shape=section.input_shape,
        mean=section.mean or (0.0,) * channels,
        std=section.std or (1.0,) * channels,
        input_type=section.input_type,
    )


def aggregation_rule(config: JobConfig) -> Rule:
    """How the updates of a round become one."""
    section, privacy = config.aggregation, config.privacy
    if privacy is not None:
        return PrivateMean(privacy.clip_norm, privacy.noise_multiplier, config.job.devices_per_round)
    match section.rule:
        case "mean":
            return WeightedMean()
        case "trimmed-mean":
            return TrimmedMean(0.1 if section.trim is None else section.trim)
        case "median":
            return Median()
        case "norm-clipping":
            return NormClipping(section.max_change)
        case "krum":
            return Krum(1 if section.faulty is None else section.faulty)


def with_export(config: JobConfig, **choices: Any) -> JobConfig:
    """The job with other choices for its exports, those that are not None.

    Raises:
        ConfigError: they do not suit the job.
    """
    given = {name: value for name, value in choices.items() if value is not None}
    changed = msgspec.structs.replace(config, export=msgspec.structs.replace(config.export, **given))
    _check_export(changed, "export")
    return changed


def policy(config: JobConfig) -> Policy:
    return Policy(config.job.policy)


def learning_rate(round_number: int, rounds: int, start: float, end: float, schedule: str) -> float:
    """The learning rate of round `round_number` of 1..`rounds`.

    The first round has `start`; `end` is what a round after the last would have, so that the last round still
    trains when `end` is 0. With p = (round − 1) / rounds:

        constant  start
        linear    start + (end − start) · p
        cosine    end + (start − end) · (1 + cos(π p)) / 2    (arXiv 1608.03983, equation 5)
    """
    if not 1 <= round_number <= rounds:
        raise ValueError(f"round {round_number} is not within 1 to {rounds}")
    done = (round_number - 1) / rounds
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (end - start) * done
    if schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
    raise ValueError(f"unknown schedule {schedule!r}")


def training_spec(config: JobConfig, round_number: int) -> TrainingSpec:
    """What is sent to a device for this round. Rounds beyond the last are given what the last is."""
    section = config.training
    number = min(max(round_number, 1), config.job.rounds)
    return TrainingSpec(
        batch=section.batch,
        local_epochs=section.local_epochs,
        optimizer=section.optimizer,
        learning_rate=learning_rate(
            number, config.job.rounds, section.learning_rate, section.learning_rate_end, section.schedule
        ),
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        proximal_mu=section.proximal_mu,
        augmentation=section.augmentation,
        seed=config.job.seed + number,  # other shuffles in every round, the same after a restart
        cache_type=section.cache_type,
    )


def _refuse_unknown(tables: dict[str, Any], file: str) -> None:
    sections = {field.name: _section_type(field.type) for field in msgspec.structs.fields(JobConfig)}
    for section, content in tables.items():
        if section not in sections:
            raise ConfigError(
                f"{file}: [{printable(section[:MOST_NAME])}]: no such section{suggestion(section, sections)}"
            )
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: [{section}]: must be a section, is {quoted(str(content))}")
        known = {field.name for field in msgspec.structs.fields(sections[section])}
        for key in content:
            if key not in known:
                raise ConfigError(
                    f"{file}: [{section}] {printable(key[:MOST_NAME])}: no such setting{suggestion(key, known)}"
                )


def _section_type(kind: Any) -> Any:
    """The type of a section that may be absent."""
    return next((part for part in get_args(kind) if part is not type(None)), kind)


def _explain(file: str, message: str) -> str:
    path, what = violation(message)
    missing = _MISSING.search(what)
    if missing:
        where = f"[{path}] {missing[1]}" if path else f"[{missing[1]}]"
        return f"{file}: {where}: is missing"
    section, _, field = path.partition(".")
    return f"{file}: [{section}] {field}: {what[0].lower()}{what[1:]}"


def _check_ranges(config: JobConfig, file: str) -> None:
    """What spans several fields, and what a type cannot say."""
    job, model, training = config.job, config.model, config.training
    for name in ("job", "training", "aggregation", "privacy"):
        section = getattr(config, name)
        for field, value in msgspec.structs.asdict(section).items() if section is not None else ():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{file}: [{name}] {field}: must be a finite number, is {value}")
    if not _NAME.fullmatch(job.name):
        raise ConfigError(
            f"{file}: [job] name: must be 1 to 64 letters, digits, '.', '_' or '-', is {quoted(job.name)}"
        )
    if job.needed > job.devices_per_round:
        raise ConfigError(
            f"{file}: [job] quorum: must be at most devices_per_round ({job.devices_per_round}), is {job.needed}"
        )
    if job.devices_per_round > config.limits.devices:
        raise ConfigError(
            f"{file}: [job] devices_per_round: must be at most [limits] devices ({config.limits.devices}), "
            f"is {job.devices_per_round}"
        )
    if training.learning_rate_end > training.learning_rate:
        raise ConfigError(
            f"{file}: [training] learning_rate_end: must be at most learning_rate, "
            f"{training.learning_rate}, is {training.learning_rate_end}"
        )
    _check_aggregation(config, file)
    _check_export(config, file)
    if config.test is None and config.guard.largest_drop < 1:
        raise ConfigError(
            f"{file}: [guard] largest_drop: needs test data to know the accuracy; add [test] data, or leave it out: an "
            "average that is not finite is kept back all the same"
        )
    if not 1 <= len(model.name) <= MOST_NAME:
        raise ConfigError(f"{file}: [model] name: must have 1 to {MOST_NAME} characters, has {len(model.name)}")
    _check_classes(model, file)
    if not 1 <= len(model.input_shape) <= 3:
        raise ConfigError(
            f"{file}: [model] input_shape: must be [channels, height, width] for images, or one or two numbers for "
            f"vectors, series and token ids; has {len(model.input_shape)} numbers"
        )
    if model.input_shape[0] > MOST_CHANNELS:
        raise ConfigError(
            f"{file}: [model] input_shape: must begin with at most {MOST_CHANNELS} channels, has {model.input_shape[0]}"
        )
    for field, values in (("mean", model.mean), ("std", model.std)):
        if values and len(values) != model.input_shape[0]:
            raise ConfigError(
                f"{file}: [model] {field}: must have one number per channel ({model.input_shape[0]}), has {len(values)}"
            )
        if not all(math.isfinite(value) for value in values):
            raise ConfigError(f"{file}: [model] {field}: must be finite numbers, is {list(values)}")


def _check_aggregation(config: JobConfig, file: str) -> None:
    section, devices = config.aggregation, config.job.devices_per_round
    for field, owner in (("trim", "trimmed-mean"), ("max_change", "norm-clipping"), ("faulty", "krum")):
        if getattr(section, field) is not None and section.rule != owner:
            raise ConfigError(
                f'{file}: [aggregation] {field}: is a setting of the rule "{owner}"; the rule is "{section.rule}"'
            )
    if config.privacy is not None and section.rule != "mean":
        raise ConfigError(
            f'{file}: [aggregation] rule: must be "mean" with [privacy], which clips by itself, is "{section.rule}"'
        )
    needed, what = _devices_for_rule(aggregation_rule(config))
    if devices < needed:
        raise ConfigError(
            f'{file}: [aggregation] rule: "{section.rule}" needs [job] devices_per_round to be at least {needed}, '
            f"is {devices}: {what}"
        )


def _check_export(config: JobConfig, file: str) -> None:
    export = config.export
    if export.preprocessing and config.model.input_type is InputType.TOKENS:
        raise ConfigError(f"{file}: [export] preprocessing: token ids need none; leave it out")
    if export.input_name == export.output_label:
        raise ConfigError(f"{file}: [export] output_name: must not be the input's, {quoted(export.input_name)}")


def _devices_for_rule(rule: Rule) -> tuple[int, str]:
    """The smallest number of updates with which a rule does anything, and why."""
    match rule:
        case TrimmedMean():
            return math.ceil(1 / rule.trim - 1e-9), f"of fewer, trim = {rule.trim:g} cuts off nothing"
        case Median():
            return 3, "the median of fewer is their mean"
        case NormClipping(max_change=None):
            return ENOUGH_NORMS + 1, "a bound is learned from others; with fewer, set max_change"
        case Krum():
            return rule.smallest_group, f"faulty = {rule.faulty} cannot be found among fewer"
        case _:
            return 1, ""


def _check_classes(model: ModelSection, file: str) -> None:
    classes = model.classes
    count = classes if isinstance(classes, int) else len(classes)
    if not 2 <= count <= MOST_CLASSES:
        raise ConfigError(f"{file}: [model] classes: must be 2 to {MOST_CLASSES}, is {count}")
    if isinstance(classes, int):
        return
    twice = sorted(name for name, times in Counter(classes).items() if times > 1)
    if twice:
        raise ConfigError(
            f"{file}: [model] classes: must be unique, but {quoted(', '.join(twice))} occurs more than once"
        )
    longest = max(map(len, classes))
    if longest > MOST_NAME or sum(len(name.encode()) for name in classes) > MOST_NAMES_BYTES:
        raise ConfigError(
            f"{file}: [model] classes: names must have at most {MOST_NAME} characters, the longest has {longest}, and "
            f"{MOST_NAMES_BYTES} bytes together"
        )


def _with_test_path(config: JobConfig, path: Path) -> JobConfig:
    if config.test is None or config.test.data == DIGITS:
        return config
    data = _path(path, "[test] data", config.test.data)
    if not data.exists():
        raise ConfigError(f'{path.name}: [test] data: {data} does not exist; give a folder or "{DIGITS}"')
    return msgspec.structs.replace(config, test=TestSection(data=str(data)))


def _path(file: Path, field: str, text: str) -> Path:
    try:
        return settings_path(file.parent, text)
    except ConfigError as error:
        raise ConfigError(f"{file.name}: {field}: {error}") from None


def _with_weights_path(config: JobConfig, path: Path) -> JobConfig:
    if not config.model.weights:
        return config
    weights = _path(path, "[model] weights", config.model.weights)
    if not weights.is_file():
        raise ConfigError(f"{path.name}: [model] weights: {weights} is not a file")
    return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, weights=str(weights)))
