"""How programs end: one sentence, a status that the help documents, and never a trace. A new case is a line."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import coordinator.cli
import edge_client.cli
import fedepth.cli
from fedepth import program
from fedepth.errors import ConfigError, StateError
from fedepth.program import BUG, FAILED, OK, USAGE, run_program

APPS: dict[str, typer.Typer] = {
    "fedepth": fedepth.cli.app,
    "fedepth-coordinator": coordinator.cli.app,
    "fedepth-client": edge_client.cli.app,
}
MODULES = {"fedepth": "fedepth", "fedepth-coordinator": "coordinator", "fedepth-client": "edge_client"}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The door is made for a process that ends behind it."""
    handlers = {number: signal.getsignal(number) for number in (*program._STOPPING, signal.SIGALRM)}
    hook, unraisable = sys.excepthook, sys.unraisablehook

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setenv(program._BUGS, "")
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.excepthook, sys.unraisablehook = hook, unraisable


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reports of bugs go."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state-home"))
    return tmp_path / "state-home" / "fedepth" / "bugs"


def ended(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *argv: str, folder: Path | None = None) -> Any:
    monkeypatch.setattr("sys.argv", ["fedepth", *argv])
    with pytest.raises(SystemExit) as caught:
        run_program("fedepth", run, lambda: folder)
    return caught.value.code


def raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def with_file(error: OSError, name: str) -> OSError:
    error.filename = name
    return error


# --- what a program may end with: the error, the status, and what standard error holds

ENDS: dict[str, tuple[BaseException, int, str]] = {
    "an error of ours": (ConfigError("rounds is 0"), FAILED, "fedepth: rounds is 0\n"),
    "an error of ours about odd names": (StateError("a\nb\x1b[2J is full"), FAILED, r"fedepth: a\nb\x1b[2J is full"),
    "a word about odd names": (SystemExit("a\nb"), FAILED, r"fedepth: a\nb"),
    "with a password": (StateError("postgresql://me:secret@db/x is away"), FAILED, "postgresql://***@db/x is away"),
    "Ctrl-C": (KeyboardInterrupt(), 130, ""),
    "a cancelled task": (asyncio.CancelledError(), 130, ""),
    "nobody reads": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    "usage": (SystemExit(2), USAGE, ""),
    "done": (SystemExit(None), OK, ""),
    "a word": (SystemExit("no such thing"), FAILED, "fedepth: no such thing\n"),
    "a full disk": (
        with_file(OSError(errno.ENOSPC, "No space left on device"), "/x/y"),
        FAILED,
        "fedepth: /x/y: No space left on device\n",
    ),
    "a forbidden file": (
        with_file(PermissionError(errno.EACCES, "Permission denied"), "a\nb"),
        FAILED,
        "fedepth: a\\nb: Permission denied\n",
    ),
    "too many files": (OSError(errno.EMFILE, "Too many open files"), FAILED, "fedepth: Too many open files\n"),
    "no memory": (MemoryError(), FAILED, "fedepth: memory ran out; free some"),
    "a bug": (
        ZeroDivisionError("division by zero"),
        BUG,
        "this is a bug in fedepth: ZeroDivisionError: division",
    ),
    "a bug of values": (ValueError("odd"), BUG, "this is a bug in fedepth: ValueError: odd; please report it with the"),
    "a bug of recursion": (RecursionError("too deep"), BUG, "this is a bug in fedepth: RecursionError"),
    "a bug with files": (
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        BUG,
        "bug in fedepth: FileNotFoundError",
    ),
    "a bug in several lines": (
        RuntimeError("a\nb\x1b[2J"),
        BUG,
        r"bug in fedepth: RuntimeError: a\nb\x1b[2J",
    ),
    "text that is none": (UnicodeEncodeError("ascii", "ü", 0, 1, "no"), BUG, "this is a bug in fedepth: UnicodeEncode"),
}


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize("case", ENDS)
def test_each_end_has_its_status_and_at_most_one_sentence(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, status, says = ENDS[case]
    assert ended(raising(error), monkeypatch) == status
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == (1 if says else 0)
    assert "Traceback" not in told.err
    assert told.out == ""


def test_a_bug_leaves_a_file_with_what_a_developer_needs_and_no_secret(
    reports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        password = "postgresql://me:secret@db/x?password=secret&sslmode=off"
        raise LookupError(f"nothing at {password}")

    options = ("--database", "postgresql://me:secret@db/x", "--files", "s3://key:secret@bucket", "--password=secret")
    options = (*options, "--token", "secret-of-enrolment")
    assert ended(run, monkeypatch, *options) == BUG
    (report,) = reports.iterdir()
    assert str(report) in capsys.readouterr().err
    text = report.read_text()
    assert "secret" not in text
    for expected in (
        "Traceback",
        "LookupError: nothing at postgresql://***@db/x?password=***",
        "sslmode",
        "test_exits",
    ):
        assert expected in text
    for name in ("program: fedepth", "fedepth: ", "python: 3.", "platform: ", "torch: ", "arguments: ['--database'"):
        assert name in text
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    assert stat.S_IMODE(reports.stat().st_mode) == 0o700


def test_reports_are_few(reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports.mkdir(parents=True)
    for number in range(30):
        (reports / f"20200101T0000{number:02d}-1.txt").write_text("old")
    (reports / "notes.txt").write_text("the user's own")
    assert ended(raising(ValueError()), monkeypatch) == BUG
    kept = sorted(path.name for path in reports.iterdir())
    assert len(kept) == program.KEPT_REPORTS + 1
    assert "notes.txt" in kept
    assert not kept[-2].startswith("2020")


@pytest.mark.parametrize("where", ["state", "home", "temporary", "nowhere"])
def test_a_report_finds_a_place(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = Path("/dev/null")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" if where == "home" else nowhere))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary" if where == "temporary" else nowhere))
    folder = tmp_path / "state" if where == "state" else nowhere
    assert ended(raising(ValueError("odd")), monkeypatch, folder=folder) == BUG
    found = [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.txt")]
    assert found == ([] if where == "nowhere" else [where])
    if where == "nowhere":  # then it is told here and now
        assert "Traceback" in capsys.readouterr().err


def test_another_users_folder_for_temporary_files_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"fedepth-bugs-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    assert ended(raising(ValueError()), monkeypatch) == BUG
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.usefixtures("reports")
def test_a_working_directory_that_is_gone_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert ended(lambda: Path("x").resolve(), monkeypatch) == FAILED
    assert capsys.readouterr().err == "fedepth: the working directory does not exist any more; change to another one\n"


@pytest.mark.parametrize("name", APPS)
def test_help_documents_the_statuses(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(APPS[name], monkeypatch, "--help") == OK
    shown = " ".join(re.sub(r"[^\x21-\x7e]", " ", capsys.readouterr().out).split())
    for status in (OK, FAILED, USAGE, BUG, 129, 130, 141, 143):
        assert re.search(rf"\b{status}\b", shown)


# --- what users type: program, command line, status, and what is said

# What no machine has, nor any model.
ENORMOUS: list[tuple[list[str], int, str]] = [
    (["--input", "1x99999999x99999999"], FAILED, "has 9999999800000001 numbers in 1 channels; a sample has at most"),
    (["--input", "9999999999"], FAILED, "a sample has at most"),
    (["--input", "1x" + "9" * 5000], FAILED, "is not a shape"),
    (["--input", "1x٣x3"], FAILED, "is not a shape"),
    (["--batch", "9" * 30], USAGE, "Invalid value"),
    (["--samples", "9" * 30], USAGE, "Invalid value"),
    (["--classes", "9" * 30], USAGE, "Invalid value"),
    (["--epochs", "9" * 30], USAGE, "Invalid value"),
    (["--budget", "9" * 30], FAILED, "is more memory than any machine has"),
]
EMPTY: list[tuple[str, list[str]]] = [
    ("fedepth", ["infer", ""]),
    ("fedepth", ["infer", "model.onnx", ""]),
    ("fedepth", ["infer", "model.onnx", "photos", ""]),
    ("fedepth", ["plan", "digits-cnn", "--budget", "1GiB", "--plot", ""]),
    ("fedepth", ["plan", "digits-cnn", "--budget", "1GiB", "--calibration="]),
    ("fedepth-client", ["run", "--data", ""]),
    ("fedepth-client", ["probe", "--config", ""]),
    ("fedepth-client", ["probe", "--state="]),
    ("fedepth-coordinator", ["record", "--state", ""]),
    ("fedepth-coordinator", ["backup", "--state", "s", "--output", ""]),
    ("fedepth-coordinator", ["export", "--state", "s", "--config", "job.toml", "--output", ""]),
    ("fedepth-coordinator", ["serve", "--state", "s", "--config", "job.toml", "--port-file", ""]),
]
PLOTS = [
    ("x.docx", "--plot: .docx is not one of the formats; there are png, pdf, svg: write x.png"),
    ("x", "--plot: the name says no format"),
    ("absent/x.svg", "absent does not exist; make it"),
    ("fifo.png", "fifo.png is not a regular file"),
    (".", "the name says no format"),
]
SIMULATED = ["simulate", "job.toml", "--data", "digits", "--output", "o"]
SIMULATIONS: list[tuple[list[str], int, str]] = [
    ([*SIMULATED, "--partition", "csv:"], FAILED, "--partition csv: names a file, as in --partition csv:owners.csv"),
    ([*SIMULATED, "--partition", "file"], FAILED, "as in --partition file:owners.json"),
    ([*SIMULATED, "--partition", "csv:absent"], FAILED, "absent cannot be read"),
    ([*SIMULATED, "--clients", "9" * 30], USAGE, "Invalid value"),
    ([*SIMULATED, "--seed", str(1 << 31)], USAGE, "Invalid value"),
    ([*SIMULATED, "--workers", "1025"], USAGE, "Invalid value"),
    ([*SIMULATED, "--threads", "1025"], USAGE, "Invalid value"),
    (["simulate", "job.toml", "--data", "", "--output", "o"], USAGE, "the path is empty"),
    (["compare", "o", "./o"], FAILED, "o is given more than once, and would count as so many seeds"),
    *((["compare", "o", "--plot", name], FAILED, says) for name, says in PLOTS),
]
TYPED: list[tuple[str, list[str], int, str]] = [
    ("fedepth", ["plan"], USAGE, "Missing argument"),
    ("fedepth", ["plan", "digits-cnn", "--budget", "x"], FAILED, '"x" is not a size'),
    ("fedepth", ["plan", "digits-cnn", "--budget", "1MiB", "--calibration", "absent"], FAILED, "holds no cal"),
    ("fedepth", ["plan", "digits-cnn", "--budget", "1MiB", "--calibration", "/"], FAILED, "holds no cal"),
    ("fedepth", ["plan", "digits-cnn", "--budget", "1MiB", "--calibration", "broken.json"], FAILED, "holds no calib"),
    (
        "fedepth",
        ["plan", "digits-cnn", "--budget", "1MiB", "--calibration", "deep.json"],
        FAILED,
        "holds no calibration",
    ),
    (
        "fedepth",
        ["plan", "digits-cnn", "--budget", "1MiB", "--calibration", "null.json"],
        FAILED,
        "holds no calibration",
    ),
    ("fedepth", ["plan", "digits-cnn", "--budget", "1MiB", "--calibration", "o'\nd"], FAILED, r"> $'o\'\nd'"),
    ("fedepth", ["infer", "a\nb.onnx", "x"], FAILED, r"a\nb.onnx cannot be read"),
    ("fedepth-coordinator", ["record", "--state", "a\x1b[2J\n"], FAILED, r"a\x1b[2J\n holds no job"),
    ("fedepth", ["plan", os.fsdecode(b"\xff"), "--budget", "1MiB"], FAILED, r"'\udcff' holds bytes that are no text"),
    *(("fedepth", ["plan", "digits-cnn", "--budget", "1GiB", *more], status, says) for more, status, says in ENORMOUS),
    *((name, line, USAGE, "the path is empty") for name, line in EMPTY),
    *(
        (
            name,
            [re.sub("^$|=$", r"\g<0>~nobody-here/x", each) for each in line],
            USAGE,
            "there is no home directory for",
        )
        for name, line in EMPTY
    ),
    *(("fedepth", ["plan", "digits-cnn", "--budget", "1GiB", "--plot", name], FAILED, says) for name, says in PLOTS),
    *(("fedepth", argv, status, says) for argv, status, says in SIMULATIONS),
    ("fedepth-client", ["probe", "--config", "fifo"], FAILED, "fifo: cannot be read: is not a regular file"),
    ("fedepth-client", ["probe", "--config", "/dev/zero"], FAILED, "cannot be read: is not a regular file"),
    ("fedepth-client", ["run", "--threads", "9" * 30], FAILED, "must be between 0 and 4096"),
    ("fedepth-client", ["report", "digits-cnn", "--plot", "x.docx"], FAILED, "there are png, pdf, svg: write x.png"),
    ("fedepth-coordinator", ["serve", "--config", "fifo", "--state", "s"], FAILED, "cannot be read: is not a regular"),
    ("fedepth-coordinator", ["rollback", "--state", "s", "--round", "9" * 30], USAGE, "Invalid value"),
    *(
        (
            "fedepth-coordinator",
            ["serve", "--config", "job.toml", "--state", "s", "--port", "0", "--files", url],
            FAILED,
            "s3://bucket",
        )
        for url in ("s3://", "s3:///prefix", "s3://B", "s3:bucket", "bucket")
    ),
    (
        "fedepth-coordinator",
        ["serve", "--config", "wrong.toml", "--state", "s", "--port", "0", "--port-file", "absent/port"],
        FAILED,
        "for 3 reasons: (1) wrong.toml: [job] name: must be 1 to 64 letters",
    ),
    ("fedepth-coordinator", ["serve", "--config", "absent", "--state", "s"], FAILED, "absent: cannot be read"),
    ("fedepth-coordinator", ["serve", "--config", "/", "--state", "s"], FAILED, "cannot be read: Is a directory"),
    ("fedepth-coordinator", ["serve", "--config", "job.toml", "--state", "file"], FAILED, "file is not a folder"),
    ("fedepth-coordinator", ["serve", "--config", "job.toml", "--state", "s", "--host", "*"], FAILED, "write 0.0.0.0"),
    (
        "fedepth-coordinator",
        ["serve", "--config", "job.toml", "--state", "s", "--host", ""],
        FAILED,
        "address is empty",
    ),
    ("fedepth-coordinator", ["serve", "--config", "job.toml", "--state", "s", "--port", "65536"], USAGE, "65535"),
    ("fedepth-coordinator", ["record", "--state", "absent"], FAILED, "holds no job"),
    ("fedepth-coordinator", ["record", "--state", "file"], FAILED, "file is not a folder"),
    ("fedepth-coordinator", ["record", "--state", "not-sqlite"], FAILED, "cannot be read: file is not a database"),
    ("fedepth-coordinator", ["record", "--state", "s", "--database", "mysql://a:secret@b/c"], FAILED, "not supported"),
    ("fedepth-coordinator", ["backup", "--state", "absent", "--output", "o"], FAILED, "holds no job"),
    ("fedepth-coordinator", ["rollback", "--state", "absent", "--round", "0"], FAILED, "holds no job"),
    ("fedepth-coordinator", ["export", "--state", "absent", "--config", "job.toml", "--output", "o"], FAILED, "no job"),
    ("fedepth-coordinator", ["status", "--coordinator", "127.0.0.1:1", "--insecure"], FAILED, "no answer from"),
    ("fedepth-coordinator", ["status"], FAILED, "make them once: fedepth-coordinator certs init"),
    ("fedepth-coordinator", ["enroll", "kitchen"], FAILED, "make them once: fedepth-coordinator certs init"),
    ("fedepth-client", ["enroll"], FAILED, "give HOST:PORT and --token TOKEN"),
    ("fedepth-client", ["enroll", "127.0.0.1:1", "--token", "abc"], FAILED, "the token has 3 characters instead of 64"),
    ("fedepth-client", ["enroll", "--bundle", "absent.pem"], FAILED, "absent.pem cannot be read"),
    ("fedepth-coordinator", ["status", "--coordinator", "a b"], FAILED, "'a b' is not an address"),
    ("fedepth-coordinator", ["watch", "--coordinator", "::1:8970"], FAILED, "write [::1]:8970"),
    ("fedepth-coordinator", ["wacth"], USAGE, "No such command"),
    ("fedepth-client", ["run"], FAILED, "coordinator is missing"),
    ("fedepth-client", ["run", "--coordinator", "a:99999", "--data", "."], FAILED, "the port must be 1 to 65535"),
    ("fedepth-client", ["run", "--coordinator", "", "--data", "."], FAILED, "coordinator is missing"),
    ("fedepth-client", ["run", "--name", "x" * 201], FAILED, "must have at most 200 characters, which can be shown"),
    ("fedepth-client", ["run", "--name", "a\nb"], FAILED, r"the command line: name is 'a\nb', but"),
    ("fedepth-client", ["run", "--config", "absent"], FAILED, "absent: cannot be read"),
    ("fedepth-client", ["probe", "--budget-cap", "x"], FAILED, '"x" is not a size'),
    ("fedepth-client", ["report", "digits-cnn", "--plot", "absent/x.png"], FAILED, "absent does not exist; make it"),
    ("fedepth-client", ["report", "digits-cnn", "--batch", "0"], USAGE, "batch"),
]


@pytest.mark.parametrize("number", range(len(TYPED)))
def test_what_is_typed_ends_well_or_in_one_sentence(
    number: int,
    tmp_path: Path,
    reports: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, argv, status, says = TYPED[number]
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("broken.json").write_text("{")
    Path("null.json").write_text("null")
    Path("deep.json").write_text("[" * 100_000)
    Path("not-sqlite").mkdir()
    Path("not-sqlite", "job.sqlite").write_text("no database, but more than a hundred bytes" * 9)
    job = '[job]\nname = "x"\n[model]\nname = "digits-cnn"\nclasses = 10\ninput_shape = [1, 8, 8]\n[test]\n'
    Path("job.toml").write_text(job + 'data = "digits"\n')
    Path("wrong.toml").write_text(job.replace('"x"', '"x y"') + 'data = "absent"\n')
    os.mkfifo("fifo")
    os.mkfifo("fifo.png")
    monkeypatch.setattr("edge_client.cli.hand_over", lambda argv: pytest.fail("the agent would have started"))
    monkeypatch.setattr("sys.argv", [name, *argv])
    with pytest.raises(SystemExit) as caught:
        run_program(name, APPS[name])
    told = capsys.readouterr()
    assert caught.value.code == status, told.err
    assert says in told.err
    assert "secret" not in told.err
    assert not reports.exists()
    if status == FAILED:
        assert told.err.count("\n") == 1
        assert told.err.startswith(f"{name}: ")


# --- real processes

# Under nohup, tests and all that they start would ignore hang-ups. That is not changed between fork and exec: gRPC,
# once it has been loaded, writes to standard error there.
ENDLESS = """
import signal, sys, time, asyncio
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from fedepth.program import run_program
async def forever():
    try:
        print("ready", flush=True)
        await asyncio.sleep(60)
    finally:
        print("in order", flush=True)
def plainly():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
def swallowing():
    for number in range(2):
        try:
            print("" if number else "ready", flush=True)
            time.sleep(60)
        except BaseException:
            print("in order", flush=True)
def destructor():
    class Slow:
        def __del__(self):
            print("ready", flush=True)
            time.sleep(60)
    Slow()
    time.sleep(60)
run_program("x", {"asyncio": lambda: asyncio.run(forever())}.get(sys.argv[1], globals().get(sys.argv[1])))
"""

SIGNALS = [
    ("asyncio", [signal.SIGINT], 130),
    ("asyncio", [signal.SIGTERM], 143),
    ("plainly", [signal.SIGHUP], 129),
    ("swallowing", [signal.SIGTERM, signal.SIGINT], 130),
    ("swallowing", [signal.SIGINT, signal.SIGINT], 130),
    ("destructor", [signal.SIGINT], 130),
]


@pytest.mark.parametrize(("how", "signals", "status"), SIGNALS)
def test_a_signal_ends_a_program_without_a_word(how: str, signals: list[signal.Signals], status: int) -> None:
    command = [sys.executable, "-c", ENDLESS, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None and running.stderr is not None
            assert running.stdout.readline() == "ready\n"
            for number, each in enumerate(signals):
                if number:
                    assert running.stdout.readline() == "in order\n"  # the first one has arrived
                    assert running.stdout.readline() == "\n"
                running.send_signal(each)
            out, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert (running.returncode, err) == (status, "")
    if how == "asyncio":
        assert out == "in order\n"


@pytest.mark.parametrize("name", MODULES)
def test_a_signal_while_a_program_loads_waits_for_the_door(name: str, tmp_path: Path) -> None:
    """The signal comes as soon as signals are blocked, which is when libraries begin to load."""
    code = (
        f"import sys, os, signal, importlib; sys.argv = [{name!r}, '--help']\n"
        "load = importlib.import_module\n"
        "importlib.import_module = lambda name: (os.kill(os.getpid(), signal.SIGINT), load(name))[1]\n"
        f"from fedepth.start import start; start('{MODULES[name]}.cli')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("redirection", "status", "says"),
    [
        ("| head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", 141, ""),
        (">/dev/full", FAILED, "x: standard output cannot be written: No space left on device\n"),
        (">&-", OK, ""),
        ("<&- >&-", OK, ""),
        ("2>&- >/dev/null", OK, ""),
        (">/dev/full 2>&-", FAILED, ""),
    ],
)
@pytest.mark.parametrize("buffered", ["", "-u"])
def test_output_that_nobody_takes(buffered: str, redirection: str, status: int, says: str) -> None:
    code = "from fedepth.program import run_program; run_program('x', lambda: [print('y' * 9999) for _ in range(99)])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", f'"$0" {buffered} -c "$1" {redirection}', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (status, says)
