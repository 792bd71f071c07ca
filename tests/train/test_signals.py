"""A signal sets the flag and nothing else; the second Ctrl-C does not wait."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from abf.train.signals import SIGNALS, StopFlag, command


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_kept(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == number
        assert stop.name == number.name


def test_the_second_ctrl_c_interrupts_at_once() -> None:
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopFlag():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_command_can_be_pasted() -> None:
    assert command().split()[0] == sys.orig_argv[0]
