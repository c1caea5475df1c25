"""A signal that asks for a save never ends the process, before the first step as well."""

from __future__ import annotations

import os
import signal

from holdfast.trainer.run import Signals, begin_to_hear


def test_a_save_that_is_asked_for_too_early_or_too_late_is_passed_over() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    signals = Signals()
    try:
        begin_to_hear()
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.listen()
        assert not signals.save
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.save
        signals.close()
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
