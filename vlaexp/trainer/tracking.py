"""Where metrics go. The journal beside the run is the truth; a tracker mirrors it and may fail.

Every metric is first appended to `metrics.jsonl` in the run folder. Then it is sent to the tracker (MLflow, Weights &
Biases, a CSV file). A tracker that cannot be reached is reported once and training goes on; what it missed is sent when
it answers again, at the latest when the run ends, and stays in the journal in any case.

Resuming: the journal is cut back to the checkpoint's step, and a tracker's own record decides what is sent again, so no
step is logged twice.
"""

import csv
import json
import os
import secrets
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from vlaexp.manifest import flatten

JOURNAL = "metrics.jsonl"
TRACKER_STATE = "tracker.json"
RETRY_SECONDS = 60.0
Row = tuple[int, dict[str, float]]


class Tracker(ABC):
    """A mirror of the journal. Any exception means that it could not be reached."""

    @abstractmethod
    def start(self, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str], state: dict[str, Any]) -> None:
        """Open a run, or continue the one that `state` (kept beside the run) names; may add to `state`."""

    @abstractmethod
    def send(self, rows: list[Row]) -> None:
        """Send metrics; rows that the tracker already holds are skipped."""

    def artifact(self, path: Path, folder: str) -> None:  # noqa: B027 - a tracker without artifacts keeps none
        """Keep a small file with the run."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """Close the run as `finished`, `failed` or `interrupted`."""

    @abstractmethod
    def describe(self) -> str:
        """One line that says where the run can be seen."""


class MlflowTracker(Tracker):
    """MLflow, on SQLite by default or any server by URI.

    Args:
        uri: tracking URI. (MLflow's plain-folder store no longer works.)
        experiment: experiment name.
        timeout_s: how long one request to a server may take.
    """

    def __init__(self, uri: str, experiment: str, timeout_s: int = 10) -> None:
        self._uri, self._experiment, self._timeout = uri, experiment, timeout_s
        self._run_id = ""
        self._sent_until: dict[str, int] = {}
        self._resumed = False

    def start(self, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str], state: dict[str, Any]) -> None:
        # The client's own defaults retry for many minutes before they admit that a server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self._timeout))
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        self._client = mlflow_client(self._uri)
        experiment_id = ensure_experiment(self._client, self._uri, self._experiment)
        if "mlflow_run_id" in state:
            self._run_id, self._resumed = state["mlflow_run_id"], True
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            run = self._client.create_run(experiment_id, run_name=run_name, tags=dict(tags))
            self._run_id = state["mlflow_run_id"] = run.info.run_id
        if "mlflow_params" not in state:  # the connection may have been lost between the two
            self._log_params(params)
            state["mlflow_params"] = True

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for begin in range(0, len(entries), 100):
            self._client.log_batch(self._run_id, params=entries[begin : begin + 100])

    def send(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(key, float(value), now, step)
            for step, values in rows
            for key, value in values.items()
            if step > self._last_step(key)
        ]
        for begin in range(0, len(metrics), 500):
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + 500])
        for metric in metrics:
            self._sent_until[metric.key] = max(self._sent_until.get(metric.key, -1), metric.step)

    def _last_step(self, key: str) -> int:
        """The newest step of a metric that MLflow holds: asked once per key of a resumed run."""
        if key not in self._sent_until:
            history = self._client.get_metric_history(self._run_id, key) if self._resumed else []
            self._sent_until[key] = max((metric.step for metric in history), default=-1)
        return self._sent_until[key]

    def artifact(self, path: Path, folder: str) -> None:
        self._client.log_artifact(self._run_id, str(path), folder)

    def finish(self, status: str) -> None:
        self._client.set_terminated(
            self._run_id, {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[status]
        )

    def describe(self) -> str:
        return f"MLflow run {self._run_id} in {self._uri} (experiment {self._experiment})"


def mlflow_client(uri: str) -> Any:
    """A client for `uri`; for SQLite the folder is made first."""
    import logging

    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def ensure_experiment(client: Any, uri: str, name: str) -> str:
    """Id of the experiment, made if needed; artifacts of a SQLite store lie beside it, whatever the working folder."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / name).as_uri()
    return client.create_experiment(name, artifact_location=location)


class WandbTracker(Tracker):
    """Weights & Biases (extra `wandb`).

    Args:
        project: project name.
        mode: `offline` (sync later with `wandb sync`), `online` or `disabled`.
        folder: where offline runs are kept.
    """

    def __init__(self, project: str, mode: str, folder: str) -> None:
        self._project, self._mode, self._folder = project, mode, folder

    def start(self, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str], state: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        state.setdefault("wandb_run_id", secrets.token_hex(4))
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._project,
            name=run_name,
            id=state["wandb_run_id"],
            resume="allow",
            mode=self._mode,  # type: ignore[arg-type]
            dir=self._folder,
            config={**params, **{f"tag/{key}": value for key, value in tags.items()}},
        )

    def send(self, rows: list[Row]) -> None:
        for step, values in rows:
            # A step below the run's own is dropped by W&B, which is what a resumed run needs.
            self._run.log(values, step=step)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)

    def describe(self) -> str:
        return f"W&B run {self._run.id} ({self._mode}) under {self._folder}"


class CsvTracker(Tracker):
    """One CSV file per run: step, metric, value."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def start(self, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str], state: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"{run_name}.csv"
        self._seen: set[tuple[int, str]] = set()
        if self._path.exists():
            with self._path.open(newline="") as file:
                self._seen = {(int(row["step"]), row["metric"]) for row in csv.DictReader(file)}
        else:
            self._path.write_text("step,metric,value\n")

    def send(self, rows: list[Row]) -> None:
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file)
            for step, values in rows:
                for key, value in values.items():
                    if (step, key) not in self._seen:
                        self._seen.add((step, key))
                        writer.writerow([step, key, value])

    def finish(self, status: str) -> None:
        pass

    def describe(self) -> str:
        return f"metrics in {self._path}"


class RunLog:
    """The journal of one run and its mirror in a tracker.

    Args:
        folder: run folder.
        tracker: the mirror.
        run_name: shown in the tracker.
        params: flat parameters.
        tags: for instance the parent run.
        resume_step: steps after this one are cut from the journal, because they will be trained again; None cuts none.
    """

    def __init__(
        self,
        folder: Path,
        tracker: Tracker,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        resume_step: int | None = None,
    ) -> None:
        self._journal, self._state_file = folder / JOURNAL, folder / TRACKER_STATE
        self._tracker, self._run_name, self._params, self._tags = tracker, run_name, dict(params), dict(tags)
        self._state: dict[str, Any] = json.loads(self._state_file.read_text()) if self._state_file.exists() else {}
        kept = [row for row in read_journal(folder) if resume_step is None or row[0] <= resume_step]
        write_journal(folder, kept)
        self._pending: list[Row] = kept
        self._logged = {(step, key) for step, values in kept for key in values}
        self._started = False
        self._warned = False
        self._next_try = 0.0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep metrics of a step; what the journal already holds of that step is left as it is."""
        row = (step, {key: float(value) for key, value in metrics.items() if (step, key) not in self._logged})
        if not row[1]:
            return
        self._logged |= {(step, key) for key in row[1]}
        with self._journal.open("a") as file:
            file.write(json.dumps({"step": row[0], **row[1]}) + "\n")
        self._pending.append(row)
        self.flush()

    def flush(self, force: bool = False) -> None:
        """Send what is pending; after a failure not before `RETRY_SECONDS`, unless forced."""
        if not force and time.monotonic() < self._next_try:
            return

        def send() -> None:
            self._tracker.send(self._pending)
            self._pending = []

        self._attempt(send)

    def artifact(self, path: Path, folder: str = "") -> None:
        self._attempt(lambda: self._tracker.artifact(path, folder))

    def finish(self, status: str) -> None:
        self.flush(force=True)
        self._attempt(lambda: self._tracker.finish(status))

    def describe(self) -> str:
        if not self._started or self._pending:
            return f"metrics in {self._journal} (the tracker could not be reached)"
        return self._tracker.describe()

    def open(self) -> dict[str, Any]:
        """Start the run in the tracker now; returns the ids that are kept beside the run."""
        self._attempt(lambda: None)
        return self._state

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            if not self._started:
                self._tracker.start(self._run_name, self._params, self._tags, self._state)
                self._state_file.write_text(json.dumps(self._state))
                self._started = True
            action()
        except Exception as error:  # whatever a tracker's client raises, training goes on
            self._next_try = time.monotonic() + RETRY_SECONDS
            if not self._warned:
                self._warned = True
                print(
                    f"the tracker cannot be reached ({type(error).__name__}: {str(error)[:300]}); training goes on, "
                    f"metrics are kept in {self._journal} and sent when it answers; if it never does, start it (or "
                    "correct tracker=) and run the same command again",
                    file=sys.stderr,
                )


def read_journal(folder: Path) -> list[Row]:
    """Rows of a run's journal; a last line that was cut by a kill is dropped."""
    path = folder / JOURNAL
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                data = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows.append((int(data.pop("step")), data))
    return rows


def write_journal(folder: Path, rows: list[Row]) -> None:
    """Replace a run's journal at once."""
    path = folder / JOURNAL
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps({"step": step, **values}) + "\n" for step, values in rows))
    temporary.replace(path)


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


def flat_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration as flat tracker parameters."""
    return dict(flatten(config))
