"""Gradient checkpointing reaches every stack of layers of the large models: each keeps less for the backward pass.

That losses and gradients stay the same is in the tests of the models.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lerobot_checkpoints
import pytest
import torch
from torch import Tensor

from vlaexp.model.base import Prefix, PrefixModel
from vlaexp.model.openvla import OpenVLA
from vlaexp.model.pi0 import Pi0
from vlaexp.model.rdt import RDT
from vlaexp.model.smolvla import SmolVLA
from vlaexp.trainer.dry_run import MadeStorages

Make = Callable[[bool], PrefixModel]


@pytest.fixture(scope="module")
def makers(
    openvla_weights: Path, rdt_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Make]]:
    folder = tmp_path_factory.mktemp("lerobot")
    with lerobot_checkpoints.small():
        pi0 = lerobot_checkpoints.write(folder / "pi0", lerobot_checkpoints.pi0_policy())
        vlm = lerobot_checkpoints.write_vlm(folder / "vlm")
        smolvla = lerobot_checkpoints.write(folder / "smolvla", lerobot_checkpoints.smolvla_policy(vlm))
        rdt = {"action_dim": None, "action_horizon": 6, "state_slots": range(7), "weights": str(rdt_weights)}
        kinds: dict[str, tuple[type, dict[str, Any]]] = {
            "openvla": (OpenVLA, {"goal_dim": 0, "weights": str(openvla_weights)}),
            "pi0": (Pi0, {"weights": str(pi0)}),
            "smolvla": (SmolVLA, {"weights": str(smolvla)}),
            "rdt": (RDT, rdt),
        }

        def maker(name: str) -> Make:
            kind, given = kinds[name]
            return lambda flag: kind(["front"], 7, gradient_checkpointing=flag, **given).train()

        yield {name: maker(name) for name in kinds}


def kept(run: Callable[[], Tensor]) -> int:
    with MadeStorages() as made:
        result = run()
    return made.living_bytes(besides=result)


@pytest.mark.parametrize("name", ["openvla", "pi0", "smolvla", "rdt"])
def test_of_images(makers: dict[str, Make], name: str) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    plain, again = (makers[name](flag) for flag in (False, True))
    pixels = plain.preprocess_images(images)
    without, with_it = (kept(lambda model=model: model.encode_images(pixels, "front")) for model in (plain, again))
    assert with_it < 0.8 * without


@pytest.mark.parametrize("name", ["pi0", "smolvla"])
def test_of_the_action_expert(makers: dict[str, Make], name: str) -> None:
    sizes = []
    for flag in (False, True):
        model: Any = makers[name](flag)
        x_t, t = torch.randn(2, 5, model.action_dim), torch.rand(2)
        prefix = no_gradient(model)
        sizes.append(kept(lambda: model.velocity(prefix, x_t, t)))  # noqa: B023  # runs at once
    assert sizes[1] < 0.7 * sizes[0]


def no_gradient(model: Any) -> Prefix:
    from test_flow_vla import observe

    with torch.no_grad():
        return model.prefill(observe(model.side))
