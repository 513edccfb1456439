"""Costs of units in a few words, for tests that work out by hand what a model needs."""

from __future__ import annotations

from dataclasses import replace

from fedepth.costs import Calibration, Convolution, ModelCosts, PassCost, Size, StepCost, UnitCost

ZERO = Size(0, 0)
NOTHING = PassCost(ZERO)


def unit_cost(
    name: str = "u",
    *,
    parameter_bytes: int = 0,
    input_bytes: int = 0,
    output_bytes: int = 0,
    saved: Size = ZERO,
    saves_output: bool = False,
    flops: int = 1,
    convolutions: tuple[Convolution, ...] = (),
    exit_: UnitCost | None = None,
) -> UnitCost:
    """A unit that keeps its input and `saved`, and needs nothing on top; all parameters in one tensor.

    Its convolutions run in every pass.
    """
    cost = PassCost(ZERO, convolutions)
    return UnitCost(
        name=name,
        parameter_bytes=parameter_bytes,
        buffer_bytes=0,
        largest_parameter_bytes=parameter_bytes,
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        training=StepCost(saved, True, saves_output, cost, cost),
        backward_first=cost,
        inference=cost,
        flops=flops,
        exit=exit_,
    )


def model_costs(
    *units: UnitCost, input_bytes: int, raw_input_bytes: int, calibration: Calibration | None = None
) -> ModelCosts:
    return ModelCosts("hand", units, input_bytes, raw_input_bytes, 1, calibration or Calibration())


def through(unit: UnitCost) -> UnitCost:
    """The same unit; frozen it costs what it costs in training."""
    return replace(unit, frozen=unit.training)
