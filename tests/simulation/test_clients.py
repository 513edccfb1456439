"""Who takes part, and with which budget."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest

from fedepth.errors import ConfigError
from fedepth.simulation.clients import TIERS, Tier, load_budgets, load_plans, make_clients, tier_shares
from fedepth.simulation.partitions import Partition, Share

PARTITION = Partition("iid", 0, 100, tuple(Share(f"c{number:02d}", (number,)) for number in range(10)))


def test_tiers_are_those_of_the_paper() -> None:
    sixth, eighth = Fraction(1, 6), Fraction(1, 8)
    assert TIERS["fair"] == (sixth, Fraction(1, 3), Fraction(1, 2), 1)
    assert TIERS["lack"] == (eighth, sixth, Fraction(1, 2), 1)
    assert TIERS["surplus"] == (sixth, Fraction(1, 3), Fraction(1, 2), 2)
    with pytest.raises(ConfigError, match="--tiers 'poor': there are fair, lack, surplus and full"):
        tier_shares("poor")


def test_tiers_are_spread_evenly_and_at_random() -> None:
    tiers = [Tier(name, 1, "") for name in "wxyz"]
    clients = make_clients(PARTITION, tiers, 1)
    assert Counter(client.tier.name for client in clients) == {"w": 3, "x": 3, "y": 2, "z": 2}
    assert clients == make_clients(PARTITION, tiers, 1)
    assert clients != make_clients(PARTITION, tiers, 2)
    assert [(client.number, client.sample_count) for client in clients] == [(number, 1) for number in range(10)]


@pytest.mark.parametrize("form", ["lines", "list", "indented"])
def test_budgets_are_what_devices_report(tmp_path: Path, form: str) -> None:
    reports = [
        {"available_bytes": 9, "budget": {"budget_bytes": 300}},
        {"model": "x", "device": {"budget_bytes": 500}, "calibration": {"fixed_bytes": 7}},
    ]
    path = tmp_path / "reports.json"
    if form == "lines":
        path.write_text("".join(json.dumps(report) + "\n" for report in reports))
    else:
        path.write_text(json.dumps(reports if form == "list" else reports[0], indent=1))
    found = load_budgets(path)
    assert [tier.budget_bytes for tier in found] == ([300] if form == "indented" else [300, 500])
    assert found[-1].calibration.fixed_bytes == (found[0].calibration.fixed_bytes if form == "indented" else 7)


def test_devices_of_one_name_are_tiers_of_their_own(tmp_path: Path) -> None:
    names = ["pi (2)", "pi", "pi", "pi", "pi (left)"]
    reports = [{"name": name, "budget": {"budget_bytes": size}} for size, name in enumerate(names)]
    (tmp_path / "reports.json").write_text(json.dumps(reports))
    found = load_budgets(tmp_path / "reports.json")
    assert [tier.name for tier in found] == ["pi (2)", "pi", "pi (3)", "pi (4)", "pi (left)"]
    assert [tier.budget_bytes for tier in found] == [0, 1, 2, 3, 4]


def test_budgets_may_be_the_tiers_of_another_run(tmp_path: Path) -> None:
    tiers = (Tier("1/6", 100, "measured", 90), Tier("1", 700, "measured", 600))
    (tmp_path / "tiers.json").write_bytes(msgspec.json.encode(tiers))
    assert load_budgets(tmp_path / "tiers.json") == tiers


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"budget": {"budget_bytes": "much"}}', "no"])
def test_what_is_no_report_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "reports.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--budgets: "):
        load_budgets(path)
    with pytest.raises(ConfigError, match="--plans: "):
        path.write_text('{"a": 1}')
        load_plans(path)
