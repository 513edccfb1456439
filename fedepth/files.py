"""Files that survive a crash, whole or not at all; their digests; locks between processes.

No numpy: idle agents load this.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import resource
import secrets
import shutil
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, BinaryIO

import msgspec

from fedepth.errors import DiskError, LockedError, StateError
from fedepth.printable import printable, quoted

Signature = tuple[int, int, int, int, int]

PIECE_BYTES = 1 << 20
_TICK_NS = 10_000_000
MOST_OPEN_FILES = 1 << 20
# What msgspec raises for bytes that are no JSON of the wanted form. Text that is not UTF-8, and nesting without end,
# are Python's own errors.
NO_WORKING_DIRECTORY = "the working directory does not exist any more; change to another one"
NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def user_folder(variable: str, below_home: str, advice: str) -> Path:
    """A folder of the user's as in the XDG Base Directory Specification 0.8: `variable`, else `below_home`.

    Raises:
        StateError: there is no home directory, as in a container that runs under a number that no account has. The
            message ends with `advice`.
    """
    base = os.environ.get(variable, "")
    try:
        # The specification: a relative path in the variable is invalid and must be ignored.
        folder = Path(base) if base.startswith("/") else Path.home() / below_home
    except RuntimeError:
        raise StateError(
            f"there is no home directory: HOME is not set, and user id {os.getuid()} has no account here; {advice}"
        ) from None
    if not base.startswith("/") and not os.environ.get("HOME", "/").startswith("/"):  # an empty one would be /
        raise StateError(f"there is no home directory: HOME is {quoted(os.environ['HOME'])}; {advice}")
    check_text(folder)
    return folder


def real_folder(path: Path) -> Path:
    """The absolute path of a folder, which need not exist.

    Raises:
        StateError: there is none, or nothing can be recorded that lies there.
    """
    try:
        found = path.resolve()
        other = found.exists() and not found.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # no working directory; links in a circle; a NUL in it
        raise StateError(
            f"{quoted(str(path))} is not a folder's path: {getattr(error, 'strerror', None) or error}"
        ) from None
    if other:
        raise StateError(f"{printable(str(found))} is not a folder; give --state another one")
    check_text(found)
    return found


def has_working_directory() -> bool:
    """Whether there is one: it may have been deleted, and no relative path can mean anything then."""
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def check_text(path: Path) -> None:
    """Names that are not text can be recorded nowhere: neither in JSON nor in a database.

    Raises:
        StateError: it holds bytes that are not text in this system's encoding.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise StateError(
            f"{quoted(str(path))} holds bytes that are no text in this system's encoding "
            f"({sys.getfilesystemencoding()}); rename the folder, or set LC_ALL=C.UTF-8"
        ) from None


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Puts `data` into `path`, durably: a crash leaves there either what it held before, or all of `data`.

    Args:
        mode: of the file, before the umask. It has it from the start: a key is never there for others to read.

    Raises:
        OSError: the disk is full, or the folder is missing or read-only; it names `path`, which is as it was.
    """
    with replacing(path, mode) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path`, durably, once the block has ended without an error.

    What is written goes to `.NAME.RANDOM.tmp` in the same folder. An error removes that file and leaves
    `path` as it was; a crash leaves it behind, to be deleted by whoever owns the folder.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only file system says so of a file that is not there, too
            temporary.unlink()
        if error.filename is None or os.fspath(error.filename) == os.fspath(temporary):
            error.filename = str(path)  # whoever tells of it knows no temporary name, and of a full disk has none
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turns an OSError of the block into a DiskError: "`what`: PATH: No space left on device; …".

    PATH is what the error names (of two the second, which was to be written), or `folder`.

    Raises:
        DiskError: the block met an OSError.
    """
    try:
        yield
    except OSError as error:
        how = f"{error.filename2 or error.filename or folder}: {error.strerror or error}"  # of a copy, where it goes
        raise DiskError(f"{what}: {how}; free some space there, make it writable, or check that disk") from error


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable: a new or renamed file can be lost in a power cut until then."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(path: Path) -> None:
    """Flushes a file or folder, and the folder that names it, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


class WrongFileError(OSError):
    """What has the name of a file can never be read as one: a FIFO, a device, a socket, or far too many bytes.

    No later try helps. A FIFO would keep its reader waiting for ever, and some devices never end.
    """


def open_regular(path: Path, *, follow: bool = True) -> BufferedReader:
    """A regular file, open for reading. Whatever else has its name is refused at once.

    Args:
        follow: whether `path` may be a symbolic link. Not in a folder whose files are all made by this program.

    Raises:
        WrongFileError: there is something else.
        OSError: it cannot be opened; IsADirectoryError for a folder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV) or (error.errno == errno.ELOOP and not follow):
            raise WrongFileError(errno.EINVAL, "is not a regular file", str(path)) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise WrongFileError(errno.EINVAL, "is not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most_bytes: int, *, follow: bool = True) -> bytes:
    """All of a regular file, which has at most `most_bytes`; see `open_regular`.

    Raises:
        WrongFileError: it has more, or is not a regular file.
        OSError: it cannot be read.
    """
    with open_regular(path, follow=follow) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise WrongFileError(errno.EFBIG, f"has more than {most_bytes} bytes, which is not read", str(path))
    return data


def is_own_file(path: Path) -> bool:
    """Whether it is a regular file, and no link to one: this program makes no links."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def delete(path: Path) -> None:
    """Whatever it is, as far as the disk lets it go; what stays is found again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def not_writable(path: Path) -> str:
    """What keeps a file from being made at `path`, or replaced there; "" if nothing does."""
    try:
        folder = path.absolute().parent
        if path.is_dir():
            return f"{printable(str(path))} is a folder; name a file"
        if (path.exists() or path.is_symlink()) and not path.is_file():
            return f"{printable(str(path))} is not a regular file; name another one"
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist; make it"
            return f"{printable(str(folder))} {what}, or name another place"
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{printable(str(folder))} cannot be written; change its permissions, or name another place"
    except (OSError, ValueError) as error:  # too long, or no working directory; a NUL in it
        return f"{quoted(str(path))} is not the path of a file: {getattr(error, 'strerror', None) or error}"
    return ""


def file_digest(path: Path, *, follow: bool = True) -> str:
    """sha256 (hex) of a regular file, read in 1 MiB pieces; see `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path, follow=follow) as file:
        while data := file.read(PIECE_BYTES):
            digest.update(data)
    return digest.hexdigest()


class Digests:
    """The digests of files that this process has written or hashed, for as long as nobody writes to them.

    A file counts as unchanged that has the same signature, under whatever name. Whether the disk still gives the bytes
    that it was given is no question for this: who needs to know that reads them.
    """

    def __init__(self, most: int = 1024) -> None:
        self._known: OrderedDict[Signature, str] = OrderedDict()
        self._most = most

    def note(self, path: Path, digest: str) -> None:
        """Takes note of the sha256 (hex) of a file that is whole."""
        status = path.stat()
        if time.time_ns() - status.st_mtime_ns < _TICK_NS:
            return  # another write in this tick of the kernel's clock would leave the same time
        self._known[signature(status)] = digest
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def of(self, path: Path) -> str:
        """As `file_digest`, which reads the file only if it is not known."""
        digest = self._known.get(signature(path.stat()))
        if digest is None:
            digest = file_digest(path)
            self.note(path, digest)
        return digest


def signature(status: os.stat_result) -> Signature:
    """What a write to a file changes, whoever writes.

    The time of modification can be set, and is by whatever restores files (cp -p, rsync -t, tar); the time of the last
    change of the inode cannot.
    """
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def raise_open_files() -> int:
    """Lets this process open as many files and connections as it may by itself; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Some systems say "unlimited" and take no more than this (fs.nr_open).
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (min(hard, MOST_OPEN_FILES) if hard > 0 else MOST_OPEN_FILES, hard)
            )
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft


def lock_file(path: Path) -> IO[str]:
    """Takes the lock of a file, which is created if need be and then names this process.

    It is held until the file is closed or the process ends, however it ends: the kernel drops it then.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be made.
    """
    file = open(path, "a+", encoding="ascii")  # noqa: SIM115 - held open as long as the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(32).strip() or "unknown"
        file.close()
        raise LockedError(f"{path} is locked by process {holder}", holder) from None
    # The number is for people. On a full disk the lock holds without it, and what frees the disk can start.
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    return file
