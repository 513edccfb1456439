"""How long the two sides wait for each other. One time is chosen, and the others follow from it.

    STALL_S                 60 s   nothing moved for so long: a call or a transfer is over, on either side
    POLL_S                  30 s   how long a device waits for a task in one call
    LONGEST_POLL_S          60 s   how long a coordinator lets it wait, whatever it asks for
    KEEPALIVE_S             30 s   a connection that is silent is asked whether it is there
    KEEPALIVE_ANSWER_S      20 s   and is dead without an answer: found out before anything has stalled
    CHECK_S                300 s   how long a coordinator may take to check an update before it says what becomes of it
    BEAT_S                   5 s   how often a device renews the lease of its task
    SYNC_S                  30 s   what came in a transfer is on the disk after so long: what a power cut can cost
    BUSY_RETRY_S            20 s   when a device should come back that a busy coordinator has sent away
    REJECTED_RETRY_S        30 s   and one that cannot take part as it is

What is under way in a transfer is about a second of its link (fedepth_wire.pace), so that a question whether the other
side is there is answered in time however slow the link is.
"""

from __future__ import annotations

STALL_S = 60.0
POLL_S = STALL_S / 2
LONGEST_POLL_S = STALL_S
KEEPALIVE_S = STALL_S / 2
KEEPALIVE_ANSWER_S = STALL_S / 3
CHECK_S = 5 * STALL_S
BEAT_S = STALL_S / 12
SYNC_S = STALL_S / 2
BUSY_RETRY_S = STALL_S / 3
REJECTED_RETRY_S = STALL_S / 2
