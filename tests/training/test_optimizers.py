"""Both optimizers against torch.optim, to the last few bits, over several steps."""

from dataclasses import replace

import pytest
import torch

from fedepth.errors import ConfigError
from fedepth.task import TrainingSpec
from fedepth.training.optimizers import new_state, optimizer_step

SPEC = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 5e-4, 0.0, "none", 1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_it_follows_torch_optim(name: str, momentum: float, weight_decay: float) -> None:
    spec = replace(SPEC, optimizer=name, momentum=momentum, weight_decay=weight_decay)
    torch.manual_seed(0)
    ours = torch.randn(7, 3)
    theirs = ours.clone().requires_grad_(True)
    reference: torch.optim.Optimizer = (
        torch.optim.SGD([theirs], lr=0.1, momentum=momentum, weight_decay=weight_decay)
        if name == "sgd"
        else torch.optim.AdamW([theirs], lr=0.1, weight_decay=weight_decay)
    )
    step, state = optimizer_step(name), new_state(ours, spec)
    for count in range(1, 6):
        gradient = torch.randn(7, 3)
        theirs.grad = gradient.clone()
        reference.step()
        step(ours, gradient, state, count, spec)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(ConfigError, match="'adagrad' is unknown; there are adamw, sgd"):
        optimizer_step("adagrad")
