"""One base under several trainings: modules of their own, frozen weights in the same memory."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlaexp.model.base import BaseModel


def twin(model: BaseModel) -> BaseModel:
    """A copy with modules, buffers and attributes of its own, whose parameters lie in the memory of those of `model`.

    Adapters, heads and freezing of one do not touch the other; whoever writes to a parameter calls `own_memory` first.
    """
    lent: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, lent)


def own_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Move the numbers of `parameters` out of memory that others may read."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def move_together(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move the parameters of several modules to a device; what shares memory here shares it there."""
    moved: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
    for module in modules:
        for parameter in module.parameters():
            place = (parameter.data_ptr(), parameter.shape)
            if place not in moved:  # the old tensor is held with the new one, so that its place stays its own
                moved[place] = parameter.data, parameter.data.to(device)
            parameter.data = moved[place][1]
