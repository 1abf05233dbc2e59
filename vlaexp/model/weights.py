"""Weights on disk: strict loading, and the fingerprint that ties an adapter to its base."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlaexp.errors import UserError

MOST_NAMES = 5  # of a kind in an error


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
    """Parameters that are not frozen, and persistent buffers: batch normalization learns its statistics."""
    buffers = {
        f"{where}.{name}".lstrip("."): value
        for where, child in module.named_modules()
        for name, value in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set
    }
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
    check_fit(own, given, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes.

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
        close = {name: difflib.get_close_matches(name, own, n=1, cutoff=0.4) for name in unknown[:MOST_NAMES]}
        hints = [f"{name} (nearest: {match[0]})" if match else name for name, match in close.items()]
        raise UserError(
            f"weights in {source} do not fit the model: missing {_few(missing, len(missing))}; unknown "
            f"{_few(hints, len(unknown))}; wrong shape {_few(wrong, len(wrong))}; "
            "use the weights that belong to this configuration"
        )


def _few(names: Sequence[str], count: int) -> str:
    """The first of `count` names."""
    if not names:
        return "none"
    shown = list(names[:MOST_NAMES])
    return f"{shown} and {count - len(shown)} more" if count > len(shown) else f"{shown}"


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder: model.safetensors, or all shards that model.safetensors.index.json names.

    Raises:
        UserError: where a file is missing or damaged, shards and index disagree, or there are only pickled weights.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() and not index.exists():
        return read_safetensors(single)
    if not index.exists():
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
        raise UserError(
            f"{folder} has no model.safetensors and no {index.name}"
            f"{f', but {pickles}: pickles can run code, so they are not opened' if pickles else ''}; "
            "download or convert the weights as safetensors"
        )
    try:
        place: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{index} is damaged ({error!r}); download it again") from error
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(place.values())):
        found = read_safetensors(folder / shard)
        listed = {name for name, file in place.items() if file == shard}
        if odd := sorted(listed ^ set(found)):
            raise UserError(f"{index.name} and {folder / shard} disagree on {_few(odd, len(odd))}; download both again")
        tensors |= found
    return tensors


def _siblings(path: Path) -> str:
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either"
    return f"the folder holds {sorted(p.name for p in path.parent.iterdir())}"
