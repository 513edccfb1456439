"""When a job pauses, since its rounds are not published (fedepth.rounds.soundness)."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.store.records import RoundRecord
from fedepth.job_sections import GuardSection


def pause(latest: Sequence[RoundRecord], guard: GuardSection, back: str) -> str:
    """Why the job is to pause after these rounds, the latest last, and what to do; empty if it may go on.

    Args:
        back: the options of a rollback to the weights in force, which ends the pause.
    """
    unsound = [record for record in latest[-guard.pause_after :] if not record.published]
    if len(unsound) < guard.pause_after:
        return ""
    return (
        f"the last {guard.pause_after} rounds, up to round {latest[-1].round}, were not published, the last since "
        f"{latest[-1].note}; see in the log or with fedepth-coordinator record which devices took part; then stop the "
        "coordinator and change what made the model worse, or it pauses again: a smaller [training] learning_rate, an "
        "[aggregation] rule against faulty updates, or, if the model may get so much worse, a larger [guard] "
        f"largest_drop; run fedepth-coordinator rollback {back} and start it again"
    )
