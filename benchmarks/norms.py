"""How far honest, unequal devices go, measured against the bound that is learned from the others of their round.

    python -m benchmarks.norms --json FILE          six rounds of 24 devices for every setting
    python -m benchmarks.norms --quick --json FILE  two rounds

Small residual networks on made-up images of ten classes. Devices differ by all that devices may differ by: 1 to 50
steps, 10 to 5,000 samples, one class or all of them, the last unit or the whole model, in one block or unit by unit.
Their weighted mean is the next round's model, so that early and late rounds are there.

    honest      norm per step divided by `norm_bound` of the others: all 23 of them; 5 drawn at random, 200 times; and
                the 5 with the smallest norms of the round, which is the worst that can happen. Above 1, an honest
                update would be refused
    poisoned    the smallest factor on an update's change with which it goes beyond the bound: for the median device,
                and for the one of the round that goes least far
    raw         for comparison: the largest honest norm divided by the median of 5 others, without regard to steps
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.norms import FACTORS, norm_bound, update_norms
from fedepth.aggregation.rules import ENOUGH_NORMS, Kind, Norms, WeightedMean
from fedepth.aggregation.updates import ClientUpdate
from fedepth.weights import load_numpy, save

DEVICES = 24
ROUNDS = 6
DRAWS = 200
CLASSES = 10
SIDE = 8
_BATCH = 32
_WIDTH = {"mlp": 48, "conv": 12}
_UNITS = 5

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained."""

    kind: str
    normalisation: str
    optimizer: str
    rate: float


@dataclass(frozen=True)
class Figures:
    """Worst cases over the rounds of a setting (see the module). Of `kind` parameters or buffers."""

    setting: Setting
    kind: Kind
    honest_all: float
    honest_five: float
    honest_worst_five: float
    poisoned_median: float
    poisoned_least: float
    raw_five: float


SETTINGS = (
    Setting("mlp", "batch", "sgd", 0.05),
    Setting("mlp", "batch", "sgd", 0.005),
    Setting("mlp", "layer", "sgd", 0.05),
    Setting("mlp", "layer", "adamw", 0.001),
    Setting("conv", "batch", "sgd", 0.05),
    Setting("conv", "batch", "adamw", 0.001),
)


class Residual(nn.Module):
    """x + f(norm(x)), of linear or convolutional layers."""

    def __init__(self, layer: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.first, self.second = norm(), layer(), layer()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = values + self.second(functional.relu(self.first(self.norm(values))))
        return out


class Network(nn.Module):
    """Units of one width, so that the head can be behind any of them."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = _WIDTH[setting.kind]
        if setting.kind == "conv":
            norm: Callable[[], nn.Module] = lambda: nn.BatchNorm2d(width)  # noqa: E731 - one of two
            layer: Callable[[], nn.Module] = lambda: nn.Conv2d(width, width, 3, padding=1)  # noqa: E731
            stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), norm())
            pool: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        else:
            norm = lambda: nn.BatchNorm1d(width) if setting.normalisation == "batch" else nn.LayerNorm(width)  # noqa: E731
            layer = lambda: nn.Linear(width, width)  # noqa: E731
            stem = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, width), norm())
            pool = nn.Identity()
        self.units = nn.ModuleList([stem, *(Residual(layer, norm) for _ in range(_UNITS - 1))])
        self.head = nn.Sequential(pool, nn.LayerNorm(width), nn.Linear(width, CLASSES))


@dataclass(frozen=True)
class Device:
    """What one device has and does in a round."""

    samples: int
    steps: int
    first: int
    blocks: int
    skew: float


def draw_device(random: np.random.Generator) -> Device:
    first = int(random.integers(0, _UNITS))
    return Device(
        samples=int(np.exp(random.uniform(np.log(10), np.log(5000)))),
        steps=int(np.exp(random.uniform(0, np.log(50.99)))),
        first=first,
        blocks=int(random.integers(1, _UNITS - first + 1)),
        skew=float(random.choice([0.05, 0.5, 100])),
    )


def draw_images(
    random: np.random.Generator, count: int, skew: float, means: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of shape (count, 1, 8, 8) and labels, whose shares follow Dirichlet(skew)."""
    labels = torch.from_numpy(random.choice(CLASSES, count, p=random.dirichlet([skew] * CLASSES)))
    noise = torch.from_numpy(random.standard_normal((count, 1, SIDE, SIDE), np.float32))
    return means[labels] * 0.5 + noise, labels


def train(
    network: Network, setting: Setting, device: Device, means: torch.Tensor, random: np.random.Generator
) -> set[str]:
    """Trains the last units block by block, each for `device.steps`; the names of the tensors that were trained."""
    values, labels = draw_images(random, device.samples, device.skew, means)
    edges = [round(edge) for edge in np.linspace(device.first, _UNITS, device.blocks + 1)]
    network.eval()
    with torch.no_grad():
        for unit in network.units[: device.first]:
            values = unit(values)
    for begin, end in itertools.pairwise(edges):
        modules = [*network.units[begin:end], network.head]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=setting.rate, momentum=0.9)
            if setting.optimizer == "sgd"
            else torch.optim.AdamW(parameters, lr=setting.rate)
        )
        for module in modules:
            module.train()
        for _ in range(device.steps):
            chosen = torch.from_numpy(random.integers(0, len(values), min(_BATCH, len(values))))
            out = values[chosen]
            for module in modules:
                out = module(out)
            optimizer.zero_grad()
            functional.cross_entropy(out, labels[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        network.eval()
        with torch.no_grad():
            for module in modules[:-1]:
                values = module(values)
    units = tuple(f"units.{index}." for index in range(device.first, _UNITS))
    return {name for name in network.state_dict() if name.startswith((*units, "head."))}


def run_round(
    folder: Path, setting: Setting, base: Path, means: torch.Tensor, random: np.random.Generator
) -> list[tuple[Device, Norms]]:
    """Trains all devices from `base`, which their mean replaces."""
    network = Network(setting)
    weights = {name: torch.from_numpy(value) for name, value in load_numpy(base).items()}
    parameters = {name for name, _ in network.named_parameters()}
    updates, norms = [], []
    for number in range(DEVICES):
        device = draw_device(random)
        network.load_state_dict(weights)
        held = train(network, setting, device, means, random)
        path = folder / f"update-{number:02d}.safetensors"
        save(path, {name: value.numpy() for name, value in network.state_dict().items() if name in held})
        updates.append(ClientUpdate((path,), float(device.samples), steps=device.steps))
        norms.append((device, update_norms(base, (path,), parameters)))
    aggregate(base, updates, base, WeightedMean())
    return norms


def figures(
    setting: Setting, kind: Kind, rounds: list[list[tuple[Device, Norms]]], random: np.random.Generator
) -> Figures:
    """The worst of all rounds."""
    worst: dict[str, float] = {}

    def bound(others: list[float]) -> float:
        found = norm_bound(others, kind)
        assert found is not None, "every device changes something"
        return found

    def note(name: str, value: float) -> None:
        worst[name] = max(worst.get(name, 0.0), value)

    for one in rounds:
        raw = [getattr(norms, kind) for _, norms in one]
        norms = [value / device.steps for value, (device, _) in zip(raw, one, strict=True)]
        for place, norm in enumerate(norms):
            others = norms[:place] + norms[place + 1 :]
            note("honest_all", norm / bound(others))
            note("honest_worst_five", norm / bound(sorted(others)[:ENOUGH_NORMS]))
        for _ in range(DRAWS):
            judged, *others_at = random.permutation(len(norms))[: ENOUGH_NORMS + 1]
            note("honest_five", norms[judged] / bound([norms[at] for at in others_at]))
            note("raw_five", raw[judged] / statistics.median(raw[at] for at in others_at))
        factors = [bound(norms[:place] + norms[place + 1 :]) / norm for place, norm in enumerate(norms)]
        note("poisoned_median", statistics.median(factors))
        note("poisoned_least", max(factors))
    return Figures(setting, kind, **worst)


def measure(setting: Setting, rounds: int) -> list[Figures]:
    torch.manual_seed(1)
    random = np.random.default_rng(2)
    means = torch.randn(CLASSES, 1, SIDE, SIDE)
    network = Network(setting)
    with tempfile.TemporaryDirectory(prefix="fedepth-norms-") as name:
        base = Path(name) / "base.safetensors"
        save(base, initial(network.state_dict()))
        norms = [run_round(Path(name), setting, base, means, random) for _ in range(rounds)]
    kinds: tuple[Kind, ...] = ("parameters", "buffers") if setting.normalisation == "batch" else ("parameters",)
    return [figures(setting, kind, norms, random) for kind in kinds]


def initial(state: Mapping[str, torch.Tensor]) -> dict[str, np.typing.NDArray[np.float32]]:
    return {name: value.numpy() for name, value in state.items()}


@app.command()
def norms(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    quick: Annotated[bool, typer.Option(help="Two rounds only.")] = False,
) -> None:
    """Measures the spread of honest norms, and what a poisoned update must be scaled by to be found."""
    started = time.process_time()
    torch.set_num_threads(1)
    rows = [row for setting in SETTINGS for row in measure(setting, 2 if quick else ROUNDS)]
    table = Table(title="honest norms per step, as a share of the bound")
    for column in (
        "setting",
        "of",
        "23 others",
        "5 drawn",
        "5 smallest",
        "found: median",
        "found: least",
        "raw, 5 drawn",
    ):
        table.add_column(column, justify="left" if column in ("setting", "of") else "right")
    for row in rows:
        setting = row.setting
        name = f"{setting.kind}, {setting.normalisation} norm, {setting.optimizer} {setting.rate:g}"
        shares = (row.honest_all, row.honest_five, row.honest_worst_five)
        factors = (row.poisoned_median, row.poisoned_least, row.raw_five)
        table.add_row(name, row.kind, *(f"{share:.2f}" for share in shares), *(f"×{factor:.0f}" for factor in factors))
    console.print(table)
    result: dict[str, object] = {
        "factors": FACTORS,
        "honest_largest_share_of_bound": max(row.honest_five for row in rows),
        "honest_largest_share_of_worst_bound": max(row.honest_worst_five for row in rows),
        **{
            f"poisoned_{kind}_smallest_scale_found_{which}": max(
                getattr(row, f"poisoned_{which}") for row in rows if row.kind == kind
            )
            for kind in FACTORS
            for which in ("median", "least")
        },
        "raw_largest_ratio": max(row.raw_five for row in rows),
        "cpu_seconds": round(time.process_time() - started, 1),
        "rows": [asdict(row) for row in rows],
    }
    console.print_json(json.dumps({name: value for name, value in result.items() if name != "rows"}))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app()
