"""Configurations of a study's points as far as they decide cost, composed no more often than needed.

A grid of a thousand points has few configurations that differ in cost: only the axes that change it are composed
against each other, each value of the others once, which also finds every misspelt key.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from vlaexp.config import compose, identity, resolved
from vlaexp.config_errors import explained
from vlaexp.errors import UserError
from vlaexp.sweep.grid import Point, as_overrides
from vlaexp.sweep.jobs import STEPS, parse
from vlaexp.workflow.measured import work_key


@dataclass(frozen=True)
class Look:
    """One configuration: what decides its cost, its steps, and whether its schedule looks at their number."""

    cfg: DictConfig
    work: str
    steps: int
    depends_on_total: bool


class Looks:
    """Configurations of a study's points, composed no more often than needed.

    Args:
        points: of the study.
        common: overrides of every point.
        on_new: is told each configuration that was composed.

    Raises:
        UserError: where a point does not compose; with the unknown key and the nearest name.
    """

    def __init__(
        self, points: Sequence[Point], common: Sequence[str], on_new: Callable[[Look], None] = lambda _: None
    ) -> None:
        self._common, self._on_new = common, on_new
        self._memo: dict[tuple[str, ...], Look] = {}
        arms: dict[str, list[Point]] = {}
        for point in points:
            arms.setdefault(point.arm, []).append(point)
        self._first = {arm: members[0] for arm, members in arms.items()}
        self._matter = {arm: self._axes_that_matter(members) for arm, members in arms.items()}

    def of(self, point: Point) -> Look:
        """Of a point; where only axes that do not matter differ, of its representative."""
        chosen = {axis: point.cell[axis] for axis in self._matter[point.arm]}
        return self._look(point, {**self._first[point.arm].cell, **chosen})

    def _axes_that_matter(self, points: Sequence[Point]) -> list[str]:
        first, matter = points[0], []
        look = self._look(first, first.cell)
        for axis in first.cell:
            values = {json.dumps(point.cell[axis], default=str): point.cell[axis] for point in points}
            seen = [self._changed(look, first, axis, value) for value in values.values()]
            if axis != STEPS and len({(look.work, look.depends_on_total, look.steps) for look in seen}) > 1:
                matter.append(axis)
        return matter

    def _look(self, point: Point, cell: Mapping[str, object]) -> Look:
        overrides = (point.verb, *point.at(cell), *self._common)
        if overrides not in self._memo:
            self._memo[overrides] = _look(*overrides)
            self._on_new(self._memo[overrides])
        return self._memo[overrides]

    def _changed(self, look: Look, point: Point, axis: str, value: object) -> Look:
        """Of a cell that differs from that of `look` in one axis; composed anew where that is a config group."""
        if isinstance(OmegaConf.select(look.cfg, axis), int | float):
            cfg = look.cfg.copy()
            OmegaConf.update(cfg, *parse(*as_overrides({axis: value})))
            return _look_at(point.verb, cfg)
        return self._look(point, {**point.cell, axis: value})


def _look(verb: str, *overrides: str) -> Look:
    with explained(verb, overrides):
        return _look_at(verb, compose(verb, overrides))


def _look_at(verb: str, cfg: DictConfig) -> Look:
    config = resolved(cfg)
    if verb == "eval":
        return Look(cfg, "", 0, False)
    if not isinstance(cfg.trainer.max_steps, int):
        raise UserError(f"{STEPS}={cfg.trainer.max_steps}; expected a whole number of steps")
    longer = cfg.copy()
    OmegaConf.update(longer, STEPS, cfg.trainer.max_steps + 1)
    depends = identity(config, {}) != identity(resolved(longer), {})
    return Look(cfg, work_key(config), cfg.trainer.max_steps, depends)
