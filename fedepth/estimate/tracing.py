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
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import msgspec
import torch
from torch._prims_common import suggest_memory_format
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
        channels_last: it runs in this memory format, which its input or its weights decide.
        pads_gradient: it computes the gradient of depth-wise weights that oneDNN pads in channels_last.
    """

    living: int
    weights: int
    maps: int
    channels_last: bool
    pads_gradient: bool


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
        unwritten: what its kernels ask for and never write to.
    """

    saved: int
    saves_input: bool
    saves_output: bool
    forward: int
    backward: int
    convolving: tuple[tuple[Convolving, ...], tuple[Convolving, ...]]
    unwritten: int


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
    exit_by_input: dict[
        tuple[_Input, int | None, bool], UnitCost
    ] = {}  # an auxiliary head's form follows from its input
    unit_by_kind: dict[bytes, UnitCost] = {}
    with FakeTensorMode():
        model = _filled(graph)
        inputs = _inputs_inside(model)
        for index, (unit, (x, y), exits) in enumerate(zip(model.units, pairwise(inputs), graph.exits, strict=True)):
            exit_ = model.exit(index)
            key = (y, unit.channels, exit_ is model.head)
            if exits and key not in exit_by_input:
                exit_by_input[key] = _exit_cost(model, exit_, unit.channels, y, batches)
            kind = _kind(graph, unit.unit, x)
            if kind not in unit_by_kind:
                unit_by_kind[kind] = _unit_cost(model, unit, x, y, batches)
            units.append(replace(unit_by_kind[kind], name=unit.unit.name, exit=exit_by_input[key] if exits else None))
        logits = model.head(inputs[-1].make(SMALL_BATCH))
    values = prod(graph.input_shape)
    return ModelCosts(
        name,
        tuple(units),
        values * FLOAT_BYTES,
        values,
        graph.smallest_micro_batch,
        logit_bytes=logits.shape[1] * FLOAT_BYTES,
    )


def trace_block(graph: Graph, first: int, last: int, samples: int) -> StepTrace:
    """Units `first..last` with their exit and the loss, traced as a whole at one batch size.

    What `trace_costs` composes has to come close to this.
    """
    with FakeTensorMode():
        model = _filled(graph)
        units = model.units[first : last + 1]
        exit_ = model.exit(last)
        exit_step = _exit_step(exit_, units[-1].channels)

        def step(x: torch.Tensor) -> torch.Tensor:
            for unit in units:
                x = unit(x)
            return exit_step(x)

        return _trace(step, (*units, exit_), _at_a_start(model, first).make(samples))


@dataclass(frozen=True)
class _Input:
    """What a unit, or an exit, is given.

    Attributes:
        shape: without the batch.
        order: the dimensions, the batch first, as they lie in memory. A unit behind a permutation gets maps in
            channels_last, whatever the rest of the model trains in, and so do the convolutions in it.
        dtype: its element type.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def make(self, samples: int, *, grad: bool = False) -> torch.Tensor:
        """A fake one. A copy of the leaf, so that a step may change it in place; copying saves nothing for backward."""
        x = torch.empty_permuted((samples, *self.shape), self.order, dtype=self.dtype)
        return x.requires_grad_(grad).clone()


def _inputs_inside(model: Model) -> list[_Input]:
    """What every unit is given in the middle of a model, and the head behind the last."""
    x = _at_a_start(model, 0).make(SMALL_BATCH)
    found = []
    with torch.no_grad():
        for unit in model.units:
            found.append(_input_like(x))
            x = unit(x)
    return [*found, _input_like(x)]


def _input_like(x: torch.Tensor) -> _Input:
    strides = x.stride()
    order = sorted(range(1, x.dim()), key=lambda dimension: -strides[dimension])  # of equals, the first stays first
    return _Input(tuple(x.shape[1:]), (0, *order), x.dtype)


def _at_a_start(model: Model, index: int) -> _Input:
    """What unit `index` is given at the start of a block: the data, or a cache, in the memory format of the model."""
    graph = model.graph
    shape = (*(unit.input_shape for unit in graph.units), graph.head_shape)[index]
    order = (0, 2, 3, 1) if graph.channels_last and len(shape) == 3 else tuple(range(len(shape) + 1))
    dtype = DTYPES[graph.input_type] if index == 0 else torch.float32
    return _Input(shape, order, dtype)


def _kind(graph: Graph, unit: Unit, x: _Input) -> bytes:
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
    return msgspec.json.encode((programs, tensors, x.shape, x.order, unit is graph.units[0]))


def _unit_cost(model: Model, unit: RunnableUnit, x: _Input, y: _Input, batches: tuple[int, int]) -> UnitCost:
    index = model.units.index(unit)
    start = _at_a_start(model, index)
    has_gradient = x.dtype.is_floating_point
    inside, first, frozen = (
        [_trace(unit, (unit,), each.make(samples, grad=grad), frozen=frozen) for samples in batches]
        for each, grad, frozen in ((x, has_gradient, False), (start, False, False), (x, has_gradient, True))
    )
    cost = _cost(unit, unit, x, prod(y.shape) * FLOAT_BYTES, batches, inside)
    return replace(
        cost,
        backward_first=_step_cost(batches, first).backward,
        frozen=_step_cost(batches, frozen) if index else None,
        unwritten=line(batches, (inside[0].unwritten, inside[1].unwritten)),
    )


def _exit_cost(
    model: Model, exit_: RunnableUnit, channels: int | None, y: _Input, batches: tuple[int, int]
) -> UnitCost:
    step = _exit_step(exit_, channels)
    traces = [_trace(step, (exit_,), y.make(samples, grad=True)) for samples in batches]
    # Of equal ones behind several units, one name stands for all.
    cost = _cost(exit_, step, y, 0, batches, traces)
    return replace(cost, name="auxiliary head") if exit_.unit in model.graph.auxiliary else cost


def _exit_step(exit_: RunnableUnit, channels: int | None) -> Step:
    """The head behind a skip connection, or an auxiliary head, and the loss."""

    def step(x: torch.Tensor) -> torch.Tensor:
        logits = exit_(skip(x, exit_.unit.input_shape, channels))
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64))

    return step


def _cost(
    unit: RunnableUnit,
    step: Step,
    x: _Input,
    output_bytes: int,
    batches: tuple[int, int],
    traces: list[StepTrace],
) -> UnitCost:
    """Two traces as sizes that are linear in the batch."""
    parameters = [parameter.nbytes for _, parameter in unit.parameters()]
    training = _step_cost(batches, traces)
    passes = [_inference(step, unit, x.make(samples)) for samples in batches]
    return UnitCost(
        name=unit.unit.name,
        parameter_bytes=sum(parameters),
        buffer_bytes=sum(unit.tensors[name].nbytes for name in unit.unit.written),
        largest_parameter_bytes=max(parameters, default=0),
        input_bytes=prod(x.shape) * FLOAT_BYTES,
        output_bytes=output_bytes,
        training=training,
        backward_first=training.backward,
        inference=_pass_cost(batches, passes),
        flops=_flops(step, unit, x.make(batches[1])),
        fixed_bytes=sum(unit.tensors[name].nbytes for name in unit.unit.fixed),
    )


def _step_cost(batches: tuple[int, int], traces: list[StepTrace]) -> StepCost:
    small, large = traces
    return StepCost(
        saved=line(batches, (small.saved, large.saved)),
        saves_input=small.saves_input,
        saves_output=small.saves_output,
        forward=_pass_cost(batches, [(each.forward, each.convolving[0]) for each in traces]),
        backward=_pass_cost(batches, [(each.backward, each.convolving[1]) for each in traces]),
    )


def _pass_cost(batches: tuple[int, int], traces: Sequence[tuple[int, tuple[Convolving, ...]]]) -> PassCost:
    """One pass, as its peak and its convolutions, seen at two batch sizes."""
    (small, small_convolving), (large, large_convolving) = traces
    return PassCost(line(batches, (small, large)), _convolutions(batches, (small_convolving, large_convolving)))


def _convolutions(
    batches: tuple[int, int], traces: tuple[tuple[Convolving, ...], tuple[Convolving, ...]]
) -> tuple[Convolution, ...]:
    """One pass's convolutions, seen at two batch sizes."""
    found = [
        Convolution(
            weight_bytes=large.weights if large.channels_last else 0,
            depthwise_bytes=large.weights if large.channels_last and large.pads_gradient else 0,
            reordered=Size(0, 0) if large.channels_last else Size(large.weights, -(-large.maps // batches[1])),
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
        unwritten: what kernels have asked for and never write to, in bytes.
    """

    def __init__(self, *foreign: torch.Tensor) -> None:
        """`foreign` tensors were there before and are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        self.convolutions: list[tuple[int, Convolving]] = []
        self.unwritten = 0
        self._serials: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._next = 0
        self._foreign = {self._register(tensor.untyped_storage(), 0) for tensor in foreign}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kept, scratch = _beside(func, args, result)
        self.unwritten += 2 * kept  # of an LSTM's workspace, a third is written to
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for leaf in leaves:
            storage = leaf.untyped_storage()
            if id(storage) not in self._serials:
                size = storage.nbytes() + (kept if leaf is leaves[-1] else 0)
                self.events.append((self._register(storage, size), size))
        if scratch:
            serial, self._next = self._next, self._next + 1
            self.events += [(serial, scratch), (serial, -scratch)]
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

    def _register(self, storage: torch.UntypedStorage, size: int) -> int:
        serial, self._next = self._next, self._next + 1
        key = id(storage)

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
    return Convolving(
        living=0,
        weights=weight.nbytes,
        maps=x.nbytes + output.nbytes,
        channels_last=any(suggest_memory_format(each) is torch.channels_last for each in (x, weight)),
        pads_gradient=backward and bool(args[10][1]) and groups == x.shape[1] > 1 and _pads(x, weight, *args[4:6]),
    )


def _pads(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether the gradient of these depth-wise weights is padded.

    oneDNN has a kernel for windows of up to 3 values that needs maps as large as the window, and with a stride larger;
    for all others it pads (torch 2.14, AVX-512: 246 to 254 times the weights for windows of 3, 5 and 7, none for 3 on
    maps of 3 and more, or of 4 with a stride of 2).
    """
    places = [each[index % len(each)] for each in (stride, padding) for index in range(2)]
    window = weight.shape[2:]
    smallest = (width + pad % step for width, step, pad in zip(window, places[:2], places[2:], strict=False))
    return max(window) > 3 or any(side < least for side, least in zip(x.shape[2:], smallest, strict=True))


def _beside(func: Any, args: tuple[Any, ...], result: Any) -> tuple[int, int]:
    """What an LSTM of oneDNN takes that fake tensors do not show, in bytes: the workspace that a forward pass in
    training keeps for the backward pass, and scratch while either runs.

    Measured with torch 2.14, per layer and direction: of the workspace, which is three times as large, the gates of
    every step are written to, and one state. Scratch holds such gates as well, half of them more in a backward pass,
    and the weights in another order.
    """
    forward = func.overloadpacket == torch.ops.aten.mkldnn_rnn_layer
    if not forward and func.overloadpacket != torch.ops.aten.mkldnn_rnn_layer_backward:
        return 0, 0
    steps, samples, width = (result[0] if forward else args[7]).shape
    gates = 4 * width * steps * samples * FLOAT_BYTES
    training = bool(args[15 if forward else 18])
    weights = sum(each.nbytes for each in args[1:5])
    if forward:
        return (gates + gates // 4 if training else 0), gates + weights
    return 0, gates + gates // 2 + weights


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
        unwritten=ledger.unwritten,
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
        # In the memory format of a trainer (fedepth.training.context.load): it decides how a convolution runs.
        last = graph.channels_last and len(shape) == 4
        order = (0, 2, 3, 1) if last else tuple(range(len(shape)))
        return torch.empty_permuted(shape, order, dtype=DTYPES[dtype])

    model.load(fake, trainable=True)
    for unit in filter(None, model.auxiliary):
        unit.tensors.update((name, fake(name).requires_grad_()) for name in unit.unit.parameters)
    return model
