"""The updates of a round, as they were recorded, become new weights; what there is to tell of it, in sentences.

No numpy until there is something to combine: a coordinator that waits loads this module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedepth.aggregation.rules import Rule
from fedepth.task import Result, TrainingSpec

Paths = Callable[[Result], tuple[Path, ...]]


@dataclass(frozen=True)
class Combined:
    """New weights, and what there is to tell of them.

    Attributes:
        digest: sha256 (hex) of their file.
    """

    digest: str
    notes: tuple[str, ...]


def combine(
    rule: Rule,
    training: TrainingSpec,
    base: Path,
    results: Sequence[Result],
    paths: Paths,
    output: Path,
    *,
    parameters: Collection[str],
    base_digest: str | None,
) -> Combined:
    """Writes what a rule makes of updates to `output`.

    Args:
        training: of the job, which bounds what is believed of numbers of steps.
        base: the weights that the updates were trained from.
        base_digest: the sha256 (hex) that they must have; None if that has just been seen.
        paths: where the parts of an update lie.
        parameters: the names of the model's trainable parameters.

    Raises:
        NotFiniteError: a new value would be no finite number; nothing is written.
        DamagedUpdateError: parts are not what was accepted.
        DiskError: it cannot be written now.
        StateError: an update does not fit the weights, or the weights are damaged.
    """
    from fedepth.aggregation.aggregate import aggregate
    from fedepth.aggregation.updates import ClientUpdate

    updates = [
        ClientUpdate(
            paths(result),
            float(result.sample_count),
            tuple(part.digest for part in result.parts),
            result.steps(training),
        )
        for result in results
    ]
    told = aggregate(base, updates, output, rule, parameters=parameters, base_digest=base_digest)
    names = [result.device_id for result in results]
    notes = [
        f"the {each.kind} of {names[each.update]} changed by {each.change:.3g}, and count as if by {each.bound:.3g}"
        for each in told.clipped
    ]
    if told.left_out:
        notes.append(f"left out, being far from the others: {', '.join(names[index] for index in told.left_out)}")
    if told.unjudged:
        notes.append(f"taken without being judged, for want of others: {', '.join(names[i] for i in told.unjudged)}")
    return Combined(told.digest, (*notes, *told.notes))
