"""Weights on disk: strict loading, and the fingerprint that ties an adapter to its base."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlaexp.errors import UserError, nearest


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and values (of which there are none on the meta device), in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if not tensor.is_meta:
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not frozen, and buffers: batch normalization learns its statistics."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in module.state_dict().items() if name not in parameters}
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad} | buffers


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; a missing or damaged one is a `UserError`."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"weights file {path} does not exist; {_siblings(path)}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights file {path} is damaged ({error}); copy or train it again") from error


def load_strictly(module: nn.Module, path: Path, left_out: Sequence[str] = ()) -> None:
    """Load a file into `module`, every key accounted for. Keys starting with `left_out` are not loaded.

    Raises:
        UserError: with the list of missing, unknown and wrongly shaped keys.
    """
    load_tensors(module, read_safetensors(path), str(path), left_out)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str, left_out: Sequence[str] = ()) -> None:
    """`load_strictly` for tensors already in memory."""

    def counts(name: str) -> bool:
        return not any(name.startswith(prefix) for prefix in left_out)

    own = {name: value for name, value in module.state_dict().items() if counts(name)}
    given = {name: value for name, value in tensors.items() if counts(name)}
    copy_strictly(own, given, source)


def copy_strictly(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Copy `given` into `own` in place, when names and shapes agree exactly.

    Raises:
        UserError: with the list of missing, unknown and wrongly shaped keys.
    """
    missing = sorted(set(own) - set(given))
    unknown = sorted(set(given) - set(own))
    wrong = [
        f"{name}: file {tuple(given[name].shape)}, model {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(given))
        if own[name].shape != given[name].shape
    ]
    if missing or unknown or wrong:
        hints = [f"{name} ({nearest(name, own)})" for name in unknown[:3]]
        raise UserError(
            f"weights in {source} do not fit the model: missing {missing or 'none'}; unknown {hints or 'none'}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}; wrong shape {wrong or 'none'}; "
            "use the weights that belong to this configuration"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def _siblings(path: Path) -> str:
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either"
    return f"the folder holds {sorted(p.name for p in path.parent.iterdir())}"
