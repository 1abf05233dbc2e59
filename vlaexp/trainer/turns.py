"""Trainings that take turns: each in a thread of its own, of which exactly one runs at any time.

Lightning's `fit` returns when a training is over; a thread is what lets it pause in between. Switching happens only
where a training hands over, so nothing is concurrent, and PyTorch's modes (gradients, autocast), which belong to a
thread, stay each training's own.
"""

import warnings
from collections.abc import Callable, Generator
from threading import Semaphore, Thread

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng


class Stopped(BaseException):
    """Raised in a waiting training that is not to go on; not an `Exception`, so that none takes it for a failure."""


class Turn(Callback):
    """A training's side: it hands over before each step, after all that belongs to the last one."""

    def __init__(self, work: Callable[["Turn"], None]) -> None:
        self._go, self._back = Semaphore(0), Semaphore(0)
        self._stopped = False
        self.over = False
        self.error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        with isolate_rng():  # the others draw from the same global generators
            self._back.release()
            self._wait()

    def take(self) -> None:
        """Let the training run until it hands over or is over."""
        self._go.release()
        self._back.acquire()

    def stop(self) -> None:
        """End a waiting training; it closes what it opened."""
        self._stopped = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._go.acquire()
        if self._stopped:
            raise Stopped

    def _run(self, work: Callable[["Turn"], None]) -> None:
        try:
            self._wait()
            work(self)
        except BaseException as error:  # raised again, or told, by whoever takes the outcome
            self.error = error
        self.over = True
        self._back.release()


def in_turns(works: dict[int, Callable[[Turn], None]]) -> Generator[tuple[int, BaseException | None]]:
    """Run `works` a step each in turn; yields the key of each that is over, and what it raised.

    Args:
        works: each is called once and gives the `Turn` to its trainer as a callback; emptied, so that what is over can
            be freed.
    """
    with warnings.catch_warnings():  # of which each training sets its own, in an order that does not nest
        turns = {key: Turn(works.pop(key)) for key in list(works)}
        try:
            while turns:
                for key, turn in list(turns.items()):
                    turn.take()
                    if turn.over:
                        del turns[key]
                        yield key, turn.error
        finally:
            for turn in turns.values():
                turn.stop()
