"""Worker processes that do not outlive the process they work for."""

import os
import signal
import threading
import time
from multiprocessing import parent_process

GRACE_S = 60.0


def exit_with_parent() -> None:
    """Called in a worker: ends it when its parent is gone, killed or not, instead of leaving it to wait forever.

    Work that handles SIGTERM is given `GRACE_S` seconds to stop where it can be resumed.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            time.sleep(0.1)
    os._exit(1)
