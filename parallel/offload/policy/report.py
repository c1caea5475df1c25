"""What an offloader says of a step. Values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """One step of one rank. Bytes count every storage once."""

    eligible_bytes: int = 0
    """That could have been sent out, sent or not."""
    sent_bytes: int = 0
    read_bytes: int = 0
    forwarded_bytes: int = 0
    """Sent, but taken from memory because they were asked for before they had left it."""
    waited_s: float = 0.0
    """That backward passes stood still for what was not back yet."""
    bytes_per_s: float = 0.0
    """Both ways, while transfers were under way; 0 when there were none."""
    share: float = 0.0
    """Of the eligible bytes that was aimed at."""
    room_bytes: int = 0
    """Taken on the drive, or in host memory."""
    fault: str = ""
    """Why less is sent than could be; empty while all is well."""
