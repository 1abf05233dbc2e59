"""Headless rendering for MuJoCo: picks a GL backend before mujoco is imported, and explains a missing one.

The embedded world takes `mujoco` from here. Physics needs no GL: without a backend the world still runs, and only the
first image fails, with what to install.
"""

import atexit
import contextlib
import os
import sys
import weakref
from importlib import import_module
from typing import Any

import numpy as np

from vlaexp.errors import UserError

# Software rasterisers start a thread per core; one camera at 64 to 224 pixels is faster without them.
os.environ.setdefault("LP_NUM_THREADS", "1")
_chosen = "MUJOCO_GL" in os.environ or "mujoco" not in sys.modules  # else mujoco has settled on a window already
if sys.platform.startswith("linux") and _chosen:
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])

_import_error: Exception | None = None
mujoco: Any  # its compiled modules carry no types
try:
    mujoco = import_module("mujoco")
except Exception as error:  # an unknown MUJOCO_GL or an unloadable library: RuntimeError, ImportError, AttributeError
    _import_error, _backend = error, os.environ.get("MUJOCO_GL", "")
    os.environ["MUJOCO_GL"] = "disable"
    mujoco = import_module("mujoco")
    os.environ["MUJOCO_GL"] = _backend  # child processes explain themselves

APT_LINE = "apt-get install -y libegl1 libgl1-mesa-dri libosmesa6"
_OFF = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_HAZE")  # shadows alone cost 30x on a CPU


class CameraRenderer:
    """Renders named cameras of one model to uint8 (size, size, 3) images. Close it, or use it as a context manager."""

    def __init__(self, model: object, size: int) -> None:
        self._flags = [getattr(mujoco.mjtRndFlag, name) for name in _OFF]
        try:
            if _import_error is not None:
                raise _import_error
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # the GL loaders raise ImportError, AttributeError, RuntimeError or their own
            backend = repr(os.environ.get("MUJOCO_GL", "the default"))
            if not _chosen:
                backend += " (mujoco was imported before vlaexp.env; set MUJOCO_GL=egl)"
            raise UserError(
                f"cannot render: GL backend {backend} does not start ({type(error).__name__}: {error}); "
                f"install it with `{APT_LINE}` as root, or choose another with MUJOCO_GL=egl|osmesa|glfw"
            ) from error
        # The first context registers the end of its display at exit: renderers close before, so register after.
        _open.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)

    def render(self, data: object, camera: str) -> np.ndarray:
        self._renderer.update_scene(data, camera=camera)
        for flag in self._flags:
            self._renderer.scene.flags[flag] = 0
        return self._renderer.render()

    def close(self) -> None:
        # MuJoCo deletes textures in whatever context is current; under OSMesa that spoils another renderer's images.
        if (context := getattr(self._renderer, "_gl_context", None)) is not None:
            context.make_current()
        self._renderer.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # there is no renderer where GL did not start
            self.close()


_open: "weakref.WeakSet[CameraRenderer]" = weakref.WeakSet()


def _close_all() -> None:
    """Without this MuJoCo prints ignored EGL errors at interpreter exit."""
    for renderer in list(_open):
        renderer.close()
