"""The job file: one TOML file that says what is trained, by how many devices, and how; and each round's learning rate.

Every message names the field, as `job.toml: [training] learning_rate: must be above 0, is -0.1`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedepth.errors import ConfigError
from fedepth.plan import CacheType, Policy
from fedepth.settings import read_toml, suggestion, violation
from fedepth.task import InputType, ModelSpec, TrainingSpec

DIGITS = "digits"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MISSING = re.compile(r"missing required field `(\w+)`")

AtLeastOne = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


class JobSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[job]: the rounds.

    Attributes:
        quorum: updates a round needs before it may close; by default more than half of `devices_per_round`.
        gather_s: how long a round waits for more devices before it draws.
        round_deadline_s: after it a round closes with its quorum.
        lease_s: a task without a sign of life for this long is lost.
    """

    name: str
    rounds: AtLeastOne = 10
    devices_per_round: AtLeastOne = 2
    quorum: AtLeastOne | None = None
    round_deadline_s: Positive = 3600.0
    gather_s: NotNegative = 5.0
    lease_s: Positive = 60.0
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    policy: Literal["paper", "auto"] = "auto"

    @property
    def needed(self) -> int:
        """The quorum in force."""
        return self.devices_per_round // 2 + 1 if self.quorum is None else self.quorum


class ModelSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[model]: `classes` are the names in label order, or a number n for "0" to "n-1".

    Attributes:
        weights: a local file with weights to begin with, relative to the job file; empty for fresh ones.
        input_type: what the data holds: numbers, or token ids.
    """

    name: str
    classes: tuple[str, ...] | int
    input_shape: tuple[AtLeastOne, ...]
    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()
    weights: str = ""
    input_type: InputType = InputType.FLOAT


class TrainingSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[training]: what one device does in one round; the learning rate moves over the rounds."""

    batch: AtLeastOne = 32
    local_epochs: AtLeastOne = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.05
    learning_rate_end: NotNegative = 0.0
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 0.0
    proximal_mu: NotNegative = 0.0
    augmentation: Literal["none", "crop-flip"] = "none"
    cache_type: CacheType = CacheType.FLOAT32


class TestSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[test]: what every round's model is evaluated on: a folder relative to the job file, or "digits"."""

    __test__ = False  # the name is the section's, not a test's

    data: str


class ExportSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[export]: an ONNX file every so many rounds; 0 for only at the end."""

    every: Annotated[int, Meta(ge=0)] = 0


class JobConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job file that has passed every check.

    `test.data` is absolute or "digits", `model.weights` absolute or empty.
    """

    job: JobSection
    model: ModelSection
    test: TestSection
    training: TrainingSection = TrainingSection()
    export: ExportSection = ExportSection()


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
    sections = {field.name: field.type for field in msgspec.structs.fields(JobConfig)}
    for section, content in tables.items():
        if section not in sections:
            raise ConfigError(f"{file}: [{section}]: no such section{suggestion(section, sections)}")
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: [{section}]: must be a section, is {content!r}")
        known = {field.name for field in msgspec.structs.fields(sections[section])}
        for key in content:
            if key not in known:
                raise ConfigError(f"{file}: [{section}] {key}: no such setting{suggestion(key, known)}")


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
    for name in ("job", "training"):
        for field, value in msgspec.structs.asdict(getattr(config, name)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{file}: [{name}] {field}: must be a finite number, is {value}")
    if not _NAME.fullmatch(job.name):
        raise ConfigError(f"{file}: [job] name: must be 1 to 64 letters, digits, '.', '_' or '-', is {job.name!r}")
    if job.needed > job.devices_per_round:
        raise ConfigError(
            f"{file}: [job] quorum: must be at most devices_per_round ({job.devices_per_round}), is {job.needed}"
        )
    if training.learning_rate_end > training.learning_rate:
        raise ConfigError(
            f"{file}: [training] learning_rate_end: must be at most learning_rate, "
            f"{training.learning_rate}, is {training.learning_rate_end}"
        )
    if not model.name:
        raise ConfigError(f"{file}: [model] name: must not be empty")
    _check_classes(model, file)
    if not 1 <= len(model.input_shape) <= 3:
        raise ConfigError(
            f"{file}: [model] input_shape: must be [channels, height, width] for images, or one or two numbers for "
            f"vectors, series and token ids; has {len(model.input_shape)} numbers"
        )
    for field, values in (("mean", model.mean), ("std", model.std)):
        if values and len(values) != model.input_shape[0]:
            raise ConfigError(
                f"{file}: [model] {field}: must have one number per channel ({model.input_shape[0]}), has {len(values)}"
            )
        if not all(math.isfinite(value) for value in values):
            raise ConfigError(f"{file}: [model] {field}: must be finite numbers, is {list(values)}")


def _check_classes(model: ModelSection, file: str) -> None:
    classes = model.classes
    count = classes if isinstance(classes, int) else len(classes)
    if count < 2:
        raise ConfigError(f"{file}: [model] classes: must be at least 2, is {count}")
    if not isinstance(classes, int) and len(set(classes)) != count:
        twice = sorted({name for name in classes if classes.count(name) > 1})
        raise ConfigError(f"{file}: [model] classes: must be unique, but {', '.join(twice)} occurs more than once")


def _with_test_path(config: JobConfig, path: Path) -> JobConfig:
    if config.test.data == DIGITS:
        return config
    data = (path.parent / config.test.data).resolve()
    if not data.exists():
        raise ConfigError(f'{path.name}: [test] data: {data} does not exist; give a folder or "{DIGITS}"')
    return msgspec.structs.replace(config, test=TestSection(data=str(data)))


def _with_weights_path(config: JobConfig, path: Path) -> JobConfig:
    if not config.model.weights:
        return config
    weights = (path.parent / config.model.weights).resolve()
    if not weights.is_file():
        raise ConfigError(f"{path.name}: [model] weights: {weights} is not a file")
    return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, weights=str(weights)))
