"""Read a LeRobotDataset v3 folder: all numbers in memory, images decoded on demand.

LeRobot's own reader decodes every image of every row of an action chunk (its issues #2895 and #4392), so only its
metadata, its video decoder and its v2.1 converter are used here; the columns are read from the parquet files directly.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlaexp.errors import UserError, nearest
from vlaexp.manifest import content_hash, hash_folder

DATA_GLOB = "data/chunk-*/file-*.parquet"


@contextlib.contextmanager
def quiet_lerobot() -> Iterator[None]:
    """LeRobot without its 100-line torchcodec traceback, its per-episode bars and SVT-AV1's banner."""
    os.environ.setdefault("SVT_LOG", "1")
    logging.getLogger("lerobot").setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()
    # torchcodec prints its fallback note with print()
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise):
        import lerobot.datasets.lerobot_dataset  # noqa: F401
        from lerobot.utils import import_utils  # noqa: F401
    yield


class ImageColumn:
    """PNG or JPEG frames embedded in the parquet files, decoded on demand to uint8 (n, 3, H, W)."""

    def __init__(self, encoded: pa.ChunkedArray) -> None:
        self._encoded = encoded.combine_chunks()

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self._decode(int(i)) for i in indices])

    def _decode(self, index: int) -> np.ndarray:
        data = self._encoded[index]["bytes"].as_buffer()
        image = np.asarray(Image.open(pa.BufferReader(data)).convert("RGB"))
        return image.transpose(2, 0, 1)


class VideoColumn:
    """Frames of MP4 files, decoded by LeRobot to uint8 (n, 3, H, W); consecutive frames of a file in one pass."""

    def __init__(self, files: list[Path], file_of_frame: np.ndarray, timestamp: np.ndarray, fps: float) -> None:
        self._files, self._file_of_frame, self._timestamp = files, file_of_frame, timestamp
        self._tolerance = 0.5 / fps

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        with quiet_lerobot():
            from lerobot.datasets.video_utils import decode_video_frames

        unique, inverse = np.unique(indices, return_inverse=True)
        frames: list[np.ndarray] = []
        for file in np.unique(self._file_of_frame[unique]):
            times = self._timestamp[unique[self._file_of_frame[unique] == file]]
            decoded = decode_video_frames(self._files[file], times.tolist(), self._tolerance, return_uint8=True)
            frames.append(decoded.numpy())
        return np.concatenate(frames)[inverse]


def hash_table(path: Path) -> str:
    """Hash of a parquet file's columns without its metadata, where the `datasets` library puts a random fingerprint."""
    file = pq.ParquetFile(path)
    digest = hashlib.sha256(str(file.schema_arrow.remove_metadata()).encode())
    for batch in file.iter_batches():
        digest.update(batch.replace_schema_metadata(None).serialize())
    return digest.hexdigest()


class LeRobotFolder:
    """One dataset folder.

    Args:
        root: folder that holds `meta/`, `data/` and perhaps `videos/`.

    Raises:
        UserError: where the folder is missing, not a LeRobotDataset, of another version, or incomplete.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.info = read_info(root)
        version = str(self.info.get("codebase_version", "?"))
        if not version.startswith("v3"):
            raise UserError(
                f"{root} is a LeRobotDataset {version}; expected v3.0; dataset.convert=true makes a converted copy"
            )
        self.fps = float(self.info["fps"])
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.files = sorted(root.glob(DATA_GLOB))
        if not self.files:
            raise UserError(f"{root} has meta/info.json but no {DATA_GLOB}; the download is incomplete, fetch it again")
        episode_index = self.column("episode_index")
        starts = np.flatnonzero(np.diff(episode_index, prepend=-1))
        self.episode_start = starts
        self.episode_end = np.append(starts[1:], len(episode_index))
        if len(starts) != self.info["total_episodes"] or len(episode_index) != self.info["total_frames"]:
            raise UserError(
                f"{root}: meta/info.json names {self.info['total_episodes']} episodes and {self.info['total_frames']} "
                f"frames, the data files hold {len(starts)} and {len(episode_index)}; fetch or record it again"
            )

    @property
    def num_episodes(self) -> int:
        return len(self.episode_start)

    @property
    def num_frames(self) -> int:
        return int(self.episode_end[-1])

    @property
    def image_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")]

    def column(self, key: str) -> np.ndarray:
        """A numeric column as (frames,) or (frames, width)."""
        table = self._read(key)
        if pa.types.is_list(table.type) or pa.types.is_fixed_size_list(table.type):
            flat = table.combine_chunks().flatten().to_numpy(zero_copy_only=False)
            return flat.reshape(len(table), -1)
        return table.to_numpy()

    def _read(self, key: str) -> pa.ChunkedArray:
        if key not in self.features:
            raise UserError(f"{self.root} has no column {key!r}; {nearest(key, self.features)}; map it in dataset.keys")
        return pa.chunked_array([c for f in self.files for c in pq.read_table(f, columns=[key])[key].chunks])

    def names(self, key: str) -> tuple[str, ...]:
        """Names of a vector's entries; LeRobot's own, whatever nesting they have, or numbered."""
        width = int(np.prod(self.features[key]["shape"]))
        names = self.features[key].get("names")
        if isinstance(names, dict):
            names = list(names.values())
        while isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
            names = names[0]
        if isinstance(names, list) and len(names) == width:
            return tuple(str(name) for name in names)
        return tuple(f"{key.split('.')[-1]}_{i}" for i in range(width))

    @cached_property
    def instructions(self) -> list[str]:
        """The task string of every frame."""
        tasks = pq.read_table(self.root / "meta" / "tasks.parquet").to_pandas()
        text = tasks.index if "task" not in tasks.columns else tasks["task"]
        by_index = dict(zip(tasks["task_index"].tolist(), text.tolist(), strict=True))
        return [str(by_index[index]) for index in self.column("task_index").tolist()]

    def frames(self, key: str) -> ImageColumn | VideoColumn:
        """Images of one camera, by frame index."""
        if key not in self.image_keys:
            raise UserError(
                f"{self.root} has no camera {key!r}; {nearest(key, self.image_keys)}; map it in dataset.cameras"
            )
        if self.features[key]["dtype"] == "image":
            return ImageColumn(self._read(key))
        episodes = pa.concat_tables(
            pq.read_table(file) for file in sorted((self.root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
        ).sort_by("episode_index")
        prefix = f"videos/{key}"
        pairs = list(
            zip(
                episodes[f"{prefix}/chunk_index"].to_pylist(), episodes[f"{prefix}/file_index"].to_pylist(), strict=True
            )
        )
        order = sorted(set(pairs))
        files = [
            self.root / self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
            for chunk, file in order
        ]
        lost = [str(file) for file in files if not file.exists()]
        if lost:
            raise UserError(f"{self.root} lacks the video files {lost}; the download is incomplete, fetch it again")
        lengths = self.episode_end - self.episode_start
        file_of_frame = np.repeat([order.index(pair) for pair in pairs], lengths)
        offset = np.repeat(episodes[f"{prefix}/from_timestamp"].to_numpy(), lengths)
        return VideoColumn(files, file_of_frame, offset + self.column("timestamp"), self.fps)


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json` of a dataset folder."""
    path = root / "meta" / "info.json"
    if not root.is_dir():
        siblings = [item.name for item in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(
            f"dataset folder {root} does not exist; in {root.parent}: {nearest(root.name, siblings)}; record it with "
            "`vlaexp record dataset=...`, or set dataset.root or dataset.repo_id"
        )
    if not path.exists():
        raise UserError(
            f"{root} is not a LeRobotDataset (no meta/info.json); point dataset.root at the folder above meta/"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); fetch or record the dataset again") from error


def locate(root: str | None, repo_id: str | None, revision: str | None, convert: bool, converted: Path) -> Path:
    """The folder of a v3 dataset: `root` itself, a converted copy of it, or a download of `repo_id`.

    Args:
        root: local folder, or None.
        repo_id: hub id, used when `root` is None.
        revision: hub revision.
        convert: allow a copy of a v2.1 folder to be converted with LeRobot's converter.
        converted: parent folder of converted copies.
    """
    if root is not None:
        folder = Path(root)
        version = str(read_info(folder).get("codebase_version", "?"))
        if not convert or version != "v2.1":
            return folder
        digest = content_hash(hash_folder(folder, ["meta/*"]))[:8]  # holds every episode's statistics
        return _convert(folder, converted / f"{folder.name}_v30_{digest}")
    if repo_id is None:
        raise UserError("no dataset is named; set dataset.root to a folder or dataset.repo_id to a hub id")
    with quiet_lerobot():
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    try:
        return Path(LeRobotDataset(repo_id, revision=revision).root)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"cannot download dataset {repo_id!r} ({type(error).__name__}: {error}); on a machine with internet run "
            f"`hf download --repo-type dataset {repo_id} --local-dir DIR`, copy DIR here and set dataset.root=DIR"
        ) from error


def _convert(source: Path, target: Path) -> Path:
    """A v3.0 copy of a v2.1 dataset by LeRobot's converter; `source` is not touched."""
    if target.exists():
        return target
    with quiet_lerobot():
        from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset
    staging = target.with_name(target.name + ".converting")
    shutil.rmtree(staging, ignore_errors=True)
    work = staging / source.name
    work.parent.mkdir(parents=True)
    shutil.copytree(source, work, copy_function=shutil.copyfile)
    for folder in (work, *(path for path in work.rglob("*") if path.is_dir())):
        folder.chmod(0o755)  # a read-only source gives read-only folders
    print(f"converting {source} from v2.1 to v3.0 into {target}", file=sys.stderr)
    convert_dataset(repo_id=f"local/{source.name}", root=str(work), push_to_hub=False)
    work.rename(target)
    shutil.rmtree(staging)
    return target
