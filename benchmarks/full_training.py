"""Whether training a whole model at the job's batch fails under a limit: tried with the real trainer, not assumed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.bench_task import prepare, write_digits
from edge_client.config import TrainerConfig
from edge_client.measure.trial import trial_request, try_in_fresh_trainer
from edge_client.trainer.protocol import Failed
from fedepth.costs import ModelCosts
from fedepth.estimate.peak import MARGIN_BYTES, MARGIN_SHARE
from fedepth.job import load_config, training_spec
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.planning.planner import full_training_peak
from fedepth.sizes import format_size
from fedepth.task import ModelSpec


def fails_in_full(folder: Path, spec: ModelSpec, job: Path, tiers: Mapping[str, int], console: Console) -> list[str]:
    """Tries full training under each tier's limit and returns the tiers on which it fails."""
    return asyncio.run(_try_tiers(folder, spec, job, tiers, console))


async def _try_tiers(folder: Path, spec: ModelSpec, job: Path, tiers: Mapping[str, int], console: Console) -> list[str]:
    training = replace(training_spec(load_config(job), 1), local_epochs=1)
    prepared = await prepare(spec, training, folder)
    samples = 2 * training.batch
    data = write_digits(folder / "data", samples)
    peak = full_training_peak(prepared.costs, training, samples)
    console.print(
        f"training all of {spec.name} at batch {training.batch} is predicted to need {format_size(peak.total)}"
    )
    failing = []
    for tier, limit in tiers.items():
        plan = full_plan(prepared.costs, training.batch, limit)
        request = trial_request(prepared, plan, limit, data, folder / tier, enforce=True)
        # Nothing is kept of what is freed: the least that training can do with.
        end = await try_in_fresh_trainer(replace(request, release_freed=True), TrainerConfig(threads=2))
        verdict = end.message if isinstance(end, Failed) else ""
        console.print(f"  {tier:<7} {format_size(limit):>10}: {verdict or 'trains'}", markup=False)
        if verdict:
            failing.append(tier)
    return failing


def full_plan(costs: ModelCosts, micro_batch: int, budget_bytes: int) -> Plan:
    """Everything in one stage. It claims to need what there is: a plan that says what it needs would not be tried."""
    claim = int((budget_bytes - MARGIN_BYTES) / (1 + MARGIN_SHARE))
    stage = Stage(
        0, len(costs.units) - 1, micro_batch, CachePlace.DISK, micro_batch, PeakComponents(0, 0, 0, 0, 0, claim, 0)
    )
    return Plan((stage,), (), Policy.PAPER, budget_bytes)
