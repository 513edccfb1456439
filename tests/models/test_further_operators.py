"""Every operator of the second list, in a model that needs it: exact, with gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedepth.models.export import export_model
from fedepth.models.further_operators import FURTHER_OPERATORS
from fedepth.models.verify import verify

Form = Callable[[torch.Tensor], torch.Tensor]
PLACES = torch.tensor([3, 0, 5, 1])
EDGES = torch.tensor([-0.5, 0.0, 0.5])


def square(x: torch.Tensor) -> torch.Tensor:
    """(B, 6, 8) to positive definite matrices (B, 6, 6)."""
    return x @ x.mT + 3 * torch.eye(6)


def written(x: torch.Tensor, name: str, *arguments: object) -> torch.Tensor:
    """An in-place method on a tensor of one's own."""
    y = x * 1.0
    getattr(y, name)(*arguments)
    return y


def integers(x: torch.Tensor) -> torch.Tensor:
    return (x * 8).to(torch.int64)


def unpooled(x: torch.Tensor) -> torch.Tensor:
    pooled, places = F.max_pool2d(x.unsqueeze(1), 2, return_indices=True)
    return F.max_unpool2d(pooled, places, 2)


FORMS: Mapping[str, Mapping[str, Form]] = {
    "places": {
        "index_copy": lambda x: x.index_copy(1, PLACES, x[:, :4] * 2),
        "index_copy_": lambda x: written(x, "index_copy_", 1, PLACES, x[:, :4] * 2),
        "scatter_reduce.two": lambda x: x.scatter_reduce(1, integers(x).clamp(0, 5), x, "amax"),
        "bucketize.Tensor": lambda x: x * torch.bucketize(x, EDGES),
        "searchsorted.Tensor": lambda x: x * torch.searchsorted(EDGES, x.contiguous()),
        "max_unpool2d": unpooled,
        "index_reduce": lambda x: x.index_reduce(1, PLACES, x[:, :4], "amin"),
        "kthvalue": lambda x: x.kthvalue(2, 1).values,
        "take": lambda x: x.take(torch.arange(x.numel()).view_as(x)),
        "isin.Tensor_Tensor": lambda x: x * torch.isin(integers(x), PLACES),
        "count_nonzero": lambda x: x.relu().count_nonzero(1).unsqueeze(1) * x,
        "moveaxis.int": lambda x: x.moveaxis(1, 2),
        "diagonal_scatter": lambda x: x.diagonal_scatter(x[:, :, 0], 0, 1, 2),
        "column_stack": lambda x: torch.column_stack((x, x)),
        "atleast_3d": lambda x: torch.atleast_3d(x),
        "swapdims": lambda x: x.swapdims(1, 2),
        "concat": lambda x: torch.concat((x, x), 1),
        "unsafe_chunk": lambda x: x.unsafe_chunk(2, 1)[0],
    },
    "arithmetic": {
        "kron": lambda x: torch.kron(torch.eye(2), torch.ones(3, 4)) * x,
        "tensordot": lambda x: torch.tensordot(x, torch.ones(8, 3), 1),
        "inner": lambda x: torch.inner(x, torch.ones(3, 8)),
        "float_power.Tensor_Scalar": lambda x: x.abs().float_power(1.5).float(),
        "trapezoid.dx": lambda x: torch.trapezoid(x, dx=0.5),
        "quantile.scalar": lambda x: x.quantile(0.3, dim=1),
        "cumulative_trapezoid.dx": lambda x: torch.cumulative_trapezoid(x),
        "fmax": lambda x: x.fmax(x * 2),
        "fmin": lambda x: x.fmin(x * 2),
        "frac": lambda x: x.frac(),
        "copysign.Scalar": lambda x: x.copysign(-1.0),
        "copysign.Tensor": lambda x: x.copysign(x.sin()),
        "sinc": lambda x: x.sinc(),
        "lgamma": lambda x: (x.abs() + 1).lgamma(),
        "digamma": lambda x: (x.abs() + 1).digamma(),
        "logaddexp2": lambda x: torch.logaddexp2(x, x * 2),
        "special_entr": lambda x: torch.special.entr(x.abs()),
        "special_ndtr": lambda x: torch.special.ndtr(x),
        "remainder.Tensor": lambda x: x.remainder(torch.full_like(x, 0.7)),
        "fmod.Tensor": lambda x: x.fmod(torch.full_like(x, 0.7)),
        "multiply.Tensor": lambda x: torch.multiply(x, x),
        "divide.Tensor": lambda x: torch.divide(x, x.abs() + 1),
        "subtract.Tensor": lambda x: torch.subtract(x, x.sin()),
        "negative": lambda x: torch.negative(x),
        "absolute": lambda x: torch.absolute(x),
        "arctan": lambda x: torch.arctan(x),
        "var_mean.dim": lambda x: torch.var_mean(x, 1)[0],
        "addbmm": lambda x: torch.addbmm(torch.zeros(6, 8), torch.ones(2, 6, 3), torch.ones(2, 3, 8)) * x,
        "signbit": lambda x: x * x.signbit(),
        "isposinf": lambda x: x * x.isposinf(),
        "greater.Scalar": lambda x: x * x.greater(0.1),
        "less_equal.Tensor": lambda x: x * x.less_equal(x.sin()),
        "not_equal.Scalar": lambda x: x * x.not_equal(0),
        "__and__.Scalar": lambda x: x * (integers(x) & 3),
        "__or__.Scalar": lambda x: x * (integers(x) | 3),
        "__lshift__.Scalar": lambda x: x * (integers(x) << 1),
        "__rshift__.Scalar": lambda x: x * (integers(x) >> 1),
        "mse_loss": lambda x: x * F.mse_loss(x, x.sin(), reduction="none"),
        "smooth_l1_loss": lambda x: x * F.smooth_l1_loss(x, x.sin(), reduction="none"),
        "kl_div": lambda x: x * F.kl_div(x.log_softmax(1), x.softmax(1), reduction="none"),
    },
    "in place": {
        "index_fill_.int_Scalar": lambda x: written(x, "index_fill_", 1, PLACES, 2.0),
        "scatter_reduce_.two": lambda x: written(x, "scatter_reduce_", 1, integers(x).clamp(0, 5), x, "amax"),
        "mean.out": lambda x: torch.mean(x.detach(), 1, out=x.new_zeros(x.shape[0], 8)),
    },
    "linear algebra": {
        "linalg_cholesky": lambda x: torch.linalg.cholesky(square(x)),
        "linalg_inv": lambda x: torch.linalg.inv(square(x)),
        "inverse": lambda x: square(x).inverse(),
        "linalg_solve": lambda x: torch.linalg.solve(square(x), x),
        "linalg_det": lambda x: torch.linalg.det(square(x) / 4).log1p().unsqueeze(1),
        "logdet": lambda x: square(x).logdet().unsqueeze(1),
        "linalg_matrix_norm.str_ord": lambda x: torch.linalg.matrix_norm(x).unsqueeze(1),
        "linalg_matrix_exp": lambda x: torch.linalg.matrix_exp(square(x).tanh()),
        "linalg_vecdot": lambda x: torch.linalg.vecdot(x, x),
        "linalg_diagonal": lambda x: torch.linalg.diagonal(square(x)),
        "mH": lambda x: x.mH,
    },
    "Fourier and complex numbers": {
        "fft_fft": lambda x: torch.fft.ifft(torch.fft.fft(x) * 2).real,
        "fft_rfft": lambda x: torch.fft.irfft(torch.fft.rfft(x)[..., :3], n=8),
        "fft_fft2": lambda x: torch.fft.ifft2(torch.fft.fft2(x)).imag + torch.fft.fft2(x).abs(),
        "fft_rfft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5),
        "view_as_complex": lambda x: torch.view_as_real(
            torch.view_as_complex(x.reshape(-1, 6, 4, 2)) * torch.polar(torch.ones(4), torch.linspace(0, 1, 4))
        ),
        "fft_fftshift": lambda x: torch.fft.fftshift(x, 2),
        "fft_ifftshift": lambda x: torch.fft.ifftshift(x, 2),
    },
    "random and from nothing": {
        "normal.float_float": lambda x: x * torch.normal(0.0, 1.0, (8,)),
        "poisson": lambda x: x + torch.poisson(x.detach().abs()),
        "multinomial": lambda x: x * torch.multinomial(x.detach().softmax(1)[:, :, 0], 1).unsqueeze(2),
        "hann_window": lambda x: x * torch.hann_window(8),
        "hamming_window": lambda x: x * torch.hamming_window(8),
        "log_normal_": lambda x: x * torch.empty(8).log_normal_(),
    },
}


class Using(nn.Module):
    """Series (6, 8) to the sum of what several functions make of them."""

    def __init__(self, forms: Mapping[str, Form]) -> None:
        super().__init__()
        self.forms = forms
        self.first, self.classifier = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        logits: torch.Tensor = self.classifier(x.mean(1))
        for form in self.forms.values():
            logits = logits + form(x).flatten(1).mean(1, keepdim=True)
        return logits


@functools.cache
def operators_of(subject: str) -> frozenset[str]:
    """What the graph of a model that uses them runs, when it has been proved."""
    torch.manual_seed(0)
    module = Using(FORMS[subject])
    exported = export_model(module, subject, (6, 8), "F32", 10)
    assert verify(module, exported, subject) < 1e-6
    programs = [
        each for unit in (*exported.graph.units, exported.graph.head) for each in (unit.training, unit.evaluation)
    ]
    return frozenset(operation.name for program in programs for operation in program.operations)


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("subject", FORMS)
def test_a_graph_with_them_is_its_module(subject: str) -> None:
    assert FORMS[subject].keys() <= operators_of(subject)


@pytest.mark.filterwarnings("ignore:index_reduce")
def test_none_is_listed_that_is_not_tried() -> None:
    tried = frozenset().union(*map(operators_of, FORMS))
    assert tried >= FURTHER_OPERATORS
