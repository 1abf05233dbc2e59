"""Record scripted demonstrations of the embedded world into a LeRobotDataset v3, in a way that survives being killed.

Workers simulate; each successful episode becomes one file under `<root>.recording/episodes/`. Meanwhile this process
writes them, in order of their seeds, with LeRobot's own writer into `<root>.recording/dataset`, and at the end renames
that folder to `<root>`. A finished dataset therefore appears at once or not at all, and a second call simulates only
the episodes that are not there yet.

Action noise follows DART (Laskey et al. 2017, arXiv 1703.09327): noise is executed, the label stays clean.
"""

import json
import os
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from vlaexp.dataset.card import CARD_FILE, LABEL_FILE
from vlaexp.dataset.lerobot import quiet_lerobot
from vlaexp.env.tabletop.env import EE_DELTA_SPEC, EMBODIMENT, FPS, JOINT_SPEC, STATE_NAMES, TabletopEnv
from vlaexp.env.tabletop.expert import DEFECTS, Expert
from vlaexp.errors import UserError, nearest
from vlaexp.processes import exit_with_parent

STEPS_AFTER_SUCCESS = 2
SIMULATED_AHEAD = 16  # episodes that may wait for the writer
FAILED = ".failed"
POSE_NAMES = ("x", "y", "z", *(f"rotation_{i}" for i in range(6)))


@dataclass(frozen=True)
class Episode:
    """One demonstration of L frames; `columns` are named as in the dataset, without images."""

    images: dict[str, np.ndarray]  # uint8 (L, size, size, 3)
    columns: dict[str, np.ndarray]  # (L, width)
    instruction: str
    seed: int
    scene: dict[str, Any]
    defect: str | None

    @property
    def length(self) -> int:
        return len(self.columns["action"])

    def save(self, path: Path) -> None:
        meta = {"instruction": self.instruction, "seed": self.seed, "scene": self.scene, "defect": self.defect}
        arrays = {f"image:{k}": v for k, v in self.images.items()} | {f"column:{k}": v for k, v in self.columns.items()}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **arrays)  # type: ignore[arg-type]
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Episode":
        with np.load(path) as data:
            meta = json.loads(str(data["meta"]))
            images = {key[6:]: data[key] for key in data.files if key.startswith("image:")}
            columns = {key[7:]: data[key] for key in data.files if key.startswith("column:")}
        return cls(images, columns, **meta)


def rotation_6d(rotation: np.ndarray) -> np.ndarray:
    """First two columns of a rotation matrix, flattened (Zhou et al. 2019, arXiv 1812.07035)."""
    return rotation[:, :2].T.ravel()


def record_episode(env: TabletopEnv, seed: int, action_noise: float, defect: str | None) -> Episode | None:
    """One demonstration from `seed`, or None where a good expert failed.

    Args:
        env: the world.
        seed: decides scene, noise and defect.
        action_noise: standard deviation in m of the noise executed on half of the steps in free space.
        defect: see `vlaexp.env.tabletop.expert.DEFECTS`.
    """
    env.reset(seed)
    rng = np.random.default_rng([seed, 1])
    expert = Expert(env, rng, defect)
    frames: dict[str, list[np.ndarray]] = {camera: [] for camera in env.cameras}
    rows: list[dict[str, np.ndarray]] = []
    steps_left, success = STEPS_AFTER_SUCCESS, False
    for _ in range(env.max_steps):
        observation = env.observe()
        clean = expert.act()
        label = env.plan(clean, EE_DELTA_SPEC)
        noisy = clean.copy()
        if action_noise > 0 and expert.in_free_space and rng.random() < 0.5:
            noisy[:3] += rng.normal(0, action_noise, 3)
        success = env.step(noisy, EE_DELTA_SPEC).success
        for camera, image in observation.images.items():
            frames[camera].append(image)
        rows.append(
            {
                "observation.state": observation.state,
                "action": np.array([*label.q, label.gripper]),
                "complementary_info.ee_delta": clean,
                "complementary_info.tool_target": np.concatenate([label.position, rotation_6d(label.rotation)]),
                "complementary_info.executed_action": np.array([*env.command.q, env.command.gripper]),
                "complementary_info.success": np.array([success]),
            }
        )
        if success:
            if steps_left == 0:
                break
            steps_left -= 1
    if not success and defect is None:
        return None
    columns = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    columns = {key: value if value.dtype == bool else value.astype(np.float32) for key, value in columns.items()}
    images = {camera: np.stack(stack) for camera, stack in frames.items()}
    keep = _kept_frames(len(rows), defect, rng)
    return Episode(
        {camera: stack[keep] for camera, stack in images.items()},
        {key: value[keep] for key, value in columns.items()},
        env.scene.instruction,
        seed,
        env.describe(),
        defect,
    )


def _kept_frames(length: int, defect: str | None, rng: np.random.Generator) -> np.ndarray:
    if defect == "truncated":
        return np.arange(max(2, int(0.6 * length)))
    if defect == "dropped_frames":
        return np.flatnonzero(rng.random(length) > 0.25)
    return np.arange(length)


def features(image_size: int, use_videos: bool) -> dict[str, dict[str, Any]]:
    """LeRobot's feature table of a recorded dataset."""

    def numbers(names: tuple[str, ...]) -> dict[str, Any]:
        return {"dtype": "float32", "shape": (len(names),), "names": list(names)}

    image = {
        "dtype": "video" if use_videos else "image",
        "shape": (image_size, image_size, 3),
        "names": ["height", "width", "channels"],
    }
    return {
        **{f"observation.images.{camera}": image for camera in TabletopEnv.cameras},
        "observation.state": numbers(STATE_NAMES),
        "action": numbers(JOINT_SPEC.names),
        "complementary_info.ee_delta": numbers(EE_DELTA_SPEC.names),
        "complementary_info.tool_target": numbers(POSE_NAMES),
        "complementary_info.executed_action": numbers(JOINT_SPEC.names),
        "complementary_info.success": {"dtype": "bool", "shape": (1,), "names": None},
        "complementary_info.seed": {"dtype": "int64", "shape": (1,), "names": None},
        "complementary_info.scene": {"dtype": "string", "shape": (1,), "names": None},
    }


def card(seeds: list[int], environment: Mapping[str, Any], action_noise: float) -> dict[str, Any]:
    """What LeRobot's metadata has no place for: meaning of the columns, cameras and where the data come from."""
    return {
        "embodiment": EMBODIMENT,
        "cameras": {camera: f"observation.images.{camera}" for camera in TabletopEnv.cameras},
        "state": {"column": "observation.state", "tool_pose": [STATE_NAMES.index("tcp_x"), len(STATE_NAMES)]},
        "action_spaces": {
            "joint": {"column": "action", "spec": JOINT_SPEC.to_dict()},
            "ee_delta": {"column": "complementary_info.ee_delta", "spec": EE_DELTA_SPEC.to_dict()},
        },
        "tool_target": "complementary_info.tool_target",
        "recorded": {
            "environment": dict(environment),
            "success": TabletopEnv.success_definition,
            "seeds": seeds,
            "action_noise": action_noise,
            "fps": FPS,
        },
    }


@dataclass(frozen=True)
class Recorder:
    """Records `episodes` demonstrations into `root`.

    Args:
        make_env: builds the world; called once in every worker process.
        environment: the environment's configuration as plain data, written into the dataset's card.
        root: where the finished dataset appears.
        episodes: number of demonstrations.
        first_seed: seeds count up from here; a seed whose expert failed is skipped.
        action_noise: see `record_episode`.
        defects: share of the demonstrations per defect, for audits; empty for clean data.
        use_videos: MP4 instead of PNG frames.
        workers: simulating processes.
    """

    make_env: Callable[[], TabletopEnv]
    environment: Mapping[str, Any]
    root: Path
    episodes: int
    first_seed: int
    action_noise: float
    defects: Mapping[str, float]
    use_videos: bool
    workers: int

    def __post_init__(self) -> None:
        for name in self.defects:
            if name not in DEFECTS:
                raise UserError(f"unknown defect {name!r}; {nearest(name, DEFECTS)}")
        if self.episodes < 1:
            raise UserError(f"episodes={self.episodes}; expected at least 1")
        if sum(self.defects.values()) > 1:
            raise UserError(f"defect shares {dict(self.defects)} add up to more than 1")

    @property
    def _staging(self) -> Path:
        return self.root.with_name(self.root.name + ".recording")

    def run(self) -> dict[str, Any]:
        """Record, or continue, or say that the dataset exists. Returns counts and rates."""
        if self.root.exists():
            raise UserError(
                f"dataset {self.root} exists already; use it as it is, remove it, or set dataset.root to another folder"
            )
        started = time.perf_counter()
        staged = self._staging / "episodes"
        staged.mkdir(parents=True, exist_ok=True)
        self._check_same_request()
        with closing(self._simulated(staged)) as files:
            seeds, frames = self._write(files)
        shutil.rmtree(self._staging)
        elapsed = time.perf_counter() - started
        return {
            "root": str(self.root),
            "episodes": len(seeds),
            "frames": frames,
            "expert_failures": seeds[-1] + 1 - self.first_seed - len(seeds),
            "seconds": round(elapsed, 1),
            "episodes_per_s": round(len(seeds) / elapsed, 2),
        }

    def _check_same_request(self) -> None:
        """Continue only what was begun with the same settings."""
        request = {
            "environment": dict(self.environment),
            "first_seed": self.first_seed,
            "action_noise": self.action_noise,
            "defects": dict(self.defects),
        }
        path = self._staging / "request.json"
        if not path.exists():
            path.write_text(json.dumps(request, indent=2))
        elif json.loads(path.read_text()) != json.loads(json.dumps(request)):
            raise UserError(
                f"{self._staging} holds an interrupted recording with other settings; remove it, or record elsewhere"
            )

    def _defect(self, seed: int) -> str | None:
        draw = np.random.default_rng([seed, 2]).random()
        for name, share in self.defects.items():
            if draw < share:
                return name
            draw -= share
        return None

    def _simulated(self, staged: Path) -> Generator[Path]:
        """Files of the first `episodes` successes, counting seeds up; what is not staged yet is simulated ahead."""
        seeds, queue, found = count(self.first_seed), deque[tuple[Path, Future[None] | None]](), 0
        with ProcessPoolExecutor(self.workers, get_context("forkserver"), _start_worker, (self.make_env,)) as pool:
            while found < self.episodes:
                while len(queue) < min(SIMULATED_AHEAD, self.episodes - found):
                    seed = next(seeds)
                    path = staged / f"{seed:09d}.npz"
                    job = None
                    if not path.exists() and not path.with_suffix(FAILED).exists():
                        job = pool.submit(_record_to_file, seed, self.action_noise, self._defect(seed), path)
                    queue.append((path, job))
                path, job = queue.popleft()
                if job is not None:
                    job.result()
                if path.exists():
                    found += 1
                    yield path

    def _write(self, files: Iterator[Path]) -> tuple[list[int], int]:
        """Write the episodes and put the finished dataset in its place; returns their seeds and the frames."""
        with quiet_lerobot():
            from lerobot.datasets.lerobot_dataset import LeRobotDataset

        target = self._staging / "dataset"
        shutil.rmtree(target, ignore_errors=True)
        dataset = LeRobotDataset.create(
            repo_id=f"local/{self.root.name}",
            fps=round(FPS),
            features=features(self.environment["image_size"], self.use_videos),
            root=target,
            robot_type=EMBODIMENT,
            use_videos=self.use_videos,
            image_writer_threads=0 if self.use_videos else 4,
            streaming_encoding=self.use_videos,
        )
        frames, seeds, labels = 0, [], {}
        for index, path in enumerate(tqdm(files, "record", self.episodes, unit="ep", smoothing=0.05)):
            episode = _load_episode(path)
            for frame in _lerobot_frames(episode):
                dataset.add_frame(frame)
            dataset.save_episode()
            frames += episode.length
            seeds.append(episode.seed)
            if episode.defect is not None:
                labels[index] = episode.defect
        dataset.finalize()
        shutil.rmtree(target / "images", ignore_errors=True)  # empty folders that LeRobot leaves
        text = yaml.safe_dump(
            card(seeds, self.environment, self.action_noise), sort_keys=False, default_flow_style=None
        )
        (target / CARD_FILE).write_text(text)
        if labels:
            (target / LABEL_FILE).write_text(json.dumps(labels, indent=2))
        self.root.parent.mkdir(parents=True, exist_ok=True)
        target.rename(self.root)
        return seeds, frames


def _load_episode(path: Path) -> Episode:
    try:
        return Episode.load(path)
    except (zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise UserError(f"staged episode {path} is damaged ({error}); delete it and record again") from error


def _lerobot_frames(episode: Episode) -> Iterator[dict[str, Any]]:
    scene = json.dumps(episode.scene)
    for i in range(episode.length):
        yield {
            **{f"observation.images.{camera}": stack[i] for camera, stack in episode.images.items()},
            **{key: value[i] for key, value in episode.columns.items()},
            "complementary_info.seed": np.array([episode.seed], dtype=np.int64),
            "complementary_info.scene": scene,
            "task": episode.instruction,
        }


_worker_env: TabletopEnv | None = None


def _start_worker(make_env: Callable[[], TabletopEnv]) -> None:
    global _worker_env
    _worker_env = make_env()
    exit_with_parent()


def _record_to_file(seed: int, action_noise: float, defect: str | None, path: Path) -> None:
    """Stage the episode of a seed, or an empty mark that the expert failed on it."""
    assert _worker_env is not None
    episode = record_episode(_worker_env, seed, action_noise, defect)
    if episode is None:
        path.with_suffix(FAILED).touch()
    else:
        episode.save(path)
