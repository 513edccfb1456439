"""A job file that was changed between two starts: taken over, refused, or asked about.

A new case is a line in CASES: what is written instead of what, and what comes of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.store.entries import Prepared
from coordinator.store.records import RoundRecord, Store
from fedepth.files import write_atomically
from fedepth.job import load_config, model_spec, section_types, training_spec
from fedepth.job_changes import KINDS, Kind, refusal, settings_of
from fedepth.job_sections import JobConfig
from fedepth.layout import ModelLayout

JOB = """[job]
name = "demo"
rounds = 4
devices_per_round = 3
seed = 7
[model]
name = "digits-cnn"
classes = 10
input_shape = [1, 8, 8]
mean = [0.3]
[training]
batch = 16
learning_rate = 0.05
[test]
data = "digits"
"""
TAKEN, ASKS, REFUSED = Kind.TAKEN_OVER, Kind.ASKS, Kind.REFUSED

# What stands in the file, what stands there at the next start, the kind, and the changes as they are said.
CASES: list[tuple[str, str, Kind | None, list[str]]] = [
    ("rounds = 4", "rounds = 9", TAKEN, ["[job] rounds from 4 to 9"]),
    ("rounds = 4", "rounds = 4\nround_deadline_s = 60", TAKEN, ["[job] round_deadline_s from 3600.0 to 60.0"]),
    ("rounds = 4", "rounds = 4\nquorum = 1", TAKEN, ["[job] quorum from 2 to 1"]),
    ("rounds = 4", "rounds = 4\nquorum = 2", None, []),  # it was 2 before
    ("devices_per_round = 3", "devices_per_round = 5", TAKEN, ["[job] devices_per_round from 3 to 5", "[job] quorum"]),
    ('name = "demo"', 'name = "better"', TAKEN, ['[job] name from "demo" to "better"']),
    ('[test]\ndata = "digits"', '[test]\ndata = "images"', TAKEN, ['[test] data from "digits" to "/']),
    ("[test]", "[guard]\nlargest_drop = 0.5\n[test]", TAKEN, ["[guard] largest_drop from 1.0 to 0.5"]),
    ("[test]", "[retention]\nkeep_last = 9\n[test]", TAKEN, ["[retention] keep_last from 3 to 9"]),
    ("[test]", "[limits]\ndevices = 9\n[test]", TAKEN, ["[limits] devices from 10000 to 9"]),
    ("[test]", "[export]\nevery = 1\n[test]", TAKEN, ["[export] every from 0 to 1"]),
    ("learning_rate = 0.05", "learning_rate = 0.01", ASKS, ["[training] learning_rate from 0.05 to 0.01"]),
    ("batch = 16", 'batch = 16\nschedule = "linear"', ASKS, ['[training] schedule from "cosine" to "linear"']),
    ("batch = 16", "batch = 16\nlocal_epochs = 2", ASKS, ["[training] local_epochs from 1 to 2"]),
    ("batch = 16", "batch = 16\nmutual = 2", ASKS, ["[training] mutual from 1 to 2"]),
    ("batch = 16", "batch = 16\nmutual_weight = 0.5", ASKS, ["[training] mutual_weight from 1.0 to 0.5"]),
    ("rounds = 4", 'rounds = 4\npolicy = "paper"', ASKS, ['[job] policy from "auto" to "paper"']),
    ("[test]", '[aggregation]\nrule = "median"\n[test]', ASKS, ['[aggregation] rule from "mean" to "median"']),
    (
        "batch = 16",
        'batch = 16\nbatch_norm = "fixed"\nfixed_after = 2',
        ASKS,
        ['[training] batch_norm from "trained" to "fixed"', "[training] fixed_after from nothing to 2"],
    ),
    (
        "[test]",
        '[tuning]\nembeddings = "frozen"\n[test]',
        REFUSED,
        ['[tuning] embeddings from "first-stage" to "frozen"'],
    ),
    ("[test]", "[tuning]\nlast_units = 2\n[test]", REFUSED, ["[tuning] last_units from nothing to 2"]),
    ("batch = 16", 'batch = 16\ndistil = "global"', ASKS, ['[training] distil from "none" to "global"']),
    ("batch = 16", "batch = 16\ndistil_weight = 2", ASKS, ["[training] distil_weight from 1.0 to 2.0"]),
    ("batch = 16", "batch = 16\ndistil_temperature = 2", ASKS, ["[training] distil_temperature from 1.0 to 2.0"]),
    ("batch = 16", 'batch = 16\nheads = "auxiliary"', REFUSED, ['[training] heads from "shared" to "auxiliary"']),
    ("seed = 7", "seed = 8", REFUSED, ["[job] seed from 7 to 8"]),
    ("batch = 16", "batch = 32", REFUSED, ["[training] batch from 16 to 32"]),
    ("batch = 16", 'batch = 16\noptimizer = "adamw"', REFUSED, ['[training] optimizer from "sgd" to "adamw"']),
    ('"digits-cnn"', '"preresnet20"', REFUSED, ['[model] name from "digits-cnn" to "preresnet20"']),
    ("classes = 10", "classes = 11", REFUSED, ["[model] classes from 10 values to 11"]),
    ("classes = 10", f"classes = {[str(digit) for digit in range(10)]}", None, []),  # the same in other words
    (
        "classes = 10",
        f"classes = {[*map(str, range(9)), 'nine']}",
        REFUSED,
        ['[model] classes[9] from "9" to "nine"'],
    ),
    ("[1, 8, 8]", "[1, 16, 16]", REFUSED, ["[model] input_shape from [1,8,8] to [1,16,16]"]),
    ("mean = [0.3]", "mean = [0.4]", REFUSED, ["[model] mean from [0.3] to [0.4]"]),
    ("mean = [0.3]", "mean = [0.3]\nstd = [1.0]", None, []),  # it was 1 before
    ("mean = [0.3]", 'mean = [0.3]\nweights = "first"', REFUSED, ['[model] weights from "" to "sha256:']),
    (
        "[test]",
        "[privacy]\nclip_norm = 1\nnoise_multiplier = 2\n[test]",
        ASKS,
        ["noise_multiplier from nothing to 2"],
    ),
    (
        "batch = 16\nlearning_rate = 0.05",
        "batch = 8\nlearning_rate = 0.1",
        REFUSED,
        ["learning_rate from", "batch from"],
    ),
]


def config_of(folder: Path, text: str) -> JobConfig:
    folder.mkdir(exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "first").write_bytes(b"weights")
    (folder / "job.toml").write_text(text, encoding="utf-8")
    return load_config(folder / "job.toml")


def opened(state: Path, config: JobConfig) -> Store:
    return Store.open(state, config.job.name, model_spec(config), settings=settings_of(config))


def begun(state: Path, config: JobConfig) -> None:
    """A job that has its first weights."""
    store = opened(state, config)
    begin(store)
    store.close()


def begin(store: Store) -> None:
    partial = store.directory / "weights" / "new.partial"
    partial.write_bytes(b"weights")
    sealed = store.seal_weights(partial, 0)
    store.record_round(RoundRecord(0, sealed.digest, sealed.size_bytes, 0.0, 0, 0))


def test_every_setting_has_a_kind() -> None:
    settings = {f"{name}.{field}" for name, kind in section_types().items() for field in kind.__struct_fields__}
    assert settings == set(KINDS)


@pytest.mark.parametrize(("old", "new", "kind", "said"), CASES, ids=[new.replace("\n", " ") for _, new, _, _ in CASES])
def test_a_changed_setting(tmp_path: Path, old: str, new: str, kind: Kind | None, said: list[str]) -> None:
    assert old in JOB
    now = settings_of(config_of(tmp_path, JOB.replace(old, new, 1)))
    state = tmp_path / "state"
    begun(state, config_of(tmp_path, JOB))
    store = opened(state, config_of(tmp_path, JOB.replace(old, new, 1)))
    changed = store.changed(now)
    store.close()
    assert (kind is None) == (not changed)
    assert kind is None or kind in {change.kind for change in changed}
    for text in said:
        assert text in ", ".join(map(str, changed))
    asked, accepted = (refusal(changed, "STATE", accept) for accept in (False, True))
    assert bool(asked) == (kind in (ASKS, REFUSED))
    assert bool(accepted) == (kind is REFUSED)
    if kind is ASKS:
        assert "add --accept-changes" in asked
    if kind is REFUSED:
        assert "STATE holds a job that has begun" in asked
        assert "start another job with another --state" in asked
        assert "which a job keeps" in accepted


def test_what_is_taken_over_is_recorded_with_its_round(tmp_path: Path) -> None:
    begun(tmp_path / "state", config_of(tmp_path, JOB))
    now = config_of(tmp_path, JOB.replace("rounds = 4", "rounds = 9").replace("0.05", "0.01"))
    for _ in range(2):  # the second start changes nothing
        store = opened(tmp_path / "state", now)
        assert store.take_over(model_spec(now), settings_of(now), store.changed(settings_of(now))) == 1
        told = [(each.round, each.setting, each.before, each.now, each.accepted) for each in store.changes()]
        assert told == [(1, "job.rounds", 4, 9, False), (1, "training.learning_rate", 0.05, 0.01, True)]
        assert store.changed(settings_of(now)) == []
        store.close()


def test_a_job_that_has_no_weights_yet_may_be_put_right(tmp_path: Path) -> None:
    """Its first start failed, perhaps for want of this very change."""
    opened(tmp_path / "state", config_of(tmp_path, JOB)).close()
    now = config_of(tmp_path, JOB.replace("[1, 8, 8]", "[1, 16, 16]").replace("seed = 7", "seed = 8"))
    store = opened(tmp_path / "state", now)
    assert store.changed(settings_of(now)) == []
    store.take_over(model_spec(now), settings_of(now), [])
    begin(store)
    assert store.changed(settings_of(now)) == []
    store.close()
    Store.open(tmp_path / "state", "demo", model_spec(now)).close()  # it is the recorded model now


def test_settings_newer_than_a_record_had_their_defaults(tmp_path: Path) -> None:
    """Else the heads of a job that an earlier version began could be changed without a word."""
    config = config_of(tmp_path, JOB)
    older = {name: value for name, value in settings_of(config).items() if name != "training.heads"}
    store = Store.open(tmp_path / "state", "demo", model_spec(config))
    store.take_over(model_spec(config), older, [])
    begin(store)
    assert store.changed(settings_of(config)) == []
    now = settings_of(config_of(tmp_path, JOB.replace("batch = 16", 'batch = 16\nheads = "auxiliary"')))
    assert [str(each) for each in store.changed(now)] == ['[training] heads from "shared" to "auxiliary"']
    store.close()


def test_a_file_with_weights_may_move(tmp_path: Path) -> None:
    text = JOB.replace("mean = [0.3]", 'mean = [0.3]\nweights = "first"')
    settings = [settings_of(config_of(tmp_path / folder, text)) for folder in ("here", "there")]
    assert settings[0] == settings[1]


def test_a_job_of_an_earlier_version_is_compared_by_what_it_recorded(tmp_path: Path) -> None:
    config = config_of(tmp_path, JOB)
    store = Store.open(tmp_path / "state", "demo", model_spec(config))  # which records no settings
    write_atomically(store.files.graph(), b"graph")
    layout = ModelLayout(units=(), head=())
    begin(store)
    store.record_prepared(Prepared(layout, training_spec(config, 1), "0" * 64, 5))
    assert store.changed(settings_of(config)) == []
    for old, new, said in (
        ("seed = 7", "seed = 8", "[job] seed from 7 to 8"),
        ("batch = 16", "batch = 32", "[training] batch from 16 to 32"),
        ("0.05", "0.1", "[training] learning_rate from 0.05 to 0.1"),
        ("batch = 16", 'batch = 16\nheads = "auxiliary"', '[training] heads from "shared" to "auxiliary"'),
        ("rounds = 4", "rounds = 5", ""),  # it is not known what they were
    ):
        changed = store.changed(settings_of(config_of(tmp_path, JOB.replace(old, new))))
        assert ", ".join(map(str, changed)) == said
    store.close()
