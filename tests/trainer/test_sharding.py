"""What `trainer.strategy=fsdp` shares out and refuses; tests/workflow/test_ddp.py trains with it.

That every base computes the same with it is in tests/workflow/test_combinations.py.
"""

from pathlib import Path

import pytest
from torch import nn

from vlaexp.config import compose
from vlaexp.errors import UserError
from vlaexp.head.base import Head
from vlaexp.trainer.fit import fit
from vlaexp.trainer.sharding import bytes_per_rank, layers_to_shard
from vlaexp.workflow.parts import build

ADAPTED = ["freeze=all", "lora=r4", "lora.targets=all-linear"]


def head_of(tiny: list[str], *keys: str) -> Head:
    return build(compose("train", [*tiny, *keys])).head


def test_shared_are_the_resting_linear_layers_of_the_blocks(tiny: list[str]) -> None:
    head = head_of(tiny, *ADAPTED)
    layers = layers_to_shard(head)
    names = {name for name, layer in head.named_modules() if layer in layers}
    assert "model.language.blocks.0.mlp.fc1.base_layer" in names
    assert not any("lora_" in name or not name.startswith("model.") for name in names)
    assert not any(name.startswith(("model.projector.key", "model.language.goal")) for name in names), "in no block"
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def test_a_rank_holds_its_part_and_one_whole_layer() -> None:
    layers = [nn.Linear(10, 100, bias=False), nn.Linear(10, 20, bias=False)]  # of 4000 and 800 bytes
    assert bytes_per_rank(layers, 2) == 2400 + 4000
    assert bytes_per_rank(layers, 4) == 1200 + 4000


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["lora=none", "freeze=none"], r"and here none rests; freeze more \(freeze=backbone .* trainer\.strategy=ddp"),
        ([*ADAPTED, "lora.dora=true"], r"lora\.dora=true: DoRA reads .*set lora\.dora=false, or trainer\.strategy=ddp"),
        ([*ADAPTED, "lora.quantize=nf4"], r"lora\.quantize=nf4: 4-bit .*set lora\.quantize=null, or trainer\.strategy"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_a_process_starts(
    tiny: list[str], tmp_path: Path, keys: list[str], text: str
) -> None:
    if "lora.quantize=nf4" in keys:
        pytest.importorskip("bitsandbytes")
    parts = build(compose("train", [*tiny, *keys, "trainer.strategy=fsdp", "trainer.devices=2"]))
    data = parts.demos.chunks([0], {}, 1, False)
    with pytest.raises(UserError, match=text):
        fit(parts.head, data, None, parts.settings, tmp_path, None, lambda step: None, "refused")
