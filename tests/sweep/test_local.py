"""Points in processes: a failing one does not stop the others, and is reported."""

import os

from vlaexp.errors import UserError
from vlaexp.sweep.grid import Point
from vlaexp.sweep.local import run_points


def work(point: Point) -> tuple[str, int]:
    if point.name == "bad":
        raise UserError("this cell is wrong; mend it")
    return point.overrides[0], os.getpid()


def die(point: Point) -> str:
    if point.name == "bad":
        os._exit(1)
    return point.name


def points(*names: str) -> list[Point]:
    return [Point(name, "train", (f"x={name}",)) for name in names]


def test_a_failing_point_does_not_stop_the_others(capfd):
    results, errors = run_points(points("a", "bad", "b"), work, processes=1)
    assert {name: value for name, (value, _) in results.items()} == {"a": "x=a", "b": "x=b"}
    assert errors == {"bad": "UserError: this cell is wrong; mend it"}
    shown = capfd.readouterr().err
    assert "point bad failed; 2 of 3" in shown
    assert "point b done; 3 of 3" in shown
    assert {process for _, process in results.values()}.isdisjoint({os.getpid()})


def test_a_dying_process_is_reported(capfd):
    results, errors = run_points(points("bad"), die, processes=1)
    assert results == {}
    assert errors["bad"].startswith("BrokenProcessPool: ")
