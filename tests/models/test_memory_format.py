"""The layout that a model trains in: fast where it is known to be safe."""

import pytest
import torch

from fedepth.models.catalog import named_spec
from fedepth.models.memory_format import prefers_channels_last
from fedepth.models.split import split_spec


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("digits-cnn", True),
        ("preresnet20", True),  # its 1×1 shortcuts have no stride
        ("mobilenet-v3-small", True),
        ("resnet18", False),  # 1×1 convolutions with stride 2 corrupted the heap in channels_last
        ("vit-tiny", False),  # one patch embedding, no convolutional trunk
    ],
)
def test_convolutional_trunks_train_in_channels_last(model: str, expected: bool) -> None:
    split = split_spec(named_spec(model, None, 10))
    assert prefers_channels_last(split, torch.device("cpu")) is expected
    assert not prefers_channels_last(split, torch.device("cuda"))
