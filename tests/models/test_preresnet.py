import subprocess
import sys

import torch
from torch.nn import functional as F

from fedepth.models.preresnet import PreActivationBlock

CHANNELS_LAST = """
import torch
from fedepth.models import preresnet
preresnet.WIDTHS = (8, 16, 32)
torch.set_num_threads(2)
torch.manual_seed(0)
model = preresnet.PreResNet(3, 10).to(memory_format=torch.channels_last)
for batch in (3, 7, 33, 101):
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model(images).sum().backward()
print("done")
"""


def test_shapes_and_shortcuts() -> None:
    same, narrower = PreActivationBlock(4, 4, 1), PreActivationBlock(4, 8, 2)
    x = torch.randn(2, 4, 8, 8)
    assert same(x).shape == (2, 4, 8, 8)
    assert narrower(x).shape == (2, 8, 4, 4)
    assert same.shortcut is None
    assert narrower.shortcut is not None


def test_an_identity_block_adds_its_input() -> None:
    block = PreActivationBlock(4, 4, 1)
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_the_projection_is_a_strided_convolution() -> None:
    block = PreActivationBlock(4, 8, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    assert block.shortcut is not None
    x = torch.randn(2, 4, 8, 8)
    expected = F.conv2d(F.relu(block.norm1(x)), block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected)


def test_channels_last_survives_odd_batches() -> None:
    """A child process, since what it guards against ends in a corrupted heap.

    On x86 with AVX-512 a shortcut with a strided 1×1 convolution dies here (8 to 16 channels, two threads).
    """
    done = subprocess.run([sys.executable, "-c", CHANNELS_LAST], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
