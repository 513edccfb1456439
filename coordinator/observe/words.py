"""Events in words: one sentence each, with names for devices and units for numbers. For the log and for `watch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedepth.printable import printable
from fedepth.sizes import format_size

Event = Mapping[str, Any]


def in_words(event: Event) -> str | None:
    """An event as a sentence in one line; None for one that is not known, or lacks what it should tell.

    Events may come from another version of fedepth, or from somebody who means harm: what they hold is only shown.
    """
    say = _SENTENCES.get(str(event.get("event")))
    if say is None:
        return None
    try:
        return printable(say(event))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _seen(event: Event) -> str:
    return (
        f"{event['device']} is here: {_count(event['samples'], 'sample')}, {format_size(event['budget'])} for "
        f"training, {event['hardware']}"
    )


def _cloned(event: Event) -> str:
    return (
        f"two devices have the identity of {event['device']}: the one on {event['served']} is served, the one on "
        f"{event['refused']} refused"
    )


def _started(event: Event) -> str:
    return f"round {event['round']} begins with {', '.join(event['devices'])}"


def _given(event: Event) -> str:
    again = f", attempt {event['attempt']}" if event["attempt"] > 1 else ""
    return (
        f"round {event['round']}: {event['device']} is given a task{again}: blocks {event['blocks']}, predicted peak "
        f"{format_size(event['predicted_peak'])} of {format_size(event['budget'])}"
    )


def _progress(event: Event) -> str:
    text = f"{event['device']}: {event['activity']}"
    if event.get("stage_count"):
        text += f", stage {event['stage'] + 1} of {event['stage_count']}, units {event['first']}-{event['last']}"
    if event.get("epochs"):
        text += f", epoch {event['epoch']} of {event['epochs']}"
        text += f", loss {event['loss']:.4f}" if event.get("loss") is not None else ""
    return text + (f", {format_size(event['bytes_moved'])}" if event.get("bytes_moved") else "")


def _accepted(event: Event) -> str:
    return (
        f"round {event['round']}: the update of {event['device']} is accepted: {format_size(event['bytes'])}, "
        f"{_count(event['samples'], 'sample')}, trained in {event['seconds']:.1f} s"
    )


def _refused(event: Event) -> str:
    return f"the update of {event['device']} is refused ({event['reason']}): {event['message']}"


def _damaged(event: Event) -> str:
    return f"round {event['round']}: the update of {event['device']} is damaged and left out: {event['message']}"


def _failed(event: Event) -> str:
    sizes = ""
    if event.get("needed_bytes"):
        sizes = f" (needed {format_size(event['needed_bytes'])}, had {format_size(event['budget_bytes'])})"
    outcome = getattr(event["outcome"], "value", event["outcome"])
    return f"the task of {event['device']} ended without an update, {outcome}: {event['message']}{sizes}"


def _closed(event: Event) -> str:
    return (
        f"round {event['round']} is closed with {_count(event['updates'], 'update')} of "
        f"{_count(event['samples'], 'sample')}"
    )


def _not_published(event: Event) -> str:
    return (
        f"round {event['round']} is not published: {event['reason']}; its devices were "
        f"{', '.join(event['devices']) or 'none'}"
    )


def _evaluated(event: Event) -> str:
    loss = f", loss {event['loss']:.4f}" if event.get("loss") is not None else ""
    return f"round {event['round']}: accuracy {event['accuracy']:.2%}{loss}"


def _exported(event: Event) -> str:
    return (
        f"round {event['round']} is exported to {event['path']}: largest difference {event['parity_max_abs']:.1e} over "
        f"{_count(event['samples'], 'sample')}"
    )


def _finished(event: Event) -> str:
    accuracy = f", accuracy {event['accuracy']:.2%}" if event.get("accuracy") is not None else ""
    return f"the job is finished after {_count(event['rounds'], 'round')}{accuracy}"


def _state(event: Event) -> str:
    message = f"; {event['message']}" if event.get("message") else ""
    if event.get("not_private"):
        message += f"; {event['not_private']}"
    elif event.get("epsilon"):
        message += f"; privacy spent: epsilon {event['epsilon']:.3g} with delta {event['delta']:g}"
    return (
        f"{event['job']}: round {event['round']} of {event['rounds']}, {event['phase']}, "
        f"{_count(event['devices'], 'device')}{message}"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "device_seen": _seen,
    "cloned_identity": _cloned,
    "device_rejected": lambda event: f"{event['device']} is rejected: {event['message']}",
    "round_started": _started,
    "task_given": _given,
    "progress": _progress,
    "update_accepted": _accepted,
    "update_refused": _refused,
    "update_damaged": _damaged,
    "task_failed": _failed,
    "round_closed": _closed,
    "not_published": _not_published,
    "evaluated": _evaluated,
    "exported": _exported,
    "paused": lambda event: f"the job is paused after round {event['round']}: {event['reason']}",
    "finished": _finished,
    "log": lambda event: str(event["message"]),
    "state": _state,
}
EVENTS = frozenset(_SENTENCES)
