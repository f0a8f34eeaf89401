"""Ctrl-C waits for the end of a step, and comes through at once the second time."""

import contextlib
import os
import signal
import threading

import pytest

from engram_core.training.interrupt import DeferredInterrupt


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_is_noted_and_the_second_acts():
    before = signal.getsignal(signal.SIGINT)
    with DeferredInterrupt() as deferred:
        assert not deferred.requested
        interrupt()
        assert deferred.requested
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_given_back_even_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ZeroDivisionError), DeferredInterrupt():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_other_threads_leave_ctrl_c_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter():
        with DeferredInterrupt() as deferred:
            seen.append((signal.getsignal(signal.SIGINT) is before, deferred.requested))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(True, False)]
