"""Worker processes that do not outlive the process they work for."""

import os
import threading
from multiprocessing import parent_process


def exit_with_parent() -> None:
    """Called in a worker: ends it when its parent is gone, killed or not, instead of leaving it to wait forever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
