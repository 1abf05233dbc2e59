"""Frozen linear layers in 4 bits: NF4, double quantization, bfloat16 products (QLoRA, Dettmers et al. 2023,
arXiv 2305.14314), by bitsandbytes.

A weight takes 4 bits, 8 more for each block of 64 weights, and 32 for each 256 of those: 4.127 bits in all. The packed
numbers lie in a tensor of the weight's own dtype, because models ask a weight for its dtype to cast their inputs.
"""

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vlaexp.errors import UserError

QUANTIZATIONS = ("nf4",)
COMPUTE = torch.bfloat16


def bitsandbytes() -> ModuleType:
    """The library, which is an extra.

    Raises:
        UserError: where it is not installed.
    """
    try:
        import bitsandbytes as library
    except ImportError as error:
        raise UserError(
            f"lora.quantize=nf4 needs bitsandbytes, which is not installed ({error}); "
            "pip install 'vlaexp[quantize]', or set lora.quantize=null"
        ) from error
    return library


Known = dict[int, tuple[Tensor, nn.Parameter]]  # by address: a weight, held so that it keeps it, and its 4-bit form


def quantize(model: nn.Module, names: Iterable[str], known: Known | None = None) -> None:
    """Replace linear layers of `model`, in place and one after the other, so that never two forms of more than one lie
    on a GPU; PEFT then puts its 4-bit adapters on them.

    Args:
        model: on the CPU, or the meta device.
        names: of the layers.
        known: for models that share weights and shall go on sharing them: the 4-bit ones so far; new ones are added.
    """
    with torch.device("cpu"):  # bitsandbytes keeps a table of its first use, which might be without numbers
        bitsandbytes().functional.quantize_blockwise(torch.zeros(1))
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), child, _in_4_bits(layer, known))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # where PEFT looks


def _in_4_bits(layer: nn.Linear, known: Known | None) -> nn.Module:
    library, weight = bitsandbytes(), layer.weight.detach()
    with torch.device("meta"):
        small = library.nn.Linear4bit(
            layer.in_features, layer.out_features, False, COMPUTE, quant_type="nf4", quant_storage=weight.dtype
        )
    small.support_avx512bf16_for_cpu = False  # a form for evaluation alone, which passes no gradient afterwards
    if known is None:
        made = _quantized(library, weight)
    else:
        if weight.data_ptr() not in known:
            known[weight.data_ptr()] = weight, _quantized(library, weight)
        made = known[weight.data_ptr()][1]
    small.weight, small.quant_state = made, made.quant_state  # type: ignore[attr-defined]
    if layer.bias is not None:  # bitsandbytes would cast it in the first forward pass
        small.bias = nn.Parameter(layer.bias.detach().to(COMPUTE), requires_grad=False)
    return small.train(layer.training)


def _quantized(library: ModuleType, weight: Tensor) -> nn.Parameter:
    """On the GPU where there is one, which is much faster; the result lies where `weight` does."""
    fast = "cuda" if torch.cuda.is_available() and not weight.is_meta else weight.device
    packed, state = library.functional.quantize_4bit(
        weight.to(fast), compress_statistics=True, quant_type="nf4", quant_storage=weight.dtype
    )
    state.to(weight.device)
    return library.nn.Params4bit(
        packed.to(weight.device),
        quant_state=state,
        quant_type="nf4",
        quant_storage=weight.dtype,
        bnb_quantized=True,
    )


def dequantize(model: nn.Module) -> None:
    """Replace 4-bit layers by plain ones with the weights that they stand for, in place."""
    for name, layer in list(model.named_modules()):
        if (state := _state(getattr(layer, "weight", None))) is None:
            continue
        weight = bitsandbytes().functional.dequantize_4bit(layer.weight.data, state)
        with torch.device("meta"):
            plain = nn.Linear(*reversed(weight.shape), bias=False)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            assert isinstance(layer.bias, Tensor)
            plain.bias = nn.Parameter(layer.bias.to(weight.dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
    model.is_loaded_in_4bit = False  # type: ignore[assignment]


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer is in 4 bits."""
    return any(_state(parameter) is not None for parameter in model.parameters())


def count(parameter: Tensor) -> int:
    """Weights that a parameter stands for."""
    state = _state(parameter)
    return parameter.numel() if state is None else state.shape.numel()


def statistics(parameter: Tensor) -> list[Tensor]:
    """What a 4-bit parameter takes of memory beside its packed numbers."""
    state = _state(parameter)
    if state is None:
        return []
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def _state(parameter: Any) -> Any:
    """bitsandbytes' `QuantState` of a 4-bit parameter."""
    return getattr(parameter, "quant_state", None)
