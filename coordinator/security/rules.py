"""Which role may call what, and whose name a request must be in: one row for every method that is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedepth_wire.tls import Role

_DEVICE = frozenset({Role.DEVICE})
_OPERATOR = frozenset({Role.OPERATOR})
_FEDERATION = "/fedepth_wire.v1.Federation/"


@dataclass(frozen=True)
class Rule:
    """Who may call a method.

    Attributes:
        roles: of the caller's certificate.
        device_id: the device that a request speaks for, which must be the caller; None for a message of a stream that
            speaks for nobody.
        task_id: the task that a request is about, in the same way. It must not be another device's.
    """

    roles: frozenset[Role]
    device_id: Callable[[Any], str | None] | None = None
    task_id: Callable[[Any], str | None] | None = None


RULES = {
    f"{_FEDERATION}NextTask": Rule(_DEVICE, device_id=lambda request: request.device.device_id),
    f"{_FEDERATION}FetchFile": Rule(_DEVICE),
    f"{_FEDERATION}UploadPart": Rule(
        _DEVICE,
        device_id=lambda request: request.header.device_id if request.HasField("header") else None,
        task_id=lambda request: request.header.task_id if request.HasField("header") else None,
    ),
    f"{_FEDERATION}DescribeData": Rule(
        _DEVICE, device_id=lambda request: request.header.device_id if request.HasField("header") else None
    ),
    f"{_FEDERATION}CommitUpdate": Rule(
        _DEVICE, device_id=lambda request: request.result.device_id, task_id=lambda request: request.result.task_id
    ),
    f"{_FEDERATION}ReportFailure": Rule(
        _DEVICE, device_id=lambda request: request.device_id, task_id=lambda request: request.task_id
    ),
    f"{_FEDERATION}ReportProgress": Rule(
        _DEVICE, device_id=lambda request: request.device_id, task_id=lambda request: request.task_id
    ),
    f"{_FEDERATION}JobStatus": Rule(_OPERATOR),
    f"{_FEDERATION}Watch": Rule(_OPERATOR),
    "/fedepth_wire.v1.Certificates/Renew": Rule(_DEVICE),
    "/grpc.health.v1.Health/Check": Rule(_DEVICE | _OPERATOR),
    "/grpc.health.v1.Health/Watch": Rule(_DEVICE | _OPERATOR),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(_OPERATOR),
}
