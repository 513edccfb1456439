"""What a simulation begins with: the model, the partition, the clients and their budgets. Made once, then read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedepth import errors
from fedepth.child import Child
from fedepth.data.check import check_data
from fedepth.data.column_sums import RunningSums, Statistics, statistics_of
from fedepth.data.damage import MOST_DAMAGED, Damage, check_share
from fedepth.data.idx_sets import find_idx
from fedepth.data.read import DIGITS, Images, Labels, open_images
from fedepth.data.row_files import asked_of
from fedepth.data.rows import Rows
from fedepth.data.scan import left_out
from fedepth.data.text import read_tokenizer
from fedepth.errors import ConfigError, FedepthError
from fedepth.files import file_digest, read_regular
from fedepth.job import load_config, model_spec, training_spec
from fedepth.job_rows import lacks_statistics, with_statistics
from fedepth.job_sections import JobConfig
from fedepth.models.traced import read_costs
from fedepth.preparation import preparation
from fedepth.printable import printable
from fedepth.simulation.clients import (
    EVERYTHING,
    FULL,
    Client,
    Tier,
    check_pinned,
    load_budgets,
    load_plans,
    make_clients,
    tier_shares,
)
from fedepth.simulation.engine import Answer, exchange, start_worker, worker_environment
from fedepth.simulation.partitions import (
    Partition,
    Source,
    file_of,
    labels_digest,
    make_partition,
    save_partition,
)
from fedepth.simulation.record import STATISTICS, VERSION, Asked, Prepared, Record
from fedepth.simulation.trace import Trace, load_trace
from fedepth.simulation.worker.protocol import MeasurePeak, Request
from fedepth.sizes import format_size
from fedepth.task import ModelSpec

MOST_FILE_BYTES = 1 << 28
_ROWS_AT_ONCE = 4096
_REASONS_SHOWN = 10
Say = Callable[[str], None]

# Those that are made from a message alone.
_KINDS = {
    kind.__name__: kind
    for kind in (errors.ConfigError, errors.DataError, errors.ModelError, errors.StateError, errors.DiskError)
}


@dataclass(frozen=True)
class Options:
    """What `fedepth simulate` was given; see its help.

    Attributes:
        seed: of job, partition, tiers and trace; None for the job's.
        name: of the run, by which several are compared; "" for the job's.
        engine: "local" or "ray".
    """

    job: Path
    data: str
    output: Path
    clients: int | None = None
    partition: str = "iid"
    tiers: str = FULL
    budgets: Path | None = None
    trace: Path | None = None
    plans: Path | None = None
    seed: int | None = None
    workers: int = 0
    threads: int = 1
    enforce: bool = False
    name: str = ""
    engine: str = "local"

    def __post_init__(self) -> None:
        for field in ("job", "output", "budgets", "trace", "plans"):
            if isinstance(given := getattr(self, field), str):
                object.__setattr__(self, field, Path(given))

    @property
    def source(self) -> Path | str:
        """Where the data lie, or DIGITS."""
        return self.data if self.data == DIGITS else Path(self.data).resolve()


@dataclass(frozen=True)
class Simulation:
    """All that is known before the first round.

    Attributes:
        damage: keys of the image files that are left out (fedepth.data.damage).
    """

    options: Options
    config: JobConfig
    record: Record
    prepared: Prepared
    partition: Partition
    labels: Labels
    clients: tuple[Client, ...]
    tiers: tuple[Tier, ...]
    trace: Trace
    damage: frozenset[int] = frozenset()


def job_of(options: Options, record: Record | None = None) -> JobConfig:
    """The job, with the seed that was asked for, and with what `record` has of its columns.

    Raises:
        ConfigError: the job file is wrong.
        StateError: the record is damaged.
    """
    config = load_config(options.job)
    if options.seed is not None:
        config = msgspec.structs.replace(config, job=msgspec.structs.replace(config.job, seed=options.seed))
    return config if record is None else with_statistics(config, record.read(STATISTICS, Statistics))


async def set_up(options: Options, config: JobConfig, record: Record, say: Say) -> Simulation:
    """Makes or reads what a simulation begins with.

    Raises:
        FedepthError: something of it is wrong, or cannot be made.
    """
    spec, seed = model_spec(config), config.job.seed
    source = options.source
    record.open(_asked(options, config, str(source)))
    images, damage = _sound_samples(source, config, record, say)
    _tell_left_out("--data", source, spec, "train", say)
    _tell_left_out("[test] data", config.test_data, spec, "test", say)
    labels = images.labels
    partition = record.read("partition.json", Partition)
    if partition is None:
        left = images.damaged.count if isinstance(images, Rows) else len(damage)
        dealt = Source(source, spec, labels, damage, left)
        partition = make_partition(options.partition, options.clients, seed, dealt)
        save_partition(record.folder / "partition.json", partition)
    elif partition.labels not in ("", labels_digest(labels)):
        raise ConfigError(
            f"{printable(str(source))} holds other samples than when this simulation began ({partition.samples} then, "
            f"{len(labels)} now, or other labels); bring those back, or give another --output"
        )
    if nobodys := len(labels) - sum(len(each.samples) for each in partition.clients):
        say(f"{nobodys} of {len(labels)} samples are no client's, by --partition {printable(options.partition)}")
    config = _with_statistics(config, record, images, partition, say)
    trace = load_trace(options.trace, {each.id for each in partition.clients}) if options.trace else Trace()
    plans = load_plans(options.plans) if options.plans else {}
    prepared, tiers = record.read("prepared.json", Prepared), record.read("tiers.json", tuple[Tier, ...])
    if prepared is None or tiers is None:
        async with preparing(say) as ask:
            say(f"preparing {spec.name}")
            prepared = await _prepare(config, record, ask)
            tiers = await _tiers(options, config, record, ask, say)
        record.write("prepared.json", prepared)
        record.write("tiers.json", tiers)
    if options.budgets is not None and len(tiers) > len(partition.clients):
        say(
            f"--budgets has {len(tiers)} reports for {len(partition.clients)} clients: the first "
            f"{len(partition.clients)} are used"
        )
    clients = make_clients(partition, tiers, seed, plans)
    training = training_spec(config, 1)
    check_pinned(plans, clients, read_costs(record.folder / "graph.json").of(training), training)
    return Simulation(options, config, record, prepared, partition, labels, clients, tiers, trace, damage)


def _with_statistics(config: JobConfig, record: Record, images: Images, partition: Partition, say: Say) -> JobConfig:
    """The job with mean and standard deviation of its columns, where the clients have to be asked for their sums."""
    if not lacks_statistics(config):
        return config
    spec = model_spec(config)
    assert spec.table is not None, "only a table lacks them"
    found = record.read(STATISTICS, Statistics)
    if found is None:
        say("adding up the clients' columns")
        sums = []
        for client in partition.clients:
            running = RunningSums(len(spec.table.numeric))
            for begin in range(0, len(client.samples), _ROWS_AT_ONCE):
                places = np.array(client.samples[begin : begin + _ROWS_AT_ONCE])
                for row in images.read(places).tolist():
                    running.add(row)
            sums.append(running.total(asked_of(spec)))
        found = statistics_of(sums, spec.table.numeric)
        record.write(STATISTICS, found)
    return with_statistics(config, found)


def _sound_samples(source: Path | str, config: JobConfig, record: Record, say: Say) -> tuple[Images, frozenset[int]]:
    """The data without what is damaged of them, as a device takes them; with the keys of damaged files.

    Raises:
        DataError: they cannot be read, or more is damaged than a device takes by default.
    """
    spec = model_spec(config)
    damage = _checked_files(source, spec, record, say)
    tokenizer = read_tokenizer(Path(config.tokenizer)) if config.tokenizer else ""
    images = open_images(source, spec, "train", record.folder, damage.keys, tokenizer)
    messages, count, what = damage.damaged, len(damage.damaged), "image files"
    if isinstance(images, Rows):
        messages, count, what = images.damaged.messages, images.damaged.count, "rows"
    if count:
        check_share(len(images), count, MOST_DAMAGED, messages, "a device (most_damaged)", what)
        example = next(iter(messages.values()))
        say(f"{count} of {len(images) + count} {what} are damaged and left out, such as: {example}")
    return images, damage.keys


def _checked_files(source: Path | str, spec: ModelSpec, record: Record, say: Say) -> Damage:
    """The image files that are damaged, as a device finds out before it trains."""
    if not isinstance(source, Path) or spec.columns is not None or find_idx(source, "train") is not None:
        return Damage()
    say("checking the image files")
    return check_data(source, record.folder / "data-check")


def _tell_left_out(what: str, source: Path | str, spec: ModelSpec, split: str, say: Say) -> None:
    rows = left_out(Path(source), spec, split) if source not in ("", DIGITS) else ()
    for row in rows[:_REASONS_SHOWN]:
        say(f"{what}: left out of the folder {printable(row.folder) or '.'}: {row}")
    if len(rows) > _REASONS_SHOWN:
        say(f"{what}: left out for {len(rows) - _REASONS_SHOWN} further reasons")


def _asked(options: Options, config: JobConfig, source: str) -> Asked:
    def text(path: Path | None) -> str:
        if path is None:
            return ""
        try:
            return read_regular(path, MOST_FILE_BYTES).decode("utf-8", "replace")
        except OSError as error:
            raise ConfigError(f"{printable(str(path))} cannot be read: {error.strerror}") from None

    how, file = options.partition, file_of(options.partition)
    if file is not None:
        how = f"{how} {text(file)}"
    return Asked(
        version=VERSION,
        name=options.name or config.job.name,
        job_file=text(options.job),
        data=source,
        clients=options.clients,
        partition=how,
        tiers=options.tiers,
        seed=config.job.seed,
        threads=options.threads,
        enforce=options.enforce,
        budgets=text(options.budgets),
        trace=text(options.trace),
        plans=text(options.plans),
        weights=_digest(Path(config.model.weights)) if config.model.weights else "",
        tokenizer=config.tokenizer_digest,
        module=_digest(module) if (module := _module_of(config)).is_file() else "",
    )


def _module_of(config: JobConfig) -> Path:
    """Where the code of a custom model is, if it lies beside the job file. What that imports is not looked at."""
    return Path(config.folder) / f"{config.model.name.partition(':')[0].replace('.', '/')}.py"


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise ConfigError(f"{printable(str(path))} cannot be read: {error.strerror}") from None


Ask = Callable[[Request], Any]


@asynccontextmanager
async def preparing(say: Say) -> AsyncIterator[Ask]:
    """A worker of its own: what exports and traces models loads much that training has no use for."""
    # Not with a fixed number of threads: this is what a coordinator's model worker does, with as many as there are.
    child: Child = await start_worker("model worker", worker_environment(0), say)

    async def ask(request: Request) -> dict[str, Any]:
        return result_of(await exchange(child, request))

    try:
        yield ask
    finally:
        child.kill()
        await child.stop()


def result_of(answer: Answer) -> dict[str, Any]:
    """What a worker answers.

    Raises:
        FedepthError: that it names instead.
    """
    if "error" in answer:
        raise as_error(answer["error"])
    return dict(answer["ok"])


def as_error(fields: dict[str, Any]) -> FedepthError:
    """The error that a worker names."""
    name, message = str(fields.get("type")), str(fields.get("message"))
    return _KINDS[name](message) if name in _KINDS else errors.ChildError(f"worker: {name}: {message}")


async def _prepare(config: JobConfig, record: Record, ask: Ask) -> Prepared:
    answer = await ask(preparation(config, record.folder / "graph.json", record.weights(0)))
    return msgspec.convert(answer, Prepared)


async def _tiers(options: Options, config: JobConfig, record: Record, ask: Ask, say: Say) -> tuple[Tier, ...]:
    if options.budgets is not None:
        return load_budgets(options.budgets)
    if options.tiers == FULL:
        return (Tier(FULL, EVERYTHING, "no limit"),)
    found: dict[Fraction, Tier] = {}
    shares = tier_shares(options.tiers)
    spec, training = model_spec(config), replace(training_spec(config, 1), augmentation="none")

    async def measured(share: Fraction) -> dict[str, Any]:
        return dict(
            await ask(
                MeasurePeak(
                    model=spec,
                    training=training,
                    numerator=share.numerator,
                    denominator=share.denominator,
                    graph=str(record.folder / "graph.json"),
                    weights=str(record.weights(0)),
                    scratch=str(record.folder / "peak"),
                )
            )
        )

    full = await measured(Fraction(1))
    for share in shares:
        answer = full if share == 1 or not full["scales"] else await measured(share)
        peak, needed = answer["measured_peak_bytes"], answer["needed_bytes"]
        if full["scales"] or share == 1:
            how = f"measured: a network {share} as wide, in full, at batch {training.batch}"
        else:
            peak, needed = int(peak * share), int(needed * share)
            how = f"{share} of what the model was measured to need in full, since it has no setting for its width"
        found[share] = Tier(str(share), needed, how, peak)
        say(f"tier {share}: {format_size(needed)} ({how}; peak {format_size(peak)})")
    return tuple(found.values())
