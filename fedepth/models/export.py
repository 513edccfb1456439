"""From a module to a graph: torch.export in both modes, cut into units, with everything that a device needs to know.

Nothing of this runs on a device. What a graph cannot hold is refused with the line of the user's own code.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from msgspec import structs
from torch import nn

from fedepth.errors import DataError, ModelError
from fedepth.models.cut import cut
from fedepth.models.exits import find_exits
from fedepth.models.graph import DTYPE_OF_TORCH, FORMAT_VERSION, Extent, Graph, Operation, Tensor, Value, check
from fedepth.models.hidden_state import hidden_tensors, undone
from fedepth.models.holdable import check_module
from fedepth.models.lower import FlatProgram, lower
from fedepth.models.outputs import NAMES, logits_of, plain
from fedepth.models.reasons import is_fixed_batch, reason
from fedepth.models.run import Model
from fedepth.models.source import error_line, guard_lines, own_frames_kept
from fedepth.models.token_ids import largest_id

LARGEST_BATCH = 4096
_SMALL_ID = 7
_EXAMPLES = 3  # a batch of 1 or 2 might be taken for a constant
HINT = "devices run models as graphs, without Python code"


@dataclass(frozen=True)
class Exported:
    """A graph, and what it takes to compare it with its module.

    Attributes:
        tensors: those that it names.
        largest_id: the largest token id that every vocabulary of the model has.
        left_out: the modules that draw random numbers for outputs that are left out, such as an auxiliary head's
            dropout, with the line of the user's code.
    """

    graph: Graph
    tensors: Mapping[str, torch.Tensor]
    largest_id: int
    left_out: Mapping[str, str]

    def examples(self, count: int, scale: float = 1.0) -> torch.Tensor:
        """See `example_inputs`."""
        return example_inputs(self.graph.input_shape, self.graph.input_type, self.largest_id, count, scale)


def export_model(module: nn.Module, name: str, input_shape: Sequence[int], input_type: str, classes: int) -> Exported:
    """The graph of a module with real weights on the CPU, which stay where they are.

    Args:
        module: its forward takes one tensor (B, *input_shape), and gives logits (B, classes); of several outputs the
            one named logits is taken, or the first.
        name: for messages.
        input_shape: without the batch.
        input_type: "F32" or "I64".
        classes: the job's number of classes.

    Raises:
        ModelError: it cannot be exported or cut; with the user's line, the reason, and what to change.
    """
    check_module(module, name)
    _refuse_other_precision(module, name)
    names, tensors = named_tensors(module, name)
    notes: set[str] = set()
    programs = flat_programs(module, name, (input_shape, input_type), classes, names, tensors, notes)
    trainable = frozenset(names[each] for each, parameter in module.named_parameters() if parameter.requires_grad)
    parameters = {names[each]: tuple(p.shape) for each, p in module.named_parameters()}
    units, head = cut(programs[0], programs[1], parameters, trainable)
    used = {each for unit in (*units, head) for each in unit.tensor_names}
    if forgotten := sorted((_read(programs[1]) - _read(programs[0])) & trainable):
        raise ModelError(
            f"what the model {name} returns in evaluation depends on {', '.join(forgotten[:5])}, what it returns first "
            "in training does not, so that these would never be trained; return the same logits first in both modes"
        )
    if unused := sorted(trainable - used):
        notes.add(f"parameters that the output does not depend on are left out: {', '.join(unused[:5])}")
    graph = Graph(
        version=FORMAT_VERSION,
        units=units,
        head=head,
        exits=(*(False for _ in units[:-1]), True),
        tensors={each: (_dtype(tensors[each], each, name), tuple(tensors[each].shape)) for each in sorted(used)},
        input_type=input_type,
        smallest_micro_batch=_smallest_micro_batch(programs[0]),
        channels_last=_prefers_channels_last(programs[0], {each: tuple(t.shape) for each, t in tensors.items()}),
        notes=tuple(sorted(notes)),
    )
    check(graph)
    kept = {each: tensors[each] for each in graph.tensors}
    moved = perturbed(kept, trainable & used)
    model = Model(graph)
    model.load(lambda each: moved[each] if each in moved else kept[each].clone())
    ids = largest_id(module, programs, tensors)
    model.train(False)
    found = _exits(model, module, name, example_inputs(input_shape, input_type, ids, 4))
    if graph.smallest_micro_batch == 1:
        _refuse_own_statistics(graph, kept, example_inputs(input_shape, input_type, ids, 2), name)
    left_out = {step.module: step.line for program in programs for step in program.left_out}
    drawing = {step.module for program in programs for step in program.steps if step.random}
    if twice := sorted(each for each in left_out.keys() & drawing if each):
        raise ModelError(
            f"the model {name} uses {twice[0]} both for the logits and, at {left_out[twice[0]]}, for an output that is "
            "left out, so that its graph cannot be compared with it; use an nn.Dropout module of its own for each"
        )
    return Exported(structs.replace(graph, exits=found), kept, ids, left_out)


def flat_programs(
    module: nn.Module,
    name: str,
    input_type: tuple[Sequence[int], str],
    classes: int,
    names: Mapping[str, str],
    tensors: dict[str, torch.Tensor],
    notes: set[str],
) -> tuple[FlatProgram, FlatProgram]:
    """The module in training and in evaluation mode.

    Args:
        input_type: shape without the batch, and "F32" or "I64".
        names: see `named_tensors`, and `tensors`, to which constants of the programs are added.
        notes: to which what a person should know is added.

    Raises:
        ModelError: it cannot be exported.
    """
    kept_by_module = {tensor.data_ptr() for tensor in hidden_tensors(module).values()}
    example = example_inputs(*input_type, 0, _EXAMPLES)  # shapes and types are all that is looked at
    programs: list[FlatProgram] = []
    was_training = module.training
    try:
        for training in (True, False):
            module.train(training)
            with undone(module):
                exported = _export(module, name, example)
            output = _logits(exported, name, classes, notes)
            programs.append(_lowered(exported, output, _with_constants(exported, names, tensors, kept_by_module), name))
    finally:
        module.train(was_training)
    return programs[0], programs[1]


def example_inputs(
    input_shape: Sequence[int], input_type: str, largest_id: int, count: int, scale: float = 1.0
) -> torch.Tensor:
    """Random inputs (count, *input_shape), always the same: token ids up to `largest_id`, or values of this scale.

    Half of the ids are small ones, which often mean something, such as padding. The largest is there.
    """
    generator = torch.Generator().manual_seed(count)
    if input_type == "I64":
        shape = (count, *input_shape)
        ids = torch.randint(0, largest_id + 1, shape, generator=generator)
        small = torch.randint(0, min(largest_id, _SMALL_ID) + 1, shape, generator=generator)
        ids = torch.where(torch.rand(shape, generator=generator) < 0.5, small, ids)
        ids.view(-1)[-1] = largest_id
        return ids
    return torch.randn((count, *input_shape), generator=generator, dtype=torch.float32) * scale


def _exits(model: Model, module: nn.Module, name: str, inputs: torch.Tensor) -> tuple[bool, ...]:
    try:
        return find_exits(model, inputs)
    except DataError as error:  # a table too small for the ids
        where = _failing_line(module, inputs)
        raise ModelError(
            f"the model {name} has no row for an id{f' at {where}' if where else ''}: ids from 0 to "
            f"{int(inputs.max())} were tried; a table that it looks up by an id, or by what it computes from one, "
            "needs a row for each"
        ) from error


def _failing_line(module: nn.Module, inputs: torch.Tensor) -> str:
    try:
        with torch.no_grad():
            module(inputs)
    except Exception as error:  # noqa: BLE001 - only where it fails is of interest
        return error_line(error)
    return ""


def _with_constants(
    program: torch.export.ExportedProgram,
    names: Mapping[str, str],
    tensors: dict[str, torch.Tensor],
    kept_by_module: AbstractSet[int],
) -> dict[str, str]:
    """`names` with those of a program's constants, which are added to `tensors`. Both modes number theirs from 0: equal
    ones are one, unless the module keeps them (`kept_by_module`: their addresses), for it may write to one of two."""
    found = dict(names)
    for target, tensor in program.constants.items():
        if isinstance(tensor, torch.Tensor) and target not in names:
            unique, number = target, 1
            while unique in tensors and not _same(tensors[unique], tensor, kept_by_module):
                unique, number = f"{target}.{number}", number + 1
            tensors.setdefault(unique, tensor.detach())
            found[target] = unique
    return found


def _same(one: torch.Tensor, other: torch.Tensor, kept_by_module: AbstractSet[int]) -> bool:
    if one.data_ptr() != other.data_ptr() and not kept_by_module.isdisjoint((one.data_ptr(), other.data_ptr())):
        return False
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _read(program: FlatProgram) -> frozenset[str]:
    return frozenset().union(*(step.tensors for step in program.steps))


def perturbed(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Copies of `names`, moved away from what they were initialised with: zeros and ones hide what they do.

    What has several dimensions is moved to both sides, by little of what its inputs add up to: in a hundred layers, a
    shift to one side would make numbers that nobody can compare.
    """
    generator = torch.Generator().manual_seed(len(tensors))
    moved = {each: tensors[each].clone() for each in sorted(names)}
    for tensor in moved.values():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.dim() > 1:
                tensor.add_((noise - 0.5) * 0.2 / max(1, prod(tensor.shape[1:])) ** 0.5)
            else:
                tensor.mul_(1 + 0.1 * noise).add_(0.02 * noise)
    return moved


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether it holds one value in many places, which cannot be written to."""
    return any(step == 0 and extent > 1 for extent, step in zip(tensor.shape, tensor.stride(), strict=True))


def named_tensors(module: nn.Module, name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """From every name of a parameter or buffer to the first with the same storage, and the tensors by that name."""
    names: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    first: dict[int, str] = {}
    for each, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names[each] = first.setdefault(id(tensor), each)
        tensors[names[each]] = tensor.detach()
    _refuse_shared_memory(module, name)
    return names, tensors


def _refuse_other_precision(module: nn.Module, name: str) -> None:
    """Devices train in float32, and ONNX Runtime's kernels for the CPU have little else."""
    for each, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype is not torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(f"the model {name} has a parameter {each} in {kind}; call .float() on it in __init__()")


def _refuse_shared_memory(module: nn.Module, name: str) -> None:
    """One parameter under two names is fine. A trained parameter in one storage with another one, or with a buffer, is
    not: each step of it would change the other, which no gradient shows, and a graph would lose it without a word."""
    owner: dict[int, tuple[str, bool]] = {}
    for each, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.numel():
            address = tensor.untyped_storage().data_ptr()
            other, other_trained = owner.setdefault(address, (each, tensor.requires_grad))
            if other != each and (tensor.requires_grad or other_trained):
                raise ModelError(
                    f"{other} and {each} of the model {name} share memory, but are two, so that to train one changes "
                    "the other; assign one nn.Parameter to both places to tie them, or give each memory of its own, "
                    "as with clone()"
                )


def _export(module: nn.Module, name: str, example: torch.Tensor) -> torch.export.ExportedProgram:
    buffers = {each for each, _ in module.named_buffers()}
    program, failure = None, None
    try:
        program = _recorded(module, example, torch.export.Dim("batch", min=1, max=LARGEST_BATCH))
    except Exception as error:  # noqa: BLE001 - whatever torch.export, or the model's own code, does
        failure = error
    if made := [each for each, _ in module.named_buffers() if each not in buffers]:
        # torch.export fails, or takes one buffer for another.
        raise ModelError(
            f"the model {name} makes its buffer {made[0]} in its first run; compute it in __init__(); {HINT}"
        ) from failure
    if program is not None:
        return program
    assert failure is not None
    where = error_line(failure) or (_fixed_batch(module, example) if is_fixed_batch(failure) else "")
    place = f" at {where}" if where else ""
    raise ModelError(f"the model {name} cannot be exported{place}: {reason(failure, where)}; {HINT}") from failure


def _recorded(module: nn.Module, example: torch.Tensor, batch: Any) -> torch.export.ExportedProgram:
    hook = module.register_forward_hook(lambda _module, _inputs, output: plain(output))
    try:
        with warnings.catch_warnings(), _quiet(), own_frames_kept():
            warnings.simplefilter("ignore")  # torch.export's own deprecations; nothing that a user could act on
            return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)
    finally:
        hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's pages of text: a refusal says all that a user can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _fixed_batch(module: nn.Module, example: torch.Tensor) -> str:
    """The line that takes the batch for a constant: the guard of an export that lets it do so."""
    try:
        program = _recorded(module, example, torch.export.Dim.AUTO)
    except Exception:  # noqa: BLE001 - it fails for another reason as well; the first is the one that is told
        return ""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            guards = value.fake_mode.shape_env.guards
            lines = [line for guard in guards for line in guard_lines(guard)]
            return lines[0] if lines else ""
    return ""


def _lowered(program: torch.export.ExportedProgram, output: int, names: Mapping[str, str], name: str) -> FlatProgram:
    try:
        return lower(program, output, names)
    except ModelError as error:
        raise ModelError(f"the model {name} cannot be turned into a graph: {error}; {HINT}") from error


def _logits(program: torch.export.ExportedProgram, name: str, classes: int, notes: set[str]) -> int:
    """Which output holds the logits."""
    output = next(node for node in program.graph.nodes if node.op == "output")
    kinds = torch.export.graph_signature.OutputKind
    places = [i for i, spec in enumerate(program.graph_signature.output_specs) if spec.kind is kinds.USER_OUTPUT]
    values = {at: each.meta["val"] for at in places if isinstance(each := output.args[0][at], torch.fx.Node)}
    tensors = [at for at, value in values.items() if isinstance(value, torch.Tensor)]
    if not tensors:
        raise ModelError(f"the model {name} returns no tensor; its forward() has to return logits")
    # Its output with the place of each leaf instead of that leaf.
    structure = torch.utils._pytree.tree_unflatten(places, program.call_spec.out_spec)
    chosen: int = logits_of(structure, is_tensor=lambda each: isinstance(each, int) and each in tensors)
    if len(tensors) > 1:
        which = "first" if chosen == tensors[0] else f"one named {' or '.join(NAMES)}"
        notes.add(f"of the {len(tensors)} outputs of the model the {which} is taken; the others are left out")
    shape = tuple(values[chosen].shape)
    if len(shape) != 2 or not isinstance(shape[0], torch.SymInt):
        raise ModelError(f"the model {name} returns {_told(shape)}; it has to return logits (batch, classes)")
    if int(shape[1]) != classes:
        raise ModelError(f"the model {name} returns {int(shape[1])} logits, the job has {classes} classes")
    return chosen


def _told(shape: tuple[Any, ...]) -> str:
    return f"a tensor of shape ({', '.join(str(n) if isinstance(n, int) else 'batch' for n in shape)})"


def _dtype(tensor: torch.Tensor, each: str, name: str) -> str:
    found = DTYPE_OF_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if found is None:
        raise ModelError(f"the model {name} has a tensor {each} of type {tensor.dtype}, which cannot travel")
    return found


def _refuse_own_statistics(graph: Graph, tensors: Mapping[str, torch.Tensor], inputs: torch.Tensor, name: str) -> None:
    """A model that takes the variance of its batch by itself has none of one sample, and a device may have no more at
    once. Of BatchNorm this is known; of other operators only a trial tells."""
    finite = []
    for count in (1, 2):
        model = Model(graph)
        model.load(lambda each: tensors[each].clone())
        model.train(True)
        with torch.no_grad():
            finite.append(bool(torch.isfinite(model(inputs[:count].clone())).all()))
    if finite == [False, True]:
        raise ModelError(
            f"the logits of the model {name} are finite in training for a batch of two and not for one, as where it "
            "takes the variance of its batch by itself; use nn.BatchNorm, or x.var(0, correction=0) and a small number "
            "added to it"
        )


def _smallest_micro_batch(program: FlatProgram) -> int:
    """2 if a BatchNorm in training mode sees one value per channel and sample, of which it cannot take a variance."""
    for step in program.steps:
        operation = step.operation
        if (
            operation.name == "batch_norm"
            and operation.arguments[5] is True
            and isinstance(operation.arguments[0], Value)
        ):
            shape = program.values[operation.arguments[0].number].shape
            rows, rest = shape[0], shape[2:]
            if (
                rows == Extent(1)
                and all(isinstance(n, int) for n in rest)
                and prod(n for n in rest if isinstance(n, int)) == 1
            ):
                return 2
    return 1


def _prefers_channels_last(program: FlatProgram, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the model trains in channels_last on a CPU, where convolutions run several times faster in it.

    Not where it has a 1×1 convolution with a stride: its backward pass in channels_last has been seen to corrupt the
    heap on two threads (torch 2.13 and 2.14, AVX-512). Nor with a patch embedding, which is no convolutional trunk.
    """
    found = False
    for step in program.steps:
        operation = step.operation
        if not operation.name.startswith("conv2d") or not isinstance(operation.arguments[1], Tensor):
            continue
        found = True
        kernel = shapes[operation.arguments[1].name][2:]  # a parameter's, or a fixed filter's
        stride = _pair(operation)
        if stride != (1, 1) and kernel in ((1, 1), stride):
            return False
    return found


def _pair(operation: Operation) -> tuple[int, ...]:
    stride = operation.arguments[3] if len(operation.arguments) > 3 else operation.keywords.get("stride", 1)
    if isinstance(stride, tuple):
        return tuple(int(n) for n in stride if isinstance(n, int)) * (2 // len(stride))
    return (int(stride),) * 2 if isinstance(stride, int) else (1, 1)
