"""The error tree. Every error that a user may see derives from one base class.

    FedepthError
    ├── ConfigError        a setting is missing, misspelt or out of range; names the field
    ├── DataError          a data directory or a label cannot be used
    ├── ModelError         a model cannot be built, exported or split, or its graph is not the model
    ├── PlanError          no plan fits the budget; carries the needed and the free bytes
    ├── OverBudgetError    training met its memory limit; carries the stage and the measured miss
    ├── ChildError         a child process ended or answered badly
    ├── TransportError     the other side cannot be reached or refused the call
    ├── ProtocolError      a message breaks the protocol (size, digest, order)
    ├── UpdateError        an update was refused; carries the reason's short name
    ├── StateError         what lies on disk does not fit the job or is damaged
    └── ExportError        the exported model differs from the trained one; carries the figures

A message says what happened, with numbers and names, and what to do next.
"""

from __future__ import annotations


class FedepthError(Exception):
    """Base of all errors that fedepth raises for its users."""


class ConfigError(FedepthError):
    """A configuration is wrong. The message names the field."""


class DataError(FedepthError):
    """A data directory is missing, empty, unreadable, or holds labels outside the job's classes."""


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


class ProtocolError(FedepthError):
    """A message breaks the protocol: wrong size, offset, digest or order."""


class UpdateError(FedepthError):
    """An update was refused, and nothing of it is used.

    Attributes:
        reason: short name for counting: "digest", "missing_tensor", "unknown_tensor", "shape", "dtype",
            "not_finite", "size", "plan", "samples", "late", "device".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StateError(FedepthError):
    """The state directory holds another job, or something in it is damaged."""


class LockedError(StateError):
    """Another process holds a lock.

    Attributes:
        holder: its process id, or "unknown".
    """

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder


class ExportError(FedepthError):
    """The exported model was refused, with the figures that led to it."""
