"""Arms of a study become points."""

import pytest

from vlaexp.errors import UserError
from vlaexp.sweep.grid import Point, expand


def test_axes_are_multiplied_out():
    points = expand(
        {
            "lora": {"overrides": ["lora=r16"], "grid": {"head": ["joint", "flow"], "seed": [0, 1]}},
            "expert": {"verb": "eval", "overrides": ["policy=expert"]},
        }
    )
    assert [point.name for point in points] == ["lora-joint-0", "lora-joint-1", "lora-flow-0", "lora-flow-1", "expert"]
    overrides, cell = ("lora=r16", "head=joint", "seed=1"), {"head": "joint", "seed": 1}
    assert points[1] == Point("lora-joint-1", "train", overrides, "lora", cell)
    assert points[1].at({"head": "flow", "seed": None}) == ("lora=r16", "head=flow", "seed=null")
    assert points[-1] == Point("expert", "eval", ("policy=expert",), "expert")


def test_names_are_unique():
    with pytest.raises(UserError, match=r"the study has 2 points, some of one name: \['lora-joint'\]"):
        expand({"lora": {"grid": {"head": ["joint", "joint"]}}})
    with pytest.raises(UserError, match=r"some of one name: \['a-b'\]"):
        expand({"a": {"grid": {"head": ["b"]}}, "a-b": {}})


@pytest.mark.parametrize(
    ("arm", "text"),
    [
        ({"verb": "evl"}, "arm 'x' of the study has verb 'evl' .* expected verb train or eval"),
        ({"girds": {"head": ["joint"]}}, r"keys \['girds'\]; expected verb train or eval, overrides, grid"),
        ({"grid": {"head": []}}, r"grid axes without values: \['head'\]; give each at least one"),
        ({"grid": {"head": "joint"}}, r"arm 'x' has grid axis head 'joint'; expected a list, as \[joint\]"),
        ({"grid": ["joint"]}, r"arm 'x' has grid \['joint'\]; expected axes by key"),
        ({"overrides": "lora=r16"}, r"arm 'x' has overrides 'lora=r16'; expected a list, as \[lora=r16\]"),
    ],
)
def test_mistyped_arms(arm, text):
    with pytest.raises(UserError, match=text):
        expand({"x": arm})


def test_nothing_to_run():
    with pytest.raises(UserError, match="the study has 0 points"):
        expand({})
