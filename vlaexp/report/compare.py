"""Compare policies that differ in one axis: intervals, paired differences, and what the data cannot resolve.

An axis is a choice that a study asks about. Runs that differ in several at once cannot answer which one mattered, so
they are refused unless the axes are named. Seeds are replicates, not an axis, and are pooled (`vlaexp.report.pool`);
baselines stand beside any comparison. Where seeds are pooled, or there are many policies, only those trained policies
are paired that one choice separates: pairs of 180 rows are thousands, and most of them answer nothing.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from vlaexp.errors import UserError
from vlaexp.report.collect import Row
from vlaexp.report.pool import difference, pool

AXES = ("base", "decoder", "action_space", "lora", "freeze", "dataset", "steps")
FILE = "comparison.json"
ALL_PAIRS = 1000  # at most so many pairs are compared whatever they differ in


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
    """The comparison as data: axes, rows with their seeds pooled, and pairs of them on the same episodes.

    `possible_pairs` says how many pairs there are on the same episodes; fewer are compared where seeds were pooled or
    where there are more than `ALL_PAIRS`: those with an untrained policy, and those that one choice separates.
    """
    axes = check_axes(rows, allowed)
    ordered = sorted(pool(rows), key=lambda row: (row["split"], row["role"] != "trained", row["run"], row["steps"]))
    pairs = [
        ((i, a), (j, b))
        for (i, a), (j, b) in combinations(enumerate(ordered), 2)
        if a["split"] == b["split"] and a["episodes_key"] == b["episodes_key"]
    ]
    possible = len(pairs)
    if possible > ALL_PAIRS or any("replicates" in row for row in ordered):
        pairs = [
            ((i, a), (j, b)) for (i, a), (j, b) in pairs if not a["role"] == b["role"] == "trained" or one_choice(a, b)
        ]
    return {
        "question": question,
        "axes": axes,
        "rows": ordered,
        "possible_pairs": possible,
        "pairs": [{"rows": [i, j], **_pair(a, b)} for (i, a), (j, b) in pairs],
    }


def one_choice(a: Row, b: Row) -> bool:
    """Whether at most one choice separates two policies; full fine-tuning against adapters is one, of two axes."""
    axes = {axis for axis in AXES if a[axis] != b[axis]}
    return len(axes) <= 1 or (axes == {"lora", "freeze"} and (is_full(a) or is_full(b)))


def is_full(row: Row) -> bool:
    """Whether everything trained, without adapters."""
    return row["lora"] == row["freeze"] == "none"


def _pair(a: Row, b: Row) -> dict[str, Any]:
    result = difference(a, b)
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
        "detectable": result.detectable,
    }


def label(row: Row) -> str:
    """A policy's short name in tables and pictures."""
    if row["role"] == "baseline":
        return str(row["head"])
    if row["role"] == "zero-shot":
        return f"{row['head']} zero-shot"
    return f"{row['head']} {adaptation(row)} step {row['steps']}"


def adaptation(row: Row) -> str:
    """How a trained policy was adapted, in words: `LoRA r16`, `full fine-tuning`, `freeze ...`, `from scratch`."""
    if "scratch" in row["base"]:
        return str(row["base"]).removeprefix("tiny ")
    if row["lora"] != "none":
        return f"LoRA {row['lora']}"
    return "full fine-tuning" if is_full(row) else f"freeze {row['freeze']}"


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
        comparison = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; make it with `vlaexp compare runs=[...] output={folder}`") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); run `vlaexp compare` again") from error
    if "possible_pairs" not in comparison:
        raise UserError(f"{path} was written by an earlier version; run `vlaexp compare` again")
    return comparison
