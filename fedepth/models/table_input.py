"""The features of a table's rows in torch, on any device and in an exported model."""

from __future__ import annotations

import torch

from fedepth.data.tables import first_slots
from fedepth.task import TableSpec


def table_features(rows: torch.Tensor, spec: TableSpec) -> torch.Tensor:
    """(B, columns) float64 rows as (B, features) float32; see `fedepth.data.tables`."""
    count = len(spec.numeric)
    parts: list[torch.Tensor] = []
    if count:
        mean, std = (torch.tensor(values, dtype=torch.float64, device=rows.device) for values in (spec.mean, spec.std))
        scaled = ((rows[:, :count] - mean) / std).to(torch.float32)
        missing = torch.isnan(scaled)
        parts += [torch.where(missing, 0.0, scaled), missing.to(torch.float32)]
    if spec.categorical:
        slots = rows[:, count:].to(torch.int64) + torch.from_numpy(first_slots(spec)).to(rows.device)
        empty = torch.zeros((rows.shape[0], spec.features - 2 * count), dtype=torch.float32, device=rows.device)
        parts.append(empty.scatter(1, slots, 1.0))
    return torch.cat(parts, 1)
