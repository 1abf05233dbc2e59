"""Films of episodes, as H.264 where the build has it and MPEG-4 otherwise."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float, scale: int = 3) -> None:
    """Write uint8 (H, W, 3) frames, each pixel enlarged `scale` times, as MP4."""
    if not frames:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    height, width = (scale * size // 2 * 2 for size in frames[0].shape[:2])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in frames:
            large = image.repeat(scale, 0).repeat(scale, 1)[:height, :width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="rgb24")))
        container.mux(stream.encode())
