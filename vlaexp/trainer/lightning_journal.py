"""Lightning's side of a run's log."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from vlaexp.trainer.run_log import RunLog


class LightningJournal(Logger):
    """Lightning's side of a `RunLog`. Steps are optimizer steps done, whatever Lightning counts."""

    def __init__(self, log: RunLog | None) -> None:
        super().__init__()
        self._log = log
        self._step = 0

    def set_step(self, step: int) -> None:
        self._step = step

    @property
    def name(self) -> str:
        return "journal"

    @property
    def version(self) -> str:
        return "0"

    @property
    @rank_zero_experiment
    def experiment(self) -> RunLog | None:
        return self._log

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {key: value for key, value in metrics.items() if key not in ("epoch", "step")}
        if values and self._log is not None:
            self._log.log(values, self._step)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Parameters are sent when the run starts."""
