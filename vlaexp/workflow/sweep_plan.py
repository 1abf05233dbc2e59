"""What a sweep would run and cost, before it is submitted.

A grid of a thousand points has few configurations that differ in cost: only the axes that change it are composed
against each other, each value of the others once, which also finds every misspelt key. Torch is imported only where a
size has to be computed that no run has measured, and by a process of its own.
"""

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlaexp.config import compose, identity, resolved
from vlaexp.config_errors import explained
from vlaexp.errors import UserError
from vlaexp.sweep.grid import Point, as_overrides, expand
from vlaexp.sweep.jobs import STEPS, Job, Task, merge_steps, pack, parse
from vlaexp.workflow.measured import HOUR, MeasuredStep, measured_steps, work_key

GB = 1e9  # bytes


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


@dataclass(frozen=True)
class SweepPlan:
    """Points, the jobs that serve them, and what they cost.

    Attributes:
        points: of the study.
        jobs: in the order of submission.
        cost: `points`, `trainings`, `steps_total`, `steps_naive` (every point trained for itself), `gpu_hours` of the
            trainings without evaluations (None where a step of some was never measured) and `disk_gb`.
        notes: what a reader should know of these figures.
    """

    points: list[Point]
    jobs: list[Job]
    cost: dict[str, Any]
    notes: list[str]


class Sizes:
    """Disk of policies that no run has measured, computed by a process that imports torch while this one composes.

    Args:
        measured: keys of the work that some run has measured.
        stack: the process ends with it.
    """

    def __init__(self, measured: Collection[str], stack: ExitStack) -> None:
        self._measured = measured
        self._pool = None if "torch" in sys.modules else stack.enter_context(get_context("spawn").Pool(1))
        self._asked: dict[str, Callable[[], dict[str, float]]] = {}

    def ask(self, look: Look) -> None:
        """Begin with a configuration's size."""
        if look.work and look.work not in self._measured and look.work not in self._asked:
            later = None if self._pool is None else self._pool.apply_async(_disk_gib, (look.cfg,))
            self._asked[look.work] = partial(_disk_gib, look.cfg) if later is None else later.get

    def found(self) -> dict[str, dict[str, float]]:
        """GiB of a `milestone` and of the resume `checkpoint`, by key of the work."""
        return {work: size() for work, size in self._asked.items()}


def _disk_gib(cfg: DictConfig) -> dict[str, float]:
    from vlaexp.workflow.plan import disk_gib

    return disk_gib(cfg)


def plan_sweep(cfg: DictConfig) -> SweepPlan:
    """The plan of a study's configuration.

    Raises:
        UserError: for a study without arms, an empty grid, an unknown key, two points that are one run.
    """
    if not cfg.arms:
        raise UserError("this study has no arms; choose one with experiment=..., see conf/experiment")
    points = expand(resolved(cfg.arms), [*map(str, cfg.everywhere)])
    measured = measured_steps(Path(cfg.outputs))
    with ExitStack() as stack:
        sizes = Sizes(measured, stack)
        looks = Looks(points, [f"outputs={cfg.outputs}"], sizes.ask)
        tasks = merge_steps(points, lambda point: looks.of(point).depends_on_total)
        first = {point.name: point for point in points}
        found = {task.name: looks.of(first[task.name]) for task in tasks}
        disk_gib = sizes.found()
    trainings = [task for task in tasks if task.verb == "train"]
    cost = {
        "points": len(points),
        "trainings": len(trainings),
        "steps_total": sum(_steps(task, found) for task in trainings),
        "steps_naive": sum(_steps_of(point, looks) for point in points if point.verb == "train"),
    }
    hours, disk, notes = _hours_and_disk(measured, disk_gib, trainings, found)
    apart = [point.name for point in points if point.verb == "train" and looks.of(point).depends_on_total]
    steps_vary = len({_steps_of(first[name], looks) for name in apart}) > 1
    if apart and steps_vary:
        notes.append(
            f"{len(apart)} points have a schedule that depends on the total number of steps: they are trained apart, "
            "not as milestones of one training (schedule=constant would let them be)"
        )
    return SweepPlan(points, pack(tasks, cfg.sweep.pack), {**cost, "gpu_hours": hours, "disk_gb": disk}, notes)


def _steps_of(point: Point, looks: Looks) -> int:
    steps = point.cell.get(STEPS, looks.of(point).steps)
    assert isinstance(steps, int)  # `merge_steps` has refused others
    return steps


def _steps(task: Task, found: Mapping[str, Look]) -> int:
    return max((step for step in task.points.values() if step is not None), default=found[task.name].steps)


def _hours_and_disk(
    measured: Mapping[str, MeasuredStep],
    disk_gib: Mapping[str, Mapping[str, float]],
    trainings: Sequence[Task],
    found: Mapping[str, Look],
) -> tuple[float | None, float, list[str]]:
    hours, disk, unmeasured, sources = 0.0, 0.0, 0, set()
    for task in trainings:
        look = found[task.name]
        milestones = len({_steps(task, found), *task.points.values(), *look.cfg.trainer.milestones} - {None})
        step = measured.get(look.work)
        if step is None:
            unmeasured += 1
            size = disk_gib[look.work]
            disk += (milestones * size["milestone"] + size["checkpoint"]) * 2**30 / GB
        else:
            hours += _steps(task, found) * step.seconds / HOUR
            disk += (milestones * step.milestone_bytes + step.checkpoint_bytes) / GB
            sources.add(step.device)
    notes = [f"hours are of trainings alone, from steps measured on {', '.join(sorted(sources))}"] if sources else []
    if unmeasured:
        notes.append(
            f"no step of {unmeasured} trainings was measured yet: hours unknown; train one for a few steps first"
        )
    return (None if unmeasured else hours), disk, notes


def plan_text(plan: SweepPlan) -> str:
    """The plan for a terminal."""
    cost = plan.cost
    saved = f" ({cost['steps_naive']} if each point were trained for itself)" if cost["steps_naive"] else ""
    hours = "unknown" if cost["gpu_hours"] is None else f"{cost['gpu_hours']:.2f}"
    return "\n".join(
        [
            f"{cost['points']} points in {len(plan.jobs)} jobs: {cost['trainings']} trainings, "
            f"{cost['steps_total']} steps{saved}",
            f"device hours {hours}, disk {cost['disk_gb']:.2f} GB",
            *plan.notes,
        ]
    )
