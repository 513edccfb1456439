"""Sends on what a trainer reports: to the coordinator as progress, to the log in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import structlog

from edge_client.trainer.protocol import Event, Paused, Rehearsing, StageDone, StageProgress, StageStarted
from fedepth.sizes import format_size
from fedepth.task import Progress, Task

LOG_EVERY_S = 30.0
_log = structlog.get_logger()


class ProgressReporter:
    """Takes the events of one task. A long stage writes a line every half a minute."""

    def __init__(self, task: Task, device_id: str, report: Callable[[Progress], None]) -> None:
        self._task = task
        self._device_id = device_id
        self._report = report
        self._logged_at = time.monotonic()

    def activity(self, name: str) -> None:
        self._report(Progress(self._task.task_id, self._task.attempt, self._device_id, name))

    def send(self, event: Event) -> None:
        if isinstance(event, Rehearsing):
            self.activity("rehearsing")
            _log.info("rehearsing every stage for one step")
        elif isinstance(event, StageStarted):
            self._report(self._training(event))
            self._log("stage started", event, predicted_peak=format_size(event.predicted_peak_bytes))
        elif isinstance(event, StageProgress):
            progress = self._training(event)
            self._report(replace(progress, epoch=event.epoch, epochs=event.epochs, loss=event.loss))
            if time.monotonic() - self._logged_at >= LOG_EVERY_S:
                self._log("training", event, epoch=f"{event.epoch}/{event.epochs}", loss=round(event.loss, 4))
        elif isinstance(event, Paused):
            self.activity("waiting for memory")
            _log.warning(
                "paused: others on this device hold the memory",
                stage=event.stage + 1,
                free_for_training=format_size(event.budget_bytes),
            )
        elif isinstance(event, StageDone):
            result = event.result
            _log.info(
                "stage done",
                units=f"{result.first}-{result.last}",
                predicted_peak=format_size(result.predicted_peak_bytes),
                rehearsed_peak=format_size(result.rehearsed_peak_bytes),
                measured_peak=format_size(result.measured_peak_bytes),
                **({"models": result.models} if result.models > 1 else {}),
                loss=round(result.loss_last, 4),
                seconds=round(result.seconds, 1),
            )

    def _training(self, event: StageStarted | StageProgress) -> Progress:
        return Progress(
            self._task.task_id,
            self._task.attempt,
            self._device_id,
            "training",
            stage=event.stage,
            stage_count=event.stage_count,
            first=event.first,
            last=event.last,
        )

    def _log(self, name: str, event: StageStarted | StageProgress, **more: object) -> None:
        _log.info(name, stage=f"{event.stage + 1}/{event.stage_count}", units=f"{event.first}-{event.last}", **more)
        self._logged_at = time.monotonic()
