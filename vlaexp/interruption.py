"""Stop long work at a safe moment when a cluster or a user asks for it.

SIGUSR2 says that a time limit or a preemption is near, SIGTERM that the process is to end (scancel, requeue, kill).
Work that can stop cleanly asks `requested()` at its step boundaries inside `deferred()`; all other work is left at once
by the exception `Interrupted`. A second signal does not wait for a boundary.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_received: signal.Signals | None = None
_deferring = False


class Interrupted(BaseException):
    """Work was left because of a signal; not an `Exception`, so that nothing takes it for a failure of the work."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number

    @property
    def exit_status(self) -> int:
        """As a shell reports a process that a signal ended."""
        return 128 + self.number


@contextmanager
def listening(signals: Iterable[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Handle `signals` inside; to be entered in the main thread."""
    global _received
    _received = None
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore(signals: Sequence[signal.Signals] = SIGNALS) -> None:
    """Let no further signal disturb the last words of a process."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def requested() -> signal.Signals | None:
    """The signal that asks for a stop, or None."""
    return _received


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a first signal only sets `requested()`; whoever asks then raises `Interrupted`."""
    global _deferring
    outer, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = outer


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    first, _received = _received is None, signal.Signals(number)
    if not (_deferring and first):
        raise Interrupted(_received)
