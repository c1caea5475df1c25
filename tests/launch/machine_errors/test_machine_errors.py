"""The errors that a machine tells of: the real reader, on a folder that looks as the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.launch.machine_errors.kernel_messages import errors_in
from holdfast.launch.machine_errors.kinds import COUNTERS, FATAL_XIDS
from holdfast.launch.machine_errors.machine_errors import MachineErrors
from holdfast.launch.machine_errors.roots import MachineRoots
from support.processes.fake_clock import FakeClock
from support.runs.machine_trees import MachineTree

XID = "6,1,1,-;NVRM: Xid (PCI:0000:3b:00): {}, pid='<unknown>', name=<unknown>\n"


@pytest.fixture
def tree(tmp_path: Path) -> MachineTree:
    return MachineTree(tmp_path)


def test_what_was_counted_before_the_watch_is_no_news(tree: MachineTree) -> None:
    tree.count("devices/system/edac/mc/mc0/ue_count", 3)
    tree.say(XID.format(79))
    errors = MachineErrors(tree.roots)
    assert errors.look() == []


def test_a_counter_that_rises_is_told_with_its_device_and_by_how_much(tree: MachineTree) -> None:
    corrected = "devices/system/edac/mc/mc0/ce_count"
    tree.count(corrected, 3)
    tree.count("devices/system/edac/mc/mc1/ce_count", 0)
    errors = MachineErrors(tree.roots)
    tree.count(corrected, 5)
    (found,) = errors.look()
    assert (found.kind, found.device, found.count) == ("memory_corrected", "mc0", 2)
    assert not found.is_serious
    assert errors.look() == []


def test_what_a_device_had_counted_before_it_came_is_no_news(tree: MachineTree) -> None:
    errors = MachineErrors(tree.roots)
    tree.count("devices/system/edac/mc/mc0/ue_count", 5)
    assert errors.look() == []
    tree.count("devices/system/edac/mc/mc0/ue_count", 6)
    assert [error.count for error in errors.look()] == [1]


@pytest.mark.parametrize("counter", COUNTERS, ids=lambda counter: counter.pattern)
def test_every_counter_is_read_where_the_kernel_has_it(tree: MachineTree, counter: object) -> None:
    path = counter.pattern  # type: ignore[attr-defined]
    for stars, name in (("mc*", "mc7"), ("cpu*", "cpu7"), ("/*/", "/dev7/")):
        path = path.replace(stars, name)
    first, second = ("0x1", "0x3") if path.endswith("ioerr_cnt") else ("1", "3")
    if "aer_dev" in path:
        first, second = (f"Undefined 0\nDLP {n}\nTOTAL_ERR_FATAL {n}" for n in (1, 3))
    tree.write(path, first)
    tree.write("class/net/dev7/device/vendor", "0x1")
    errors = MachineErrors(tree.roots)
    tree.write(path, second)
    (found,) = errors.look()
    assert (found.kind, found.count) == (counter.kind, 2)  # type: ignore[attr-defined]
    assert found.device in ("mc7", "cpu", "dev7")
    assert found.is_serious == counter.is_serious  # type: ignore[attr-defined]


def test_interfaces_without_hardware_are_left_out(tree: MachineTree) -> None:
    tree.count("class/net/veth1/statistics/rx_errors", 0)
    errors = MachineErrors(tree.roots)
    tree.count("class/net/veth1/statistics/rx_errors", 9)
    assert errors.look() == []


def test_pages_taken_away_and_waits_for_memory_are_told(tree: MachineTree) -> None:
    pressure = "some avg10=0.00 total=9000000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total={}\n"
    tree.write_proc("meminfo", "MemTotal: 9 kB\nHardwareCorrupted:     0 kB\n")
    tree.write_proc("pressure/memory", pressure.format(1_000_000))
    errors = MachineErrors(tree.roots)
    tree.write_proc("meminfo", "MemTotal: 9 kB\nHardwareCorrupted:     4 kB\n")
    tree.write_proc("pressure/memory", pressure.format(3_500_000))
    found = {error.kind: error for error in errors.look()}
    assert found["memory_uncorrectable"].is_serious
    assert found["memory_pressure"].count == 2
    assert not found["memory_pressure"].is_serious


def test_messages_of_the_kernel_are_read_as_they_come(tree: MachineTree) -> None:
    errors = MachineErrors(tree.roots)
    tree.say("6,2,2,-;usb 1-1: new device\n")
    assert errors.look() == []
    tree.say(XID.format(79))
    tree.say(XID.format(31))
    found = {str(error): error for error in errors.look()}
    gone = found["the GPU has fallen off the bus (Xid 79) (PCI:0000:3b:00)"]
    assert (gone.kind, gone.is_serious) == ("xid", True)
    other = found["a GPU has reported an error (Xid 31) (PCI:0000:3b:00)"]
    assert not other.is_serious


@pytest.mark.parametrize(
    ("line", "kind", "device", "is_serious"),
    [
        ("EDAC MC0: 1 UE memory read error on CPU_SrcID#0", "memory_uncorrectable", "MC0", True),
        ("EDAC MC0: 1 CE memory read error on CPU_SrcID#0", "", "", False),
        (
            "Memory failure: 0x1234: recovery action for dirty page: Recovered",
            "memory_uncorrectable",
            "0x1234",
            True,
        ),
        ("mce: [Hardware Error]: CPU 3: Machine Check: 0 Bank 5", "processor", "CPU 3", False),
        ("I/O error, dev nvme0n1, sector 12345 op 0x0:(READ)", "disk", "nvme0n1", False),
        ("EXT4-fs error (device sda1): ext4_find_entry:1455: inode #2", "disk", "sda1", False),
        ("XFS (dm-1): Corruption detected. Unmount and run xfs_repair", "disk", "dm-1", False),
        ("nvme nvme1: controller is down; will reset: CSTS=0xffffffff", "disk", "nvme1", False),
        ("Out of memory: Killed process 4711 (python)", "out_of_memory", "memory", False),
    ],
)
def test_what_a_message_stands_for(line: str, kind: str, device: str, is_serious: bool) -> None:
    found = [(e.kind, e.device, e.is_serious) for e in errors_in([line])]
    assert found == ([(kind, device, is_serious)] if kind else [])


def test_only_xids_after_which_a_gpu_is_of_no_use_are_serious() -> None:
    serious = {
        number
        for number in range(1, 200)
        for error in errors_in([XID.format(number)])
        if error.is_serious
    }
    assert serious == set(FATAL_XIDS)
    assert 79 in serious
    assert 13 not in serious  # a fault of a program


def test_errors_that_keep_coming_are_told_once_a_minute_and_none_is_left_out(
    tree: MachineTree,
) -> None:
    clock, path = FakeClock(), "devices/system/edac/mc/mc0/ce_count"
    tree.count(path, 0)
    errors, told = MachineErrors(tree.roots, clock=clock), []
    for number in range(1, 131):
        tree.count(path, number)
        told += errors.look()
        clock.sleep(1.0)
    assert [error.count for error in told] == [1, 60, 60]


def test_serious_errors_are_told_at_once_each_time(tree: MachineTree) -> None:
    path = "devices/system/edac/mc/mc0/ue_count"
    tree.count(path, 0)
    errors = MachineErrors(tree.roots, clock=FakeClock())
    for number in (1, 2):
        tree.count(path, number)
        (found,) = errors.look()
        assert found.is_serious


def test_a_machine_that_tells_nothing_has_no_errors(tmp_path: Path) -> None:
    errors = MachineErrors(MachineRoots.below(tmp_path))
    assert errors.look() == []
    errors.close()


def test_this_machine_can_be_looked_at() -> None:
    errors = MachineErrors()
    errors.look()
    errors.close()
