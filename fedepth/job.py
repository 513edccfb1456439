"""The job file: one TOML file that says what is trained, by how many devices, and how; and each round's learning rate.

Every message names the field, as `job.toml: [training] learning_rate: must be above 0, is -0.1`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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
from fedepth.data.labels import listed, normalised
from fedepth.errors import ConfigError, JobFileError
from fedepth.job_rows import lacks_statistics, table_spec, text_spec, with_row_input, with_tokenizer, wrong_rows
from fedepth.job_sections import (
    DIGITS,
    LEAST_FLOAT,
    MOST_FLOAT,
    MOST_NAME,
    JobConfig,
    ModelSection,
    TrainingSection,
)
from fedepth.plan import Policy
from fedepth.printable import printable, quoted
from fedepth.settings import SettingsFile, read_settings, settings_path, suggestion, violation
from fedepth.task import MOST_CHANNELS, MOST_CLASSES, MOST_NAMES_BYTES, MOST_NUMBERS, InputType, ModelSpec, TrainingSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MISSING = re.compile(r"missing required field `(\w+)`")


def load_config(path: Path) -> JobConfig:
    """Reads and checks a job file.

    Raises:
        ConfigError: the file cannot be read, or a field is missing, misspelt or out of range, or names what is not
            there.
        JobFileError: several fields are.
    """
    config, missing = read_job(path)
    if missing:
        raise _all_of(path.name, missing)
    return config


def read_job(path: Path) -> tuple[JobConfig, list[ConfigError]]:
    """The same, but for files and folders that are named and are not there: the job is without them, and can be looked
    at in every other way. What is wrong with them comes with it.

    Raises:
        ConfigError, JobFileError: as `load_config`.
    """
    file = read_settings(path, path.name)
    if not file.tables:
        raise ConfigError(f"{file.name}: is empty; a job needs [job] name, [model] name, classes and input_shape")
    _refuse_unknown(file)
    try:
        config = msgspec.convert(file.tables, JobConfig)
    except msgspec.ValidationError as error:
        raise _explain(file, str(error)) from None
    if wrong_row := wrong_rows(config):
        raise _wrong(file, *wrong_row)
    config = with_row_input(config)
    wrong = list(_out_of_range(config, file))
    config, missing = _with_places(config, file)
    if wrong:
        raise _all_of(file.name, [*wrong, *missing])
    return config, missing


def _all_of(name: str, errors: Sequence[ConfigError]) -> ConfigError:
    if len(errors) == 1:
        return errors[0]
    each = (f"({number}) {str(error).removeprefix(f'{name}: ')}" for number, error in enumerate(errors, 1))
    return JobFileError(f"{name}: {len(errors)} things are wrong: {'; '.join(each)}", parts=tuple(errors))


def model_spec(config: JobConfig) -> ModelSpec:
    """The model as it is sent to devices and to the model worker."""
    section = config.model
    classes = section.classes
    names = tuple(str(label) for label in range(classes)) if isinstance(classes, int) else map(normalised, classes)
    rows = config.text is not None or config.table is not None
    channels = 0 if rows else section.input_shape[0]  # a table's columns have a mean of their own
    return ModelSpec(
        name=section.name,
        classes=tuple(names),
        input_shape=section.input_shape,
        mean=section.mean or (0.0,) * channels,
        std=section.std or (1.0,) * channels,
        input_type=section.input_type,
        first_label=section.first_label,
        text=text_spec(config),
        table=table_spec(config),
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
    wrong = _wrong_export(changed)
    if wrong:
        raise ConfigError(f"export: {wrong[0]}: {wrong[1]}")
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


def check_training(training: TrainingSpec) -> None:
    """What a job file's [training] may not say, code that makes a TrainingSpec by itself may not say either.

    Raises:
        ConfigError: a value is out of its range.
    """
    shared = {name: getattr(training, name) for name in TrainingSection.__struct_fields__ if hasattr(training, name)}
    try:
        msgspec.convert(msgspec.to_builtins(shared), TrainingSection)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the TrainingSpec cannot be used: {error}".replace("at `$.", "at `")) from None


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
        fixed_statistics=fixes_statistics(config) and number > (section.fixed_after or 0),
        heads=section.heads,
        distil=section.distil,
        distil_weight=section.distil_weight,
        distil_temperature=section.distil_temperature,
        mutual=section.mutual,
        mutual_weight=section.mutual_weight,
        mutual_temperature=section.mutual_temperature,
        encoding=config.transfer.encoding,
    )


def fixes_statistics(config: JobConfig) -> bool:
    """Whether BatchNorm's statistics are fixed in some round."""
    return config.training.batch_norm == "fixed"


def _wrong(file: SettingsFile, section: str, field: str, what: str) -> ConfigError:
    """The message about a field."""
    return ConfigError(f"{file.name}: [{section}]{f' {field}' if field else ''}: {what}{file.place(section, field)}")


def _refuse_unknown(file: SettingsFile) -> None:
    sections = section_types()
    for section, content in file.tables.items():
        if section not in sections:
            shown = printable(section[:MOST_NAME])
            owner = next((name for name, kind in sections.items() if section in kind.__struct_fields__), "")
            hint = f"; it belongs under [{owner}]" if owner and not isinstance(content, dict) else ""
            raise ConfigError(
                f"{file.name}: [{shown}]: no such section{hint or suggestion(section, sections)}{file.place(section)}"
            )
        if not isinstance(content, dict):
            raise ConfigError(
                f"{file.name}: [{section}]: must be a section, is {quoted(str(content))}{file.place(section)}"
            )
        known = {field.name for field in msgspec.structs.fields(sections[section])}
        for key in content:
            if key not in known:
                what = f"no such setting{suggestion(key, known)}"
                raise _wrong(file, section, printable(key[:MOST_NAME]), what)


def section_types() -> dict[str, type[msgspec.Struct]]:
    """The sections of a job file by their names; what else a JobConfig holds is no part of the file."""
    kinds = {field.name: get_args(field.type) or (field.type,) for field in msgspec.structs.fields(JobConfig)}
    found = ((name, next((kind for kind in options if _is_section(kind)), None)) for name, options in kinds.items())
    return {name: kind for name, kind in found if kind is not None}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _explain(file: SettingsFile, message: str) -> ConfigError:
    path, what = violation(message)
    missing = _MISSING.search(what)
    if missing and path:
        return _wrong(file, path, missing[1], "is missing")
    if missing:
        return ConfigError(f"{file.name}: [{missing[1]}]: is missing")
    section, _, field = path.partition(".")
    return _wrong(file, section, field, f"{what[0].lower()}{what[1:]}")


def _out_of_range(config: JobConfig, file: SettingsFile) -> Iterator[ConfigError]:
    """What spans several fields, and what a type cannot say."""
    job, model, training = config.job, config.model, config.training
    odd = list(_odd_floats(config, file))
    yield from odd
    if odd:
        return  # nothing can be computed with them
    if not _NAME.fullmatch(job.name):
        yield _wrong(file, "job", "name", f"must be 1 to 64 letters, digits, '.', '_' or '-', is {quoted(job.name)}")
    if job.needed > job.devices_per_round:
        yield _wrong(
            file, "job", "quorum", f"must be at most devices_per_round ({job.devices_per_round}), is {job.needed}"
        )
    if job.devices_per_round > config.limits.devices:
        yield _wrong(
            file,
            "job",
            "devices_per_round",
            f"must be at most [limits] devices ({config.limits.devices}), is {job.devices_per_round}",
        )
    if training.learning_rate_end > training.learning_rate:
        yield _wrong(
            file,
            "training",
            "learning_rate_end",
            f"must be at most learning_rate, {training.learning_rate}, is {training.learning_rate_end}",
        )
    yield from _odd_statistics(config, file)
    if config.tuning.new_classifier and not model.weights:
        yield _wrong(
            file, "tuning", "new_classifier", "needs [model] weights; without a file with weights all of them are fresh"
        )
    if config.privacy is not None and lacks_statistics(config):
        what = "must be given with [privacy]: what devices tell of their columns has no noise"
        yield _wrong(file, "table", "mean", what)
    yield from _odd_aggregation(config, file)
    wrong = _wrong_export(config)
    if wrong:
        yield _wrong(file, "export", *wrong)
    if config.test is None and config.guard.largest_drop < 1:
        yield _wrong(
            file,
            "guard",
            "largest_drop",
            "needs test data to know the accuracy; add [test] data, or leave it out: an average that is not finite is "
            "kept back all the same",
        )
    if not 1 <= len(model.name) <= MOST_NAME:
        yield _wrong(file, "model", "name", f"must have 1 to {MOST_NAME} characters, has {len(model.name)}")
    yield from _odd_classes(model, file)
    if not model.input_shape:
        yield _wrong(file, "model", "input_shape", "is missing; only jobs with [text] or [table] need none")
        return
    if len(model.input_shape) > 3:
        yield _wrong(
            file,
            "model",
            "input_shape",
            "must be [channels, height, width] for images, or one or two numbers for "
            f"vectors, series and token ids; has {len(model.input_shape)} numbers",
        )
        return
    if math.prod(model.input_shape) > MOST_NUMBERS:
        yield _wrong(
            file,
            "model",
            "input_shape",
            f"must have at most {MOST_NUMBERS} numbers in a sample, has {math.prod(model.input_shape)}",
        )
    if model.input_shape[0] > MOST_CHANNELS:
        yield _wrong(
            file,
            "model",
            "input_shape",
            f"must begin with at most {MOST_CHANNELS} channels, has {model.input_shape[0]}",
        )
    is_image = len(model.input_shape) == 3 and model.input_type is InputType.FLOAT
    if training.augmentation != "none" and not is_image and config.text is None and config.table is None:
        what = f'is for images ([channels, height, width]), must be "none" for samples of {list(model.input_shape)}'
        yield _wrong(file, "training", "augmentation", what)
    for field, values in (("mean", model.mean), ("std", model.std)):
        if values and len(values) != model.input_shape[0]:
            yield _wrong(
                file, "model", field, f"must have one number per channel ({model.input_shape[0]}), has {len(values)}"
            )


def _odd_statistics(config: JobConfig, file: SettingsFile) -> Iterator[ConfigError]:
    training = config.training
    if training.batch_norm == "trained" and training.fixed_after is not None:
        yield _wrong(file, "training", "fixed_after", 'is a setting of batch_norm = "fixed"; batch_norm is "trained"')
    if training.batch_norm == "fixed" and training.fixed_after is None:
        what = (
            '"fixed" needs fixed_after: after how many rounds the statistics are fixed, such as half of them; 0 where '
            "[model] weights has good ones from the start"
        )
        yield _wrong(file, "training", "batch_norm", what)
    rounds = config.job.rounds
    if training.fixed_after is not None and training.fixed_after >= rounds:
        what = f"must be below [job] rounds ({rounds}), so that some round fixes them, is {training.fixed_after}"
        yield _wrong(file, "training", "fixed_after", what)


def _odd_floats(config: JobConfig, file: SettingsFile) -> Iterator[ConfigError]:
    for name in ("job", "model", "training", "aggregation", "privacy", "table"):
        section = getattr(config, name)
        for field, value in msgspec.structs.asdict(section).items() if section is not None else ():
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, float):
                    continue
                if not math.isfinite(number):
                    yield _wrong(file, name, field, f"must be a finite number, is {number}")
                elif name != "job" and number != 0 and not LEAST_FLOAT <= abs(number) <= MOST_FLOAT:
                    what = f"must be between {LEAST_FLOAT:g} and {MOST_FLOAT:g}, which float32 can be computed with"
                    yield _wrong(file, name, field, f"{what}, is {number}")


def _odd_aggregation(config: JobConfig, file: SettingsFile) -> Iterator[ConfigError]:
    section, devices = config.aggregation, config.job.devices_per_round
    for field, owner in (("trim", "trimmed-mean"), ("max_change", "norm-clipping"), ("faulty", "krum")):
        if getattr(section, field) is not None and section.rule != owner:
            yield _wrong(
                file, "aggregation", field, f'is a setting of the rule "{owner}"; the rule is "{section.rule}"'
            )
    if config.privacy is not None and section.rule != "mean":
        yield _wrong(
            file, "aggregation", "rule", f'must be "mean" with [privacy], which clips by itself, is "{section.rule}"'
        )
    needed, what = _devices_for_rule(aggregation_rule(config))
    if devices < needed:
        yield _wrong(
            file,
            "aggregation",
            "rule",
            f'"{section.rule}" needs [job] devices_per_round to be at least {needed}, is {devices}: {what}',
        )


def _wrong_export(config: JobConfig) -> tuple[str, str] | None:
    """The setting of [export] that does not suit the job, and why."""
    export = config.export
    if export.preprocessing and config.model.input_type is InputType.TOKENS:
        return "preprocessing", "token ids need none; leave it out"
    if export.input_name == export.output_label:
        return "output_name", f"must not be the input's, {quoted(export.input_name)}"
    return None


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


def _odd_classes(model: ModelSection, file: SettingsFile) -> Iterator[ConfigError]:
    classes = model.classes
    count = classes if isinstance(classes, int) else len(classes)
    if not 2 <= count <= MOST_CLASSES:
        yield _wrong(file, "model", "classes", f"must be 2 to {MOST_CLASSES}, is {count}")
    if isinstance(classes, int) or not classes:
        return
    odd = next((name for name in classes if not name.strip() or printable(name) != name), None)
    if odd is not None:
        yield _wrong(file, "model", "classes", f"names must show something, and in one line; {quoted(odd)} does not")
    twice = sorted(name for name, times in Counter(map(normalised, classes)).items() if times > 1)
    if twice:
        yield _wrong(file, "model", "classes", f"must be unique, but {listed(twice)} occurs more than once")
    longest, together = max(map(len, classes)), sum(len(name.encode()) for name in classes)
    if longest > MOST_NAME or together > MOST_NAMES_BYTES:
        yield _wrong(
            file,
            "model",
            "classes",
            f"names must have at most {MOST_NAME} characters, the longest has {longest}, and "
            f"{MOST_NAMES_BYTES} bytes together, of which they have {together}",
        )


def _with_places(config: JobConfig, file: SettingsFile) -> tuple[JobConfig, list[ConfigError]]:
    """The job with absolute paths, without what is not there; and what is wrong with that."""
    test, model = config.test, config.model
    missing: list[ConfigError] = []
    if test is not None and test.data != DIGITS:
        try:
            test = msgspec.structs.replace(test, data=_test_data(file, test.data))
        except ConfigError as error:
            test = None
            missing.append(error)
    if model.weights:
        try:
            model = msgspec.structs.replace(model, weights=_weights(file, model.weights))
        except ConfigError as error:
            model = msgspec.structs.replace(model, weights="")
            missing.append(error)
    config = msgspec.structs.replace(config, test=test, model=model, folder=str(file.folder))
    if config.text is not None and config.text.tokenizer:
        try:
            config = _with_tokenizer(config, config.text.tokenizer, file)
        except ConfigError as error:
            missing.append(error)
    return config, missing


def _with_tokenizer(config: JobConfig, text: str, file: SettingsFile) -> JobConfig:
    path = _path(file, "text", "tokenizer", text)
    try:
        return with_tokenizer(config, path)
    except ConfigError as error:
        raise _wrong(file, "text", "tokenizer", str(error)) from None


def _test_data(file: SettingsFile, text: str) -> str:
    data = _path(file, "test", "data", text)
    if not data.exists():
        near = f'; give a folder or "{DIGITS}"'
        raise _wrong(file, "test", "data", f"{printable(str(data))} does not exist{near}")
    return str(data)


def _weights(file: SettingsFile, text: str) -> str:
    weights = _path(file, "model", "weights", text)
    if not weights.is_file():
        what = "is not a file" if weights.exists() else "does not exist"
        raise _wrong(file, "model", "weights", f"{printable(str(weights))} {what}")
    return str(weights)


def _path(file: SettingsFile, section: str, field: str, text: str) -> Path:
    try:
        return settings_path(file.folder, text)
    except ConfigError as error:
        raise _wrong(file, section, field, str(error)) from None
