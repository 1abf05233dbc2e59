"""Points in processes: a failing one does not stop the others, and is reported."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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


def test_a_killed_study_leaves_no_workers(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom vlaexp.sweep.grid import Point\nfrom vlaexp.sweep.local import run_points\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_local import report_and_wait\n"
        f"if __name__ == '__main__':\n    run_points([Point('a', 'train', ({str(tmp_path)!r},))], report_and_wait, 1)\n"
    )
    script = tmp_path / "study.py"
    script.write_text(code)
    study = subprocess.Popen([sys.executable, str(script)])
    file = tmp_path / "pid"
    wait_until(file.exists)
    study.kill()
    study.wait()
    wait_until(lambda: not running(int(file.read_text())))


def report_and_wait(point: Point) -> None:
    partial = Path(point.overrides[0]) / "partial"
    partial.write_text(str(os.getpid()))
    partial.rename(partial.with_name("pid"))
    time.sleep(600)


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
