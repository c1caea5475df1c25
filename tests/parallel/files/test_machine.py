"""The identity of the machine is not its name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from holdfast.parallel.files import machine_identity

_TELL = (
    "import socket; from holdfast.parallel.files import machine_identity;"
    "print(socket.gethostname(), machine_identity())"
)


@pytest.mark.mp
@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
@pytest.mark.parametrize(
    ("apart", "same"), [("--uts", True), ("--mount", True), ("--pid", False), ("--ipc", True)]
)
def test_a_machine_is_what_shares_memory_whatever_its_name(apart: str, same: bool) -> None:
    name = "hostname other-name &&" if apart == "--uts" else ""
    command = ("sh", "-c", f'{name} exec "$0" -c "$1"', sys.executable, _TELL)
    told = subprocess.run(
        ["unshare", "--fork", apart, *command],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert (told[0] == "other-name") == (apart == "--uts")
    assert (told[1] == machine_identity()) == same
