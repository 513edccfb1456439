"""The error tree. Every error that a user may see derives from one base class.

    FedepthError
    ├── ConfigError        a setting is missing, misspelt or out of range; names the field
    │   └── JobFileError       several things are wrong in a job file; carries each
    ├── DataError          a data directory or a label cannot be used
    │   └── DamagedFileError   one image file cannot be read; carries its path
    ├── ModelError         a model cannot be built, exported or split, or its graph is not the model
    ├── PlanError          no plan fits the budget; carries the needed and the free bytes
    ├── OverBudgetError    training met its memory limit; carries the stage and the measured miss
    ├── DivergedError      the loss or the weights of a training are not finite any more
    ├── ChildError         a child process ended or answered badly
    ├── TransportError     the other side cannot be reached or refused the call
    ├── TrustError         a certificate or token is missing, damaged, expired, revoked, or not for this
    ├── ProtocolError      a message breaks the protocol (size, digest, order)
    ├── UpdateError        an update was refused; carries the reason's short name
    ├── StartError         a job cannot be served as it is; says all that is wrong
    ├── JobError           no device can train the job as it is
    ├── StateError         what lies on disk does not fit the job or is damaged
    │   ├── LockedError        another process holds a lock; carries its process id
    │   └── UnavailableError   a disk, a database or a bucket cannot be used just now; a later try may work
    │       └── DiskError          a disk is full, read-only or failing
    └── ExportError        the exported model differs from the trained one; carries the figures

A message says what happened, with numbers and names, and what to do next.
"""

from __future__ import annotations

from pathlib import Path


class FedepthError(Exception):
    """Base of all errors that fedepth raises for its users."""


class ConfigError(FedepthError):
    """A configuration is wrong. The message names the field."""


class JobFileError(ConfigError):
    """Several things are wrong in a job file.

    Attributes:
        parts: each of them.
    """

    def __init__(self, message: str, *, parts: tuple[ConfigError, ...]) -> None:
        super().__init__(message)
        self.parts = parts


class DataError(FedepthError):
    """A data directory is missing, empty, unreadable, or holds labels outside the job's classes."""


class DamagedFileError(DataError):
    """An image file cannot be read, whatever memory there is. Data can be used without it.

    Attributes:
        path: the file.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class ModelError(FedepthError):
    """A model cannot be built, exported as a graph, or split into units, or its graph differs from it."""


class PlanError(FedepthError):
    """No block plan fits.

    Attributes:
        needed_bytes: the budget that the smallest plan needs.
        budget_bytes: what is free for training.
    """

    def __init__(self, message: str, *, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


class OverBudgetError(FedepthError):
    """A stage met the memory limit while it trained.

    Attributes:
        stage: index of the stage in its plan.
        miss_bytes: by how much, as far as it was measured; at least 0.
        capped: it met the cap on its heap, which counts what was asked for, not what was written to.
    """

    def __init__(self, message: str, *, stage: int, miss_bytes: int, capped: bool = False) -> None:
        super().__init__(message)
        self.stage = stage
        self.miss_bytes = miss_bytes
        self.capped = capped


class DivergedError(FedepthError):
    """Training has left the finite numbers. The same training would do so again: only other settings help."""


class ChildError(FedepthError):
    """A child process ended when it should not have, or broke its protocol.

    Attributes:
        returncode: its exit status, negative for a signal; None while it still runs.
    """

    def __init__(self, message: str, *, returncode: int | None = None) -> None:
        super().__init__(message)
        self.returncode = returncode


class TransportError(FedepthError):
    """The other side cannot be reached, or refused the call."""


class TrustError(FedepthError):
    """A certificate, a key or a token is missing, damaged, expired, revoked, or not good for its use."""


class ProtocolError(FedepthError):
    """A message breaks the protocol: wrong size, offset, digest or order."""


class UpdateError(FedepthError):
    """An update was refused, and nothing of it is used.

    Attributes:
        reason: short name for counting: "digest", "missing_tensor", "unknown_tensor", "shape", "dtype",
            "not_finite", "range", "size", "plan", "samples", "late" (its round is closed), "device", "duplicate" (an
            update of another attempt is recorded already), "norm" (too far from the others of its round).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StartError(FedepthError):
    """A job cannot be served as it is: its test data, its libraries, its disk. One message says all that is wrong."""


class JobError(FedepthError):
    """A job cannot go on: every device fails it in the same way."""


class StateError(FedepthError):
    """The state directory holds another job, or something in it is damaged."""


class PeerError(StateError):
    """A file of a peer is not one of the task's model. Without it, training begins a new peer."""


class LockedError(StateError):
    """Another process holds a lock.

    Attributes:
        holder: its process id, or "unknown".
    """

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder


class UnavailableError(StateError):
    """The record or a file cannot be read or written just now: a full disk, a database or a bucket that is away.

    Nothing was changed, or what was changed can be done again; the same call may succeed later.
    """


class DiskError(UnavailableError):
    """Something cannot be read or written: the disk is full, read-only or failing. What was there is as it was.

    Attributes:
        needed_bytes: what must be free there; 0 if nobody knows.
    """

    def __init__(self, message: str, *, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class DamagedUpdateError(StateError):
    """Parts of updates are no longer what was accepted.

    Attributes:
        paths: the files.
    """

    def __init__(self, message: str, *, paths: tuple[Path, ...]) -> None:
        super().__init__(message)
        self.paths = paths


class NotFiniteError(StateError):
    """New weights would hold values that are not finite numbers.

    Attributes:
        tensor: the name of the first such tensor.
    """

    def __init__(self, message: str, *, tensor: str) -> None:
        super().__init__(message)
        self.tensor = tensor


class ExportError(FedepthError):
    """The exported model was refused, with the figures that led to it."""
