"""A dataset that cannot be read is refused with the next step; a v2.1 folder is converted into a copy."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlaexp.config import compose
from vlaexp.dataset.lerobot import LeRobotFolder, locate
from vlaexp.errors import UserError
from vlaexp.manifest import hash_folder
from vlaexp.workflow.data import load_demonstrations

LENGTHS = (4, 6, 5)
TASKS = ("open the drawer", "close the drawer")
NUMBERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}


def png(level):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_v21(folder, offset=0.0):
    """A v2.1 dataset of three episodes whose state and action columns are not called as usual."""
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    episodes, stats, begin = [], [], 0
    for episode, length in enumerate(LENGTHS):
        index = np.arange(begin, begin + length)
        state = (index[:, None] + np.array([0.1, 0.2, 0.3]) + offset).astype(np.float32)
        action = (10 * index[:, None] + np.array([1, 2]) + offset).astype(np.float32)
        frame = np.arange(length)
        table = pd.DataFrame(
            {
                "image": [png(10 * i) for i in index],
                "state": list(state),
                "actions": list(action),
                "timestamp": (frame / 5).astype(np.float32),
                "frame_index": frame,
                "episode_index": np.full(length, episode),
                "index": index,
                "task_index": np.full(length, episode % 2),
            }
        )
        table.to_parquet(folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet", index=False)
        episodes.append({"episode_index": episode, "tasks": [TASKS[episode % 2]], "length": length})
        stats.append({"episode_index": episode, "stats": {"state": summary(state), "actions": summary(action)}})
        begin += length
    features = {
        "image": {"dtype": "image", "shape": [8, 8, 3], "names": ["height", "width", "channel"]},
        "state": {"dtype": "float32", "shape": [3], "names": [["a", "b", "c"]]},
        "actions": {"dtype": "float32", "shape": [2], "names": {"motors": ["left", "right"]}},
    }
    features |= {
        key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in {**NUMBERS, "task_index": "int64"}.items()
    }
    info = {
        "codebase_version": "v2.1",
        "robot_type": "drawer_bot",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(TASKS),
        "total_videos": 0,
        "total_chunks": 1,
        "chunks_size": 1000,
        "fps": 5,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "features": features,
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    for name, rows in (("episodes", episodes), ("episodes_stats", stats), ("tasks", tasks)):
        (folder / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def summary(values):
    found = {name: getattr(values, name)(0).tolist() for name in ("min", "max", "mean", "std")}
    return found | {"count": [len(values)]}


@pytest.fixture
def v21(tmp_path):
    write_v21(tmp_path / "drawer")
    return tmp_path / "drawer"


def demonstrations(tmp_path, *overrides):
    """As `vlaexp train` would load them."""
    chosen = ["dataset=lerobot", "action_space=native", "head=regression", f"outputs={tmp_path}"]
    return load_demonstrations(compose("train", [*chosen, *overrides]))


# ---- v2.1


KEYS = "dataset.keys={state: state, action: actions}"


def test_a_v21_folder_is_not_converted_unasked(v21, tmp_path):
    with pytest.raises(UserError, match=r"is a LeRobotDataset v2.1; expected v3.0; dataset.convert=true makes a conv"):
        demonstrations(tmp_path, f"dataset.root={v21}")


def test_a_v21_folder_is_converted_into_a_copy(v21, tmp_path):
    before = hash_folder(v21, ["**/*"])
    demos = demonstrations(tmp_path, f"dataset.root={v21}", "dataset.convert=true", KEYS)
    assert hash_folder(v21, ["**/*"]) == before
    assert demos.root.parent == tmp_path / "datasets"
    assert [path.name for path in demos.root.parent.iterdir()] == [demos.root.name]
    assert (demos.folder.num_episodes, demos.folder.num_frames, demos.folder.fps) == (3, 15, 5.0)
    assert demos.columns.episode_end.tolist() == [4, 10, 15]
    np.testing.assert_allclose(demos.columns.state[:, 1], np.arange(15) + 0.2, rtol=1e-6)
    np.testing.assert_allclose(demos.columns.action, 10 * np.arange(15)[:, None] + [1, 2])
    assert demos.columns.instructions == [TASKS[0]] * 4 + [TASKS[1]] * 6 + [TASKS[0]] * 5
    assert demos.frames("image")[np.array([3, 0])][:, 0, 0, 0].tolist() == [30, 0]


def test_a_converted_copy_is_used_again(v21, tmp_path):
    choice = [f"dataset.root={v21}", "dataset.convert=true", KEYS]
    first = demonstrations(tmp_path, *choice).root
    info = (first / "meta" / "info.json").stat().st_mtime_ns
    assert demonstrations(tmp_path, *choice).root == first
    assert (first / "meta" / "info.json").stat().st_mtime_ns == info


def test_a_copy_of_another_dataset_of_the_same_name_is_not_taken(v21, tmp_path):
    write_v21(tmp_path / "elsewhere" / "drawer", offset=0.5)
    choice = ["dataset.convert=true", KEYS]
    one = demonstrations(tmp_path, f"dataset.root={v21}", *choice)
    two = demonstrations(tmp_path, f"dataset.root={tmp_path}/elsewhere/drawer", *choice)
    np.testing.assert_allclose(two.columns.action - one.columns.action, 0.5)


def test_keys_map_columns_that_are_not_called_as_usual(v21, tmp_path):
    choice = [f"dataset.root={v21}", "dataset.convert=true"]
    with pytest.raises(UserError, match=r"has no column 'observation.state'; available: .*map it in dataset.keys"):
        demonstrations(tmp_path, *choice)
    demos = demonstrations(tmp_path, *choice, KEYS)
    assert demos.spec.names == ("left", "right")
    assert demos.state_dim == 3
    assert demos.spec.measured_by is None


def test_cameras_are_mapped_by_name(v21, tmp_path):
    choice = [f"dataset.root={v21}", "dataset.convert=true", KEYS]
    assert demonstrations(tmp_path, *choice).cameras == {"image": "image"}
    assert demonstrations(tmp_path, *choice, "dataset.cameras={front: image}").cameras == {"front": "image"}
    with pytest.raises(UserError, match=r"dataset.cameras names the column 'top', which .* lacks; its cameras are"):
        demonstrations(tmp_path, *choice, "dataset.cameras={front: top}")


# ---- where there is no dataset


def test_a_folder_that_does_not_exist_is_named_with_its_nearest_sibling(recorded, tmp_path):
    wrong = recorded.with_name("tabletop_pik")
    with pytest.raises(UserError) as refusal:
        demonstrations(tmp_path, f"dataset.root={wrong}")
    assert str(refusal.value) == (
        f"dataset folder {wrong} does not exist; in {recorded.parent}: available: tabletop_pick; nearest: "
        "tabletop_pick; record it with `vlaexp record dataset=...`, or set dataset.root or dataset.repo_id"
    )


def test_neither_folder_nor_hub_id_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no dataset is named; set dataset.root to a folder or dataset.repo_id to a"):
        demonstrations(tmp_path)


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"photos is not a LeRobotDataset \(no meta/info.json\); point dataset.root at"):
        demonstrations(tmp_path, f"dataset.root={tmp_path}/photos")


def test_without_the_hub_the_way_to_a_local_copy_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot download dataset 'nobody/nothing-at-all' .*hf download --repo-type"):
        locate(None, "nobody/nothing-at-all", None, convert=False, converted=tmp_path)


@pytest.fixture
def broken(recorded, tmp_path):
    """A copy of the recorded dataset's metadata, without its data."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "meta").mkdir()
    info = (recorded / "meta" / "info.json").read_text()
    (tmp_path / "broken" / "meta" / "info.json").write_text(info)
    return tmp_path / "broken"


def test_an_incomplete_download_is_named(broken, recorded):
    with pytest.raises(
        UserError, match=r"has meta/info.json but no data/chunk-\*/file-\*.parquet; the download is inc"
    ):
        LeRobotFolder(broken)
    (broken / "data").symlink_to(recorded / "data")
    LeRobotFolder(broken)
    info = json.loads((broken / "meta" / "info.json").read_text())
    (broken / "meta" / "info.json").write_text(json.dumps(info | {"total_episodes": 9}))
    with pytest.raises(UserError, match=r"meta/info.json names 9 episodes and \d+ frames, the data files hold 8 and"):
        LeRobotFolder(broken)


def test_a_damaged_info_is_named(broken):
    (broken / "meta" / "info.json").write_text('{"fps": ')
    with pytest.raises(UserError, match=r"info.json is damaged \(.*\); fetch or record the dataset again"):
        LeRobotFolder(broken)


def test_an_unknown_column_or_camera_is_named_with_its_nearest(recorded):
    folder = LeRobotFolder(recorded)
    with pytest.raises(UserError, match=r"has no column 'observation.stat'; .*nearest: observation.state; map it in"):
        folder.column("observation.stat")
    with pytest.raises(UserError, match=r"has no camera 'action'; available: observation.images.front, observation"):
        folder.frames("action")
