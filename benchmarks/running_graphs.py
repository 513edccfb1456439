"""What it costs in time to run a model as a graph instead of as the modules it came from.

    python -m benchmarks.running_graphs --json FILE

Forward and backward passes of the same batch, with the same weights, in the memory format and with the allocator of a
trainer, by turns in one process: module, graph, graph, module, and so on, since a shared machine is faster at one time
than at another. A ratio is the median over these rounds. It compares seconds of processor time, which other programs
take less from than from seconds on the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.models import spec_of
from fedepth.memory.environment import environment
from fedepth.models import zoo
from fedepth.models.export import export_model
from fedepth.models.run import Model

LIMIT = 1.02
BATCH = 16
NAMES = (
    *("digits-cnn", "preresnet20", "vit-tiny", "torchvision:resnet18", "torchvision:mobilenet_v3_small"),
    *("torchvision:shufflenet_v2_x1_0", "timm:mobilenetv4_conv_small", "timm:levit_128s", "custom:TextEncoder"),
)


def ratio_of(name: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of module and graph, and the median of their ratios."""
    spec = spec_of(name)
    torch.manual_seed(1)
    module = zoo.build(spec)
    exported = export_model(module, name, spec.input_shape, spec.input_type.dtype, len(spec.classes))
    graph = exported.graph

    def laid_out(tensor: torch.Tensor) -> torch.Tensor:
        last = graph.channels_last and tensor.dim() == 4
        return tensor.to(memory_format=torch.channels_last) if last else tensor

    model = Model(graph)
    tensors = {each: laid_out(tensor.detach().clone()) for each, tensor in exported.tensors.items()}
    model.load(tensors.__getitem__, trainable=True)
    if graph.channels_last:
        module = module.to(memory_format=torch.channels_last)
    module.train()
    inputs = laid_out(exported.examples(BATCH))
    own, loaded = list(module.parameters()), list(tensors.values())

    def module_step() -> float:
        return _step(module, inputs, own)

    def graph_step() -> float:
        return _step(model, inputs, loaded)

    steps = (module_step, graph_step)
    for step in (*steps, *steps):  # kernels are compiled at their first use
        step()
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for which in order:
            seconds[which].append(steps[which]())
    ratios = [one / other for other, one in zip(*seconds, strict=True)]
    in_ms = [statistics.median(each) * 1000 for each in seconds]
    return {"model": name, "module_ms": in_ms[0], "graph_ms": in_ms[1], "ratio": statistics.median(ratios)}


def _step(model: nn.Module | Model, inputs: torch.Tensor, parameters: Sequence[torch.Tensor]) -> float:
    """Seconds of processor time for one forward and backward pass."""
    for parameter in parameters:
        parameter.grad = None
    started = time.process_time()
    logits: torch.Tensor = model(inputs)
    torch.autograd.backward(logits.sum())
    return time.process_time() - started


def main(
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    rounds: Annotated[int, typer.Option(help="Steps of each.")] = 40,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Compares the time of graphs with that of the modules they came from."""
    if one:
        torch.set_num_threads(1)
        output.write_text(json.dumps(ratio_of(one, rounds)))
        return
    console = Console()
    rows: list[dict[str, Any]] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        command = [sys.executable, "-m", "benchmarks.running_graphs", "--one", name, "--rounds", str(rounds)]
        subprocess.run([*command, "--json", str(output)], env={**os.environ, **environment("auto", 1)}, check=True)
        rows.append(json.loads(output.read_text()))
        console.print(f"{name:<36} {rows[-1]['ratio']:.3f}")
    table = Table(title="one step, forwards and backwards")
    for column in ("model", "modules", "graph", "ratio"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(row["model"], f"{row['module_ms']:.1f} ms", f"{row['graph_ms']:.1f} ms", f"{row['ratio']:.3f}")
    console.print(table)
    median = statistics.median(row["ratio"] for row in rows)
    worst = max(row["ratio"] for row in rows)
    console.print(f"median ratio {median:.3f}, largest {worst:.3f}; at most {LIMIT} is the aim")
    figures = {"median_ratio": median, "largest_ratio": worst, "limit": LIMIT, "torch": torch.__version__, "rows": rows}
    output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
