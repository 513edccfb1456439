import pytest
import torch

from fedepth.errors import ModelError
from fedepth.models.skip import skip


def test_feature_maps_are_averaged_and_padded_with_zero_channels() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = torch.tensor([[[[2.5, 4.5], [10.5, 12.5]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert torch.equal(skip(x, (3, 2, 2)), expected)


def test_uneven_ratios_average_over_overlapping_windows() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert torch.equal(skip(x, (1, 2, 2)), torch.tensor([[[[2.0, 3.0], [5.0, 6.0]]]]))


def test_height_and_width_have_their_own_ratios() -> None:
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert torch.equal(skip(x, (1, 2, 2)), torch.tensor([[[[0.5, 2.5], [4.5, 6.5]]]]))
    assert torch.equal(skip(x, (1, 1, 2)), torch.tensor([[[[2.5, 4.5]]]]))


def test_tokens_get_zeros_behind_their_width() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    expected = torch.tensor([[[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]])
    assert torch.equal(skip(x, (2, 3)), expected)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3)])
def test_equal_shapes_are_the_identity(shape: tuple[int, ...]) -> None:
    x = torch.randn(5, *shape)
    assert skip(x, shape) is x


def test_gradients_are_spread_over_the_windows() -> None:
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    skip(x, (2, 2, 2)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((1, 1, 4, 4), 0.25))


def test_channels_that_are_too_many_are_averaged_in_groups() -> None:
    x = torch.arange(4.0).reshape(1, 4, 1, 1)
    assert torch.equal(skip(x, (2, 1, 1)), torch.tensor([[[[0.5]], [[2.5]]]]))


def test_a_map_becomes_a_vector_by_its_means() -> None:
    x = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert torch.equal(skip(x, (3,)), torch.tensor([[1.5, 5.5, 0.0]]))


def test_a_vector_gets_zeros_and_tokens_their_mean() -> None:
    assert torch.equal(skip(torch.tensor([[1.0, 2.0]]), (3,)), torch.tensor([[1.0, 2.0, 0.0]]))
    tokens = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]])  # two tokens of width 3
    assert torch.equal(skip(tokens, (3,)), torch.tensor([[2.0, 3.0, 4.0]]))


def test_a_series_shrinks_in_time() -> None:
    x = torch.arange(4.0).reshape(1, 1, 4)
    assert torch.equal(skip(x, (2, 2)), torch.tensor([[[0.5, 2.5], [0.0, 0.0]]]))


def test_maps_with_channels_last_shrink_in_height_and_width() -> None:
    x = torch.arange(4.0).reshape(1, 2, 2, 1)
    assert torch.equal(skip(x, (1, 1, 2)), torch.tensor([[[[1.5, 0.0]]]]))


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ((2, 2, 4), (2, 4, 4)),  # higher
        ((5, 8), (8, 2, 2)),  # tokens to an image
        ((4, 4), (5, 5)),  # larger
        ((8, 4, 4), (4, 8)),  # an image to tokens
    ],
)
def test_anything_else_is_refused_with_both_shapes(given: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        skip(torch.zeros(2, *given), target)
    assert str(given) in str(caught.value)
    assert str(target) in str(caught.value)
