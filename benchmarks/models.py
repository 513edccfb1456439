"""Which models can be brought: exported, cut, proved equal to their modules, and trained for a step.

    python -m benchmarks.models --quick --json FILE   25 small ones, under five minutes
    python -m benchmarks.models --json FILE           all of torchvision's classifiers, 50 of timm, 34 written by hand

Every model runs in a process of its own, which is ended after ten minutes. `exact`: the preparation of a job found no
difference between graph and module. `trained`: every unit alone, and all of them with and without checkpointing, made a
training step in the layout of a trainer. `silently_different` is judged without that code: the graph goes through its
file to another process that has not the model's code, and is compared there with logits and gradients of the module, at
other weights, batches, scales and seeds. Finished models are kept in a folder, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import custom_models
from fedepth.task import InputType, ModelSpec, TrainingSpec

if TYPE_CHECKING:
    from fedepth.models.export import Exported

LONGEST_S = 600
DIFFERENCE = 1e-4
MODES = {"training": 3, "evaluation": 6}  # with the samples of a batch
TRAINING = TrainingSpec(32, 1, "sgd", 0.01, 0.9, 5e-4, 0.0, "none", 1)
_LARGE = ("vit_h", "vit_l", "regnet_y_128", "regnet_y_32", "regnet_x_32", "convnext_large", "efficientnet_v2_l")
# Sides in pixels of those that do not take 64.
_SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}
TIMM = (
    *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
    *("efficientnet_lite0", "ghostnet_100", "resnet26d", "seresnet18", "ecaresnet26t", "convnextv2_atto"),
    *("mixer_s32_224", "resmlp_12_224", "gmlp_s16_224", "poolformer_s12", "mobilevit_xxs", "mobilevitv2_050"),
    *("fastvit_t8", "efficientformer_l1", "levit_128s", "tinynet_e", "lcnet_050", "hardcorenas_a", "fbnetc_100"),
    *("rexnet_100", "cspdarknet53", "dla34", "hrnet_w18_small", "res2net50_26w_4s", "xcit_nano_12_p16_224"),
    *("pit_ti_224", "coat_lite_tiny", "crossvit_tiny_240", "tiny_vit_5m_224", "efficientvit_b0", "visformer_tiny"),
    *("maxvit_tiny_tf_224", "starnet_s1", "pvt_v2_b0", "swinv2_cr_tiny_224", "cait_xxs24_224", "selecsls42b"),
    *("skresnet18", "mobileone_s0", "repvit_m0_9", "edgenext_xx_small", "regnety_002", "repghostnet_050", "vovnet39a"),
    *("inception_next_tiny", "nfnet_l0"),
)
_TIMM_SIDES = {"crossvit_tiny_240": 240, "poolformer_s12": 64, "repvit_m0_9": 64}
QUICK = (
    *(
        "torchvision:resnet18",
        "torchvision:mobilenet_v2",
        "torchvision:mobilenet_v3_small",
        "torchvision:squeezenet1_1",
    ),
    *("torchvision:shufflenet_v2_x0_5", "torchvision:regnet_y_400mf", "torchvision:alexnet", "timm:edgenext_xx_small"),
    *("timm:mobilenetv4_conv_small", "timm:tinynet_e", "timm:lcnet_050", "digits-cnn", "preresnet20", "vit-tiny"),
    *(f"custom:{name}" for name in ("TextEncoder", "Gpt", "LstmClassifier", "spectral", "StochasticDepth", "Tied")),
    *(f"custom:{name}" for name in ("InPlaceSlices", "ModeBranch", "frozen_backbone", "group_norm_cnn", "series_cnn")),
)


def everything() -> tuple[str, ...]:
    """Names of all models, small ones first."""
    from torchvision import models

    names = [f"torchvision:{name}" for name in models.list_models(module=models)]
    small = [name for name in names if not name.split(":")[1].startswith(_LARGE)]
    rest = [name for name in names if name not in small]
    custom = [f"custom:{name}" for name in custom_models.KEPT]
    return (*custom, *(f"timm:{name}" for name in TIMM), *small, *rest)


def spec_of(name: str) -> ModelSpec:
    """The job's view of a model: ten classes, inputs as small as it takes."""
    source, _, model = name.partition(":")
    labels = tuple("0123456789")
    if source == "custom":
        shape, kind = custom_models.KEPT[model]
        plain = (0.0,) * shape[0], (1.0,) * shape[0]
        return ModelSpec(f"benchmarks.custom_models:{model}", labels, shape, *plain, InputType(kind))
    side = _side(source, model)
    channels = 1 if name == "digits-cnn" else 3
    return ModelSpec(name, labels, (channels, side, side), (0.5,) * channels, (0.25,) * channels)


def _side(source: str, model: str) -> int:
    if source == "torchvision":
        return _SIDES.get(model, 64)
    if source == "timm":
        import timm

        wanted = timm.get_pretrained_cfg(model)
        if model in _TIMM_SIDES:
            return _TIMM_SIDES[model]
        if wanted is None or not wanted.fixed_input_size or "vit_tiny_patch16" in model:
            return 64
        return int(wanted.input_size[-1])
    return 32


def try_model(name: str, folder: Path) -> dict[str, Any]:
    """What becomes of one model, in this process."""
    import torch

    from fedepth.errors import ModelError
    from fedepth.estimate.tracing import trace_costs
    from fedepth.models import zoo
    from fedepth.models.export import export_model
    from fedepth.models.traced import TracedModel, write_traced
    from fedepth.models.verify import verify
    from fedepth.plan import Policy
    from fedepth.planning.planner import full_training_peak, make_plan, smallest_peak
    from fedepth.training.trial_step import try_one_step
    from fedepth.weights import save

    spec = spec_of(name)
    row: dict[str, Any] = {"name": name, "units": 0, "largest_unit_share": 0.0, "exact": False, "trained": False}
    row.update(refused_because="", plan_seconds=0.0, difference=None, silently_different=False, seconds=0.0)
    started = time.monotonic()
    torch.manual_seed(1)
    try:
        module = zoo.build(spec)
        exported = export_model(module, name, spec.input_shape, spec.input_type.dtype, len(spec.classes))
        graph = exported.graph
        sizes = [sum(exported.tensors[each].numel() for each in unit.parameters) for unit in (*graph.units, graph.head)]
        row["units"], row["exits"] = len(graph.units), sum(graph.exits)
        row["largest_unit_share"] = max(sizes) / max(1, sum(sizes))
        row["head_share"] = sizes[-1] / max(1, sum(sizes))
        row["difference"] = verify(module, exported, name)
        row["exact"] = row["difference"] <= DIFFERENCE
        try_one_step(graph, exported.tensors, exported.examples(max(2, graph.smallest_micro_batch)))
        row["trained"] = True
    except ModelError as error:
        row["refused_because"] = str(error)
        row["seconds"] = time.monotonic() - started
        return row
    costs = trace_costs(graph, name, TRAINING.batch)
    least = smallest_peak(costs, TRAINING, 1000, Policy.AUTO)
    budget = max(least, full_training_peak(costs, TRAINING, 1000).total // 2)
    before = time.process_time()
    try:
        make_plan(costs, budget_bytes=budget, training=TRAINING, sample_count=1000, policy=Policy.AUTO)
    finally:
        row["plan_seconds"] = time.process_time() - before
    write_traced(folder / "graph.json", TracedModel(graph, costs))
    save(folder / "weights.safetensors", _moved(module, exported))
    _write_truth(module, exported, spec, folder)
    del module, exported  # a large model does not fit into two processes
    row["silently_different"] = _differs_elsewhere(folder)
    row["seconds"] = time.monotonic() - started
    return row


def _moved(module: Any, exported: Exported) -> dict[str, Any]:
    """Moves the module's weights; returns all that the graph names."""
    import torch

    from fedepth.models.export import is_spread

    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for each in sorted(exported.tensors):
            tensor = own.get(each)
            if tensor is not None and tensor.is_floating_point() and not is_spread(tensor):
                # To both sides and by little of each sum: in a hundred layers numbers would grow beyond all measure.
                inputs = max(1, tensor[:1].numel() if tensor.dim() > 1 else 100)
                noise = torch.rand(tensor.shape, generator=generator) - (0.5 if tensor.dim() > 1 else 0.0)
                tensor.add_(noise * 0.2 / inputs**0.5)
    # From the module itself: by now a buffer may be another tensor than when it was exported.
    return {each: own.get(each, tensor).detach().numpy() for each, tensor in exported.tensors.items()}


def _write_truth(module: Any, exported: Exported, spec: ModelSpec, folder: Path) -> None:
    """Writes inputs, logits and gradients of the module, a file for each mode."""
    import torch

    from fedepth.models.export import is_spread

    tensors = exported.tensors
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    generator = torch.Generator().manual_seed(98)
    for mode, batch in MODES.items():
        module.train(mode == "training")
        state = {each: tensor.detach().clone() for each, tensor in own.items() if not is_spread(tensor)}
        shape = (batch, *spec.input_shape)
        tokens = spec.input_type is InputType.TOKENS
        x = (
            torch.randint(0, exported.largest_id + 1, shape, generator=generator)
            if tokens
            else torch.randn(shape, generator=generator) * 3
        )
        torch.manual_seed(1234)
        module.zero_grad()
        output = module(x.clone())
        logits = next(leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
        torch.autograd.backward(torch.sin(logits).sum())
        gradients = {e: p.grad for e, p in module.named_parameters() if p.grad is not None and e in tensors}
        torch.save({"x": x, "logits": logits.detach(), "gradients": gradients}, folder / f"{mode}.pt")
        now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():  # looked up anew: a buffer may be another tensor by now
            for each, before in state.items():
                now[each].copy_(before)


def _differs_elsewhere(folder: Path) -> bool:
    """Whether the graph, run by a process that has only files, differs from what the module gave."""
    command = [sys.executable, "-m", "benchmarks.models", "--elsewhere", str(folder), "--json", "-"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=True)
    return float(found.stdout.split()[-1]) > DIFFERENCE


def run_elsewhere(folder: Path) -> float:
    """The largest relative difference between the graph's results and the recorded ones."""
    import torch

    from fedepth.models.run import Model
    from fedepth.models.traced import read_traced
    from fedepth.weights import load_numpy

    worst = 0.0
    for mode in MODES:
        truth = torch.load(folder / f"{mode}.pt", weights_only=True)
        model = Model(read_traced(folder / "graph.json").graph)
        weights = load_numpy(folder / "weights.safetensors")
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        model.load(tensors.__getitem__, trainable=True)
        model.train(mode == "training")
        torch.manual_seed(1234)
        logits = model(truth["x"])
        torch.autograd.backward(torch.sin(logits).sum())
        pairs = [(logits.detach(), truth["logits"], 1e-6)]
        # A gradient that is all but zero, as of the bias of an attention's keys, is made of rounding.
        least = max((float(each.abs().max()) for each in truth["gradients"].values()), default=0.0) / 1000
        for name, gradient in truth["gradients"].items():
            mine = tensors[name].grad
            pairs.append((torch.zeros_like(gradient) if mine is None else mine, gradient, max(least, 1e-6)))
        for one, other, smallest in pairs:
            size = max(float(other.abs().max()), smallest)
            difference = float((one.double() - other.double()).abs().max()) / size
            worst = max(worst, difference if difference == difference else float("inf"))
    foreign = sorted(name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm"))
    if foreign:
        raise SystemExit(f"the model's code was there: {foreign[:3]}")
    return worst


def run_all(names: tuple[str, ...], folder: Path, console: Console) -> list[dict[str, Any]]:
    """Runs what is not there yet, and returns all."""
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names, 1):
        place = folder / name.replace(":", "-")
        result = place / "row.json"
        if not result.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            command = [sys.executable, "-m", "benchmarks.models", "--one", name, "--json", str(result)]
            with open(place / "log", "w", encoding="utf-8") as log:
                try:
                    ended = subprocess.run(command, stdout=log, stderr=log, timeout=LONGEST_S, check=False).returncode
                except subprocess.TimeoutExpired:
                    ended = -1
            for heavy in (*place.glob("*.safetensors"), *place.glob("*.pt")):
                heavy.unlink()
            if not result.exists():
                row: dict[str, Any] = {"name": name, "units": 0, "largest_unit_share": 0.0}
                row.update(
                    exact=False,
                    trained=False,
                    refused_because=f"ended with {ended}, see {place / 'log'}",
                    plan_seconds=0.0,
                )
                row.update(silently_different=False, difference=None, seconds=0.0)
                result.write_text(json.dumps(row))
        rows.append(json.loads(result.read_text()))
        row = rows[-1]
        console.print(
            f"{number:>3}/{len(names)} {name:<36} {row['units']:>3} units  "
            + (row["refused_because"][:120] if row["refused_because"] else f"exact, {row['seconds']:.0f} s"),
            markup=False,
            soft_wrap=True,
        )
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON file says."""
    by_source: dict[str, list[bool]] = {}
    for row in rows:
        source = row["name"].partition(":")[0] if ":" in row["name"] else "zoo"
        by_source.setdefault(source, []).append(row["exact"] and row["trained"])
    return {
        "accepted_fraction": sum(map(sum, by_source.values())) / max(1, len(rows)),
        "accepted_fraction_by_source": {source: sum(each) / len(each) for source, each in by_source.items()},
        "inexact": sum("differs from the model" in row["refused_because"] for row in rows),
        "silently_different": sum(row["silently_different"] for row in rows),
        "models": rows,
    }


def main(
    output: Annotated[str, typer.Option("--json", help="File for all figures.")],
    quick: Annotated[bool, typer.Option(help="25 small models.")] = False,
    folder: Annotated[Path, typer.Option(help="Where finished models are kept.")] = Path("runs/models"),
    one: Annotated[str, typer.Option(hidden=True)] = "",
    elsewhere: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Export, cut, prove and train many models for one step."""
    if elsewhere:
        print(run_elsewhere(Path(elsewhere)))
        return
    if one:
        Path(output).write_text(json.dumps(try_model(one, Path(output).parent)))
        return
    console = Console()
    rows = run_all(QUICK if quick else everything(), folder, console)
    found = figures(rows)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title="models")
    for column in ("source", "accepted"):
        table.add_column(column)
    for source, fraction in found["accepted_fraction_by_source"].items():
        table.add_row(source, f"{fraction:.0%}")
    console.print(table)
    console.print(f"inexact {found['inexact']}, silently different {found['silently_different']}")
    sys.exit(1 if found["silently_different"] else 0)


if __name__ == "__main__":
    typer.run(main)
