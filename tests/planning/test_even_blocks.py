"""The paper's plans by tier: the smallest budget for a number of blocks makes them even."""

from __future__ import annotations

import pytest

from fedepth.costs import Size
from fedepth.plan import Policy
from fedepth.planning.planner import make_plan
from fedepth.task import TrainingSpec
from tests.unit_costs import model_costs, unit_cost

MIB = 1 << 20
TRAINING = TrainingSpec(128, 1, "sgd", 0.01, 0.9, 0.0, 0.0, "none", 1)
LAYERS = 12
COSTS = model_costs(
    *(
        unit_cost(
            f"layer {number}",
            parameter_bytes=2 * MIB,
            input_bytes=12 << 10,
            output_bytes=12 << 10,
            saved=Size(0, 100 << 10),
            flops=1_000_000,
            exit_=unit_cost("head", parameter_bytes=MIB >> 4, input_bytes=12 << 10),
        )
        for number in range(LAYERS)
    ),
    input_bytes=12 << 10,
    raw_input_bytes=3 << 10,
)


def blocks_at(mib: int) -> list[int]:
    """How many layers each block has."""
    plan = make_plan(COSTS, budget_bytes=mib * MIB, training=TRAINING, sample_count=1000, policy=Policy.PAPER)
    return [stage.last - stage.first + 1 for stage in plan.stages]


@pytest.mark.parametrize(("blocks", "layers"), [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)])
def test_the_first_budget_for_a_number_of_blocks_makes_them_even(blocks: int, layers: int) -> None:
    low, high = 10, 1000
    assert len(blocks_at(high)) == 1
    while high - low > 1:  # the fewer blocks, the larger the budget
        middle = (low + high) // 2
        fits = middle >= 35 and len(blocks_at(middle)) <= blocks
        low, high = (low, middle) if fits else (middle, high)
    assert blocks_at(high) == [layers] * blocks
