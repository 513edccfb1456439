"""What may change in a job file between two starts of its coordinator, and what was changed.

A job is compared by what its settings mean: a number of classes and their names, written out, are the same.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fedepth.errors import ConfigError
from fedepth.files import file_digest
from fedepth.job import model_spec, section_types
from fedepth.job_sections import JobConfig, ModelSection
from fedepth.printable import shortened

Settings = Mapping[str, Any]  # "training.batch" to a value that JSON can hold

ACCEPT_OPTION = "--accept-changes"
_MOST_LISTED = 4  # values of a list; of a longer one the first that differs is shown
_MOST_SHOWN = 80  # characters of a value


class Kind(enum.Enum):
    """What a coordinator does with a setting that has changed."""

    TAKEN_OVER = "taken over"
    ASKS = "asks"  # the rounds before were trained in another way; only with ACCEPT_OPTION
    REFUSED = "refused"  # what was trained, recorded or accounted for would not fit


# Every setting of a job file. A test fails for one that is missing.
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(
        (
            "job.name",
            "job.rounds",
            "job.devices_per_round",
            "job.quorum",
            "job.round_deadline_s",
            "job.gather_s",
            "job.lease_s",
            "test.data",
            "test.most_damaged",
            "export.every",
            "export.opset",
            "export.precision",
            "export.preprocessing",
            "export.output",
            "export.input_name",
            "export.output_name",
            "guard.largest_drop",
            "guard.pause_after",
            "guard.learn_norms",
            "retention.keep_last",
            "retention.keep_best",
            "retention.keep_every",
            "retention.history",
            "limits.samples_per_device",
            "limits.devices",
        ),
        Kind.TAKEN_OVER,
    ),
    **dict.fromkeys(
        (
            "job.policy",
            "training.local_epochs",
            "training.learning_rate",
            "training.learning_rate_end",
            "training.schedule",
            "training.momentum",
            "training.weight_decay",
            "training.proximal_mu",
            "training.augmentation",
            "training.cache_type",
            "training.batch_norm",
            "training.fixed_after",
            "training.distil",
            "training.distil_weight",
            "training.distil_temperature",
            "training.mutual",
            "training.mutual_weight",
            "training.mutual_temperature",
            "transfer.encoding",
            "aggregation.rule",
            "aggregation.trim",
            "aggregation.max_change",
            "aggregation.faulty",
            "privacy.clip_norm",  # every round keeps what noise it was closed with, and ε is of all of them
            "privacy.noise_multiplier",
            "privacy.delta",
        ),
        Kind.ASKS,
    ),
    **dict.fromkeys(
        (
            "job.seed",
            "model.name",
            "model.classes",
            "model.first_label",
            "model.input_shape",
            "model.mean",
            "model.std",
            "model.weights",
            "model.input_type",
            "text.label",
            "text.text",
            "text.length",
            "text.vocabulary",
            "text.tokenizer",
            "table.label",
            "table.numeric",
            "table.mean",
            "table.std",
            "table.categorical",
            "training.batch",
            "training.optimizer",
            "tuning.embeddings",
            "tuning.last_units",
            "tuning.new_classifier",
            "training.heads",  # the global weights hold those of auxiliary heads
        ),
        Kind.REFUSED,
    ),
}


@dataclass(frozen=True)
class Change:
    """One setting, as it was and as it is now."""

    setting: str
    before: Any
    now: Any

    @property
    def kind(self) -> Kind:
        return KINDS[self.setting]

    def __str__(self) -> str:
        section, _, field = self.setting.partition(".")
        before, now = self.before, self.now
        if isinstance(before, list) and isinstance(now, list):
            if len(before) != len(now) and max(len(before), len(now)) > _MOST_LISTED:
                return f"[{section}] {field} from {len(before)} values to {len(now)}"
            if len(before) == len(now) > _MOST_LISTED:
                place = next(index for index, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
                return f"[{section}] {field}[{place}] from {_shown(before[place])} to {_shown(now[place])}"
        return f"[{section}] {field} from {_shown(before)} to {_shown(now)}"


def settings_of(config: JobConfig) -> dict[str, Any]:
    """The settings of a job, with defaults filled in where they follow from others; None in a section that is absent.

    Instead of the path of a file with weights, or a tokenizer, there is its digest: the file may move.

    Raises:
        ConfigError: that file cannot be read.
    """
    found: dict[str, Any] = {}
    for section, kind in section_types().items():
        held = getattr(config, section)
        values = {} if held is None else msgspec.to_builtins(held)
        found.update({f"{section}.{field}": values.get(field) for field in kind.__struct_fields__})
    spec = msgspec.to_builtins(model_spec(config))
    # With all defaults in place. What the other sections say of rows is compared there.
    found.update({f"model.{field}": spec[field] for field in ModelSection.__struct_fields__ if field in spec})
    found["job.quorum"] = config.job.needed
    if config.model.weights:
        try:
            found["model.weights"] = f"sha256:{file_digest(Path(config.model.weights))}"
        except OSError as error:
            raise ConfigError(f"[model] weights: {config.model.weights} cannot be read: {error.strerror}") from None
    if config.tokenizer_digest:
        found["text.tokenizer"] = f"sha256:{config.tokenizer_digest}"
    as_recorded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(found))
    return as_recorded


def recorded_settings(held: Settings) -> Settings:
    """What a record says of all settings; those that are newer than it had their defaults."""
    defaults = {
        f"{section}.{field.name}": field.default
        for section, kind in section_types().items()
        for field in msgspec.structs.fields(kind)
        if field.default is not msgspec.NODEFAULT
    }
    return {**msgspec.to_builtins(defaults), **held}


def differences(before: Settings, now: Settings) -> list[Change]:
    """What has changed, in the order of the job file. What `before` does not know is not compared."""
    return [Change(name, before[name], now[name]) for name in now if name in before and before[name] != now[name]]


def refusal(changes: Sequence[Change], where: str, accept: bool) -> str:
    """Why a job does not go on as its file says now, all settings at once, and what to do; "" if it does.

    Args:
        where: names the state.
        accept: what asks for ACCEPT_OPTION has it.
    """
    refused = [change for change in changes if change.kind is Kind.REFUSED]
    asking = [change for change in changes if change.kind is Kind.ASKS and not accept]
    sentences = []
    if refused:
        sentences.append(
            f"{where} holds a job that has begun, and its file now changes {_listed(refused)}, which a job keeps: put "
            f"{'the old value' if len(refused) == 1 else 'the old values'} back, or start another job with another "
            "--state"
        )
    if asking:
        sentences.append(
            f"the job file changes {_listed(asking)} in the middle of the job{'' if refused else f' in {where}'}: add "
            f"{ACCEPT_OPTION} to train the rounds to come in this way, or put "
            f"{'the old value' if len(asking) == 1 else 'the old values'} back"
        )
    return "; ".join(sentences)


def _listed(changes: Iterable[Change]) -> str:
    return ", ".join(map(str, changes))


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return shortened(msgspec.json.encode(value).decode(), _MOST_SHOWN)
