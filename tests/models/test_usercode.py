from __future__ import annotations

import os
import signal
import threading

import pytest

from autoquant.errors import TaskError, TrialError
from autoquant.models.usercode import Interrupt, describe, guarded, interruptible


def failed(reason: str) -> TrialError:
    return TrialError(f"it failed: {reason}")


@pytest.fixture(autouse=True)
def _nobody_handles_sigint():
    """A test run in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, GeneratorExit, KeyboardInterrupt])
def test_what_user_code_raises_is_its_failure(kind):
    with (
        interruptible(),
        pytest.raises(TrialError, match=f"it failed: {kind.__name__}: why"),
        guarded(failed),
    ):
        raise kind("why")


def test_our_own_errors_and_those_let_through_pass():
    with pytest.raises(TaskError), guarded(failed):
        raise TaskError("ours")
    with pytest.raises(StopIteration), guarded(failed, passing=(StopIteration,)):
        raise StopIteration


def test_a_signal_is_no_failure():
    with interruptible(), pytest.raises(Interrupt), guarded(failed):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("instead", [None, ValueError("because of it")])
def test_a_signal_that_user_code_caught_is_raised_again(instead):
    with interruptible():
        with pytest.raises(Interrupt), guarded(failed):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                if instead:
                    raise instead from None
        with guarded(failed):  # once
            pass


def test_handlers_are_given_back_and_those_of_others_stay():
    def mine(number: int, frame: object) -> None:
        raise RuntimeError("mine")

    with interruptible(signal.SIGINT, signal.SIGTERM), interruptible():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, mine)
    with interruptible(), pytest.raises(TrialError, match="RuntimeError: mine"), guarded(failed):
        os.kill(os.getpid(), signal.SIGINT)


def test_where_interrupts_cannot_be_told_apart_they_pass():
    """In a thread no handler can be set: whether Ctrl-C was meant is for the caller to say."""
    seen: list[BaseException] = []

    def work() -> None:
        try:
            with interruptible(), guarded(failed):
                raise KeyboardInterrupt
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert type(seen[0]) is KeyboardInterrupt


def test_where_the_signal_is_ignored_an_interrupt_is_the_codes_own():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(TrialError, match="KeyboardInterrupt"), guarded(failed):
        raise KeyboardInterrupt


def test_one_line_whatever_the_error_says():
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert describe(Mute()) == "Mute"
    assert describe(ValueError("two\nlines")) == "ValueError: two lines"
    assert describe(SystemExit(0)) == "SystemExit: 0"
