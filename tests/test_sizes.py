import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedepth.errors import ConfigError
from fedepth.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("300MiB", 300 << 20),
        ("300 mib", 300 << 20),
        ("1.5GiB", 3 << 29),
        ("300MB", 300_000_000),
        ("2 KB", 2000),
        ("2KiB", 2048),
        ("0", 0),
        (" 7 B ", 7),
        ("9007199254740993", 9007199254740993),  # 2^53 + 1 is lost in a float
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-3MiB", "300M", "1.2.3MiB", "three", "1e6", "nan", -1])
def test_what_is_no_size_is_named(text: str | int) -> None:
    with pytest.raises(ConfigError, match="is not a size") as caught:
        parse_size(text)
    assert f'"{text}"' in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (35_756_442, "34.1 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),  # never "1024.0 KiB"
        (-2048, "-2.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_written_size_is_read_back_within_its_rounding(size: int) -> None:
    # One decimal of the unit: an error of at most 0.05 of it, which is 5 % at 1.0.
    assert abs(parse_size(format_size(size)) - size) <= 0.05 * max(size, 1)


@given(st.integers(min_value=0, max_value=1 << 60))
@example((1 << 58) + 1)  # which a float cannot tell from 1 << 58
def test_a_size_to_provide_is_never_written_too_small(size: int) -> None:
    assert parse_size(format_size(size, round_up=True)) >= size
