"""Twins of a base: the same numbers in the same memory, until one takes its own."""

from collections.abc import Callable

import pytest
import torch

from vlaexp.data_types import Observation
from vlaexp.lora import Freeze, Lora, add_adapter, freeze_parts
from vlaexp.model.sharing import move_together, own_memory, twin
from vlaexp.model.tiny import TinyVLA


def places(model: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_a_twin_reads_the_same_memory_and_has_its_own_modules(model: TinyVLA, observation: Observation) -> None:
    other = twin(model)
    assert places(other) == places(model)
    assert torch.equal(other.prefill(observation).hidden, model.prefill(observation).hidden)
    assert other.weights_fingerprint() == model.weights_fingerprint()
    freeze = Freeze(("vision", "projector", "language"))
    freeze_parts(other, freeze)
    add_adapter(other, Lora(4), freeze)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora_" in name for name, _ in model.named_parameters())
    buffers, others = dict(model.named_buffers()), dict(other.named_buffers())
    assert buffers
    assert not {buffer.data_ptr() for buffer in buffers.values()} & {buffer.data_ptr() for buffer in others.values()}


def test_what_a_twin_owns_is_not_written_for_others(model: TinyVLA) -> None:
    other = twin(model)
    own_memory(other.decoder.parameters())
    for parameter in other.decoder.parameters():
        with torch.no_grad():
            parameter.zero_()
    assert any(parameter.any() for parameter in model.decoder.parameters())
    assert places(other.language) == places(model.language)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_shared_memory_stays_shared_on_a_device(make_model: Callable[..., TinyVLA], device: str) -> None:
    base = make_model()
    models = [twin(base), twin(base)]
    own_memory(models[1].decoder.parameters())
    named = [dict(model.named_parameters()) for model in models]
    move_together(models, torch.device(device))
    for name, parameter in models[0].named_parameters():
        assert parameter is named[0][name]
        assert parameter.device.type == device
        assert (parameter.data_ptr() == named[1][name].data_ptr()) != name.startswith("decoder."), name
        assert torch.equal(parameter.cpu(), base.get_parameter(name))
