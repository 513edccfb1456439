"""New global weights from updates by a rule, streamed from files to a file.

Memory is a few slices of 512 KiB or one stack of 16 MiB, whatever the size of the model and the number of updates. Sums
run in float64 over the updates in the order of their files' paths, so that the result is the same to the last bit, in
whatever order they came.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedepth.aggregation.clipping import Clipped, clip
from fedepth.aggregation.coordinates import median, trimmed_mean
from fedepth.aggregation.krum import choose, groups
from fedepth.aggregation.mean import Term, weighted_mean
from fedepth.aggregation.privacy import NoisyMean
from fedepth.aggregation.rules import Kind, Krum, Median, NormClipping, PrivateMean, Rule, TrimmedMean, WeightedMean
from fedepth.aggregation.updates import ClientUpdate, OpenUpdate, check_digests, is_floating, open_updates
from fedepth.errors import ConfigError, NotFiniteError
from fedepth.files import disk_errors
from fedepth.layout import DTYPES
from fedepth.weights import Array, Reader, open_weights, write_tensors

Values = Callable[[str], Iterator[Array]]


@dataclass(frozen=True)
class Aggregated:
    """New weights, and what people should be told of how they came about. Updates are named by index.

    Attributes:
        digest: sha256 (hex) of the file.
        clipped: what was scaled down (NormClipping).
        left_out: updates that were not taken (Krum).
        unjudged: updates that were taken without being judged, because there were too few to compare with
            (NormClipping, Krum).
        notes: sentences on what the rule could not do.
    """

    digest: str
    clipped: tuple[Clipped, ...] = ()
    left_out: tuple[int, ...] = ()
    unjudged: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Round:
    """What a rule works on."""

    old: Reader
    updates: Sequence[OpenUpdate]
    holders: Mapping[str, Sequence[OpenUpdate]]
    parameters: Collection[str]

    def is_parameter(self, name: str) -> bool:
        return name in self.parameters and is_floating(self.old, name)


def aggregate(
    base: Path,
    updates: Sequence[ClientUpdate],
    output: Path,
    rule: Rule,
    *,
    parameters: Collection[str] | None = None,
    base_digest: str | None = None,
) -> Aggregated:
    """Combines `updates` of `base` by `rule` into `output`.

    `output` is replaced at the end, atomically and durably; an error leaves it as it was.

    Every file whose digest is known is checked against it immediately before. Integer tensors get the rounded value,
    computed in float64: exact up to 2^53. `output` may be `base`. Without updates it has the values of `base`, with
    noise under `PrivateMean`.

    Args:
        base: the weights that the updates were trained from.
        updates: in any order.
        output: what to write.
        rule: how to combine them.
        parameters: the names of all trainable parameters of the model; other floating-point tensors are buffers. Needed
            by the rules that tell them apart: NormClipping, Krum, PrivateMean.
        base_digest: the sha256 (hex) that `base` is recorded with.

    Raises:
        DamagedUpdateError: parts of updates are not what was accepted; names all of them.
        NotFiniteError: a new value would not be a finite number; names the tensor.
        StateError: an update does not fit `base` or another file is damaged, a weight is not above 0, or the same file
            is given twice.
        ConfigError: the rule needs `parameters`.
        DiskError: `output` cannot be written.
    """
    if parameters is None and isinstance(rule, NormClipping | Krum | PrivateMean):
        raise ConfigError(f"{type(rule).__name__} tells parameters from buffers: give parameters")
    with disk_errors("the average cannot be written", output):
        return _aggregated(base, updates, output, rule, frozenset(parameters or ()), base_digest)


def _aggregated(
    base: Path,
    updates: Sequence[ClientUpdate],
    output: Path,
    rule: Rule,
    parameters: frozenset[str],
    base_digest: str | None,
) -> Aggregated:
    check_digests(base, base_digest, updates)
    # What overflows is found in the result.
    with open_weights(base) as old, np.errstate(over="ignore", invalid="ignore"):
        opened = open_updates(old, updates)
        holders = {name: [update for update in opened if name in update.tensors] for name in old.names}
        values, told = _apply(rule, _Round(old, opened, holders, parameters))
        infos = {name: old.info(name) for name in old.names}
        digest = write_tensors(output, infos, lambda name: _finished(old, name, values(name)))
    return replace(told, digest=digest)


def _apply(rule: Rule, work: _Round) -> tuple[Values, Aggregated]:
    """What gives each tensor its new value, and what there is to tell. A tensor without values keeps its own."""
    match rule:
        case WeightedMean():
            return lambda name: _mean(work.old, name, work.holders[name]), Aggregated("")
        case TrimmedMean():
            return lambda name: _trimmed(name, work.holders[name], rule), _too_few_to_trim(work, rule)
        case Median():
            return lambda name: _median(name, work.holders[name]), _too_few_for_a_median(work)
        case NormClipping():
            return _clip(work, rule)
        case Krum():
            return _krum(work, rule)
        case PrivateMean():
            return _private(work, rule)


def _mean(old: Reader, name: str, holders: Sequence[OpenUpdate]) -> Iterator[Array]:
    if holders:
        yield from weighted_mean(old, name, [Term(update.tensors[name], update.update.weight) for update in holders])


def _trimmed(name: str, holders: Sequence[OpenUpdate], rule: TrimmedMean) -> Iterator[Array]:
    if holders:
        yield from trimmed_mean([update.tensors[name] for update in holders], name, rule.cut(len(holders)))


def _median(name: str, holders: Sequence[OpenUpdate]) -> Iterator[Array]:
    if holders:
        yield from median([update.tensors[name] for update in holders], name)


def _too_few_to_trim(work: _Round, rule: TrimmedMean) -> Aggregated:
    few = [name for name, holders in work.holders.items() if holders and rule.cut(len(holders)) == 0]
    if not few:
        return Aggregated("")
    most = max(len(work.holders[name]) for name in few)
    note = (
        f"{len(few)} tensors, such as {few[0]}, were trained by {most} devices or fewer, too few to cut off "
        f"{rule.trim:g} of them at each end: they got the plain mean"
    )
    return Aggregated("", notes=(note,))


def _too_few_for_a_median(work: _Round) -> Aggregated:
    few = [name for name, holders in work.holders.items() if 0 < len(holders) < 3]
    if not few:
        return Aggregated("")
    note = f"{len(few)} tensors, such as {few[0]}, were trained by 1 or 2 devices, whose median is their mean"
    return Aggregated("", notes=(note,))


def _clip(work: _Round, rule: NormClipping) -> tuple[Values, Aggregated]:
    scales, clipped, unjudged = clip(work.old, work.updates, work.parameters, rule.max_change)

    def term(update: OpenUpdate, name: str) -> Term:
        kind: Kind = "parameters" if work.is_parameter(name) else "buffers"
        scale = scales[update.index, kind] if is_floating(work.old, name) else 1.0
        return Term(update.tensors[name], update.update.weight, scale)

    def values(name: str) -> Iterator[Array]:
        holders = work.holders[name]
        if holders:
            yield from weighted_mean(work.old, name, [term(update, name) for update in holders])

    return values, Aggregated("", clipped=tuple(clipped), unjudged=tuple(unjudged))


def _krum(work: _Round, rule: Krum) -> tuple[Values, Aggregated]:
    chosen: set[int] = set()
    unjudged: list[int] = []
    notes = []
    for group in groups(work.updates):
        if len(group) < rule.smallest_group:
            unjudged += [update.index for update in group]
            notes.append(
                f"{len(group)} updates of the same {len(group[0].tensors)} tensors are too few to find {rule.faulty} "
                f"faulty ones among them, which takes {rule.smallest_group}: they were taken as they are"
            )
            chosen.update(update.index for update in group)
        else:
            names = sorted(name for name in group[0].tensors if work.is_parameter(name))
            chosen.update(update.index for update in choose(group, names, rule.faulty))

    def values(name: str) -> Iterator[Array]:
        holders = [update for update in work.holders[name] if update.index in chosen]
        return _mean(work.old, name, holders) if work.is_parameter(name) else _median(name, holders)

    left_out = sorted({update.index for update in work.updates} - chosen)
    return values, Aggregated("", left_out=tuple(left_out), unjudged=tuple(sorted(unjudged)), notes=tuple(notes))


def _private(work: _Round, rule: PrivateMean) -> tuple[Values, Aggregated]:
    names = [name for name in work.old.names if work.is_parameter(name)]
    noisy = NoisyMean(work.old, work.updates, names, rule)
    kept = [name for name, holders in work.holders.items() if holders and not work.is_parameter(name)]

    def values(name: str) -> Iterator[Array]:
        return noisy.values(name) if work.is_parameter(name) else iter(())

    if not kept:
        return values, Aggregated("")
    note = f"{len(kept)} buffers, such as {kept[0]}, stay as they are under differential privacy"
    return values, Aggregated("", notes=(note,))


def _finished(old: Reader, name: str, values: Iterator[Array]) -> Iterator[Array]:
    """New values in the tensor's own type, or its old ones where there are none."""
    dtype = np.dtype(DTYPES[old.info(name)[0]])
    count = 0
    for value in values:
        # Rounding here: a cast to an integer type would cut off instead.
        cast = (value if is_floating(old, name) else np.rint(value)).astype(dtype)
        wrong = value.size - int(np.isfinite(value if cast.dtype.kind != "f" else cast).sum())
        if wrong:
            raise NotFiniteError(
                f"{wrong} elements of {name} would not be finite numbers; nothing was written", tensor=name
            )
        yield cast
        count += 1
    if not count:
        yield from old.slices(name)
