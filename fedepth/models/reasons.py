"""Why a model cannot be exported, in words of its author's, rather than in torch's pages of text."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch.nn.utils.rnn import PackedSequence

from fedepth.models.source import first_line

_LONGEST = 200  # characters of torch's own words
_TORCH = f"{Path(torch.__file__).parent}/"


def reason(error: Exception, where: str) -> str:
    """What a model does that a graph cannot hold, and what to do instead.

    Args:
        where: the line of the user's code, if it is known.
    """
    text = str(error)
    kind = type(error).__name__
    if _packs(error):
        return (
            "it packs sequences, whose lengths are values of a tensor; run the recurrent layer on the padded batch, "
            "and pick the outputs that count with gather or a mask"
        )
    if "DataDependent" in kind or "data-dependent" in text.lower() or "GuardOnDataDependent" in text:
        return (
            "what it does depends on the values of a tensor (an if, a loop, .item(), .tolist() or indexing with a "
            "mask); use torch.where, or sizes that are known in advance"
        )
    if is_fixed_batch(error):
        what = "it" if where else "something in it, which torch does not name,"
        return (
            f"it works for one batch size only, because {what} treats the batch size as a constant, as len(x) and "
            "int(x.shape[0]) do; write x.shape[0], or -1 in a reshape"
        )
    if "fake tensor in the exported program constant" in text:
        return (
            "it assigns to the .data of a parameter, or keeps a tensor that it has made, be it in an attribute or in "
            "the cache of a function; change a parameter by parameter.copy_(...) under torch.no_grad(), and compute "
            "what stays in __init__(), as a buffer"
        )
    if ".numpy()" in text or "can't call numpy" in text.lower() or "numpy() on" in text:
        return "it converts a tensor to numpy; use torch's functions instead"
    if found := re.match(r"Found <class '([^']+)'> in output", text):
        return f"its forward() returns a {found[1]}; return the tensor of logits, or a dict that holds it as 'logits'"
    return _in_its_own_words(error)


def is_fixed_batch(error: Exception) -> bool:
    """Whether an export failed because the batch has become a constant."""
    return "Constraints violated" in str(error) or "specialized" in str(error)


def _packs(error: Exception) -> bool:
    """Whether it failed in, or with, a packed sequence."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name in ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence"):
            return True
        if any(isinstance(value, PackedSequence) for value in frame.f_locals.values()):
            return True
    return False


def _in_its_own_words(error: Exception) -> str:
    words = first_line(error)
    if len(words) > _LONGEST:
        words = f"{words[:_LONGEST].rpartition(' ')[0]} …"
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_by_torch = bool(frames) and frames[-1][0].f_code.co_filename.startswith(_TORCH)
    return f"torch says: {words}" if raised_by_torch else f"{type(error).__name__}: {words}"
