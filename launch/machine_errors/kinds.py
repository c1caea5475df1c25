"""The kinds of errors of a machine: where each is counted, and how serious it is. Data.

An error is serious when the node should not go on: what it computes may be wrong from now on, or a
device of it is gone. Corrected and repeated errors are told, and no more.

Sources: for the counters, the kernel's Documentation/ABI (sysfs-devices-edac, sysfs-class-net,
sysfs-bus-pci-devices-aer_stats) and Documentation/accounting/psi.rst; for Xid numbers, NVIDIA's
"Xid Errors" (docs.nvidia.com/deploy/xid-errors), where these ask for a reset of the GPU or a
restart of the machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class MachineError:
    """Errors of one kind on one device of this machine since they were last told."""

    kind: str
    device: str
    count: int
    what: str
    """What that is, for a person."""
    is_serious: bool = False

    def __str__(self) -> str:
        times = f", {self.count} times" if self.count > 1 else ""
        return f"{self.what} ({self.device}{times})"


@dataclass(frozen=True, slots=True)
class Counter:
    """A counter of the kernel, one file for each device."""

    kind: str
    what: str
    pattern: str
    """The files below the root of sysfs, as for glob."""
    device: int
    """Which part of the path names the device, counted from its beginning. Counts of files with one
    device are added."""
    is_serious: bool = False


COUNTERS: Final = (
    Counter(
        "memory_corrected",
        "memory errors that were corrected",
        "devices/system/edac/mc/mc*/ce_count",
        4,
    ),
    Counter(
        "memory_uncorrectable",
        "a memory error that cannot be corrected",
        "devices/system/edac/mc/mc*/ue_count",
        4,
        is_serious=True,
    ),
    Counter(
        "throttled",
        "the processor was slowed down because it is hot",
        "devices/system/cpu/cpu*/thermal_throttle/package_throttle_count",
        2,
    ),
    Counter(
        "throttled",
        "a core was slowed down because it is hot",
        "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count",
        2,
    ),
    Counter("disk", "errors of a disk", "block/*/device/ioerr_cnt", 1),
    Counter("network", "errors in received packets", "class/net/*/statistics/rx_errors", 2),
    Counter("network", "errors in sent packets", "class/net/*/statistics/tx_errors", 2),
    Counter("link_down", "a network link went down", "class/net/*/carrier_down_count", 2),
    Counter(
        "link_down",
        "an InfiniBand link went down",
        "class/infiniband/*/ports/*/counters/link_downed",
        2,
    ),
    Counter(
        "network",
        "errors in packets over InfiniBand",
        "class/infiniband/*/ports/*/counters/port_rcv_errors",
        2,
    ),
    Counter(
        "pcie_fatal",
        "a PCIe device had a fatal error",
        "bus/pci/devices/*/aer_dev_fatal",
        3,
        is_serious=True,
    ),
    Counter("pcie", "errors of a PCIe device", "bus/pci/devices/*/aer_dev_nonfatal", 3),
)

FATAL_XIDS: Final[Mapping[int, str]] = {
    48: "an uncorrectable error in the GPU's memory",
    62: "the GPU's power management has halted",
    64: "a bad row of the GPU's memory could not be replaced",
    79: "the GPU has fallen off the bus",
    95: "an uncontained error in the GPU's memory",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor has failed",
    140: "an unrecovered error in the GPU's memory",
}
"""By number: what it stands for."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the kernel that stands for an error."""

    kind: str
    what: str
    pattern: re.Pattern[str]
    """Its group, where it has one, names the device; else that is memory."""
    is_serious: bool = False


MESSAGES: Final = (
    Message(
        "memory_uncorrectable",
        "a memory error that cannot be corrected",
        re.compile(r"EDAC (MC\d+): \d+ UE "),
        is_serious=True,
    ),
    Message(
        "memory_uncorrectable",
        "the kernel has taken a broken page of memory away",
        re.compile(r"Memory failure: (0x[0-9a-f]+): "),
        is_serious=True,
    ),
    Message(
        "processor",
        "the processor has reported an error",
        re.compile(r"mce: \[Hardware Error\]: (CPU \d+)"),
    ),
    Message(
        "disk",
        "a disk cannot read or write",
        re.compile(r"I/O error, dev (\w+)"),
    ),
    Message(
        "disk",
        "a file system has found itself damaged",
        re.compile(
            r"(?:EXT4-fs error|BTRFS (?:error|critical)) \(device ([\w-]+)\)"
            r"|XFS \(([\w-]+)\): .*[Cc]orruption"
        ),
    ),
    Message(
        "disk",
        "a disk's controller does not answer",
        re.compile(r"nvme (nvme\d+): controller is down"),
    ),
    Message(
        "out_of_memory",
        "the kernel has killed a process because memory ran out",
        re.compile(r"Out of memory: Killed process"),
    ),
)
XID: Final = re.compile(r"NVRM: Xid \(([^)]+)\): (\d+)")
