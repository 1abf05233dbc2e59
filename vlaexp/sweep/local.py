"""Run a study's points in processes of this machine; a failing point does not stop the others."""

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from vlaexp.processes import exit_with_parent
from vlaexp.sweep.grid import Point


def run_points[Result](
    points: Sequence[Point], work: Callable[[Point], Result], processes: int
) -> tuple[dict[str, Result], dict[str, str]]:
    """Results by point name, and the error texts of those that failed.

    Args:
        points: in the order in which they begin.
        work: what a point means; a module-level function.
        processes: how many run side by side. Each process imports its libraries once and serves several points.
    """
    results: dict[str, Result] = {}
    errors: dict[str, str] = {}
    began = time.monotonic()
    with ProcessPoolExecutor(min(processes, len(points)), get_context("spawn"), exit_with_parent) as pool:
        futures: dict[Future[Result], str] = {pool.submit(work, point): point.name for point in points}
        for future in as_completed(futures):
            name = futures[future]
            try:
                results[name] = future.result()
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}"
                traceback.print_exception(error)
            done = len(results) + len(errors)
            state = "failed" if name in errors else "done"
            print(
                f"point {name} {state}; {done} of {len(points)} after {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return results, errors
