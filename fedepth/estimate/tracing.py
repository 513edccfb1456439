"""What training costs in memory, unit by unit, traced without allocating anything.

The model runs on fake tensors, which have shapes and storages but no data, while a ledger writes down when
each storage comes and goes. Storages, not tensors, are counted: autograd keeps many views of one storage, and
adding up tensors overstates a convolutional network by more than half. Only what kernels take inside one
operation is out of sight; the prediction adds a calibrated term for that.

A trace imports sympy and torch._dynamo (over 150 MiB), so it runs in the coordinator's model worker, never in
a trainer. Optimizer state is no part of it: it follows from the parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fedepth.costs import Convolution, ModelCosts, PassCost, Size, StepCost, UnitCost
from fedepth.estimate.peak import FLOAT_BYTES
from fedepth.models.graph import Graph, Scalar, Tensor, Unit, with_scalars
from fedepth.models.run import DTYPES, Model, RunnableUnit
from fedepth.models.skip import skip

SMALL_BATCH = 2
SMALLEST_LARGE_BATCH = 16

_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Convolving:
    """A convolution, or its backward pass, while it runs at one batch size, in bytes.

    Attributes:
        living: what lives then, without the unit's input, parameters and their gradients.
        weights: its weights.
        maps: its input and output.
        wide_depthwise: it is depth-wise and wider than 3.
    """

    living: int
    weights: int
    maps: int
    wide_depthwise: bool


@dataclass(frozen=True)
class StepTrace:
    """One forward and backward pass at one batch size, in bytes, without parameters and their gradients.

    Attributes:
        saved: what lives after the forward pass, without input and output; with the output if autograd keeps
            it.
        saves_input: autograd keeps the input.
        saves_output: autograd keeps the output.
        forward: the peak of the forward pass above what lives after it.
        backward: the peak of the backward pass above `saved`, gradients of input and output counted.
        convolving: the convolutions of the forward pass, and of the backward pass.
    """

    saved: int
    saves_input: bool
    saves_output: bool
    forward: int
    backward: int
    convolving: tuple[tuple[Convolving, ...], tuple[Convolving, ...]]


def trace_costs(graph: Graph, name: str, batch: int) -> ModelCosts:
    """The cost table of a model.

    Every unit, also frozen, and every exit behind a unit, is traced at two batch sizes, 2 and the job's batch (at
    least 16). A peak is the largest of several sums that grow with the batch, a convex function, so the line
    through these two points is never below it between them.

    Args:
        graph: the model.
        name: for people.
        batch: the larger batch size.
    """
    batches = (SMALL_BATCH, max(batch, SMALLEST_LARGE_BATCH))
    units: list[UnitCost] = []
    exit_by_shape: dict[tuple[int, ...], UnitCost] = {}
    unit_by_kind: dict[bytes, UnitCost] = {}
    with FakeTensorMode():
        model = _filled(graph)
        for unit, shape, exits in zip(model.units, graph.output_shapes, graph.exits, strict=True):
            if exits and shape not in exit_by_shape:
                exit_by_shape[shape] = _exit_cost(model, shape, batches)
            kind = _kind(graph, unit.unit)
            if kind not in unit_by_kind:
                unit_by_kind[kind] = _unit_cost(graph, unit, shape, batches)
            units.append(replace(unit_by_kind[kind], name=unit.unit.name, exit=exit_by_shape[shape] if exits else None))
    values = prod(graph.input_shape)
    return ModelCosts(name, tuple(units), values * FLOAT_BYTES, values, graph.smallest_micro_batch)


def trace_block(graph: Graph, first: int, last: int, samples: int) -> StepTrace:
    """Units `first..last` with their exit and the loss, traced as a whole at one batch size.

    What `trace_costs` composes has to come close to this.
    """
    with FakeTensorMode():
        model = _filled(graph)
        units = model.units[first : last + 1]
        exit_step = _exit_step(model)

        def step(x: torch.Tensor) -> torch.Tensor:
            for unit in units:
                x = unit(x)
            return exit_step(x)

        return _trace(step, (*units, model.head), _inputs(graph, first, samples, input_grad=False))


def _kind(graph: Graph, unit: Unit) -> bytes:
    """What a unit's costs follow from: its programs, and the types and shapes of its tensors, whatever their names.

    Most models repeat a few kinds of units: a Vision Transformer has two, whatever its depth.
    """
    places = {name: Tensor(str(place)) for place, name in enumerate(unit.tensor_names)}

    def placed(each: Scalar) -> Scalar:
        return places[each.name] if isinstance(each, Tensor) else each

    programs = [
        (program.output, [with_scalars(each, placed, each.results) for each in program.operations])
        for program in (unit.training, unit.evaluation)
    ]
    tensors = [[graph.tensors[each] for each in names] for names in (unit.parameters, unit.written, unit.fixed)]
    return msgspec.json.encode((programs, tensors, unit.input_shape, unit is graph.units[0]))


def _unit_cost(graph: Graph, unit: RunnableUnit, output_shape: tuple[int, ...], batches: tuple[int, int]) -> UnitCost:
    index = graph.units.index(unit.unit)
    inside, first, frozen = (
        [_trace(unit, (unit,), _inputs(graph, index, samples, input_grad=grad), frozen=frozen) for samples in batches]
        for grad, frozen in ((True, False), (False, False), (True, True))
    )
    cost = _cost(graph, unit, unit, index, prod(output_shape) * FLOAT_BYTES, batches, inside)
    return replace(
        cost,
        backward_first=_step_cost(batches, first, graph.channels_last).backward,
        frozen=_step_cost(batches, frozen, graph.channels_last) if index else None,
    )


def _exit_cost(model: Model, shape: tuple[int, ...], batches: tuple[int, int]) -> UnitCost:
    step = _exit_step(model)
    index = model.graph.output_shapes.index(shape) + 1
    traces = [
        _trace(step, (model.head,), torch.empty((samples, *shape)).requires_grad_().clone()) for samples in batches
    ]
    return _cost(model.graph, model.head, step, index, 0, batches, traces)


def _exit_step(model: Model) -> Step:
    def step(x: torch.Tensor) -> torch.Tensor:
        logits = model.head(skip(x, model.graph.head_shape))
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64))

    return step


def _inputs(graph: Graph, index: int, samples: int, *, input_grad: bool) -> torch.Tensor:
    """An input of unit `index`, or of the exit behind the unit before it."""
    shapes = (*(unit.input_shape for unit in graph.units), graph.head_shape)
    if index == 0 and graph.input_type != "F32":
        return torch.zeros((samples, *shapes[0]), dtype=DTYPES[graph.input_type])
    # A copy of the leaf, so that a step may change its input in place; copying saves nothing for backward.
    return torch.empty((samples, *shapes[index])).requires_grad_(input_grad).clone()


def _cost(
    graph: Graph,
    unit: RunnableUnit,
    step: Step,
    index: int,
    output_bytes: int,
    batches: tuple[int, int],
    traces: list[StepTrace],
) -> UnitCost:
    """Two traces as sizes that are linear in the batch."""
    parameters = [parameter.nbytes for _, parameter in unit.parameters()]
    training = _step_cost(batches, traces, graph.channels_last)
    passes = [_inference(step, unit, _inputs(graph, index, samples, input_grad=False)) for samples in batches]
    inputs = _inputs(graph, index, batches[1], input_grad=False)
    return UnitCost(
        name=unit.unit.name,
        parameter_bytes=sum(parameters),
        buffer_bytes=sum(unit.tensors[name].nbytes for name in unit.unit.written),
        largest_parameter_bytes=max(parameters, default=0),
        input_bytes=prod(inputs.shape[1:]) * FLOAT_BYTES,
        output_bytes=output_bytes,
        training=training,
        backward_first=training.backward,
        inference=_pass_cost(batches, passes, graph.channels_last),
        flops=_flops(step, unit, inputs),
        fixed_bytes=sum(unit.tensors[name].nbytes for name in unit.unit.fixed),
    )


def _step_cost(batches: tuple[int, int], traces: list[StepTrace], channels_last: bool) -> StepCost:
    small, large = traces
    return StepCost(
        saved=line(batches, (small.saved, large.saved)),
        saves_input=small.saves_input,
        saves_output=small.saves_output,
        forward=_pass_cost(batches, [(each.forward, each.convolving[0]) for each in traces], channels_last),
        backward=_pass_cost(batches, [(each.backward, each.convolving[1]) for each in traces], channels_last),
    )


def _pass_cost(
    batches: tuple[int, int], traces: Sequence[tuple[int, tuple[Convolving, ...]]], channels_last: bool
) -> PassCost:
    """One pass, as its peak and its convolutions, seen at two batch sizes."""
    (small, small_convolving), (large, large_convolving) = traces
    return PassCost(
        line(batches, (small, large)), _convolutions(batches, (small_convolving, large_convolving), channels_last)
    )


def _convolutions(
    batches: tuple[int, int], traces: tuple[tuple[Convolving, ...], tuple[Convolving, ...]], channels_last: bool
) -> tuple[Convolution, ...]:
    """One pass's convolutions, seen at two batch sizes."""
    found = [
        Convolution(
            weight_bytes=large.weights if channels_last else 0,
            depthwise_bytes=large.weights if channels_last and large.wide_depthwise else 0,
            reordered=Size(0, 0) if channels_last else Size(large.weights, -(-large.maps // batches[1])),
            living=line(batches, (small.living, large.living)),
        )
        for small, large in zip(*traces, strict=True)
    ]
    distinct = list(dict.fromkeys(found))
    return tuple(each for each in distinct if not any(_outweighs(other, each) for other in distinct))


def _outweighs(one: Convolution, other: Convolution) -> bool:
    """Whether it copies and holds at least as much in every respect, and is another one."""
    return one != other and all(mine >= its for mine, its in zip(_amounts(one), _amounts(other), strict=True))


def _amounts(each: Convolution) -> tuple[int, ...]:
    sizes = (each.reordered, each.living)
    return each.weight_bytes, each.depthwise_bytes, *(part for size in sizes for part in (size.fixed, size.per_sample))


def line(batches: tuple[int, int], sizes: tuple[int, int]) -> Size:
    """The line through two measurements, in integers, at or above both and with no negative part."""
    per_sample = max(0, -(-(sizes[1] - sizes[0]) // (batches[1] - batches[0])))
    fixed = max(size - per_sample * batch for batch, size in zip(batches, sizes, strict=True))
    if fixed < 0:  # an integer per sample above the true slope can leave less than nothing as the rest
        return Size(0, max(-(-size // batch) for batch, size in zip(batches, sizes, strict=True)))
    return Size(fixed, per_sample)


class _Tail(torch.autograd.Function):
    """Stands for the rest of a model: keeps nothing, and gives the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.shape = x.shape
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> torch.Tensor:
        return torch.empty(ctx.shape)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every storage that an operation makes, and its end.

    Attributes:
        events: (serial number of the storage, bytes), negative bytes where it ends.
        convolutions: every convolution, or its backward pass, and how many events there were when it was through.
    """

    def __init__(self, *foreign: torch.Tensor) -> None:
        """`foreign` tensors were there before and are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        self.convolutions: list[tuple[int, Convolving]] = []
        self._serials: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._next = 0
        self._foreign = {self._register(tensor.untyped_storage()) for tensor in foreign}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._serials:
                    self.events.append((self._register(storage), storage.nbytes()))
        if func.overloadpacket in _CONVOLUTIONS:
            self.convolutions.append((len(self.events), _running(func, args, result)))
        return result

    def serial(self, tensor: torch.Tensor) -> int:
        """The storage's number; -1 if no operation has made it and it is not foreign."""
        found = self._serials.get(id(tensor.untyped_storage()))
        return -1 if found is None else found[0]

    def live(self) -> int:
        return sum(size for _, size in self.events)

    def peak(self, start: int = 0, without: frozenset[int] = frozenset()) -> int:
        """The most that lives at once from event `start` on, without the given storages."""
        return max(self._totals(without)[start:], default=0)

    def convolving(self, start: int = 0, without: frozenset[int] = frozenset()) -> tuple[Convolving, ...]:
        """The convolutions from event `start` on, in the order in which they ran."""
        totals = self._totals(without)
        return tuple(replace(each, living=totals[end - 1]) for end, each in self.convolutions if end > start)

    def _totals(self, without: frozenset[int]) -> list[int]:
        """What lives after every event."""
        return list(accumulate(0 if serial in without else size for serial, size in self.events))

    def _register(self, storage: torch.UntypedStorage) -> int:
        serial, self._next = self._next, self._next + 1
        key, size = id(storage), storage.nbytes()

        def ended(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._serials[key]
            if serial not in self._foreign:
                self.events.append((serial, -size))

        self._serials[key] = (serial, weakref.ref(storage, ended))
        return serial


def _running(func: Any, args: tuple[Any, ...], result: Any) -> Convolving:
    """What an operation of `_CONVOLUTIONS` works on; what lives meanwhile is not known yet."""
    backward = func.overloadpacket == torch.ops.aten.convolution_backward
    output, (x, weight) = (args[0], args[1:3]) if backward else (result, args[:2])
    groups = args[9] if backward else args[8]
    depthwise = groups == x.shape[1] > 1
    return Convolving(0, weight.nbytes, x.nbytes + output.nbytes, depthwise and max(weight.shape[2:]) > 3)


def _trace(step: Step, owners: Sequence[RunnableUnit], x: torch.Tensor, *, frozen: bool = False) -> StepTrace:
    """Runs one step under the fake mode that is active; `frozen`: in evaluation mode, parameters without gradients."""
    parameters = [parameter for owner in owners for _, parameter in owner.parameters()]
    known = [tensor for owner in owners for tensor in owner.tensors.values()]
    for owner in owners:
        owner.training = not frozen
    for parameter in parameters:
        parameter.requires_grad_(not frozen)
    ledger = _Ledger(x, *known)
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(ledger.serial(tensor))
        return tensor

    with ledger, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = step(x)
    is_loss = output.dim() == 0
    saves_output = not is_loss and ledger.serial(output) in kept
    forward_peak, forward_convolving, after_forward = ledger.peak(), ledger.convolving(), ledger.live()
    saved = max(0, after_forward - (0 if is_loss or saves_output else output.nbytes))
    start, gradients = len(ledger.events), frozenset[int]()
    if output.requires_grad:  # not where a unit has no parameters, and its input needs no gradient
        tail = output if is_loss else _Tail.apply(output)
        del output  # so that backward frees it as soon as it would in the middle of a model
        gradient = torch.empty_like(tail)
        with ledger:
            torch.autograd.backward(tail, gradient)
        gradients = frozenset(ledger.serial(p.grad) for p in parameters if p.grad is not None)
    backward_peak = ledger.peak(start, without=gradients)
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(True)
    return StepTrace(
        saved=saved,
        saves_input=ledger.serial(x) in kept,
        saves_output=saves_output,
        forward=forward_peak - after_forward,
        backward=max(0, backward_peak - saved),
        convolving=(forward_convolving, ledger.convolving(start, without=gradients)),
    )


def _inference(step: Step, owner: RunnableUnit, x: torch.Tensor) -> tuple[int, tuple[Convolving, ...]]:
    """Of a forward pass without autograd, its peak above the output, and its convolutions."""
    owner.training = False
    ledger = _Ledger(x, *owner.tensors.values())
    with torch.no_grad(), ledger:
        output = step(x)
        return max(0, ledger.peak() - output.nbytes), ledger.convolving()


def _flops(step: Step, owner: RunnableUnit, inputs: torch.Tensor) -> int:
    """Floating point operations of a forward pass, per sample."""
    owner.training = True
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        step(inputs)
    return int(counter.get_total_flops()) // len(inputs)


def _filled(graph: Graph) -> Model:
    """The model with fake tensors; a fake mode has to be active."""
    model = Model(graph)

    def fake(name: str) -> torch.Tensor:
        dtype, shape = graph.tensors[name]
        return torch.empty(shape, dtype=DTYPES[dtype])

    model.load(fake, trainable=True)
    return model
