from pathlib import Path

import pytest

from edge_client.config import check_runnable, default_state_dir, load
from fedepth.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "client.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_and_options_win(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        'coordinator = "10.0.0.1:50051"\ndata = "photos"\n[memory]\ncap = "300MiB"\nreserve = 1024\n',
    )
    config = load(path, {"coordinator": "host:1", "memory.cap": "2KiB", "trainer.threads": 3})
    assert (config.coordinator, config.memory.cap_bytes, config.memory.reserve_bytes) == (
        "host:1",
        2048,
        1024,
    )
    assert config.trainer.threads == 3
    assert config.data_dir == tmp_path / "photos"  # counted from the file's folder


def test_defaults() -> None:
    config = load(None)
    assert (config.memory.cap_bytes, config.memory.reserve_bytes, config.memory.fraction) == (
        0,
        64 << 20,
        0.9,
    )
    assert (config.trainer.linger_s, config.trainer.threads, config.trainer.enforce) == (60, 0, True)
    assert (config.retry.first_s, config.retry.longest_s, config.retry.remind_s) == (1, 300, 180)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cap = 3", 'unknown setting "cap"; did you mean memory.cap?'),
        ("[memory]\ncapp = 3", 'unknown setting "memory.capp"; did you mean memory.cap?'),
        ('coordinater = "a:1"', "did you mean coordinator?"),
        ("[memory]\nfraction = 1.5", "memory.fraction is 1.5"),
        ('[memory]\nreserve = "3M"', 'memory.reserve: "3M" is not a size'),
        ('[trainer]\nthreads = "many"', "trainer.threads: Expected `int`"),
        ("[trainer]\nlinger_s = inf", "trainer.linger_s is inf, but must be between 0 and 31536000"),
        ('coordinator = "no where"', "coordinator: 'no where' is not an address that can be used"),
        (
            'coordinator = "host:70000"',
            "coordinator: 'host:70000' is not an address that can be used: the port",
        ),
        ("[retry]\nfirst_s = 500", "retry.first_s is 500"),
        ("[retry]\nlongest_s = inf", "must be above 0 and at most longest_s (inf), a finite number"),
        ("[retry]\nremind_s = inf", "remind_s is inf, but must be above 0 and finite"),
        ("memory = [", "is not valid TOML"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text))
    assert message in str(caught.value)
    assert "client.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        load(tmp_path / "absent.toml")


@pytest.mark.parametrize(("given", "missing"), [({"data": "x"}, "--coordinator"), ({"coordinator": "a:1"}, "--data")])
def test_what_run_needs_is_asked_for(given: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        check_runnable(load(None, given))


def test_state_follows_xdg_and_ignores_relative_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / "fedepth-client"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / ".local/state/fedepth-client"
