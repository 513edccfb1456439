"""Peers: the other models of mutual distillation, which a device keeps for itself (arXiv 2303.04887, section 4.3).

A file of a peer holds what training changes, under the names of the global weights. Where there is none, a peer begins
as a copy of the global weights with noise on it, NOISE of each tensor's spread: from equal weights, all models would
take the same steps for ever, and teach each other nothing. A device has no code that could draw fresh weights, and a
peer that knows what the global model knows teaches from its first step on (docs/mutual.md has the comparison).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fedepth.errors import PeerError, StateError
from fedepth.kept_files import kept_name
from fedepth.models.run import Model, RunnableUnit
from fedepth.training.block import BlockTraining
from fedepth.training.context import TrainingContext, load
from fedepth.weights import Reader, open_weights

NOISE = 0.3


def begin_peers(
    context: TrainingContext, count: int, begin: Callable[[TrainingContext], BlockTraining]
) -> list[BlockTraining]:
    """So many peers, loaded and trainable.

    Args:
        context: of the model that is uploaded, whose units of this stage are loaded; the head is.
        begin: begins the stage for another model.

    Raises:
        PeerError: a file of a peer is not one of this model.
    """
    # FedProx holds what is averaged near the global weights; a peer is not.
    task = replace(context.task, training=replace(context.task.training, proximal_mu=0.0))
    found = []
    for slot in range(1, count + 1):
        path = context.peers[slot - 1] if slot <= len(context.peers) else None
        model = Model(context.model.graph)
        trained = {} if path is None else _opened(context, path)
        peer = replace(context, task=task, model=model, trained=trained)
        for mine, its in zip(_units(context.model), _units(model), strict=True):
            its.tensors.update({name: mine.tensors[name] for name in mine.unit.fixed if name in mine.tensors})
        load(peer, model.head, trainable=True)
        found.append(begin(peer))
        if path is None:
            _vary(peer, slot)
    return found


def name_peer(folder: Path, slot: int, digest: str) -> None:
    """Gives a written peer its name, by which the device finds it."""
    peer_path(folder, slot).rename(folder / kept_name(slot, digest))


def peer_path(folder: Path, slot: int) -> Path:
    """Where a peer is written."""
    return folder / f"peer-{slot}.safetensors"


def _opened(context: TrainingContext, path: Path) -> dict[str, Reader]:
    """What a peer's file holds of what is trained now.

    One of a round whose BatchNorm statistics were fixed has none; those of the global weights are its own as well.
    """
    try:
        reader = open_weights(path)
    except StateError as error:
        raise PeerError(str(error)) from None
    units = _units(context.model)
    found = {name for unit in units for name in unit.unit.trained_names} & set(reader.names)
    whole = found >= {name for unit in units for name in unit.unit.parameters}
    if not whole or any(reader.info(name) != context.weights.info(name) for name in found):
        raise PeerError(f"{path} holds another model than the one of this task")
    return dict.fromkeys(found, reader)


def _units(model: Model) -> tuple[RunnableUnit, ...]:
    return (*model.units, model.head)


def _vary(peer: TrainingContext, slot: int) -> None:
    """Adds the noise; the same for the same job, round, device and slot."""
    task = peer.task
    text = f"peer/{task.training.seed}/{task.round}/{peer.device_id}/{slot}"
    chance = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
    with torch.no_grad():
        for unit in _units(peer.model):
            for name in unit.unit.parameters:
                if name in unit.tensors:
                    parameter = unit.tensors[name]
                    noise = torch.randn(parameter.shape, generator=chance).to(parameter.device)
                    parameter.add_(noise, alpha=NOISE * float(parameter.std(correction=0)))
