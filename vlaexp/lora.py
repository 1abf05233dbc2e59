"""Freeze and adapt: which parts of a base model get gradients of their own, and which carry LoRA adapters.

LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT. `alpha / rank` is held fixed across ranks, so that a rank sweep
does not confound rank with scale; `rslora` scales by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732).

| freeze     | lora       | what trains                                      |
|------------|------------|--------------------------------------------------|
| `none`     | `none`     | everything: full fine-tuning                     |
| `vision`   | `none`     | all but the vision part                          |
| `backbone` | `none`     | decoder and head alone                           |
| `backbone` | `rN`       | adapters in projector and language, decoder, head |
| `all`      | `none`     | the head's own layers alone                      |
| `all`      | `rN`       | adapters (decoder too, if named), head's layers  |
| `none`     | `rN`       | refused: a part with adapters must be frozen     |
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vlaexp.errors import UserError, nearest
from vlaexp.model.base import PARTS, BaseModel


@dataclass(frozen=True)
class Lora:
    """Adapter settings.

    Args:
        rank: r; 0 means no adapter.
        alpha_per_rank: alpha / r, the same for every rank.
        dropout: on the adapter's input.
        parts: which parts of the model carry adapters.
        modules: `all-linear`, or names of linear layers inside those parts (`q_proj`, `v_proj`, ...).
        rslora: scale by alpha / sqrt(r).
    """

    rank: int
    alpha_per_rank: float = 2.0
    dropout: float = 0.0
    parts: Sequence[str] = ("projector", "language")
    modules: str | Sequence[str] = "all-linear"
    rslora: bool = False


@dataclass(frozen=True)
class Freeze:
    """Parts whose own weights get no gradient."""

    parts: Sequence[str]


@dataclass(frozen=True)
class Ledger:
    """What trains, in numbers; printed before training and kept in the manifest."""

    total: int
    base: int
    adapter: int
    head: int
    trainable: int
    by_part: dict[str, dict[str, int]]
    adapted_modules: tuple[str, ...]
    scale: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"trainable_share": self.trainable / self.total}

    def lines(self) -> list[str]:
        """A table to print."""
        rows = [f"{'part':<12}{'parameters':>14}{'trainable':>14}{'adapter':>12}"]
        rows += [
            f"{part:<12}{n['parameters']:>14,}{n['trainable']:>14,}{n['adapter']:>12,}"
            for part, n in self.by_part.items()
        ]
        share = 100 * self.trainable / self.total
        rows.append(f"{'total':<12}{self.total:>14,}{self.trainable:>14,}{self.adapter:>12,}  trainable {share:.2f}%")
        if self.adapted_modules:
            rows.append(f"adapters of scale {self.scale:g} on {len(self.adapted_modules)} modules:")
            rows.append("  " + " ".join(self.adapted_modules))
        return rows


def freeze_parts(model: BaseModel, freeze: Freeze) -> None:
    """Take the gradients of the named parts, except of what was started anew because the robot is another."""
    for name in freeze.parts:
        if name not in PARTS:
            raise UserError(f"unknown part {name!r} in freeze.parts; {nearest(name, PARTS)}")
    for name, parameter in model.named_parameters():
        if model.part_of(name) in freeze.parts:
            parameter.requires_grad_(False)
        if any(name.startswith(prefix) for prefix in model.reinitialized):
            parameter.requires_grad_(True)


def add_adapter(model: BaseModel, lora: Lora, freeze: Freeze) -> PeftModel:
    """Put fresh adapters into `model`, in place; what was trainable stays so.

    Returns:
        PEFT's wrapper around the same modules, for saving and merging.
    """
    for name in lora.parts:
        if name not in PARTS:
            raise UserError(f"unknown part {name!r} in lora.parts; {nearest(name, PARTS)}")
    loose = [part for part in lora.parts if part not in freeze.parts]
    if loose:
        raise UserError(
            f"lora.parts {loose} are not frozen, so their adapters would compete with their own weights; "
            f"use freeze=backbone (or another that freezes them), or lora=none"
        )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha_per_rank * lora.rank,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora),
        use_rslora=lora.rslora,
    )
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    _restore_trainable(model, trainable)
    return wrapped  # type: ignore[return-value]


def load_adapter(model: BaseModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter (PEFT format) into `model`, in place."""
    keep = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).exists():
            raise UserError(f"adapter folder {folder} lacks {name}; copy the whole policy folder or train again")
    try:
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=trainable)  # type: ignore[arg-type]
    except Exception as error:  # PEFT and safetensors raise many types for a damaged or foreign adapter
        raise UserError(
            f"adapter in {folder} does not fit {type(model).__name__} ({type(error).__name__}: {error}); "
            "copy the policy folder again or train again"
        ) from error
    _restore_trainable(model, keep)
    return wrapped  # type: ignore[return-value]


def _restore_trainable(model: nn.Module, names: set[str]) -> None:
    """PEFT freezes everything but adapters; give back what was trainable before."""
    for name, parameter in model.named_parameters():
        if name in names or name.replace(".base_layer.", ".") in names:
            parameter.requires_grad_(True)


def target_modules(model: BaseModel, lora: Lora) -> list[str]:
    """Full names of the linear and convolutional layers that get adapters."""
    wanted = None if lora.modules == "all-linear" else set(lora.modules)
    targets, candidates = [], set()
    for part in lora.parts:
        for name, module in model.named_modules():
            if model.part_of(name) != part or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            if isinstance(module, NonDynamicallyQuantizableLinear):
                continue  # nn.MultiheadAttention reads its weight directly, past any adapter
            if any(f"{name}.".startswith(prefix) for prefix in model.reinitialized):
                continue
            candidates.add(name.rsplit(".", 1)[-1])
            if wanted is None or name.rsplit(".", 1)[-1] in wanted:
                targets.append(name)
    if not targets:
        raise UserError(
            f"lora.modules={lora.modules} matches no layer in parts {list(lora.parts)}; layers there are called "
            f"{sorted(candidates)}"
        )
    return targets


def ledger(model: BaseModel, head_parameters: Sequence[nn.Parameter], lora: Lora) -> Ledger:
    """Count parameters by part; adapters are PEFT's `lora_` parameters."""
    named = [(model.part_of(name), name, parameter) for name, parameter in model.named_parameters()]
    by_part = {part: _count([(name, p) for where, name, p in named if where == part]) for part in PARTS}
    by_part["head"] = _count([("", parameter) for parameter in head_parameters])
    adapted = sorted({name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name})
    scale = None
    if adapted:
        alpha = lora.alpha_per_rank * lora.rank
        scale = alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    adapter = sum(n["adapter"] for n in by_part.values())
    total = sum(n["parameters"] for n in by_part.values())
    return Ledger(
        total=total,
        base=total - adapter - by_part["head"]["parameters"],
        adapter=adapter,
        head=by_part["head"]["parameters"],
        trainable=sum(n["trainable"] for n in by_part.values()),
        by_part=by_part,
        adapted_modules=tuple(adapted),
        scale=scale,
    )


def _count(parameters: Sequence[tuple[str, torch.Tensor]]) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for _, p in parameters),
        "trainable": sum(p.numel() for _, p in parameters if p.requires_grad),
        "adapter": sum(p.numel() for name, p in parameters if "lora_" in name),
    }
