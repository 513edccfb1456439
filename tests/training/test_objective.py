"""The loss of a micro-batch: values and gradients worked out by hand."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch.nn import functional

from fedepth.training.objective import Teachers, any_exit, objective, shared_head

# softmax: 2/3 and 1/3; a teacher's: 1/4 and 3/4
OWN = [log(2.0), 0.0]
TEACHER = [0.0, log(3.0)]
KL = 0.25 * log(3 / 8) + 0.75 * log(9 / 4)  # Σ b · ln(b / a)


def own(rows: list[list[float]] | None = None) -> torch.Tensor:
    return torch.tensor(rows or [OWN], dtype=torch.float64, requires_grad=True)


def teacher(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows or [TEACHER], dtype=torch.float64, requires_grad=True)


def test_without_teachers_it_is_the_cross_entropy() -> None:
    logits = own()
    loss = objective(logits, targets=torch.tensor([0]), batch=1)
    assert float(loss.detach()) == pytest.approx(log(3 / 2), abs=1e-15)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([-1 / 3, 1 / 3], abs=1e-15)]


def test_a_teacher_adds_how_far_it_is_from_what_the_model_says() -> None:
    logits, given = own(), teacher()
    loss = objective(logits, targets=torch.tensor([0]), batch=1, teachers=[Teachers((given,), weight=3.0)])
    assert float(loss.detach()) == pytest.approx(log(3 / 2) + 3 * KL, abs=1e-15)
    loss.backward()
    assert logits.grad is not None
    assert given.grad is None  # no gradient goes back to a teacher
    # d KL / d a = softmax(a) - softmax(b)
    assert logits.grad.tolist() == [pytest.approx([-1 / 3 + 3 * 5 / 12, 1 / 3 - 3 * 5 / 12], abs=1e-15)]


def test_a_temperature_divides_both_and_the_gradient_and_scales_nothing_back() -> None:
    logits = own([[2 * log(2.0), 0.0]])  # 4/5 and 1/5, at a temperature of 2 as above
    given = teacher([0.0, 2 * log(3.0)])
    loss = objective(logits, targets=torch.tensor([1]), batch=1, teachers=[Teachers((given,), temperature=2.0)])
    assert float(loss.detach()) == pytest.approx(log(5) + KL, abs=1e-15)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([4 / 5 + 5 / 24, -4 / 5 - 5 / 24], abs=1e-15)]


def test_of_several_teachers_the_mean_counts_and_groups_have_weights_of_their_own() -> None:
    logits = own()
    agreeing = teacher(OWN)  # whose divergence is 0
    loss = objective(
        logits,
        targets=torch.tensor([0]),
        batch=1,
        teachers=(Teachers((teacher(), agreeing), weight=4.0), Teachers((teacher(),), weight=0.5)),
    )
    assert float(loss.detach()) == pytest.approx(log(3 / 2) + 2 * KL + 0.5 * KL, abs=1e-15)


def test_micro_batches_add_up_to_their_batch() -> None:
    torch.manual_seed(0)
    rows, given, targets = torch.randn(7, 5).double(), torch.randn(7, 5).double(), torch.arange(7) % 5
    whole, cut = rows.clone().requires_grad_(), rows.clone().requires_grad_()

    def loss_of(logits: torch.Tensor, part: slice) -> torch.Tensor:
        teachers = [Teachers((given[part],), 0.7, 3.0)]
        return objective(logits[part], targets=targets[part], batch=7, teachers=teachers)

    loss_of(whole, slice(None)).backward()
    for part in (slice(0, 3), slice(3, 7)):
        loss_of(cut, part).backward()
    assert whole.grad is not None
    assert cut.grad is not None
    torch.testing.assert_close(cut.grad, whole.grad, rtol=0, atol=1e-15)
    expected = functional.cross_entropy(rows, targets) + 0.7 * functional.kl_div(
        functional.log_softmax(rows / 3, 1), functional.softmax(given / 3, 1), reduction="batchmean"
    )
    assert float(loss_of(whole, slice(None)).detach()) == pytest.approx(float(expected), abs=1e-15)


def test_the_shared_head_lies_behind_the_skip_connection() -> None:
    weight = torch.tensor([[1.0, 10.0, 100.0]])
    logits = shared_head(
        torch.tensor([[[1.0, 2.0], [3.0, 2.0]]]), head=lambda x: functional.linear(x, weight), head_shape=(3,)
    )
    assert logits.tolist() == [[2.0 + 20.0]]  # means over two tokens, and a zero


def test_a_warm_up_runs_the_head_behind_any_output() -> None:
    logits = any_exit(torch.full((2, 3), 4.0), head=lambda x: x.flatten(1)[:, :2] + 1, head_shape=(2, 4, 4))
    assert logits.tolist() == [[5.0, 5.0]] * 2
