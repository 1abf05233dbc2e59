"""What trains, in numbers: parameters by part, adapted modules, effective scale, and adapters that do nothing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlaexp.lora import Lora
from vlaexp.model.base import PARTS, BaseModel
from vlaexp.model.quantize import count


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


def ledger(model: BaseModel, head_parameters: Sequence[nn.Parameter], lora: Lora) -> Ledger:
    """Count parameters by part; adapters are PEFT's `lora_` parameters."""
    named = [(model.part_of(name), name, parameter) for name, parameter in model.named_parameters()]
    by_part = {part: _count([(name, p) for where, name, p in named if where == part]) for part in PARTS}
    by_part["head"] = _count([("", parameter) for parameter in head_parameters])
    adapted = sorted(adapters(model))
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


def _count(parameters: Sequence[tuple[str, Tensor]]) -> dict[str, int]:
    return {
        "parameters": sum(count(p) for _, p in parameters),
        "trainable": sum(count(p) for _, p in parameters if p.requires_grad),
        "adapter": sum(count(p) for name, p in parameters if "lora_" in name),
    }


def adapters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters of each adapter, by the name of the layer that carries it."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer, mark, rest = name.partition(".lora_")
        if mark:
            found.setdefault(layer, {})[rest] = parameter
    return found


def dead_adapters(model: BaseModel, loss: Callable[[], Tensor], actions: Callable[[], Tensor]) -> list[str]:
    """Layers whose adapters reach neither the loss nor the actions, so that they only cost memory and time.

    The loss is followed back: B is zero at the start, but its gradient is not, where the layer's output matters. What
    gets no gradient is then changed at random, because an output may also act through a detached tensor; dead is what
    changes nothing at all, although whatever else trains has been moved a little, because a gate that trains may begin
    at zero. On the meta device there are no numbers, and having no path back decides.

    Args:
        model: with or without adapters.
        loss: a training loss; the same number at every call, and of a batch in which no input is hidden by a mask.
        actions: the same numbers at every call.
    """
    by_layer = adapters(model)
    if not by_layer:
        return []
    ups = [next(p for name, p in own.items() if name.startswith("B.")) for own in by_layer.values()]
    gradients = torch.autograd.grad(loss(), ups, allow_unused=True)
    silent = [
        name
        for name, gradient in zip(by_layer, gradients, strict=True)
        if gradient is None or (not gradient.is_meta and not gradient.any())
    ]
    if not silent or ups[0].is_meta:
        return silent

    def changes(*names: str) -> bool:
        """Whether loss or actions differ while the adapters of these layers are changed."""
        with _moved((p for name in names for p in by_layer[name].values()), 1.0):
            return not (torch.equal(loss(), before[0]) and torch.equal(actions(), before[1]))

    quiet = {id(parameter) for name in silent for parameter in by_layer[name].values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in quiet]
    with torch.no_grad(), _moved(others, 0.01):
        before = loss(), actions()
        return silent if not changes(*silent) else [name for name in silent if not changes(name)]


@contextmanager
def _moved(parameters: Iterable[nn.Parameter], size: float) -> Iterator[None]:
    """For the while, with normal noise of this standard deviation added."""
    chosen = list(parameters)
    kept = [parameter.clone() for parameter in chosen]
    generator = torch.Generator().manual_seed(0)
    for parameter in chosen:
        parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    try:
        yield
    finally:
        for parameter, value in zip(chosen, kept, strict=True):
            parameter.copy_(value)
