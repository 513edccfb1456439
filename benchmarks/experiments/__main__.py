"""Experiments in simulated federations: what depth-wise training gives and costs, and a calibration of the simulator.

    python -m benchmarks.experiments NAME… --json FILE          Fashion-MNIST, 20 clients, 40 rounds, 2 seeds
    python -m benchmarks.experiments NAME… --quick --json FILE  scikit-learn's digits, 8 clients, 4 rounds, 1 seed

Every run is `fedepth simulate`, of clients of equal size whose classes are drawn from Dirichlet(0.3), with pinned plans
where the experiment is about plans. `measured_peak_bytes` is what a plan took in a fresh trainer, as on a device.

    budgets             digits-cnn under a ladder of budgets, from the smallest plan to full training
    blocks              PreResNet-20 in 1, 2, 3, 5 and 9 equal blocks
    blocks_cifar10      the same on CIFAR-10, with --cifar10
    partial             a share of the clients trains the last units only: what they add, and what they spoil
    slices              depth-wise, layer-wise and by slices of the width, at equal measured memory
    epochs              1, 2 and 5 blocks with few and many local epochs: do more steps close the gap?
    text                texts of AG News by a transformer in 1 to 5 blocks, with --ag-news
    table               diamonds, numbers and categories, by a residual network in 1 to 5 blocks, with --diamonds
    niid_bench_fashion  FedAvg as in Flower's baseline niid_bench, against its published accuracy
    niid_bench_cifar10  the same, with --cifar10

FILE keeps what other experiments have left in it. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console

from benchmarks.experiments import depth, niid_bench, rows
from benchmarks.experiments.ground import WEIGHT_DECAY, Ground, Setup, digits_labels
from benchmarks.runs import Scale, fashion, figures, job_text, processor_seconds, simulate, table
from fedepth.data.read import DIGITS, open_images
from fedepth.errors import ConfigError
from fedepth.files import write_atomically
from fedepth.simulation.compare import compare, read_run

PARTITION = "dirichlet:0.3"
_WIDE = """\
from fractions import Fraction

from fedepth.models.zoo import {function}


def narrow(spec):
    return {function}(spec, Fraction({numerator}, {denominator}))
"""


@dataclass(frozen=True)
class Source:
    """Data that are given by an option.

    Attributes:
        what: is to be given.
        prepare: makes so many training samples of it in a folder, and returns where they lie.
    """

    option: str
    what: str
    prepare: Callable[[Path, int, Path], Path]


CIFAR10 = Source("--cifar10", "CIFAR-10 as class folders: DIR/train and DIR/test", niid_bench.cifar10)
AG_NEWS = Source("--ag-news", "AG News as gzipped CSV without a line of names: label, title, description", rows.ag_news)
DIAMONDS = Source("--diamonds", "plotnine/data/diamonds.csv of the package plotnine", rows.diamonds)


@dataclass(frozen=True)
class Experiment:
    """What is compared, and how much of it is done in full and with --quick.

    Attributes:
        source: of the data; none for Fashion-MNIST, and with --quick scikit-learn's digits.
    """

    setups: Callable[[Ground], Iterable[Setup]]
    full: Scale
    quick: Scale
    source: Source | None = None


def _published(ground: Ground) -> Iterable[Setup]:
    if not ground.scale.images:  # digits have nothing to do with it
        return [Setup("fedavg")]
    mean, std = niid_bench.PUBLISHED[ground.folder.name]
    return [Setup("fedavg", facts={"published_accuracy_mean": mean, "published_accuracy_std": std})]


_PRERESNET = Scale("preresnet20", (1, 16, 16), 4000, 20, 5, 40, 2, 32, 0.1, (1, 2))
_QUICK = replace(_PRERESNET, images=0, clients=8, drawn=2, rounds=4, seeds=(1,))
# So many epochs that eight times as many can be run.
_EPOCHS = replace(_PRERESNET, epochs=1)
_ADAMW = 'optimizer = "adamw"'
_TEXT = replace(_PRERESNET, model="text-transformer", rate=1e-3, training=_ADAMW, rows=rows.AG_NEWS)
_TABLE = replace(_PRERESNET, model="table-resnet", rate=1e-3, training=_ADAMW, rows=rows.DIAMONDS)
_CIFAR10 = replace(_PRERESNET, input_shape=(3, 16, 16), images=10_000, mean=0.47, std=0.25)
_FEW: Mapping[str, Any] = {"images": 400, "clients": 8, "drawn": 2, "rounds": 4, "seeds": (1,)}
_LENET = Scale("lenet:lenet", (1, 28, 28), 60_000, 10, 10, 50, 10, 64, 0.01, (1,), mean=0.0, std=1.0)
_QUICK_LENET = replace(_LENET, images=0, rounds=5)
EXPERIMENTS: Mapping[str, Experiment] = {
    "budgets": Experiment(
        depth.budgets,
        replace(_PRERESNET, model="digits-cnn", input_shape=(1, 28, 28), rate=0.05),
        replace(_QUICK, model="digits-cnn", input_shape=(1, 8, 8), rate=0.05),
    ),
    "blocks": Experiment(depth.blocks, _PRERESNET, _QUICK),
    "partial": Experiment(depth.partial, _PRERESNET, _QUICK),
    "slices": Experiment(depth.slices, _PRERESNET, _QUICK),
    "blocks_cifar10": Experiment(depth.blocks, _CIFAR10, _QUICK, CIFAR10),
    "epochs": Experiment(depth.epochs, _EPOCHS, replace(_QUICK, epochs=1)),
    "text": Experiment(depth.blocks, _TEXT, replace(_TEXT, **_FEW), AG_NEWS),
    "table": Experiment(depth.blocks, _TABLE, replace(_TABLE, **_FEW), DIAMONDS),
    "niid_bench_fashion": Experiment(_published, _LENET, _QUICK_LENET),
    "niid_bench_cifar10": Experiment(_published, replace(_LENET, input_shape=(3, 32, 32)), _QUICK_LENET, CIFAR10),
}


def play(ground: Ground, setup: Setup, seed: int) -> Path:
    """One run, or what is missing of it. Returns its folder."""
    scale, folder, data = ground.scale, ground.folder, ground.data
    name, calibrates = f"{setup.name}-{seed}", scale.model.startswith(niid_bench.LENET.stem)
    options = ["--name", setup.name, "--clients", str(scale.clients), "--partition", PARTITION]
    training, rate_end = f"weight_decay = {WEIGHT_DECAY}", scale.rate / 20
    if calibrates:
        shares = folder / f"partition-{seed}.json"
        labels = digits_labels() if data == DIGITS else open_images(data, ground.spec, "train").labels
        niid_bench.write_partition(shares, labels, scale.clients, seed)
        options[2:] = ["--partition", f"file:{shares}"]
        training, rate_end = niid_bench.job_lines(scale), scale.rate
    if setup.plans:
        plans = folder / f"{setup.name}-plans.json"
        plans.write_bytes(msgspec.json.encode({_client(number): plan for number, plan in enumerate(setup.plans)}))
        options += ["--plans", str(plans)]
    if setup.drawn_from:
        trace = folder / f"{setup.name}-trace.jsonl"
        clients = [_client(number) for number in setup.drawn_from]
        rounds = range(1, scale.rounds + 1)
        trace.write_text("".join(json.dumps({"round": each, "clients": clients}) + "\n" for each in rounds))
        options += ["--trace", str(trace)]
    if setup.width != 1:
        scale = replace(scale, model=_narrow(scale.model, setup.width, folder))
    if setup.epochs:
        scale = replace(scale, epochs=setup.epochs)
    text = job_text(scale, name=setup.name, seed=seed, data=data, training=training, rate_end=rate_end)
    return simulate(folder / f"{name}.toml", text, data, folder / name, *options)


def _client(number: int) -> str:
    return f"client-{number:03d}"


def _narrow(model: str, width: Fraction, folder: Path) -> str:
    """A user's model file that builds the model so wide; the name to give in a job."""
    stem = f"width_{width.numerator}_{width.denominator}"
    function = model.replace("-", "_")
    text = _WIDE.format(function=function, numerator=width.numerator, denominator=width.denominator)
    (folder / f"{stem}.py").write_text(text)
    return f"{stem}:narrow"


def data_of(name: str, scale: Scale, folder: Path, given: Mapping[str, Path | None]) -> str:
    """Where the experiment's data lie, prepared.

    Args:
        given: what the options of the sources name.
    """
    source = EXPERIMENTS[name].source
    if not scale.images:
        return DIGITS
    if source is None:
        return str(fashion(scale.images, folder / f"fashion-{scale.images}"))
    place = given[source.option]
    if place is None:
        raise ConfigError(f"{name} needs {source.option}: {source.what}")
    return str(source.prepare(place, scale.images, folder / f"{source.option.strip('-')}-{scale.images}"))


@dataclass
class Begun:
    """An experiment that is being run.

    Attributes:
        runs: what has been run, or begun.
    """

    name: str
    ground: Ground
    setups: Sequence[Setup]
    runs: list[Path] = field(default_factory=list)

    def play(self, seed: int, output: Path, quick: bool, console: Console) -> None:
        """Runs all set-ups with this seed, and writes what there is after each; peaks are known before."""
        if self.name not in _known(output):
            self.write(output, quick)
        for setup in self.setups:
            console.print(f"{self.name}: {setup.name}, seed {seed}")
            self.runs.append(play(self.ground, setup, seed))
            self.write(output, quick)

    def write(self, output: Path, quick: bool) -> None:
        """Puts what there is into the file, beside other experiments."""
        known = _known(output)
        setups: dict[str, dict[str, Any]] = {setup.name: dict(setup.facts) for setup in self.setups}
        for each in compare([read_run(run) for run in self.runs]):
            seconds = [processor_seconds(run) for run in self.runs if read_run(run).name == each.name]
            setups[each.name] |= {**figures(each), "processor_seconds": fmean(seconds)}
        known[self.name] = {
            "quick": quick,
            "scale": asdict(self.ground.scale),
            "torch": torch.__version__,
            "cores": len(os.sched_getaffinity(0)),
            "setups": setups,
        }
        write_atomically(output, json.dumps(known, indent=1).encode() + b"\n")


def _known(output: Path) -> dict[str, Any]:
    """What a file holds, by experiment."""
    found: dict[str, Any] = json.loads(output.read_bytes()) if output.exists() else {}
    return found


def _begin(name: str, scale: Scale, folder: Path, given: Mapping[str, Path | None], console: Console) -> Begun:
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(niid_bench.LENET, place / niid_bench.LENET.name)  # for jobs whose model it is
    ground = Ground(scale, place, data_of(name, scale, folder.parent / "data", given), console.print)
    return Begun(name, ground, list(EXPERIMENTS[name].setups(ground)))


def main(
    names: Annotated[list[str], typer.Argument(help=f"One or more of {', '.join(EXPERIMENTS)}.")],
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    quick: Annotated[bool, typer.Option(help="Digits, a few clients and rounds.")] = False,
    cifar10: Annotated[Path | None, typer.Option(help="Class folders of CIFAR-10.", file_okay=False)] = None,
    ag_news: Annotated[Path | None, typer.Option(help="AG News as gzipped CSV.", dir_okay=False)] = None,
    diamonds: Annotated[Path | None, typer.Option(help="diamonds.csv of plotnine.", dir_okay=False)] = None,
    folder: Annotated[Path, typer.Option(help="For data and runs.")] = Path("runs/experiments"),
) -> None:
    """Simulated federations that say what depth-wise training gives and costs."""
    console = Console()
    unknown = sorted({*names} - {*EXPERIMENTS})
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: there are {', '.join(EXPERIMENTS)}")
    place = folder.resolve() / ("quick" if quick else "full")
    scales = {name: EXPERIMENTS[name].quick if quick else EXPERIMENTS[name].full for name in names}
    given = {CIFAR10.option: cifar10, AG_NEWS.option: ag_news, DIAMONDS.option: diamonds}
    begun: dict[str, Begun] = {}
    for seed in sorted({seed for scale in scales.values() for seed in scale.seeds}):
        for name, scale in scales.items():  # so that all have a first seed soon
            if seed in scale.seeds:
                if name not in begun:
                    begun[name] = _begin(name, scale, place, given, console)
                begun[name].play(seed, output, quick, console)
    for each in begun.values():
        console.print(each.name, table(compare([read_run(run) for run in each.runs])))


if __name__ == "__main__":
    typer.run(main)
