"""Several policies on one base: it lies in memory once, and each acts as if it had been loaded alone."""

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import vlaexp
from vlaexp.config import compose
from vlaexp.head.base import Head
from vlaexp.model.tiny import TinyVLA
from vlaexp.trainer.dry_run import made_up_batch
from vlaexp.trainer.policy_folder import save_policy
from vlaexp.workflow.train import build

CHOICES = {
    "adapters": ["head=joint", "lora=r4", "freeze=all"],
    "other rank": ["head=joint", "lora=r8", "freeze=all", "lora.targets=all-linear"],
    "other head": ["head=flow", "lora=r4"],
    "head alone": ["head=joint", "lora=none", "freeze=backbone"],
    "full": ["head=joint", "lora=none", "freeze=none"],
    "4 bits": ["head=joint", "lora=r4", "lora.quantize=nf4", "freeze=all"],
    "4 bits, other rank": ["head=ee_delta", "lora=r8", "lora.quantize=nf4", "freeze=all"],
}


def policies(tiny: Sequence[str], folder: Path, names: Sequence[str]) -> list[Path]:
    """Policy folders of one base with random weights, as if trained."""
    made = []
    for i, name in enumerate(names):
        if "4 bits" in name:
            pytest.importorskip("bitsandbytes")
        parts = build(compose("train", [*tiny, *CHOICES[name]]))
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in parts.head.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        base = {"name": "tiny", "fingerprint": parts.head.model.weights_fingerprint()}
        made.append(save_policy(folder / str(i), parts.head, parts.adapter, parts.config, {"base": base}))
    return made


def act(head: Head) -> torch.Tensor:
    head.reset([1, 2], [0, 1], [{}, {}])
    return head.act(made_up_batch(head, 2).observation).action


@pytest.mark.parametrize("names", [list(CHOICES), list(reversed(CHOICES))])
def test_each_acts_as_if_loaded_alone_in_any_order(tiny: list[str], tmp_path: Path, names: list[str]) -> None:
    folders = policies(tiny, tmp_path, names)
    alone = [act(vlaexp.load_policy(folder)) for folder in folders]
    heads = vlaexp.load_policies(folders)
    for order in (range(len(heads)), reversed(range(len(heads))), [2, 0, 2, 1]):
        for i in order:
            assert torch.equal(act(heads[i]), alone[i]), names[i]


def addresses(head: Head) -> dict[str, int]:
    """Of frozen weights, by their name in the base."""
    return {
        name.replace(".base_layer", ""): parameter.data_ptr()
        for name, parameter in head.model.named_parameters()
        if "lora_" not in name and not parameter.requires_grad
    }


@pytest.mark.parametrize("pair", [("adapters", "other rank"), ("adapters", "other head"), ("other rank", "head alone")])
def test_frozen_weights_are_the_same_memory(tiny: list[str], tmp_path: Path, pair: tuple[str, str]) -> None:
    one, two = (addresses(head) for head in vlaexp.load_policies(policies(tiny, tmp_path, pair)))
    frozen = one.keys() & two.keys()
    assert len(frozen) > 20
    assert [name for name in frozen if one[name] != two[name]] == []


def test_4_bit_weights_are_the_same_memory(tiny: list[str], tmp_path: Path) -> None:
    heads = vlaexp.load_policies(policies(tiny, tmp_path, ["4 bits", "4 bits, other rank"]))
    one, two = (
        {n: p.data_ptr() for n, p in head.model.named_parameters() if hasattr(p, "quant_state")} for head in heads
    )
    assert one == two
    assert one


def test_the_base_is_read_once(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = policies(tiny, tmp_path, ["adapters", "other rank", "adapters"])
    built = []
    make = TinyVLA.__init__

    @functools.wraps(make)
    def counted(self: TinyVLA, *args: object, **kwargs: object) -> None:
        built.append(1)
        make(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(TinyVLA, "__init__", counted)
    vlaexp.load_policies(folders)
    assert len(built) == 1


def test_policies_of_other_bases_go_together(tiny: list[str], tmp_path: Path) -> None:
    here = policies(tiny, tmp_path / "a", ["adapters"])
    there = policies([*tiny, "model.width=48"], tmp_path / "b", ["adapters"])
    folders = [*here, *there, *here]
    for head, folder in zip(vlaexp.load_policies(folders), folders, strict=True):
        assert torch.equal(act(head), act(vlaexp.load_policy(folder)))
