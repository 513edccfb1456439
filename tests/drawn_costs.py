"""Cost tables that Hypothesis draws, for planner, explanation and timeline alike."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from fedepth.costs import Calibration, Convolution, ModelCosts, PassCost, Size, StepCost, UnitCost

sizes = st.builds(Size, st.integers(0, 1000), st.integers(0, 5000))
convolutions = st.lists(
    st.builds(Convolution, st.integers(0, 1000), st.integers(0, 1000), sizes, sizes), max_size=2
).map(tuple)
passes = st.builds(PassCost, sizes, convolutions)
steps = st.builds(StepCost, sizes, st.booleans(), st.booleans(), passes, passes)
units = st.builds(
    UnitCost,
    name=st.just("u"),
    parameter_bytes=st.integers(0, 200_000),
    buffer_bytes=st.integers(0, 1000),
    largest_parameter_bytes=st.integers(0, 1000),
    input_bytes=st.integers(1, 5000),
    output_bytes=st.integers(1, 5000),
    training=steps,
    backward_first=passes,
    inference=passes,
    flops=st.integers(0, 10**9),
    fixed_bytes=st.integers(0, 20_000),
    frozen=st.none(),
    exit=st.none(),
)


@st.composite
def models(draw: st.DrawFn, calibration: Calibration) -> ModelCosts:
    """A model of one to six units on a device with this calibration; not every unit has an exit or may be a frozen
    suffix, and the model's author may have frozen the first ones."""
    count = draw(st.integers(1, 6))
    head = draw(units)
    drawn = [
        replace(draw(units), frozen=draw(st.none() | steps), exit=draw(st.none() | units)) for _ in range(count - 1)
    ]
    for index in range(min(draw(st.sampled_from((0, 0, 0, 1, 2))), len(drawn))):
        drawn[index] = replace(
            drawn[index], parameter_bytes=0, buffer_bytes=0, largest_parameter_bytes=0, fixed_bytes=10_000
        )
    return ModelCosts(
        "drawn",
        (*drawn, replace(draw(units), frozen=draw(st.none() | steps), exit=head)),
        input_bytes=1000,
        raw_input_bytes=250,
        smallest_micro_batch=draw(st.integers(1, 2)),
        calibration=calibration,
    )
