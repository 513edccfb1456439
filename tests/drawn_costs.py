"""Cost tables that Hypothesis draws, for planner, explanation and timeline alike."""

from __future__ import annotations

from hypothesis import strategies as st

from fedepth.costs import Calibration, Convolution, Convolutions, ModelCosts, Size, UnitCost

sizes = st.builds(Size, st.integers(0, 1000), st.integers(0, 5000))
convolutions = st.lists(
    st.builds(Convolution, st.integers(0, 1000), st.integers(0, 1000), sizes, sizes), max_size=2
).map(tuple)
units = st.builds(
    UnitCost,
    name=st.just("u"),
    parameter_bytes=st.integers(0, 200_000),
    buffer_bytes=st.integers(0, 1000),
    largest_parameter_bytes=st.integers(0, 1000),
    input_bytes=st.integers(1, 5000),
    output_bytes=st.integers(1, 5000),
    saved=sizes,
    saves_input=st.booleans(),
    saves_output=st.booleans(),
    forward=sizes,
    backward=sizes,
    backward_first=sizes,
    inference=sizes,
    convolutions=st.builds(Convolutions, *[convolutions] * 4),
    flops=st.integers(0, 10**9),
    steps=st.just(()),
    input_shape=st.just(()),
)


@st.composite
def models(draw: st.DrawFn, calibration: Calibration) -> ModelCosts:
    """A model of one to six units on a device with this calibration."""
    count = draw(st.integers(1, 6))
    return ModelCosts(
        "drawn",
        tuple(draw(units) for _ in range(count)),
        tuple(draw(units) for _ in range(count)),
        input_bytes=1000,
        raw_input_bytes=250,
        smallest_micro_batch=draw(st.integers(1, 2)),
        calibration=calibration,
    )
