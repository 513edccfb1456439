"""Real processes: a Vision Transformer that begins with weights of a file, and BatchNorm whose statistics are fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from fedepth.weights import load_numpy, save

VIT = """
from timm.models.vision_transformer import VisionTransformer

def build(spec):
    side = spec.input_shape[-1]
    return VisionTransformer(side, 8, 1, len(spec.classes), embed_dim=16, depth=3, num_heads=2)
"""

CONVOLUTIONS = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 10),
    )
"""


def job(rig: Any, code: str, sections: str, **changes: Any) -> Path:
    (rig.folder / "tuned.py").write_text(code)
    path: Path = rig.job(devices=1, quorum=1, model="tuned:build", **changes)
    path.write_text(path.read_text().replace("learning_rate = 0.05", f"learning_rate = 0.01\n{sections}"))
    return path


def weights(rig: Any, number: int) -> dict[str, Any]:
    """The global weights of a round."""
    (path,) = (rig.lab.coordinator_state / "weights").glob(f"round-{number:04d}-????????????.safetensors")
    return load_numpy(path)


def notes(rig: Any) -> list[str]:
    return [line["note"] for line in rig.log("coordinator") if line.get("event") == "model"]


def test_the_last_units_of_a_vision_transformer_are_tuned(rig: Any) -> None:
    torch.manual_seed(5)
    given = VisionTransformer(64, 8, 1, 7, embed_dim=16, depth=3, num_heads=2)  # other images, other classes
    state = {f"module.{name}": tensor.numpy() for name, tensor in given.state_dict().items()}
    save(rig.folder / "given.safetensors", state)
    path = job(rig, VIT, 'optimizer = "adamw"\nweight_decay = 0.1\n[tuning]\nlast_units = 2\n', epochs=2)
    path.write_text(
        path.read_text().replace('name = "tuned:build"', 'name = "tuned:build"\nweights = "given.safetensors"')
    )
    rig.lab.start_coordinator(path, "--exit-when-done")
    rig.agent(0, "--exit-when-done")
    given_task = rig.event("coordinator", "task_given")
    assert given_task["blocks"] == "5-6"
    exported = rig.event("coordinator", "exported")
    assert [rig.end(name) for name in ("coordinator", "device-0")] == [0, 0]
    assert exported["parity_max_abs"] <= 1e-4
    said = notes(rig)
    assert "a new classifier for 10 classes: head.bias, head.weight keep fresh weights" in said
    assert "position embeddings were interpolated: pos_embed from 8×8 to 4×4 patches" in said
    assert len([note for note in said if note.startswith("[tuning] freezes the first 5 of 7 units")]) == 1
    before, after = weights(rig, 0), weights(rig, 1)
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith(("blocks.2.", "norm.", "head."))}
    assert np.array_equal(after["blocks.1.mlp.fc1.weight"], state["module.blocks.1.mlp.fc1.weight"])


def test_batch_norms_statistics_are_fixed_after_the_first_round(rig: Any) -> None:
    path = job(rig, CONVOLUTIONS, 'batch_norm = "fixed"\nfixed_after = 1\n', rounds=3)
    rig.lab.start_coordinator(path, "--exit-when-done")
    rig.agent(0, "--exit-when-done")
    assert [rig.end(name) for name in ("coordinator", "device-0")] == [0, 0]
    assert [line["event"] for line in rig.log("coordinator")].count("update_accepted") == 3
    rounds = [weights(rig, number) for number in (1, 2, 3)]
    statistics = {name for name in rounds[0] if name.split(".")[-1].startswith(("running", "num_batches"))}
    assert len(statistics) == 6
    assert all(rounds[0][name].any() for name in statistics)
    for before, after in ((rounds[0], rounds[1]), (rounds[1], rounds[2])):
        moved = {name for name in after if not np.array_equal(before[name], after[name])}
        assert moved == set(after) - statistics
