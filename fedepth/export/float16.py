"""A model whose weights and most of whose operators are float16, for runtimes that are faster with it or have little
memory. Input and output stay as they are."""

from __future__ import annotations

from typing import Any

# They sum over many values, or take powers, and leave the range of float16 (65,504) though their results do not.
_SUMMING = (
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization", "BatchNormalization"),
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"),
    *("ReduceSumSquare", "GlobalAveragePool", "Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Reciprocal"),
)
# ONNX Runtime crashes on x86 as it loads a model with a transposed float16 tensor that is multiplied as float32
# (microsoft/onnxruntime#28392, not mended in 1.32).
_CRASHING = ("Transpose",)


def to_float16(model: Any) -> Any:
    """The model (`onnx.ModelProto`, of float32, which is used up) with float16 within, and float32 where it matters."""
    import onnx_ir
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    converted = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_SUMMING, *_CRASHING]
    )
    del converted.graph.value_info[:]  # they still say float32
    ordered = onnx_ir.serde.deserialize_model(converted)
    ordered.graph.sort()  # the converter appends its casts at the end, which onnx's checker refuses
    return onnx_ir.serde.serialize_model(ordered)
