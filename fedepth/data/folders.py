"""The image files below a folder of class folders, and what is left out there, by folder and reason.

Standard library only, and no file is opened: a pipe, a socket or a device that lies there cannot hold anybody up.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fedepth.data.labels import normalised
from fedepth.printable import printable

# What `fedepth.data.decode` reads, by the names that people's programs give it.
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjpg", ".mpo",
        ".png", ".apng", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".dib",
        ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
    }
)  # fmt: skip
_CONVERT = "convert it to JPEG or PNG"
RAW_SUFFIXES = (
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw", ".orf", ".pef",
    ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srw", ".x3f",
)  # fmt: skip
_VIDEOS = (".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv")
_OTHERS_UNREAD = (
    ".jp2", ".j2k", ".jxl", ".psd", ".xcf", ".exr", ".hdr", ".eps", ".ai", ".pdf", ".dcm", ".ico", ".emf", ".wmf",
)  # fmt: skip
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar", ".xz", ".bz2")
UNPACK = "an archive: unpack it"
_UNREAD = {
    **dict.fromkeys((".heic", ".heif", ".hif"), f"HEIC, which is not read: {_CONVERT}"),
    ".avif": f"AVIF, which is not read: {_CONVERT}",
    **dict.fromkeys((".svg", ".svgz"), f"SVG, which is not read: {_CONVERT}"),
    **dict.fromkeys(RAW_SUFFIXES, f"a camera's raw file, which is not read: {_CONVERT}"),
    **dict.fromkeys(_OTHERS_UNREAD, f"not read: {_CONVERT}"),
    **dict.fromkeys(_VIDEOS, "a video: only images are read"),
    **dict.fromkeys(ARCHIVES, UNPACK),
}
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"})
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NO_CLASS = "image in no class folder: move it into one"
NO_SUFFIX = "file without a suffix: an image needs one, such as .jpg"
EMPTY = "empty file"
_MOST_ROWS = 200
_LONGEST_NAME = 255  # bytes, on Linux and macOS
_OTHERS = "other reasons"


@dataclass(frozen=True)
class LeftOut:
    """Files of one folder that are not taken, for one reason.

    Attributes:
        folder: as it is called in the data directory; empty for the directory itself.
        example: one of them, relative to the data directory.
    """

    folder: str
    reason: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.count} × {self.reason}, such as {printable(self.example)}"


def gathered(left_out: Iterable[tuple[str, str]]) -> tuple[LeftOut, ...]:
    """Of pairs of a reason and a path, one row for each reason, whatever the folder."""
    found: dict[str, tuple[int, str]] = {}
    for reason, path in left_out:
        count, example = found.get(reason, (0, path))
        found[reason] = (count + 1, min(example, path))
    return tuple(LeftOut("", reason, *row) for reason, row in sorted(found.items()))


class Picture(NamedTuple):
    """An image file.

    Attributes:
        name: of its class folder, normalised.
        path: relative to the folder that was walked.
        key: of its path, size and times: another key is another file, or a changed one.
    """

    name: str
    path: str
    key: int


@dataclass
class Walk:
    """One walk below a folder of class folders. Iterate over it once; then it knows what was left out.

    Attributes:
        root: the folder.
        reserved: names of folders in it that are no classes, and not worth a word.
        damage: keys of files that are known to be damaged.
        prefix: of paths, where the folder lies in the data directory.
        names: of the class folders, normalised, with what they are called on the disk.
        with_images: of these, those with an image.
        loose: how many images lie beside them.
        damaged: the keys of files that are empty or otherwise known to be damaged.
    """

    root: Path
    reserved: frozenset[str] = frozenset()
    damage: frozenset[int] = frozenset()
    prefix: str = ""
    names: dict[str, list[str]] = field(default_factory=dict)
    with_images: set[str] = field(default_factory=set)
    loose: int = 0
    damaged: set[int] = field(default_factory=set)
    _left_out: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    _entered: dict[tuple[int, int], str] = field(default_factory=dict)
    _above: set[tuple[int, int]] = field(default_factory=set)

    def __iter__(self) -> Iterator[Picture]:
        """The images, folder by folder. Links to folders are followed last, so that a folder keeps its own place."""
        status = self.root.stat()
        self._entered[status.st_dev, status.st_ino] = "the data directory itself"
        self._above = {place for folder in self.root.resolve().parents if (place := _place(folder))}
        folders: deque[tuple[str, str]] = deque()  # (class folder as it is called, path)
        links: deque[tuple[str, str]] = deque()
        for entry in self._entries("", ""):
            if entry.name in self.reserved:
                continue
            if not is_folder(entry):
                self._stray(entry)
            elif not self._hidden(entry, entry.name, ""):
                self.names.setdefault(normalised(entry.name), []).append(entry.name)
                (links if entry.is_symlink() else folders).append((entry.name, entry.name))
        while folders or links:
            top, path = folders.popleft() if folders else links.popleft()
            if not self._enter(top, path):
                continue
            for entry in self._entries(top, path):
                inner = f"{path}/{entry.name}"
                if self._hidden(entry, inner, top):
                    continue
                if is_folder(entry):
                    (links if entry.is_symlink() else folders).append((top, inner))
                    continue
                picture = self._picture(entry, top, inner)
                if picture is not None:
                    self.with_images.add(picture.name)
                    yield picture

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What was not taken; class folders without an image at the end."""
        empty = (
            LeftOut(called[0], "class folder without images", len(called), called[0])
            for name, called in self.names.items()
            if name not in self.with_images
        )
        rows = (LeftOut(*key, *row) for key, row in sorted(self._left_out.items()))
        return (*rows, *empty)

    def leave_out(self, top: str, path: str, reason: str) -> None:
        """Notes that something is not taken."""
        key = (top, reason)
        if key not in self._left_out and len(self._left_out) >= _MOST_ROWS:
            key = ("", _OTHERS)
        count, example = self._left_out.get(key, (0, path))
        self._left_out[key] = (count + 1, min(example, path))

    def _entries(self, top: str, path: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / path) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not path:
                raise
            self.leave_out(top, f"{path}/", f"folder that cannot be read: {error.strerror}")
            return []

    def _enter(self, top: str, path: str) -> bool:
        try:
            status = (self.root / path).stat()
        except OSError as error:
            self.leave_out(top, f"{path}/", f"folder that cannot be read: {error.strerror}")
            return False
        if (status.st_dev, status.st_ino) in self._above:
            self.leave_out(top, f"{path}/", "link to a folder that the data lie in")
            return False
        before = self._entered.setdefault((status.st_dev, status.st_ino), f"{path}/")
        if before != f"{path}/":
            self.leave_out(top, f"{path}/", "link to a folder that is read already")
            return False
        return True

    def _hidden(self, entry: os.DirEntry[str], path: str, top: str) -> bool:
        reason = hidden(entry.name)
        if reason:
            self.leave_out(top, path, reason)
        return bool(reason)

    def _stray(self, entry: os.DirEntry[str]) -> None:
        """Something that lies beside the class folders."""
        if self._hidden(entry, entry.name, ""):
            return
        reason = not_an_image(entry)
        self.loose += not reason
        self.leave_out("", entry.name, reason or _NO_CLASS)

    def _picture(self, entry: os.DirEntry[str], top: str, path: str) -> Picture | None:
        reason = not_an_image(entry)
        if reason:
            self.leave_out(top, path, reason)
            return None
        status = entry.stat()
        key = file_key(self.prefix + path, status)
        if not status.st_size or key in self.damage:
            self.damaged.add(key)
            self.leave_out(top, path, EMPTY if not status.st_size else "damaged")
            return None
        return Picture(normalised(top), path, key)


def not_a_file(entry: os.DirEntry[str]) -> str:
    """Why something is not a regular file; empty if it is one."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        if entry.is_symlink():
            return "link to itself" if error.errno == errno.ELOOP else "link to nothing"
        return f"cannot be looked at: {error.strerror}"
    if stat.S_ISREG(mode):
        return ""
    return next((what for is_kind, what in _KINDS if is_kind(mode)), "not a file")


def not_an_image(entry: os.DirEntry[str]) -> str:
    """Why something is not an image file; empty if it is one, by its name."""
    suffix = Path(entry.name).suffix.lower()
    reason = not_a_file(entry)
    if reason or suffix in IMAGE_SUFFIXES:
        return reason
    return _UNREAD.get(suffix) or (f"not an image ({suffix})" if suffix else NO_SUFFIX)


def _place(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from all others; None of one that cannot be reached by this name."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. A link in a circle is named as a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def hidden(name: str) -> str:
    """Why a file or folder of this name is passed over, whatever it holds; empty if it is not."""
    name = name.lower()
    if name.startswith("._"):
        return "AppleDouble file of macOS"
    if name in _SYSTEM_FILES or name == ".ds_store":
        return "file of an operating system"
    if name in _SYSTEM_FOLDERS:
        return "folder of an operating system"
    if name.startswith(".") and name.endswith(".icloud"):
        return "file that is still in iCloud: download it"
    return "hidden" if name.startswith(".") else ""


def never_a_folder(name: str) -> str:
    """Why no class folder can have this name; empty if one can. Where labels are numbers (IDX), any name will do."""
    if "/" in name or "\0" in name:
        return "no folder's name holds a slash" if "/" in name else "no folder's name holds a NUL"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        return f"a folder's name has at most {_LONGEST_NAME} bytes"
    reason = hidden(name)
    if reason:
        return f"what has that name is left out ({reason})"
    return "" if name else "a folder has a name"


def file_key(path: str, status: os.stat_result) -> int:
    """64 bits that change with a file's path, size, times, and permissions, which change one of its times."""
    text = b"%s\0%d\0%d\0%d" % (os.fsencode(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
