"""The one door through which every program of fedepth ends: a sentence where something went wrong, and a status.

    0    done, or stopped in order (serve, run)
    1    an error, told in one sentence on standard error
    2    the command line is wrong
    70   a bug in fedepth: the sentence names a file that holds the trace and the versions (EX_SOFTWARE, sysexits.h)
    128 + N   stopped by signal N: 129 SIGHUP, 130 Ctrl-C, 141 a closed pipe, 143 SIGTERM

It loads no library for command lines or terminals: an idle agent goes through it, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import platform
import re
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from fedepth import __version__
from fedepth.errors import ConfigError, FedepthError
from fedepth.files import NO_WORKING_DIRECTORY, has_working_directory, user_folder
from fedepth.printable import PLAIN, printable, quoted

OK, FAILED, USAGE, BUG = 0, 1, 2, 70
STATUSES = (
    "Exit status: 0 done; 1 an error, told in one sentence; 2 wrong usage; 70 a bug in fedepth, told with the file "
    "that holds its trace; 129, 130, 141, 143 ended by SIGHUP, Ctrl-C, a closed pipe, SIGTERM."
)
KEPT_REPORTS = 10
GRACE_S = 10.0  # for putting things in order after a signal, which some library may have kept from us

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What the machine answers when it is full, broken or forbids something: nothing that a program can do wrong.
_MACHINE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.EACCES,
        errno.EPERM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOLCK,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.EFBIG,
        errno.ETXTBSY,
    }
)
_OUTPUT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})  # what standard output may answer
_VERSIONS = ("torch", "grpcio", "onnx", "onnxruntime", "rich", "typer")  # distributions, as far as they are installed
# Passwords, in URLs (user:password@host, ?password=...) and in what looks like a setting.
_USER = re.compile(r"(?P<before>://)[^/\s'\"]*@")
_SECRET = re.compile(
    r"(?P<before>[A-Za-z_]*(?:password|passwd|secret|token|access_?key|credential)[A-Za-z_]*[\"']?\s*[=:]\s*[\"']?)"
    r"[^\s&\"',;]+",
    re.IGNORECASE,
)

_BUGS = "FEDEPTH_BUGS"  # where a program's child processes keep their traces, too
_AGAIN_S = 0.01
_stopped_by: signal.Signals | None = None
_lost = False  # an interruption was raised where Python cannot raise


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end.

    A class of its own: Python ends itself by SIGINT once a plain KeyboardInterrupt has passed through an `eval`, as
    that of a dataclass that is being made, whoever catches it.
    """


def run_program(name: str, run: Callable[[], object], folder: Callable[[], Path | None] | None = None) -> NoReturn:
    """Runs a program and ends it, in every case with a status that stands above.

    Args:
        name: begins every message.
        run: the program. It may raise SystemExit, as libraries for command lines do.
        folder: says where the trace of a bug is kept if it can be; in the user's state directory by default.
    """
    _prepare_streams()
    try:
        _catch_signals()
        place = None if folder is None else folder()
        if place is not None:
            os.environ[_BUGS] = str(place.absolute() / "bugs")
        _check_arguments(sys.argv[1:])
        run()
        status = OK if _stopped_by is None else 128 + _stopped_by
    except BaseException as error:  # noqa: BLE001 - nothing passes the door unsaid
        status = tell(name, error)
    status = _flushed(name, status)
    if status > 128:
        os._exit(status)  # Python takes a second to end, and a signal would meet no handler any more
    sys.exit(status)


def stop_on_signals(stop: Callable[[], object]) -> None:
    """In the running event loop, SIGINT, SIGTERM and SIGHUP call `stop`, for an end in order; a second Ctrl-C ends the
    program at once. nohup's wish is respected."""
    loop = asyncio.get_running_loop()
    interrupts = 0

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            os._exit(128 + signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, stop)


def hand_over(argv: Sequence[str]) -> NoReturn:
    """Runs another of our programs in this process's place. A signal that comes meanwhile waits for its door."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    os.execv(argv[0], list(argv))


def say(name: str, text: str) -> None:
    """One sentence on standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"{name}: {text}", file=sys.stderr, flush=True)


def without_secrets(text: str) -> str:
    """`text` without passwords, as far as they can be told by their form."""
    return _SECRET.sub(r"\g<before>***", _USER.sub(r"\g<before>***@", text))


# --- before


def _prepare_streams() -> None:
    # A closed descriptor would be given to the next file that is opened, which then takes what is printed.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) != number:  # pragma: no cover - the lowest free number is given
                break
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=PLAIN)


def _catch_signals() -> None:
    """Every signal that stops us becomes a KeyboardInterrupt, so that what is open is closed on the way out."""
    global _stopped_by, _lost
    _stopped_by, _lost = None, False
    for number in _STOPPING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _on_signal)
    sys.unraisablehook = _on_unraisable
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _on_signal(number: int, _: FrameType | None) -> None:
    global _stopped_by
    if _stopped_by is None:
        _stopped_by = signal.Signals(number)
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
    elif number == signal.SIGINT:
        os._exit(128 + number)
    else:
        return  # it is ending already
    raise Stopped


def _on_last_signal(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _on_alarm(_: int, __: FrameType | None) -> None:
    """The time for an end in order is over, or an interruption was lost and comes again."""
    global _lost
    if not _lost:
        os._exit(128 + (_stopped_by or signal.SIGTERM))
    _lost = False
    signal.setitimer(signal.ITIMER_REAL, GRACE_S)
    raise Stopped


def _on_unraisable(what: Any) -> None:
    """Python cannot raise in some places, such as a destructor."""
    global _lost
    if isinstance(what.exc_value, Stopped):
        _lost = True
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    elif not isinstance(what.exc_value, BrokenPipeError):
        sys.__unraisablehook__(what)


def _check_arguments(arguments: Sequence[str]) -> None:
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(
                f"{quoted(argument)} holds bytes that are no text in this system's encoding "
                f"({sys.getfilesystemencoding()}); rename the file or folder, or set LC_ALL=C.UTF-8"
            ) from None


# --- after


def tell(name: str, error: BaseException, folder: Path | None = None) -> int:
    """Says what ended a program, or a child process of one, if that needs a word; its status."""
    if _stopped_by is not None:
        return 128 + _stopped_by
    causes = tuple(_causes(error))
    if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):  # libraries for command lines answer some errors themselves
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            return 128 + signal.SIGINT
        if any(isinstance(cause, BrokenPipeError) for cause in causes):
            return 128 + signal.SIGPIPE
        if error.code is None or isinstance(error.code, int):
            return error.code or OK
        say(name, printable(str(error.code)))
        return FAILED
    if isinstance(error, FedepthError):
        # One line, whatever the paths in it are called.
        say(name, printable(_USER.sub(r"\g<before>***@", str(error))))
        return FAILED
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError) and error.errno in _MACHINE:
        where = f"{printable(os.fsdecode(error.filename))}: " if isinstance(error.filename, (str, bytes)) else ""
        if not where and error.errno in _OUTPUT and _refuses(sys.stdout):
            where = "standard output cannot be written: "
        say(name, f"{where}{error.strerror or error}")
        return FAILED
    if isinstance(error, FileNotFoundError) and not has_working_directory():
        say(name, NO_WORKING_DIRECTORY)
        return FAILED
    if isinstance(error, MemoryError):
        say(name, "memory ran out; free some, or run on a machine that has more")
        return FAILED
    _tell_bug(name, error, folder)
    return BUG


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error.__context__ is not None and id(error.__context__) not in seen:
        error = error.__context__
        seen.add(id(error))
        yield error


def keep_trace(name: str, error: BaseException) -> str:
    """Keeps the trace of an error that is told elsewhere, and says where: the end of a message."""
    path = _kept(bug_report(name, error), None)
    return "no file could be written with its trace" if path is None else f"its trace is in {printable(str(path))}"


def _tell_bug(name: str, error: BaseException, folder: Path | None) -> None:
    what = without_secrets(printable(traceback.format_exception_only(type(error), error)[-1].strip()))
    report = bug_report(name, error)
    path = _kept(report, folder)
    if path is None:
        say(name, f"this is a bug in fedepth: {what}; please report it with what follows")
        say(name, report)
    else:
        say(name, f"this is a bug in fedepth: {what}; please report it with the file {printable(str(path))}")


def bug_report(name: str, error: BaseException) -> str:
    """What a developer wants to know: versions, the command line and the trace, without passwords."""
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"program: {name}", f"arguments: {_without_values_of_secrets(sys.argv[1:])}"]
    lines += [f"fedepth: {__version__}", f"python: {sys.version.split()[0]} ({platform.python_implementation()})"]
    lines.append(f"platform: {platform.platform()}")
    for each in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError, OSError, ValueError):
            lines.append(f"{each}: {version(each)}")
    lines += ["", *"".join(traceback.format_exception(error)).rstrip().splitlines()]
    return without_secrets("\n".join(map(printable, lines)) + "\n")


def _without_values_of_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line without what follows --token, or stands behind it."""
    shown, hidden = [], False
    for argument in arguments:
        shown.append("***" if hidden else argument)
        hidden = argument == "--token"
    return shown


def _kept(report: str, folder: Path | None) -> Path | None:
    """Where the report was put; None if it cannot be put anywhere. The oldest of KEPT_REPORTS make room for it."""
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}.txt"
    for place in _report_folders(folder):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = place.lstat()
            if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
                continue  # in a folder for everybody, another user may have made it
            path = place / name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8", errors=PLAIN) as file:
                file.write(report)
            for old in sorted(place.glob("*T*-*.txt"))[:-KEPT_REPORTS]:
                old.unlink(missing_ok=True)
            return path
        except (OSError, ValueError):
            continue
    return None


def _report_folders(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder / "bugs"
    if os.environ.get(_BUGS):
        yield Path(os.environ[_BUGS])
    with contextlib.suppress(FedepthError):  # no home
        yield user_folder("XDG_STATE_HOME", ".local/state", "set HOME") / "fedepth" / "bugs"
    with contextlib.suppress(OSError):  # no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"fedepth-bugs-{os.geteuid()}"


def _flushed(name: str, status: int) -> int:
    """The status, once all that was printed has left. What cannot leave must not fail again when Python ends."""
    for number in _STOPPING:  # from here on there is nothing to put in order
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _on_signal):
            signal.signal(number, _on_last_signal)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        status = status or 128 + signal.SIGPIPE
        _give_up(sys.stdout)
    except (OSError, ValueError) as error:
        if status == OK:
            say(name, f"standard output cannot be written: {getattr(error, 'strerror', None) or error}")
            status = FAILED
        _give_up(sys.stdout)
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        _give_up(sys.stderr)
    return status


def _refuses(stream: IO[str] | None) -> bool:
    """Whether it is a stream that could not be written. One without a buffer, as with python -u, is tried again."""
    try:
        if stream is not None:
            stream.write("\n")
            stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _give_up(stream: IO[str]) -> None:
    """What a stream still holds goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
