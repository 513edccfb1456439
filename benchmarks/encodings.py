"""What the encoding of updates does to accuracy, and to what goes up, in simulated federations.

    python -m benchmarks.encodings --json FILE          Fashion-MNIST, 20 clients, 30 rounds, 2 seeds: minutes
    python -m benchmarks.encodings --quick --json FILE  scikit-learn's digits, 6 clients, 4 rounds, 2 seeds

Every run is `fedepth simulate`: the session, encoding and average of real devices, five of twenty clients a round, so
that a client waits for several rounds before what int8 has left out goes up. All runs share data, partition
(Dirichlet 0.3 with equal sizes), seeds, model (digits-cnn at 16×16 pixels) and training.

    float32, float16, int8  as a job says under [transfer] encoding
    int8_without_feedback   int8 whose devices forget what it leaves out, for comparison: no job can ask for it

A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.runs import Scale, fashion, figures, job_text, simulate, table
from fedepth.files import write_atomically
from fedepth.layout import Encoding
from fedepth.simulation.compare import compare, read_run

RUNS: Mapping[str, tuple[Encoding, str]] = {  # the encoding, and the module that is run
    "float32": (Encoding.FLOAT32, "fedepth.cli"),
    "float16": (Encoding.FLOAT16, "fedepth.cli"),
    "int8": (Encoding.INT8, "fedepth.cli"),
    "int8_without_feedback": (Encoding.INT8, "benchmarks.without_feedback"),
}
FULL = Scale("digits-cnn", (1, 16, 16), 3_000, 20, 5, 30, 2, 32, 0.05, (1, 2))
QUICK = Scale("digits-cnn", (1, 16, 16), 0, 6, 4, 4, 2, 32, 0.05, (1, 2))


def play(name: str, scale: Scale, seed: int, data: str, folder: Path) -> Path:
    """One run, or what is missing of it. Returns its folder."""
    encoding, module = RUNS[name]
    text = job_text(
        scale, name=name, seed=seed, data=data, rate_end=scale.rate / 20,
        training=f'\n[transfer]\nencoding = "{encoding.value}"',
    )  # fmt: skip
    return simulate(
        folder / f"{name}-{seed}.toml", text, data, folder / f"{name}-{seed}",
        "--clients", str(scale.clients), "--partition", "dirichlet:0.3", module=module,
    )  # fmt: skip


def main(
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    quick: Annotated[bool, typer.Option(help="Digits, a few clients and rounds.")] = False,
    folder: Annotated[Path, typer.Option(help="For data and runs.")] = Path("runs/encodings"),
) -> None:
    """Simulated federations whose updates go up in every encoding."""
    console = Console()
    scale = QUICK if quick else FULL
    folder = (folder / ("quick" if quick else "full")).resolve()
    data = str(fashion(scale.images, folder / "data")) if scale.images else "digits"
    runs: list[Path] = []
    for seed in scale.seeds:
        for name in RUNS:
            console.print(f"{name}, seed {seed}")
            runs.append(play(name, scale, seed, data, folder))
            found = compare([read_run(run) for run in runs])
            written = {
                "quick": quick,
                "scale": asdict(scale),
                "encodings": {each.name: figures(each) for each in found},
            }
            write_atomically(output, json.dumps(written, indent=1).encode() + b"\n")
    console.print(table(found))


if __name__ == "__main__":
    typer.run(main)
