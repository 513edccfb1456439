"""The operators that few models need; see fedepth.models.operators. Each is run by a test."""

from __future__ import annotations

_PLACES = (
    *("atleast_3d", "broadcast_tensors", "bucketize.Tensor", "column_stack", "concat", "count_nonzero"),
    *("diagonal_scatter", "index_copy", "index_copy_", "index_fill_.int_Scalar", "index_reduce", "isin.Tensor_Tensor"),
    *("kthvalue", "max_unpool2d", "moveaxis.int", "scatter_reduce.two", "scatter_reduce_.two", "searchsorted.Tensor"),
    *("swapdims", "take", "unsafe_chunk"),
)
_ARITHMETIC = (
    *("__and__.Scalar", "__lshift__.Scalar", "__or__.Scalar", "__rshift__.Scalar", "absolute", "addbmm", "arctan"),
    *("copysign.Scalar", "copysign.Tensor", "cumulative_trapezoid.dx", "digamma", "divide.Tensor", "fmax", "fmin"),
    *("float_power.Tensor_Scalar", "fmod.Tensor", "frac", "greater.Scalar", "inner", "isposinf", "kl_div", "kron"),
    *("less_equal.Tensor", "lgamma", "logaddexp2", "mean.out", "mse_loss", "multiply.Tensor", "negative"),
    *("not_equal.Scalar", "quantile.scalar", "remainder.Tensor", "signbit", "sinc", "smooth_l1_loss", "special_entr"),
    *("special_ndtr", "subtract.Tensor", "tensordot", "trapezoid.dx", "var_mean.dim"),
)
_LINEAR_ALGEBRA = (
    *("inverse", "linalg_cholesky", "linalg_det", "linalg_diagonal", "linalg_inv", "linalg_matrix_exp"),
    *("linalg_matrix_norm.str_ord", "linalg_solve", "linalg_vecdot", "logdet", "mH"),
)
_FOURIER = (
    *("fft_fft", "fft_fft2", "fft_fftshift", "fft_ifft", "fft_ifft2", "fft_ifftshift", "fft_irfft", "fft_irfft2"),
    *("fft_rfft", "fft_rfft2", "imag", "polar", "real", "view_as_complex", "view_as_real"),
)
_FROM_NOTHING_AND_RANDOM = (
    *("hamming_window", "hann_window", "log_normal_", "multinomial", "normal.float_float", "poisson"),
)

FURTHER_OPERATORS = frozenset((*_PLACES, *_ARITHMETIC, *_LINEAR_ALGEBRA, *_FOURIER, *_FROM_NOTHING_AND_RANDOM))
