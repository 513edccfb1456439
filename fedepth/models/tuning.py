"""Which units of a model are trained, as a job's [tuning] says: the rest is frozen, as if its author had done it. No
torch.

A frozen unit is run as in evaluation: without dropout, and with the running statistics of its BatchNorm. Its tensors
have no gradient, no optimizer state, no weight decay and no place in an update.
"""

from __future__ import annotations

from msgspec import structs

from fedepth.errors import ModelError
from fedepth.job_sections import TuningSection
from fedepth.models.fixed_statistics import with_units
from fedepth.models.graph import Graph, Unit


def tuned(graph: Graph, tuning: TuningSection, name: str) -> Graph:
    """The graph with only those units trained that are to be.

    Args:
        name: the model's, for messages.

    Raises:
        ModelError: it has fewer units than are to be trained, or nothing is left that could be.
    """
    count = len(graph.units)
    frozen = embeddings(graph) if tuning.embeddings == "frozen" else 0
    if tuning.last_units is not None:
        if tuning.last_units > count:
            raise ModelError(
                f"[tuning] last_units is {tuning.last_units}, but {name} has {count} units before its head; lower it, "
                "or leave it out to train all of them"
            )
        frozen = max(frozen, count - tuning.last_units)
    if not frozen:
        return graph
    units = (*map(_frozen, graph.units[:frozen]), *graph.units[frozen:])
    if not any(unit.parameters for unit in (*units, graph.head)):
        raise ModelError(
            f"[tuning] leaves nothing of {name} to train: it has {count} units, of which the first {frozen} are "
            "frozen, and a head without parameters; raise last_units"
        )
    return with_units(graph, units, graph.head)


def embeddings(graph: Graph) -> int:
    """How many units come before the first one behind which a block may end; at least 1.

    Of a Vision Transformer that is the embedding of patches and positions with the class token: behind it no block may
    end. Of a convolutional network it is the first convolution.
    """
    return max(1, graph.exits.index(True))


def described(graph: Graph, before: Graph) -> str:
    """For people: what is trained of the units of `before`; empty if that is all."""
    frozen = [unit for unit, was in zip(graph.units, before.units, strict=True) if unit is not was]
    if not frozen:
        return ""
    trained = len(graph.units) - len(frozen)
    return (
        f"[tuning] freezes the first {len(frozen)} of {len(graph.units)} units, up to {frozen[-1].name}; "
        f"{f'the last {trained} and the head are' if trained else 'the head alone is'} trained"
    )


def _frozen(unit: Unit) -> Unit:
    return structs.replace(unit, parameters=(), written=(), fixed=unit.tensor_names, training=unit.evaluation)
