"""The experiments on depth: by budget, by number of blocks, of parts of a model, and against slices of its width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from benchmarks.experiments.ground import EVERYTHING, Ground, Setup
from fedepth.plan import Plan, Policy
from fedepth.planning.explain import explain, ladder
from fedepth.planning.planner import make_plan, smallest_peak

_RUNGS = 6
_BLOCKS = (1, 2, 3, 5, 9)
_FEW_BLOCKS, _MANY_EPOCHS = (1, 2, 5), 8
_LAST_UNITS = 3  # what the weakest clients can train: of PreResNet-20 those at the highest width
_SHARES = (Fraction(1, 2), Fraction(3, 4))  # of clients so weak
_WIDTHS = 16  # widths to choose from are sixteenths
_SAME = 1.05  # peaks that differ by less are taken for the same memory


def budgets(ground: Ground) -> Iterator[Setup]:
    """The plans of the paper's policy, from the smallest to full training, and what policy "auto" makes of the smallest
    budget."""
    costs, training, samples = ground.whole.costs, ground.training, ground.samples
    rungs = ladder(
        costs, most_bytes=EVERYTHING, training=training, sample_count=samples, policy=Policy.PAPER, count=_RUNGS
    )
    for number, rung in enumerate(rungs, 1):
        yield ground.everyone(f"paper-{number}", rung.plan)
    least = rungs[0].budget_bytes
    plan = make_plan(costs, budget_bytes=least, training=training, sample_count=samples, policy=Policy.AUTO)
    yield ground.everyone("auto-1", plan)


def blocks(ground: Ground) -> Iterator[Setup]:
    """The model in 1 to 9 blocks, as far as it has units, of as equal numbers of them as can be; the larger ones come
    first, where a unit, the stem, is a small one."""
    units = len(ground.whole.costs.units)
    for count in _BLOCKS:
        if count <= units:
            yield ground.everyone(f"blocks-{count}", ground.pinned(*even(units, count)))


def epochs(ground: Ground) -> Iterator[Setup]:
    """A few numbers of blocks, with the usual local epochs and with more of them."""
    few = ground.scale.epochs
    for number in (few, few * _MANY_EPOCHS):
        for count in _FEW_BLOCKS:
            plan = ground.pinned(*even(len(ground.whole.costs.units), count))
            yield replace(ground.everyone(f"blocks-{count}-epochs-{number}", plan), epochs=number)


def even(units: int, count: int) -> list[tuple[int, int]]:
    """So many blocks of about equal numbers of units.

    >>> even(10, 3)
    [(0, 3), (4, 6), (7, 9)]
    """
    ends = [-(-units * number // count) for number in range(count + 1)]
    return [(first, following - 1) for first, following in pairwise(ends)]


def partial(ground: Ground) -> Iterator[Setup]:
    """A share of the clients trains the last units only; for comparison it is left out, or trains everything."""
    units, clients = len(ground.whole.costs.units), ground.scale.clients
    whole, last = ground.pinned((0, units - 1)), ground.pinned((units - _LAST_UNITS, units - 1))
    yield ground.everyone("all-train-all", whole)
    yield ground.everyone("all-train-last", last)
    for share in _SHARES:
        weak = int(clients * share)
        facts = {"weak_clients": weak, "weak": ground.facts(last), "others": ground.facts(whole)}
        percent = f"{float(share):.0%}".rstrip("%")
        plans = [last] * weak + [whole] * (clients - weak)
        yield Setup(f"{percent}-train-last", plans, facts=facts)
        yield Setup(f"{percent}-left-out", plans, drawn_from=range(weak, clients), facts=facts)


def slices(ground: Ground) -> Iterator[Setup]:
    """By depth, layer by layer and by width, at memory that was measured to be the same: what training one unit at a
    time takes, and half of what full training takes. The nearest below is taken, or 5 % more."""
    units = len(ground.whole.costs.units)
    full = ground.pinned((0, units - 1))
    yield ground.everyone("full", full)
    layers = ground.pinned(*((unit, unit) for unit in range(units)))
    least, half = int(ground.peak(layers) * _SAME), int(ground.peak(full) / 2 * _SAME)
    yield ground.everyone("layer-wise", layers)
    for name, most in (("least", least), ("half", half)):
        yield ground.everyone(f"depth-{name}", _coarsest(ground, most))
        width = _widest(ground, most)
        model = ground.network(width)
        yield ground.everyone(f"width-{name}", ground.pinned((0, units - 1), model=model), width)


def _coarsest(ground: Ground, most: int) -> Plan:
    """The plan with the fewest blocks that trains all units within so much memory, as measured."""
    costs, training, samples = ground.whole.costs, ground.training, ground.samples
    least = smallest_peak(costs, training, samples, Policy.PAPER)
    found = explain(costs, budget_bytes=least, training=training, sample_count=samples, policy=Policy.PAPER)
    plans = [each.plan for each in found.coarser]
    layers = ground.pinned(*((unit, unit) for unit in range(len(costs.units))))
    return next((plan for plan in reversed(plans) if ground.peak(plan) <= most), layers)


def _widest(ground: Ground, most: int) -> Fraction:
    """The widest network that trains in full within so much memory, as measured."""

    def fits(sixteenths: int) -> bool:
        width = Fraction(sixteenths, _WIDTHS)
        model = ground.network(width)
        plan = ground.pinned((0, len(model.costs.units) - 1), model=model)
        return ground.peak(plan, width) <= most

    def find() -> int:
        low, high = 1, _WIDTHS  # some memory is needed by the narrowest network, too
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    return Fraction(int(ground.remembered(f"sixteenths within {most}", find)), _WIDTHS)
