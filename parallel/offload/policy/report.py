"""The report of an offloader on one step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """One step of one rank. Every storage counts once."""

    eligible_bytes: int = 0
    """Bytes that could have been sent out, sent or not."""
    sent_bytes: int = 0
    read_bytes: int = 0
    forwarded_bytes: int = 0
    """Bytes sent, but taken from memory because they were needed before they had left it."""
    waited_s: float = 0.0
    """Seconds that backward passes waited for storages on their way back."""
    bytes_per_s: float = 0.0
    """Transfer rate in both directions while transfers were under way; 0 when there were none."""
    share: float = 0.0
    """The share of the eligible bytes that was the aim."""
    room_bytes: int = 0
    """Bytes of room taken on the drive or in host memory."""
    fault: str = ""
    """The reason why less is sent than could be; empty while all is well."""
