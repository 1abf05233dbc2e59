"""A comparison as pages: `report.html`, one file that needs nothing else, and `report.md` with its pictures beside it.

Both say the same in the same order: question, answer, policies, pictures, paired differences, how to repeat it.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from vlaexp.errors import UserError
from vlaexp.report import figures, films, words
from vlaexp.report.collect import Row
from vlaexp.report.figures import Journal
from vlaexp.report.words import Couple, Names, key

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"
COLLAPSE = 30  # rows of paired differences that are shown unfolded
POLICY_COLUMNS = (  # heading, is a number
    ("policy", False),
    ("role", False),
    ("base", False),
    ("action space", False),
    ("LoRA", False),
    ("steps", True),
    ("successes", True),
    ("rate, %", True),
    ("95% interval", True),
    ("jerk, m²/s⁶", True),
    ("seam jump, mm", True),
    ("latency, ms (p95)", True),
    ("trainable", True),
)
PAIR_COLUMNS = (
    ("A", False),
    ("B", False),
    ("differ in", False),
    ("A − B, points", True),
    ("95% interval", True),
    ("p", True),
    ("resolvable", False),
)


def render(
    comparison: Mapping[str, Any],
    folder: Path,
    title: str,
    journals: Mapping[str, Journal] | None = None,
    command: str = "",
) -> list[Path]:
    """Write the report of a comparison.

    Args:
        comparison: what `vlaexp.report.compare.compare` returned or `read` read.
        folder: where the pages go; made if needed.
        title: the pages' heading.
        journals: run name to its journal as `vlaexp.trainer.journal.read_journal` gives it, for training curves.
        command: how to repeat the report, printed as it is.

    Returns:
        Every file written, the page first.

    Raises:
        UserError: where the comparison is empty or inconsistent, or a film cannot be read.
    """
    content = _content(comparison, journals or {}) | {"title": title, "command": command}
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=PackageLoader("vlaexp", "report"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "base64": _base64, "cell": _cell}
    written = []
    for name in (PAGE, TEXT):
        (folder / name).write_text(environment.get_template(f"{name}.j2").render(content))
        written.append(folder / name)
    for file, png in _pictures(content):
        (folder / file).write_bytes(png)
        written.append(folder / file)
    return written


def _content(comparison: Mapping[str, Any], journals: Mapping[str, Journal]) -> dict[str, Any]:
    rows = words.ordered(comparison["rows"])
    if not rows:
        raise UserError("the comparison has no rows, so there is nothing to report; compare evaluated runs first")
    names, couples = words.policy_names(rows), words.paired_rows(comparison)
    splits = list(dict.fromkeys(row["split"] for row in rows))
    tables = {split: _pair_table([c for c in couples if c[0]["split"] == split], names) for split in splits}
    return {
        "question": comparison["question"],
        "axes": words.axes_text(comparison["axes"]),
        "method": words.METHOD,
        "splits": [_split([row for row in rows if row["split"] == split], couples, names) for split in splits],
        "policy_columns": POLICY_COLUMNS,
        "pictures": figures.draw(rows, names, journals),
        "films": [_film(film, names) for film in films.samples(rows)],
        "pair_columns": PAIR_COLUMNS,
        "pair_tables": {split: table for split, table in tables.items() if table},
        "collapse": sum(map(len, tables.values())) > COLLAPSE,
        "manifests": {names[key(row)]: row["manifest"] for row in rows if row.get("manifest")},
    }


def _split(rows: Sequence[Row], couples: Sequence[Couple], names: Names) -> dict[str, Any]:
    return {
        "name": rows[0]["split"],
        "question": rows[0]["question"],
        "answer": words.answer(rows, couples, names),
        "rows": [(words.kind(row), _policy_row(row, names)) for row in rows],
    }


def _policy_row(row: Row, names: Names) -> list[str]:
    return [
        names[key(row)],
        row["role"],
        row["base"],
        row["action_space"],
        row["lora"],
        f"{row['steps']:,}",
        f"{row['successes']}/{row['episodes']}",
        words.percent(row["success_rate"]),
        words.interval_text(row),
        f"{row['smoothness']:.3g}",
        f"{row['seam_jump_mm']:.2f}",
        f"{row['latency']:.1f} ({row['latency_p95']:.1f})",
        f"{row['trainable_parameters']:,}",
    ]


def _pair_table(couples: Sequence[Couple], names: Names) -> list[list[str]]:
    """Cells of the pairs that matter, the largest difference first."""
    last = {key(row) for row in words.latest([row for a, b, _ in couples for row in (a, b)])}
    shown = [couple for couple in couples if words.relevant(couple[0], couple[1], last)]
    shown.sort(key=lambda couple: -abs(couple[2]["difference"]))
    return [
        [
            names[key(a)],
            names[key(b)],
            words.differs_in(pair),
            words.points(pair["difference"]),
            f"{words.points(pair['ci_low'])} to {words.points(pair['ci_high'])}",
            words.p_text(pair["p_value"]),
            "yes" if pair["resolvable"] else f"not with {a['episodes']} episodes",
        ]
        for a, b, pair in shown
    ]


def _film(film: films.Film, names: Names) -> dict[str, Any]:
    return {
        "file": f"{FIGURES}/film_{re.sub(r'\W+', '_', film.split)}_{film.outcome}.png",
        "split": film.split,
        "caption": f"{film.outcome}: {names[film.run]}, seed {film.seed}",
        "png": film.png,
        "mp4": film.mp4,
    }


def _pictures(content: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Files, relative to the report's folder, that the Markdown page refers to."""
    drawn = [(f"{FIGURES}/{picture.stem}.png", picture.png) for picture in content["pictures"]]
    return drawn + [(film["file"], film["png"]) for film in content["films"]]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _cell(text: str) -> str:
    """Text that neither ends a cell of a Markdown table nor starts HTML."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
