"""Keeps files in a bucket, through fsspec, with a working copy in the state directory.

Credentials and the address of the service come from where s3fs looks for them, such as AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL; they are neither stored nor shown.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from botocore.exceptions import BotoCoreError

from coordinator.store.storage import NOT_WRITTEN, Directory
from fedepth.errors import StateError, UnavailableError
from fedepth.files import disk_errors, file_digest, make_durable

# A service that hangs is one that is away, and whoever calls tries again: nothing here waits for minutes. By default a
# try may take a minute in botocore, and both botocore and s3fs try five times.
CONNECT_S = 5.0
READ_S = 10.0
TRIES = 2
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html; other services allow underscores.
_URL = re.compile(r"s3://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[^@?#\\\x00-\x1f]*)?")
_CONFIG = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"total_max_attempts": 1}}


class Bucket:
    """Files in a bucket. What is used of them lies in the state directory too, and is fetched again when it does not.

    `Storage` says what the methods do.
    """

    def __init__(self, directory: Path, url: str) -> None:
        if not _URL.fullmatch(url):
            raise StateError(
                "--files must be a URL such as s3://bucket/prefix: a bucket's name of 3 to 63 small letters, digits, "
                "dots and hyphens, and no key; give none for --state"
            )
        self._directory = directory
        self._local = Directory(directory)
        self._url = url.rstrip("/")
        self._system: Any
        # No listing is remembered: another process may change the bucket.
        self._system, root = fsspec.core.url_to_fs(self._url, use_listings_cache=False, config_kwargs=_CONFIG)
        self._system.retries = TRIES
        self._root = str(root)

    def keep(self, name: str) -> None:
        self._local.keep(name)
        path = self._directory / name
        digest = file_digest(path)
        with self._reached(name):
            if self._digest(name) != digest:
                self._system.put_file(str(path), self._at(name), Metadata={"sha256": digest})

    def fetch(self, name: str, digest: str) -> None:
        path = self._directory / name
        if path.is_file() and file_digest(path) == digest:
            return
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with self._reached(name):
                if not self._system.exists(self._at(name)):
                    raise StateError(f"{self._url}/{name} is missing, and so is a sound copy in {self._directory}")
                path.parent.mkdir(parents=True, exist_ok=True)
                self._system.get_file(self._at(name), str(partial))
            found = file_digest(partial)
            if found != digest:
                raise StateError(
                    f"{self._url}/{name} is damaged: its sha256 is {found[:12]}…, recorded is {digest[:12]}…"
                )
            with disk_errors(NOT_WRITTEN, path):
                partial.replace(path)
                make_durable(path)
        finally:
            partial.unlink(missing_ok=True)

    def ready(self, name: str, digest: str) -> None:
        self.fetch(name, digest)
        self.keep(name)

    def holds(self, name: str, size_bytes: int) -> bool:
        if self._local.holds(name, size_bytes):
            return True
        with self._reached(name):
            at = self._at(name)
            return bool(self._system.exists(at)) and int(self._system.info(at)["size"]) == size_bytes

    def names(self, folder: str) -> set[str]:
        with self._reached(folder):
            found = self._system.find(self._at(folder))
        return self._local.names(folder) | {str(each)[len(self._root) + 1 :] for each in found}

    def rename(self, name: str, new: str) -> None:
        self._local.rename(name, new)
        with self._reached(name):
            if self._system.exists(self._at(name)):
                if not self._system.exists(self._at(new)):
                    self._system.copy(self._at(name), self._at(new))
                self._system.rm_file(self._at(name))

    def remove(self, name: str) -> None:
        with self._reached(name):
            for each in self._system.find(self._at(name)):
                self._system.rm_file(each)
        self._local.remove(name)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _digest(self, name: str) -> str:
        """What was put there; "" for nothing."""
        if not self._system.exists(self._at(name)):
            return ""
        return str(self._system.metadata(self._at(name)).get("sha256", ""))

    @contextlib.contextmanager
    def _reached(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, BotoCoreError) as error:
            why = str(error) or f"it did not answer within {READ_S:g} s"  # TimeoutError says nothing
            raise UnavailableError(
                f"{self._url}/{name} cannot be reached now: {why}; see that the bucket exists, and that the address "
                "and the key in the environment are right"
            ) from error
