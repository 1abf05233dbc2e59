"""Compare policies that differ in one axis: intervals, paired differences, and what the data cannot resolve.

An axis is a choice that a study asks about. Runs that differ in several at once cannot answer which one mattered, so
they are refused unless the axes are named. Seeds are replicates, not an axis; baselines stand beside any comparison.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from vlaexp.errors import UserError
from vlaexp.eval.statistics import paired_difference
from vlaexp.report.collect import Row

AXES = ("base", "decoder", "action_space", "lora", "freeze", "dataset", "steps")
FILE = "comparison.json"


def differing_axes(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """Axes in which trained policies differ, with their values."""
    trained = [row for row in rows if row["role"] == "trained"]
    values = {axis: sorted({row[axis] for row in trained}, key=str) for axis in AXES}
    return {axis: found for axis, found in values.items() if len(found) > 1}


def check_axes(rows: Sequence[Row], allowed: Sequence[str]) -> dict[str, list[Any]]:
    """The axes of a comparison.

    Args:
        rows: what is compared.
        allowed: axes that may differ together; empty for the rule of one.

    Raises:
        UserError: when more axes differ than the rule or `allowed` permits.
    """
    unknown = [axis for axis in allowed if axis not in AXES]
    if unknown:
        raise UserError(f"unknown axes {unknown}; expected some of {list(AXES)}")
    axes = differing_axes(rows)
    surplus = set(axes) - set(allowed) if allowed else set(axes) if len(axes) > 1 else set()
    if surplus:
        listing = "; ".join(f"{axis}: {', '.join(map(str, values))}" for axis, values in axes.items())
        raise UserError(
            f"these runs differ in {len(axes)} axes ({listing}), so a difference could not be put down to one; leave "
            f"some out, or name the axes: axes=[{','.join(axes)}]"
        )
    return axes


def compare(rows: Sequence[Row], allowed: Sequence[str], question: str) -> dict[str, Any]:
    """The comparison as data: rows, axes, and every pair of policies on the same episodes."""
    axes = check_axes(rows, allowed)
    ordered = sorted(rows, key=lambda row: (row["split"], row["role"] != "trained", row["run"], row["steps"]))
    return {
        "question": question,
        "axes": axes,
        "rows": ordered,
        "pairs": [
            {"rows": [i, j], **_pair(a, b)}
            for (i, a), (j, b) in combinations(enumerate(ordered), 2)
            if a["split"] == b["split"] and a["episodes_key"] == b["episodes_key"]
        ],
    }


def _pair(a: Row, b: Row) -> dict[str, Any]:
    result = paired_difference(a["outcomes"], b["outcomes"])
    return {
        "split": a["split"],
        "a": label(a),
        "b": label(b),
        "axes": [axis for axis in AXES if a[axis] != b[axis]],
        "difference": result.difference,
        "ci_low": result.ci_low,
        "ci_high": result.ci_high,
        "p_value": result.p_value,
        "only_a": result.only_a,
        "only_b": result.only_b,
        "resolvable": result.resolvable,
    }


def label(row: Row) -> str:
    """A policy's short name in tables and pictures."""
    if row["role"] == "baseline":
        return str(row["head"])
    if row["role"] == "zero-shot":
        return f"{row['head']} zero-shot"
    how = row["base"].removeprefix("tiny ") if "scratch" in row["base"] else f"LoRA {row['lora']}"
    if row["lora"] == "none" and "scratch" not in row["base"]:
        how = f"freeze {row['freeze']}"
    return f"{row['head']} {how} step {row['steps']}"


def write(comparison: dict[str, Any], folder: Path) -> Path:
    """Write `comparison.json` at once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(comparison, indent=1) + "\n")
    partial.replace(path)
    return path


def read(folder: Path) -> dict[str, Any]:
    """Read `comparison.json` of a folder."""
    path = folder / FILE if folder.is_dir() else folder
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; make it with `vlaexp compare runs=[...] output={folder}`") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); run `vlaexp compare` again") from error
