"""Smoothness of tool paths made by hand."""

import numpy as np
import pytest

from vlaexp.eval.metrics import mean_squared_jerk, seam_jump, summarize_episode, summarize_measures

FPS = 10.0


def path(x):
    return np.stack([x, 0 * x, 0 * x], 1)


def test_constant_acceleration_has_no_jerk():
    t = np.arange(20) / FPS
    for x in (0 * t + 0.3, 0.2 * t, 0.5 * t**2):
        assert mean_squared_jerk(path(x), FPS) == pytest.approx(0, abs=1e-12)


def test_jerk_of_a_cubic_is_its_third_derivative():
    t = np.arange(20) / FPS
    assert mean_squared_jerk(path(0.5 * t**3), FPS) == pytest.approx(3.0**2)


def test_jerk_of_a_step():
    """A jump of h spreads over three third differences: h, -2 h, h."""
    x = np.where(np.arange(10) >= 5, 0.01, 0.0)
    assert mean_squared_jerk(path(x), FPS) == pytest.approx((1 + 4 + 1) * (0.01 * FPS**3) ** 2 / 7)


def test_seam_jump_sees_seams_alone():
    x = np.zeros(12)
    x[5:] = 0.02  # step 4 is the first of the second chunk of 4; the path bends there
    at_seam, inside = seam_jump(path(x), 4), seam_jump(path(np.roll(x, 2)), 4)
    assert at_seam == pytest.approx(0.02 / 2)  # two seams, one of them bent
    assert inside == pytest.approx(0.0)


def test_smooth_paths_have_no_seams():
    x = 0.01 * np.arange(12)
    assert seam_jump(path(x), 4) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_paths_are_smooth(length):
    assert mean_squared_jerk(np.ones((length, 3)), FPS) == 0.0
    assert seam_jump(np.ones((length, 3)), 4) == 0.0


def test_an_episode_is_summarized():
    trace = [{"tcp": [0.01 * i, 0, 0], "success": i == 5, "unreachable": i in (1, 2)} for i in range(6)]
    summary = summarize_episode(trace, FPS, n_action_steps=4)
    assert (summary["success"], summary["steps"], summary["unreachable"]) == (True, 6, 2)
    assert summary["mean_squared_jerk"] == pytest.approx(0, abs=1e-12)
    assert summarize_episode(trace[:5], FPS, 4)["success"] is False


def test_a_world_without_a_tool_path_has_no_smoothness():
    """0 would read as perfectly smooth."""
    summary = summarize_episode([{"success": False, "unreachable": False}], FPS, 4)
    assert (summary["mean_squared_jerk"], summary["seam_jump_mm"]) == (None, None)


def test_measures_of_an_episode_are_the_last_and_the_largest():
    trace = [{"measures": {"coverage": coverage, "reward": coverage / 2}} for coverage in (0.1, 0.8, 0.4)]
    expected = {"final_coverage": 0.4, "max_coverage": 0.8, "final_reward": 0.2, "max_reward": 0.4}
    assert summarize_measures(trace) == expected
    assert summarize_measures([{"measures": {}}]) == {}
