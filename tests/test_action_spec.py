"""An ActionSpec survives its file, and refuses what does not fit together."""

import json

import pytest

from vlaexp.action_spec import ActionSpec
from vlaexp.env.tabletop.env import EE_DELTA_SPEC, JOINT_SPEC
from vlaexp.errors import UserError

NATIVE = ActionSpec("native", ("x", "y"), ("unknown", "unknown"), 30.0, measured_by=(4, 2), slot_map=(0, 7))


@pytest.mark.parametrize("spec", [JOINT_SPEC, EE_DELTA_SPEC, NATIVE], ids=lambda spec: spec.space)
def test_a_spec_survives_dict_json_and_file(spec, tmp_path):
    assert ActionSpec.from_dict(spec.to_dict()) == spec
    assert ActionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    spec.save(tmp_path / "action_spec.json")
    assert ActionSpec.load(tmp_path / "action_spec.json") == spec


def test_the_dimension_is_the_number_of_names():
    assert (JOINT_SPEC.dim, EE_DELTA_SPEC.dim, NATIVE.dim) == (8, 7, 2)


@pytest.mark.parametrize("field", ["units", "lower", "upper", "measured_by", "slot_map"])
def test_a_field_of_another_length_is_named(field):
    with pytest.raises(UserError, match=rf"ActionSpec.{field} has 3 entries for 2 dimensions \['x', 'y'\]; give one"):
        ActionSpec.from_dict(NATIVE.to_dict() | {field: [1, 2, 3]})


def test_an_unknown_key_is_named():
    with pytest.raises(UserError, match=r"unknown ActionSpec keys \['unit'\]; expected \['embodiment', 'fps'"):
        ActionSpec.from_dict(NATIVE.to_dict() | {"unit": ["rad", "rad"]})
