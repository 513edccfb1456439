"""Simulated clients: what each has to train on, and the budget that it is planned for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import ConfigError, PlanError
from fedepth.files import NOT_JSON, read_regular
from fedepth.plan import Plan
from fedepth.planning.check import check_plan
from fedepth.printable import printable, quoted
from fedepth.simulation.partitions import Partition
from fedepth.task import TrainingSpec

EVERYTHING = 1 << 50  # a budget that any plan fits
FULL = "full"
# A tier r is the memory that a width-r network of the job's model needs to train at the job's batch; a quarter of the
# clients each (arXiv 2303.04887, section 5).
TIERS: Mapping[str, tuple[Fraction, ...]] = {
    "fair": (Fraction(1, 6), Fraction(1, 3), Fraction(1, 2), Fraction(1)),
    "lack": (Fraction(1, 8), Fraction(1, 6), Fraction(1, 2), Fraction(1)),
    "surplus": (Fraction(1, 6), Fraction(1, 3), Fraction(1, 2), Fraction(2)),
}
_MOST_BYTES = 64 << 20


class Tier(msgspec.Struct, frozen=True):
    """Clients with the same memory.

    Attributes:
        name: the share of the width, as "1/6"; "full"; or what a report says of its device.
        budget_bytes: what training may add on them.
        how: where the figure comes from, for people.
        measured_peak_bytes: of the network of that width; 0 where the budget was not measured so.
    """

    name: str
    budget_bytes: int
    how: str
    measured_peak_bytes: int = 0
    calibration: Calibration = Calibration()


@dataclass(frozen=True)
class Client:
    """One simulated device.

    Attributes:
        number: its place in the partition.
        pinned: a plan that it trains whatever is free.
    """

    id: str
    number: int
    sample_count: int
    tier: Tier
    pinned: Plan | None = None


def make_clients(
    partition: Partition, tiers: Sequence[Tier], seed: int, plans: Mapping[str, Plan] | None = None
) -> tuple[Client, ...]:
    """The clients of a partition, the tiers spread over them evenly and at random, the same for the same seed."""
    count = len(partition.clients)
    places = [tiers[number % len(tiers)] for number in range(count)]
    random.Random(f"tiers/{seed}").shuffle(places)
    return tuple(
        Client(share.id, number, len(share.samples), tier, (plans or {}).get(share.id))
        for number, (share, tier) in enumerate(zip(partition.clients, places, strict=True))
    )


def load_budgets(path: Path) -> tuple[Tier, ...]:
    """Budgets of real devices: what `fedepth-client probe --json` or `report --json` said on each, one after the other
    or in a list; or the tiers.json of another run.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    found = []
    for number, report in enumerate(_reports(path), 1):
        where = f"--budgets: report {number} of {printable(str(path))}"
        if isinstance(report, dict) and report.keys() >= {"name", "budget_bytes", "how"}:
            found.append(_tier(report, where))
            continue
        budget = report.get("budget") or report.get("device") if isinstance(report, dict) else None
        size = budget.get("budget_bytes") if isinstance(budget, dict) else None
        if not isinstance(size, int) or size < 0:
            raise ConfigError(f"{where} tells no budget; write it with: fedepth-client probe --json >> FILE")
        try:
            calibration = msgspec.convert(report.get("calibration") or {}, Calibration)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: {error}") from None
        name = printable(str(report.get("name") or f"device {number}")[:60])
        found.append(Tier(name, size, "a report", 0, calibration))
    if not found:
        raise ConfigError(f"--budgets: {printable(str(path))} holds no report")
    return tuple(_named_apart(found))


def _named_apart(tiers: Sequence[Tier]) -> Iterator[Tier]:
    """The same, each with a name of its own: those of one name would be one in the record."""
    taken = {tier.name for tier in tiers}
    seen: set[str] = set()
    for tier in tiers:
        name = tier.name
        if name in seen:
            name = next(each for n in count(2) if (each := f"{tier.name} ({n})") not in taken)
            taken.add(name)
        seen.add(name)
        yield msgspec.structs.replace(tier, name=name)


def _tier(fields: dict[str, Any], where: str) -> Tier:
    try:
        return msgspec.convert(fields, Tier)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None


def _reports(path: Path) -> list[Any]:
    try:
        data = read_regular(path, _MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"--budgets: {printable(str(path))} cannot be read: {error.strerror}") from None
    try:
        whole = msgspec.json.decode(data)
        return whole if isinstance(whole, list) else [whole]
    except NOT_JSON:
        pass  # one object a line
    try:
        return [msgspec.json.decode(line) for line in data.splitlines() if line.strip()]
    except NOT_JSON as error:
        raise ConfigError(f"--budgets: {printable(str(path))} is not JSON: {error}") from None


def load_plans(path: Path) -> dict[str, Plan]:
    """Plans by client id, as a JSON object: what a job's record says that its devices trained.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        return msgspec.json.decode(read_regular(path, _MOST_BYTES), type=dict[str, Plan])
    except OSError as error:
        raise ConfigError(f"--plans: {printable(str(path))} cannot be read: {error.strerror}") from None
    except NOT_JSON as error:
        raise ConfigError(f"--plans: {printable(str(path))} does not hold plans by client: {error}") from None


def check_pinned(
    plans: Mapping[str, Plan], clients: Sequence[Client], costs: ModelCosts, training: TrainingSpec
) -> None:
    """Raises ConfigError: a plan is of a client that there is not, or is none that this job's model is trained by."""
    known = {client.id for client in clients}
    for client, plan in plans.items():
        where = f"--plans: {quoted(client)}"
        if client not in known:
            raise ConfigError(f"{where}: there is no such client, there are {quoted(clients[0].id)} and so on")
        try:
            check_plan(costs, plan)
        except PlanError as error:
            raise ConfigError(f"{where}: {error}") from None
        whole = [*range(costs.first_trained, len(costs.units))]
        if sorted((*plan.trained_units, *plan.untrained)) != whole:
            raise ConfigError(
                f"{where}: the plan trains {plan.blocks}; each of the units {whole[0]} to {whole[-1]} has to be in one "
                "block or among `untrained`"
            )
        if plan.models > training.mutual:
            raise ConfigError(
                f"{where}: the plan trains {plan.models} models, [training] mutual of the job is {training.mutual}"
            )


def tier_shares(name: str) -> tuple[Fraction, ...]:
    """The widths behind the name of a set of tiers.

    Raises:
        ConfigError: there is no such set.
    """
    if name not in TIERS:
        raise ConfigError(f"--tiers {quoted(name)}: there are {', '.join(TIERS)} and {FULL}")
    return TIERS[name]
