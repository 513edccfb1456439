"""From a flat program to units: cuts where exactly one tensor that depends on the input is alive. No torch.

Between two operators that read parameters there is often more than one place to cut (before or after an activation, a
pooling, a dropout). Evaluation mode may run other operators there than training mode, so both programs are cut at
places that mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod

from msgspec import structs

from fedepth.errors import ModelError
from fedepth.models.graph import (
    Extent,
    Operation,
    Program,
    Scalar,
    Tensor,
    Unit,
    Value,
    scalars_of,
    values_of,
    with_scalars,
)
from fedepth.models.lower import FlatProgram, Step

# Operators that carry a unit's weight. What has none of them is a norm or a scale, and joins a neighbour.
_HEAVY = {
    *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "einsum", "bilinear", "embedding", "embedding_bag"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "_native_multi_head_attention"),
}
# A head that holds more of the model's parameters than this begins later, where it can.
_HEAD_SHARE = 0.25
_BATCH = Extent(1)


@dataclass(frozen=True)
class _Place:
    """A place to cut one program: after step `step`, where only `value` is alive.

    `channels_behind`: it is a feature map in the order (height, width, channels) for the sake of one operator, such as
    a LayerNorm between two convolutions.
    """

    step: int
    value: int
    shape: tuple[int, ...]
    channels_behind: bool = False


@dataclass(frozen=True)
class _Cut:
    """The same cut in both programs."""

    training: _Place
    evaluation: _Place

    @property
    def shape(self) -> tuple[int, ...]:
        return self.training.shape


@dataclass(frozen=True)
class _Gap:
    """All cuts between the same two operators that read parameters, in order."""

    cuts: tuple[_Cut, ...]
    alike: bool

    @property
    def narrowest(self) -> _Cut:
        """The smallest tensor; of equals a feature map rather than a vector, channels first, and the last."""

        def size(cut: _Cut) -> tuple[int, int, bool]:
            return prod(cut.shape), -len(cut.shape), cut.training.channels_behind

        smallest = min(map(size, self.cuts))
        equal = [cut for cut in self.cuts if size(cut) == smallest]
        return next(cut for cut in reversed(equal) if cut.shape == equal[0].shape)

    @property
    def before_pooling(self) -> _Cut:
        """The last that is as large as the first: pooling and what follows it belong to the head."""
        first = self.cuts[0]
        same = (prod(first.shape), len(first.shape))
        return next(cut for cut in reversed(self.cuts) if (prod(cut.shape), len(cut.shape)) == same)


def cut(
    training: FlatProgram, evaluation: FlatProgram, shapes: Mapping[str, tuple[int, ...]], trainable: frozenset[str]
) -> tuple[tuple[Unit, ...], Unit]:
    """Units and head of a model.

    Args:
        training: the model in training mode.
        evaluation: the same in evaluation mode.
        shapes: of every parameter and buffer.
        trainable: names of the parameters that are not frozen.

    Raises:
        ModelError: the two programs take other inputs.
    """
    parameters = frozenset(name for name in shapes)
    gaps = [gap for gap in _gaps(training, evaluation, parameters) if gap.cuts]
    cuts = _without_shared(training, evaluation, [gap.narrowest for gap in gaps], trainable)
    kept = [gap for gap in gaps if gap.narrowest in cuts]
    kept = _without_light(training, kept)
    head_at = _head(training, kept, shapes)
    chosen = [gap.narrowest for gap in kept[:head_at]]
    if head_at < len(kept):
        pooled = [*chosen, kept[head_at].before_pooling]
        # Only the narrowest has been looked at before: what stands between the two may be shared.
        free = _without_shared(training, evaluation, pooled, trainable) == pooled
        chosen = pooled if free else [*chosen, kept[head_at].narrowest]
    pieces = _pieces(training, evaluation, chosen, trainable)
    if head_at == len(kept):  # nothing can be cut off as a head: all of it is one unit
        last = pieces[-1]
        shape = _plain(training.values[training.output].shape)
        head = Unit("head", (), (), (), shape, Program((), 0), Program((), 0))
        return (*pieces[:-1], last), head
    return pieces[:-1], pieces[-1]


def uncut(training: FlatProgram, evaluation: FlatProgram, trainable: frozenset[str]) -> Unit:
    """The whole of a small model as one unit. Arguments as for `cut`."""
    (unit,) = _pieces(training, evaluation, [], trainable)
    return unit


def _gaps(training: FlatProgram, evaluation: FlatProgram, parameters: frozenset[str]) -> Iterator[_Gap]:
    places = [_places(program, parameters) for program in (training, evaluation)]
    for key, found in places[0].items():
        other = places[1].get(key)
        if not key or not other or key == max(places[0], key=len):
            continue
        alike = _names(training, found) == _names(evaluation, other)
        found = _with_channels(training, found)
        pairs = list(zip(found, other, strict=True)) if alike and len(found) == len(other) else [(found[-1], other[-1])]
        yield _Gap(tuple(_Cut(one, two) for one, two in pairs if one.shape == two.shape), alike)


def _places(program: FlatProgram, parameters: frozenset[str]) -> dict[frozenset[str], list[_Place]]:
    """Where a program can be cut, by the tensors that it has read up to there."""
    last = _last_uses(program)
    needs = _needs(program)
    found: dict[frozenset[str], list[_Place]] = {}
    alive: set[int] = {0}
    read: frozenset[str] = frozenset()
    for at, step in enumerate(program.steps):
        if not _depends(program, step):
            continue
        alive.update(n for n in step.operation.results if n >= 0 and program.values[n].depends)
        alive = {number for number in alive if last.get(number, -1) > at}
        read = read | (needs[at] & parameters)
        if len(alive) == 1:
            (value,) = alive
            info = program.values[value]
            if info.dtype == "F32" and info.shape[:1] == (_BATCH,) and all(isinstance(n, int) for n in info.shape[1:]):
                found.setdefault(read, []).append(_Place(at, value, _plain(info.shape)))
    return found


def _with_channels(program: FlatProgram, places: Sequence[_Place]) -> list[_Place]:
    """Marks places between a permutation that puts channels last and one that puts them back."""
    turns: list[tuple[int, bool]] = []  # (step, whether channels are last from here on)
    for at in range(places[0].step, places[-1].step + 1):
        operation = program.steps[at].operation
        if operation.name == "permute" and operation.arguments[1] in ((0, 2, 3, 1), (0, 3, 1, 2)):
            turns.append((at, operation.arguments[1] == (0, 2, 3, 1)))
    marked: list[_Place] = []
    for place in places:
        before = [behind for at, behind in turns if at <= place.step]
        after = [behind for at, behind in turns if at > place.step]
        behind = before[-1] if before else not after[0] if after else False
        marked.append(replace(place, channels_behind=behind))
    return marked


def _needs(program: FlatProgram) -> list[frozenset[str]]:
    """For every step, the tensors that it reads, itself or through values that do not depend on the input."""
    through: dict[int, frozenset[str]] = {}
    needs: list[frozenset[str]] = []
    for step in program.steps:
        own = step.tensors
        for number in values_of(step.operation):
            if not program.values[number].depends:
                own = own | through.get(number, frozenset())
        needs.append(own)
        for number in step.operation.results:
            if number >= 0 and not program.values[number].depends:
                through[number] = own
    return needs


def _last_uses(program: FlatProgram) -> dict[int, int]:
    last = {number: at for at, step in enumerate(program.steps) for number in values_of(step.operation)}
    last[program.output] = len(program.steps)
    return last


def _names(program: FlatProgram, places: Sequence[_Place]) -> list[str]:
    """The operators between the first and the last of some places."""
    steps = program.steps[places[0].step : places[-1].step + 1]
    return [step.operation.name for step in steps if _depends(program, step)]


def _depends(program: FlatProgram, step: Step) -> bool:
    return any(program.values[number].depends for number in values_of(step.operation))


def _plain(shape: tuple[int | Extent, ...]) -> tuple[int, ...]:
    """Without the batch."""
    return tuple(extent for extent in shape[1:] if isinstance(extent, int))


def _without_shared(
    training: FlatProgram, evaluation: FlatProgram, cuts: list[_Cut], trainable: frozenset[str]
) -> list[_Cut]:
    """Drops cuts between two users of one trainable tensor, written buffer, or random value, in one mode or in both."""
    steps = (*training.steps, *evaluation.steps)
    owned = trainable | {name for step in steps for name in step.writes}
    users: dict[object, set[int]] = {}
    for program, places in (
        (training, [each.training for each in cuts]),
        (evaluation, [each.evaluation for each in cuts]),
    ):
        for piece, members in enumerate(_members(program, places)):
            for at in members:
                step = program.steps[at]
                for name in step.tensors & owned:
                    users.setdefault(name, set()).add(piece)
                if step.random and not _depends(program, step):
                    users.setdefault((id(program), at), set()).add(piece)
    forbidden = {cut for pieces in users.values() for cut in range(min(pieces), max(pieces))}
    return [each for index, each in enumerate(cuts) if index not in forbidden]


def _members(program: FlatProgram, places: Sequence[_Place]) -> list[list[int]]:
    """The steps of every piece: those that depend on the input, and what they need that does not.

    What depends on sizes only, such as a mask, is computed in every piece that needs it, rather than carried along.
    """
    ends = [place.step for place in places] + [len(program.steps) - 1]
    starts = [0] + [place.step + 1 for place in places]
    members: list[list[int]] = []
    for start, end in zip(starts, ends, strict=True):
        needed: set[int] = set()
        storages: set[int] = set()
        kept: list[int] = []
        for at in range(end, -1, -1):
            step = program.steps[at]
            inside = start <= at <= end
            if _depends(program, step):
                wanted = inside
            else:
                wanted = (inside and bool(step.writes)) or not needed.isdisjoint(step.operation.results)
                wanted = wanted or (step.mutates is not None and program.values[step.mutates].storage in storages)
            if wanted:
                kept.append(at)
                free = [n for n in values_of(step.operation) if not program.values[n].depends]
                needed.update(free)
                storages.update(program.values[n].storage for n in free)
        members.append(kept[::-1])
    return members


def _without_light(program: FlatProgram, gaps: list[_Gap]) -> list[_Gap]:
    """Joins pieces that have no weight of their own, such as a norm, to the neighbour that they belong to."""
    gaps = list(gaps)
    index = 0
    while index <= len(gaps) and gaps:
        places = [gap.narrowest.training for gap in gaps]
        members = _members(program, places)[index]
        if any(_is_heavy(program, program.steps[at]) for at in members):
            index += 1
            continue
        # A norm behind a convolution or linear layer belongs to that; one behind a sum or a pooling to what follows.
        to_previous = index > 0 and (index == len(gaps) or _follows_heavy(program, places[index - 1]))
        del gaps[index - 1 if to_previous else index]
        index = max(0, index - 1) if to_previous else index
    return gaps


def _is_heavy(program: FlatProgram, step: Step) -> bool:
    name = step.operation.name.split(".")[0]
    return name in _HEAVY and any(
        isinstance(scalar, Tensor) or (isinstance(scalar, Value) and not program.values[scalar.number].depends)
        for scalar in scalars_of(step.operation)
    )


def _follows_heavy(program: FlatProgram, place: _Place) -> bool:
    """Whether the value at a cut comes from a heavy operator, through operators of one input without parameters."""
    producers = {number: step for step in program.steps for number in step.operation.results}
    number = place.value
    while number in producers:
        step = producers[number]
        if _is_heavy(program, step):
            return True
        inputs = [each for each in values_of(step.operation) if program.values[each].depends]
        if len(inputs) != 1 or step.tensors:
            return False
        number = inputs[0]
    return False


def _head(program: FlatProgram, gaps: Sequence[_Gap], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The index of the cut in front of the head: behind the last feature map, or later if that is most of the model."""
    if not gaps:
        return 0
    pieces = _members(program, [gap.narrowest.training for gap in gaps])
    sizes = [
        sum(prod(shapes[name]) for name in {n for at in members for n in program.steps[at].tensors} if name in shapes)
        for members in pieces
    ]
    total = max(1, sum(sizes))
    maps = [index for index, gap in enumerate(gaps) if len(gap.cuts[0].shape) > 1]
    for index in range(maps[-1] if maps else len(gaps) - 1, len(gaps)):
        if sum(sizes[index + 1 :]) <= _HEAD_SHARE * total:
            return index
    return len(gaps) - 1


def _pieces(
    training: FlatProgram, evaluation: FlatProgram, cuts: Sequence[_Cut], trainable: frozenset[str]
) -> tuple[Unit, ...]:
    trained = _programs(training, [each.training for each in cuts])
    evaluated = _programs(evaluation, [each.evaluation for each in cuts])
    inputs = [_plain(training.values[0].shape), *(each.shape for each in cuts)]
    units: list[Unit] = []
    for (program, members), (other, others), shape in zip(trained, evaluated, inputs, strict=True):
        steps = [training.steps[at] for at in members] + [evaluation.steps[at] for at in others]
        names = list(dict.fromkeys(name for step in steps for name in sorted(step.tensors)))
        written = {name for step in steps for name in step.writes}
        parameters = tuple(name for name in names if name in trainable)
        fixed = tuple(name for name in names if name not in trainable and name not in written)
        buffers = tuple(name for name in names if name in written and name not in trainable)
        units.append(Unit("", parameters, buffers, fixed, shape, program, other))
    names_of = _module_names([(unit.parameters or unit.tensor_names) for unit in units])
    return tuple(structs.replace(unit, name=name) for unit, name in zip(units, names_of, strict=True))


def _module_names(tensors: Sequence[tuple[str, ...]]) -> list[str]:
    """For every piece the module that all its tensors lie in, or the first such module where others lie in it too."""
    owners = [[name.rpartition(".")[0] for name in names] or ["unit"] for names in tensors]
    together = [_common(each) for each in owners]
    found: list[str] = []
    for index, (common, each) in enumerate(zip(together, owners, strict=True)):
        others = together[:index] + together[index + 1 :]
        shared = not common or any(f"{other}.".startswith(f"{common}.") for other in others)
        name = each[0] if shared else common
        name = name or "model"
        found.append(name if name not in found else f"{name}#{index}")
    return found


def _common(modules: Sequence[str]) -> str:
    """The innermost module that all of these lie in; empty for the model itself."""
    levels = zip(*(module.split(".") for module in modules), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _programs(program: FlatProgram, places: Sequence[_Place]) -> list[tuple[Program, list[int]]]:
    outputs = [place.value for place in places] + [program.output]
    inputs = [0] + [place.value for place in places]
    return [
        (_program(program, members, start, end), members)
        for members, start, end in zip(_members(program, places), inputs, outputs, strict=True)
    ]


def _program(program: FlatProgram, members: Sequence[int], start: int, end: int) -> Program:
    """The steps of one piece with numbers of their own; its input is value 0."""
    numbers = {start: 0}
    operations: list[Operation] = []
    storage = program.values[start].storage
    if any(
        (changed := program.steps[at].mutates) is not None and program.values[changed].storage == storage
        for at in members
    ):
        # What it changes in place must not be its input, which may be needed again.
        operations.append(Operation("clone", (Value(0),), (1,)))
        numbers[start] = 1

    def renumbered(each: Scalar) -> Scalar:
        return Value(numbers[each.number]) if isinstance(each, Value) else each

    following = len(operations) + 1
    used = {number for at in members for number in values_of(program.steps[at].operation)} | {end}
    for at in members:
        operation = program.steps[at].operation
        results = []
        for number in operation.results:
            if number in used:
                numbers[number] = following
                following += 1
            results.append(numbers[number] if number in used else -1)
        operations.append(with_scalars(operation, renumbered, tuple(results)))
    if end not in numbers:
        raise ModelError("the model's output is not computed from its input")
    return Program(tuple(operations), numbers[end])
