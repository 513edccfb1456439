"""The operators that a device runs: no code comes over the network, only these names with arguments.

Each is an overload of torch's aten library. None of them reads files, changes the size or storage of a tensor, or looks at
memory that was not written before.
"""

from __future__ import annotations

# They make a tensor from sizes alone, and need to be told where.
CREATION = frozenset(
    {"arange", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "scalar_tensor", "zeros"}
)

OPERATORS = frozenset(
    (
        # layers
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout avg_pool1d "
        "avg_pool2d batch_norm bilinear celu celu_ channel_shuffle conv1d conv1d.padding conv2d conv2d.padding "
        "conv3d conv_transpose1d conv_transpose2d.input cross_entropy_loss dropout dropout_ elu embedding "
        "feature_alpha_dropout feature_dropout gelu glu group_norm gru.input hardshrink hardsigmoid hardswish hardtanh "
        "instance_norm layer_norm leaky_relu linear log_sigmoid log_softmax.int lstm.input max_pool1d "
        "max_pool2d max_pool2d_with_indices mish native_group_norm native_layer_norm pixel_shuffle pixel_unshuffle "
        "prelu relu relu6 rms_norm rnn_relu.input rnn_tanh.input rrelu scaled_dot_product_attention selu sigmoid silu "
        "softmax.int softplus softshrink tanh threshold upsample_bilinear2d upsample_bilinear2d.vec "
        "upsample_nearest2d upsample_nearest2d.vec upsample_bicubic2d.vec upsample_linear1d.vec "
        # arithmetic
        "abs add.Scalar add.Tensor add_.Tensor addcdiv addcmul addmm addmv amax amin argmax argmin atan2 baddbmm bmm "
        "ceil clamp clamp.Tensor clamp_max clamp_min cos cosine_similarity cumprod cumsum div.Scalar div.Tensor "
        "div.Tensor_mode div_.Tensor div.out dot einsum erf exp exp2 expm1 fill.Scalar fill.Tensor fill_.Scalar fill_.Tensor "
        "floor floor_divide floor_divide.Scalar fmod.Scalar frobenius_norm.dim lerp.Scalar lerp.Tensor linalg_norm "
        "linalg_vector_norm log log1p log2 logsumexp matmul max max.dim max.other maximum mean mean.dim min min.dim "
        "min.other minimum mm mul.Scalar mul.Tensor mul_.Tensor mv neg norm.Scalar norm.ScalarOpt_dim norm.dtype_out "
        "outer positive pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prod prod.dim_int reciprocal "
        "remainder.Scalar round rsqrt rsub.Scalar rsub.Tensor sgn sign sin sqrt square std.correction std.dim sub.Scalar "
        "sub.Tensor sub_.Tensor sum sum.dim_IntList tan true_divide.Tensor trunc var.correction var.dim var_mean.correction "
        "vdot where.Scalar where.ScalarOther where.ScalarSelf where.self "
        # comparison and selection
        "bitwise_and.Tensor bitwise_not bitwise_or.Tensor eq.Scalar eq.Tensor ge.Scalar ge.Tensor gt.Scalar gt.Tensor "
        "isfinite isnan le.Scalar le.Tensor logical_and logical_not logical_or lt.Scalar lt.Tensor masked_fill.Scalar "
        "masked_fill.Tensor masked_fill_.Scalar ne.Scalar ne.Tensor nan_to_num one_hot sort topk tril triu "
        # shape and place
        "alias cat chunk clone constant_pad_nd contiguous copy copy_ detach expand expand_as flatten.using_ints flip gather "
        "index.Tensor index_put index_put_ index_select lift_fresh_copy meshgrid meshgrid.indexing movedim.int "
        "movedim.intlist narrow pad permute repeat repeat_interleave.self_int reshape reshape_as roll scatter.src "
        "scatter_add select.int slice.Tensor split.Tensor split_with_sizes squeeze squeeze.dim squeeze.dims stack "
        "swapaxes t tensor_split.sections tile to.dtype to.other transpose.int type_as unbind.int unflatten.int unfold "
        "im2col unsqueeze view view_as adjoint mT matrix_H numpy_T "
        # from nothing, and random
        "arange arange.start arange.start_step bernoulli bernoulli.p bernoulli_.float bernoulli_.Tensor eye eye.m full "
        "full_like linspace new_full new_ones new_zeros normal_ ones ones_like rand rand_like randint randint.low randn "
        "randn_like scalar_tensor uniform_ zero_ zeros zeros_like"
    ).split()
)
