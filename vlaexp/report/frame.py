"""The frame of results: `results.csv`, a row per trained seed or other policy, milestone and split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vlaexp.report.compare import AXES
from vlaexp.report.pool import replicates

FRAME = "results.csv"
HELD_OUT = ("val/action_mse", "val/tool_error_mm")  # at that milestone's step, where the journal has them
MEASURED = ("seed", "trainable_parameters", "successes", "episodes", "success_rate", "ci_low", "ci_high")
FIELDS = ("split", "run", "role", "head", *AXES, *MEASURED)


def frame(
    comparison: Mapping[str, Any], journals: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]
) -> pd.DataFrame:
    """One row per run, milestone and split, seeds not pooled; intervals are those of the row's own episodes.

    Args:
        comparison: what `vlaexp.report.compare.compare` returned.
        journals: run name to its journal, for held-out errors.
    """
    errors = {
        (run, step, metric): values[metric]
        for run, rows in journals.items()
        for step, values in rows
        for metric in HELD_OUT
        if metric in values
    }
    return pd.DataFrame(
        [
            {field: row[field] for field in FIELDS}
            | {metric: errors.get((row["run"], row["steps"], metric)) for metric in HELD_OUT}
            | {"folder": row["folder"]}
            for pooled in comparison["rows"]
            for row in replicates(pooled)
        ]
    )


def write_frame(table: pd.DataFrame, folder: Path) -> Path:
    """Write `results.csv` at once."""
    path = folder / FRAME
    partial = path.with_suffix(".partial")
    table.to_csv(partial, index=False)
    partial.replace(path)
    return path
