"""Caches of what never changes during training: images after the model's deterministic pipeline, and vision features.

A cache is legal only where nothing before it is trainable and nothing random happens before it; the caller proves that
and gives a key made of everything that decides the content (image bytes, pipeline, weights, dtype, versions). The file
appears under its key when it is complete, and is checked against its header on every open.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from tqdm import tqdm

from vlaexp.dataset.batches import Frames
from vlaexp.errors import UserError

CHUNK = 256
_open_caches: WeakValueDictionary[Path, "FrameCache"] = WeakValueDictionary()


class FrameCache:
    """A memory-mapped array with one row per frame of the dataset."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self._array[indices])

    @property
    def nbytes(self) -> int:
        return self._array.nbytes


def cache_key(parts: Mapping[str, Any]) -> str:
    """Hash of everything that decides a cache's content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def cached_frames(
    folder: Path,
    key_parts: Mapping[str, Any],
    source: Frames,
    num_frames: int,
    compute: Callable[[np.ndarray], np.ndarray],
    limit_gb: float,
    label: str,
) -> FrameCache:
    """Open the cache of `compute(source[i])` for all frames, building it first if it does not exist.

    Args:
        folder: where caches live.
        key_parts: see `cache_key`; kept beside the data.
        source: raw frames.
        num_frames: rows of the cache.
        compute: maps raw frames (n, ...) to cached rows (n, ...).
        limit_gb: a larger cache is refused.
        label: for the progress bar.

    Raises:
        UserError: when the cache would be larger than allowed, or an existing file does not match its header.
    """
    path = folder / f"{cache_key(key_parts)}.npy"
    header = path.with_suffix(".json")
    if path.exists():
        return _shared(path, header, num_frames)
    first = compute(source[np.arange(1)])
    size_gb = first.nbytes * num_frames / 1e9
    if size_gb > limit_gb:
        raise UserError(
            f"the {label} cache would take {size_gb:.1f} GB, above the limit of {limit_gb} GB; "
            f"set cache.limit_gb={size_gb * 1.05:.1f} to allow it, or cache.mode=none to decode on the fly"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        array = np.lib.format.open_memmap(partial, "w+", first.dtype, (num_frames, *first.shape[1:]))
        with tqdm(total=num_frames, desc=f"cache {label} ({size_gb:.2f} GB)", unit="frame") as bar:
            for begin in range(0, num_frames, CHUNK):
                indices = np.arange(begin, min(begin + CHUNK, num_frames))
                array[indices] = compute(source[indices])
                bar.update(len(indices))
        array.flush()
        header.write_text(json.dumps({"frames": num_frames, "shape": list(first.shape[1:]), **key_parts}, default=str))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return _shared(path, header, num_frames)


def _shared(path: Path, header: Path, num_frames: int) -> FrameCache:
    """The cache in a file; trainings of one process that read the same one hold it once."""
    key = path.resolve()
    cache = _open_caches.get(key)
    if cache is None:
        cache = _open_caches[key] = FrameCache(_open(path, header, num_frames))
    return cache


def _open(path: Path, header: Path, num_frames: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
        expected = [num_frames, *json.loads(header.read_text())["shape"]]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cache {path} is damaged ({error}); delete it and run again") from error
    if list(array.shape) != expected:
        raise UserError(f"cache {path} is stale: it has shape {array.shape}; delete it and run again")
    return array
