"""The order of batches is a function of (seed, step), and a chunk is what LeRobot's own reader would give."""

import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch

from vlaexp.dataset.batches import ChunkDataset, Position, StepSampler
from vlaexp.dataset.lerobot import LeRobotFolder, quiet_lerobot
from vlaexp.dataset.transform import accumulate, apply_to_start, rotation_from_6d
from vlaexp.env.tabletop import kinematics as kin


def batches(count, size=23, batch_size=4, seed=0, **position):
    return list(islice(StepSampler(size, batch_size, seed, lambda: Position(**position)), count))


# ---- the order of samples


def test_a_batch_depends_on_seed_and_number_alone():
    assert batches(20) == batches(20)
    assert batches(20) != batches(20, seed=1)


@pytest.mark.parametrize("done", [1, 4, 5, 6, 17])
def test_a_resumed_training_sees_the_same_tail(done):
    assert batches(20 - done, batch=done) == batches(20)[done:]


def test_the_position_is_asked_each_time_iteration_starts():
    at = Position()
    sampler = StepSampler(23, 4, 0, lambda: at)
    whole = list(islice(sampler, 8))
    at = Position(batch=3)
    assert list(islice(sampler, 5)) == whole[3:]


def test_each_epoch_visits_each_sample_at_most_once_and_epochs_differ():
    per_epoch = 23 // 4
    epochs = [batches(per_epoch, batch=epoch * per_epoch) for epoch in range(4)]
    for epoch in epochs:
        visited = [item for batch in epoch for item in batch]
        assert len(visited) == len(set(visited)) == per_epoch * 4
        assert set(visited) <= set(range(23))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_disjoint_slices_of_what_one_process_would_see(world_size):
    ranks = [batches(6, size=60, rank=rank, world_size=world_size) for rank in range(world_size)]
    alone = batches(6, size=60, batch_size=4 * world_size)
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert [item for part in parts for item in part] == whole


def test_no_rank_goes_without_on_few_samples():
    ranks = [batches(1, size=10, batch_size=8, rank=rank, world_size=4)[0] for rank in range(4)]
    assert [len(batch) for batch in ranks] == [2] * 4
    assert len(set().union(*ranks)) == 8


def test_a_batch_is_not_larger_than_the_data():
    assert sorted(batches(1, size=3, batch_size=8)[0]) == [0, 1, 2]


# ---- chunks


def first_action(action):
    """Index of the frame that each action of `columns` was taken from."""
    return (action[..., 0] / 100).round().int().tolist()


@pytest.fixture
def previous(columns, frames):
    """Chunks of 4 over all three episodes, in the recorded reference."""
    return ChunkDataset(columns, {"front": frames}, [0, 1, 2], 4)


def test_a_chunk_ends_with_its_episode_and_repeats_the_last_action(previous):
    batch = previous.__getitems__(range(9))
    assert first_action(batch.action) == [
        [0, 1, 2, 2],
        [1, 2, 2, 2],
        [2, 2, 2, 2],
        [3, 4, 5, 6],
        [4, 5, 6, 7],
        [5, 6, 7, 7],
        [6, 7, 7, 7],
        [7, 7, 7, 7],
        [8, 8, 8, 8],
    ]
    real = torch.tensor([3, 2, 1, 4, 4, 3, 2, 1, 1])
    assert torch.equal(batch.action_is_pad, torch.arange(4) >= real[:, None])


def test_the_observation_is_of_the_chunks_first_step(previous, columns):
    batch = previous.__getitems__([7, 0])
    assert batch.observation.images["front"].shape == (2, 1, 3, 2, 2)
    assert batch.observation.images["front"][:, 0, 0, 0, 0].tolist() == [7, 0]
    np.testing.assert_allclose(batch.observation.state[:, 0], columns.state[[7, 0]], rtol=1e-6)
    assert batch.observation.instruction == ["do 7", "do 0"]


def test_only_the_asked_episodes_are_seen(columns, frames):
    data = ChunkDataset(columns, {"front": frames}, [2, 0], 2)
    assert len(data) == 4
    assert first_action(data.__getitems__(range(4)).action[:, 0]) == [8, 0, 1, 2]


def test_steps_before_an_episode_repeat_its_first_frame(columns, frames):
    batch = ChunkDataset(columns, {"front": frames}, [0, 1, 2], 2, n_obs_steps=3).__getitems__([0, 1, 3, 4, 5, 8])
    seen = [[0, 0, 0], [0, 0, 1], [3, 3, 3], [3, 3, 4], [3, 4, 5], [8, 8, 8]]
    assert batch.observation.images["front"][:, :, 0, 0, 0].tolist() == seen
    np.testing.assert_allclose(batch.observation.state[..., 0], seen)


def test_cached_features_take_the_place_of_images(columns):
    features = np.arange(9, dtype=np.float16)[:, None, None] * np.ones((1, 5, 6), np.float16)
    data = ChunkDataset(columns, {"front": features}, [0, 1, 2], 2, cached_features=True)
    observation = data.__getitems__([4, 2]).observation
    assert observation.images == {}
    assert observation.features["front"].dtype == torch.float32
    assert observation.features["front"][:, 0, 0].tolist() == [4, 2]


# ---- references


def test_measured_state_is_subtracted(columns):
    spec = dataclasses.replace(columns.spec, space="native", reference="measured_state")
    state = np.random.default_rng(0).normal(size=columns.action.shape)
    columns = dataclasses.replace(columns, spec=spec, state=state)
    batch = ChunkDataset(columns, {}, [1], 3).__getitems__([1])
    np.testing.assert_allclose(batch.action[0], columns.action[4:7] - state[4], rtol=1e-5)


def test_labels_against_the_chunks_start_lead_to_the_tool_targets(columns):
    columns = dataclasses.replace(columns, spec=dataclasses.replace(columns.spec, reference="chunk_start"))
    batch = ChunkDataset(columns, {}, [0, 1, 2], 4).__getitems__(range(9))
    targets = {name: value.numpy().astype(float) for name, value in batch.targets.items()}
    position, rotation = apply_to_start(batch.action[..., :6].numpy().astype(float), targets["tool_start"])
    np.testing.assert_allclose(position, targets["tool_target"][..., :3], atol=1e-5)
    np.testing.assert_allclose(rotation, rotation_from_6d(targets["tool_target"][..., 3:]), atol=1e-5)
    np.testing.assert_allclose(targets["tool_start"], columns.tool_pose, atol=1e-6)
    np.testing.assert_array_equal(batch.action[:, 0, 6], columns.action[:, 6])  # the gripper stays a command


def test_labels_against_the_previous_command_accumulate_to_the_first_target(columns):
    columns.action[:, :6] = np.random.default_rng(2).normal(0, 0.3, (9, 6))
    batch = ChunkDataset(columns, {}, [0, 1, 2], 1).__getitems__(range(9))
    start = batch.targets["command_start"].numpy().astype(float)
    position, rotation = accumulate(columns.action[:, None, :6], start)
    np.testing.assert_allclose(position[:, 0], columns.tool_target[:, :3], atol=1e-5)
    np.testing.assert_allclose(rotation[:, 0], rotation_from_6d(columns.tool_target[:, 3:]), atol=1e-5)


def test_the_command_before_a_recorded_label_is_the_one_that_was_executed(load):
    demos = load(reference="previous_command", horizon=1)
    executed = demos.folder.column("complementary_info.executed_action")[:, :7].astype(float)
    position, rotation = kin.forward_kinematics(executed)
    executed_pose = np.concatenate([position, rotation[..., 0], rotation[..., 1]], 1)
    data = demos.chunks(range(8), {}, 1, cached_features=False)
    start = data.__getitems__(range(len(data))).targets["command_start"].numpy()
    after = np.setdiff1d(np.arange(len(data)), demos.columns.episode_start)
    error = np.abs(start[after] - executed_pose[after - 1]).max(1)
    assert np.mean(error < 1e-3) > 0.9  # where the planner kept to what it was asked


# ---- against LeRobot's own reader


def test_chunks_equal_those_of_lerobots_reader(load):
    horizon = 6
    demos = load("joint", "absolute", horizon)
    with quiet_lerobot():
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    ahead = [i / demos.folder.fps for i in range(horizon)]
    theirs = LeRobotDataset("local/test", root=demos.root, delta_timestamps={"action": ahead})
    frames = {camera: demos.frames(camera) for camera in demos.cameras}
    ours = demos.chunks(range(demos.folder.num_episodes), frames, 1, cached_features=False)
    assert len(ours) == len(theirs)
    ends = demos.columns.episode_end
    rows = [0, 1, int(ends[0]) - 1, int(ends[0]), int(ends[3]) - 3, len(ours) - 2, len(ours) - 1]
    batch = ours.__getitems__(rows)
    for i, row in enumerate(rows):
        sample = theirs[row]
        assert sample["index"] == row
        assert torch.equal(batch.action[i], sample["action"])
        assert torch.equal(batch.action_is_pad[i], sample["action_is_pad"])
        assert torch.equal(batch.observation.state[i, 0], sample["observation.state"])
        assert batch.observation.instruction[i] == sample["task"]
        for camera in ("front", "wrist"):
            image = (sample[f"observation.images.{camera}"] * 255).round().to(torch.uint8)
            assert torch.equal(batch.observation.images[camera][i, 0], image), camera


def test_episodes_are_those_of_lerobots_metadata(recorded):
    with quiet_lerobot():
        from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
    meta = LeRobotDatasetMetadata("local/test", root=recorded)
    folder = LeRobotFolder(recorded)
    assert folder.episode_start.tolist() == list(meta.episodes["dataset_from_index"])
    assert folder.episode_end.tolist() == list(meta.episodes["dataset_to_index"])
