"""From what was played in a round to its line in the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedepth.rounds.soundness import Evaluation
from fedepth.simulation.clients import Client
from fedepth.simulation.course import Played
from fedepth.simulation.record import ClientLine, RoundLine, TierLine
from fedepth.task import Result


def round_line(
    number: int,
    played: Played,
    clients: Mapping[str, Client],
    found: Evaluation | None,
    *,
    note: str,
    notes: tuple[str, ...],
    weights_bytes: int,
    seconds: float,
    began_at: float,
    weights_digest: str,
    weights_round: int,
) -> RoundLine:
    """The line of a round."""
    updates = {result.task_id: result for result in played.updates}
    rows: list[ClientLine] = []
    for task_id, client in {given.task_id: given.client for given in played.given}.items():
        tier = clients[client].tier.name
        result = updates.get(task_id)
        if result is None:
            rows.append(ClientLine(client, tier, played.ends.get(task_id, "late: the round closed without it")))
        else:
            rows.append(_client_line(client, tier, result))
    trained = [row for row in rows if row.end == "update"]
    return RoundLine(
        round=number,
        accuracy=None if found is None else found.accuracy,
        loss=None if found is None else found.loss,
        published=not note,
        note=note,
        updates=len(trained),
        samples=sum(row.samples for row in trained),
        steps=sum(row.steps for row in trained),
        samples_seen=sum(row.samples_seen for row in trained),
        predicted_peak_bytes=max((row.predicted_peak_bytes for row in trained), default=0),
        measured_peak_bytes=max((row.measured_peak_bytes for row in trained), default=0),
        bytes_down=weights_bytes * len(played.given),
        bytes_up=sum(part.size_bytes for result in updates.values() for part in result.parts),
        seconds=seconds,
        simulated_seconds=played.ended_at - began_at,
        ended_at=played.ended_at,
        weights_digest=weights_digest,
        weights_round=weights_round,
        notes=notes,
        tiers={name: _tier_line([row for row in trained if row.tier == name]) for name in _names(trained)},
        clients=tuple(rows),
    )


def _names(rows: Iterable[ClientLine]) -> list[str]:
    return sorted({row.tier for row in rows})


def _client_line(client: str, tier: str, result: Result) -> ClientLine:
    return ClientLine(
        client=client,
        tier=tier,
        end="update",
        blocks=result.plan.blocks,
        samples=result.sample_count,
        predicted_peak_bytes=max(stage.predicted_peak_bytes for stage in result.stages),
        measured_peak_bytes=max(stage.measured_peak_bytes for stage in result.stages),
        budget_bytes=min(stage.budget_bytes for stage in result.stages),
        steps=sum(stage.steps for stage in result.stages),
        samples_seen=sum(stage.samples_seen for stage in result.stages),
        seconds=result.seconds,
        loss=result.stages[-1].loss_last,
    )


def _tier_line(rows: list[ClientLine]) -> TierLine:
    return TierLine(
        updates=len(rows),
        blocks=tuple(sorted({row.blocks for row in rows})),
        budget_bytes=min(row.budget_bytes for row in rows),
        predicted_peak_bytes=max(row.predicted_peak_bytes for row in rows),
        measured_peak_bytes=max(row.measured_peak_bytes for row in rows),
        steps=sum(row.steps for row in rows),
        samples_seen=sum(row.samples_seen for row in rows),
        seconds=sum(row.seconds for row in rows),
    )
