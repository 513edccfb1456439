"""What has to be right before a job is served, checked in seconds: all that is wrong is said at once.

Nothing here imports torch; whether the model can be trained is found out when it is prepared.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import msgspec
import structlog

from coordinator.evaluation_data import LOOK_ARGV, Answer, Request
from coordinator.job import SPARE_BYTES
from fedepth.child import Child
from fedepth.data.folders import LeftOut
from fedepth.errors import ChildError, FedepthError, JobFileError, StartError
from fedepth.files import not_writable
from fedepth.job import model_spec
from fedepth.job_sections import DIGITS, JobConfig
from fedepth.models.catalog import ZOO
from fedepth.printable import printable, shortened
from fedepth.settings import suggestion
from fedepth.sizes import format_size
from fedepth.task import ModelSpec

_DIGITS_CLASSES = 10
_MOST_NAMED = 10

_log = structlog.get_logger()


@dataclass(frozen=True)
class Findings:
    """What was found: `problems` keep a job from being served, `warnings` and `facts` are told."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    def tell(self) -> None:
        """Logs what is no problem."""
        for fact in self.facts:
            _log.info("before the start", found=fact)
        for warning in self.warnings:
            _log.warning("before the start", found=warning)


Examine = Callable[[JobConfig], Awaitable[Findings]]


async def nothing_to_find(config: JobConfig) -> Findings:
    """For a job whose model and data are known to be right."""
    return Findings()


async def examine(config: JobConfig) -> Findings:
    """Looks at what a job names: libraries, the model's module, and the test data."""
    missing = tuple(missing_libraries(config))
    data = await examine_test_data(config)
    return Findings((*missing, *data.problems), data.warnings, data.facts)


def missing_libraries(config: JobConfig) -> list[str]:
    """What is not installed, or is no model at all."""
    wanted = [("torch", "fedepth[coordinator]", "the model"), ("onnx", "fedepth[coordinator]", "the export")]
    if config.tokenizer:
        wanted.append(("tokenizers", "fedepth[text]", "[text] tokenizer"))
    if config.privacy is not None:
        wanted.append(("dp_accounting", "fedepth[privacy]", "[privacy]"))
    source, colon, _ = config.model.name.partition(":")
    problems = []
    if source in ("torchvision", "timm") and colon:
        wanted.append((source, "fedepth[timm]" if source == "timm" else "fedepth[train]", config.model.name))
    elif colon and source and not _can_be_imported(source.partition(".")[0], *filter(None, [config.folder]), ""):
        where = f"in {printable(config.folder)} and " if config.folder else ""
        problems.append(
            f"[model] name: there is no module {shortened(source)}, looked for {where}where Python looks; put its file "
            "there, or correct the name"
        )
    elif not colon and config.model.name not in ZOO:
        problems.append(
            f"[model] name: there is no model {shortened(config.model.name)}{suggestion(config.model.name, ZOO)}; "
            "others are torchvision:NAME, timm:NAME and module:function"
        )
    for module, extra, purpose in wanted:
        if not _can_be_imported(module):
            problems.append(f"{module} is not installed, which {purpose} needs: pip install '{extra}'")
    return problems


def _can_be_imported(module: str, *folders: str) -> bool:
    """Whether there is such a module in these folders ("" is the working directory), or where Python looks.

    It is not loaded.
    """
    if module in sys.modules:
        return True
    try:
        return any(find(module) is not None for find in (_in(folders), importlib.util.find_spec))
    except (ImportError, ValueError, OSError):
        return False


def _in(folders: Sequence[str]) -> Callable[[str], ModuleSpec | None]:
    return lambda module: PathFinder.find_spec(module, folders)


async def examine_test_data(config: JobConfig, argv: Sequence[str] = LOOK_ARGV) -> Findings:
    """Opens the test data and reads a few samples of it: in a child process, but for the set of digits."""
    spec = model_spec(config)
    if not config.test_data:
        return Findings()  # it is told when the model is prepared
    if config.test_data == DIGITS:
        return _digits(spec)
    answer = await _ask(
        Request(config.test_data, spec, config.most_damaged, config.text.tokenizer if config.text else ""), argv
    )
    if answer.problem:
        return Findings((f"[test] data: {answer.problem}",))
    found = _told(config.test_data, answer.class_counts, spec.classes)
    left_out = [_left_out(row) for row in answer.left_out[:_MOST_NAMED]]
    if len(answer.left_out) > _MOST_NAMED:
        left_out.append(f"[test] data: left out for {len(answer.left_out) - _MOST_NAMED} further reasons")
    if answer.damaged:
        what = "rows" if spec.columns else "files"
        left_out.append(f"[test] data: {answer.damaged} {what} are damaged and left out, such as: {answer.example}")
    return Findings(found.problems, (*found.warnings, *left_out), found.facts)


def _left_out(row: LeftOut) -> str:
    return printable(f"[test] data: left out of the folder {row.folder or '.'}: {row}")


def _digits(spec: ModelSpec) -> Findings:
    if not _can_be_imported("sklearn"):
        return Findings(("[test] data: digits comes with scikit-learn, which is missing: pip install 'fedepth[demo]'",))
    if len(spec.classes) < _DIGITS_CLASSES:
        return Findings(
            (
                f"[test] data: digits has {_DIGITS_CLASSES} classes, [model] classes has {len(spec.classes)}: "
                "write classes = 10, or name other data",
            )
        )
    return Findings()


def _told(data: str, counts: Sequence[int], classes: Sequence[str]) -> Findings:
    each = [f"{shortened(name)} {count}" for name, count in zip(classes, counts, strict=True)]
    more = f" and {len(each) - _MOST_NAMED} more classes" if len(each) > _MOST_NAMED else ""
    facts = (f"{printable(data)}: {sum(counts)} test samples: {', '.join(each[:_MOST_NAMED])}{more}",)
    absent = [shortened(name) for name, count in zip(classes, counts, strict=True) if not count]
    if not absent:
        return Findings(facts=facts)
    more = f" and {len(absent) - _MOST_NAMED} more" if len(absent) > _MOST_NAMED else ""
    warning = (
        f"[test] data: {printable(data)} has no sample of {len(absent)} of the {len(classes)} classes: "
        f"{', '.join(absent[:_MOST_NAMED])}{more}; how well they are told apart is not measured"
    )
    return Findings(warnings=(warning,), facts=facts)


async def _ask(request: Request, argv: Sequence[str]) -> Answer:
    child = await Child.start("the look at the test data", argv, on_line=_pass_on)
    try:
        await child.send(request)
        return msgspec.convert(await child.receive(), Answer)
    except (ChildError, msgspec.ValidationError) as error:
        return Answer(problem=f"{error}; its lines in the log say why")
    finally:
        child.kill()
        await child.stop()


def _pass_on(line: str) -> None:
    _log.warning("test data", said=line)


def writable(option: str, path: Path) -> list[str]:
    """What keeps a file from being made at `path`."""
    why = not_writable(path)
    return [f"{option}: {why}"] if why else []


def disk_findings(config: JobConfig, free: int, weights: int, where: Path, begun: bool) -> Findings:
    """Whether the disk takes what a round writes, and what is kept of rounds.

    Args:
        free: bytes.
        weights: bytes of the model's weights, as which an update counts; 0 if they are not known yet.
        begun: the job has rounds. It goes on, then: an open round may be closed in what is left, which frees some.
    """
    devices = config.job.devices_per_round
    first = (devices + 2) * weights + SPARE_BYTES  # the updates, the average, and the weights before
    if free < first and not begun:
        updates = "1 update" if devices == 1 else f"{devices} updates"
        models = f"{updates} and two models of {format_size(weights)}, and " if weights else ""
        return Findings(
            (
                f"--state: the disk of {printable(str(where))} has {format_size(free)} left, the first round needs "
                f"{format_size(first, round_up=True)}: {models}{format_size(SPARE_BYTES)} for the record; free some "
                "space, or name another place",
            )
        )
    kept = config.retention.keep_last
    all_kept = (devices + 2 + 3 * kept + config.retention.keep_best) * weights + SPARE_BYTES
    if free < (first if begun else all_kept):
        return Findings(
            warnings=(
                f"the disk of {printable(str(where))} has {format_size(free)} left; a round of {devices} devices and "
                f"the {kept} rounds that are kept ([retention] keep_last) may take "
                f"{format_size(all_kept, round_up=True)}",
            )
        )
    return Findings()


def together(errors: Sequence[FedepthError]) -> FedepthError:
    """What is wrong as one error: a single one as it is, several as a StartError."""
    if len(errors) == 1:
        return errors[0]
    each = [part for error in errors for part in (error.parts if isinstance(error, JobFileError) else (error,))]
    reasons = "; ".join(f"({number}) {error}" for number, error in enumerate(each, 1))
    return StartError(f"the job cannot start, for {len(each)} reasons: {reasons}")
