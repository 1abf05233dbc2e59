"""The policy folder: what a run yields at each milestone, and its loading.

    config.yaml  adapter/ (PEFT format)  head.safetensors  norm_stats.json  action_spec.json  manifest.json
    lerobot/ (config and processors, with head=native)

`head.safetensors` holds everything that training changed besides adapters. Base weights are never copied; their
fingerprint in the manifest is checked on loading. A folder appears under its name when it is complete.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import instantiate
from peft import PeftModel
from safetensors.torch import save_file

from vlaexp.action_spec import ActionSpec
from vlaexp.dataset.normalize import NormStats
from vlaexp.errors import UserError
from vlaexp.head.base import Head
from vlaexp.lora import Freeze, freeze_parts, load_adapter, quantize_base
from vlaexp.manifest import hash_folder, read, verify, write
from vlaexp.model.weights import copy_strictly, read_safetensors
from vlaexp.trainer.build import build_head, build_model

FILES = ("config.yaml", "head.safetensors", "norm_stats.json", "action_spec.json")


def save_policy(
    folder: Path, head: Head, adapter: PeftModel | None, config: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Path:
    """Write the policy to `folder`, at once."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    save_file({name: value.contiguous() for name, value in head.own_tensors().items()}, partial / "head.safetensors")
    head.norm_stats.save(partial / "norm_stats.json")
    head.spec.save(partial / "action_spec.json")
    head.save_files(partial)
    if adapter is not None:
        adapter.save_pretrained(str(partial / "adapter"), save_embedding_layers=False)  # base weights stay out
    write(partial, {**manifest, "files": hash_folder(partial, ["*", "*/*"])})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def load_policy(folder: Path | str) -> Head:
    """A policy folder as a ready head, in evaluation mode, on the CPU.

    Raises:
        UserError: where the folder is incomplete or damaged, or the base's weights are not those it was trained on.
    """
    folder = Path(folder)
    manifest = read(folder)
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise UserError(f"policy folder {folder} lacks {missing}; copy the whole folder or train again")
    if problems := verify(folder):
        raise UserError(
            f"policy folder {folder} does not match its manifest: {'; '.join(problems)}; copy the whole folder again "
            "or train again"
        )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    spec = ActionSpec.load(folder / "action_spec.json")
    norm_stats = NormStats.load(folder / "norm_stats.json")
    state_dim = norm_stats.quantities["state"].mean.shape[-1]
    model = build_model(config, state_dim, has_goal="goal" in norm_stats.quantities, action_dim=spec.dim)
    if model.weights_fingerprint() != manifest["base"]["fingerprint"]:
        raise UserError(
            f"policy {folder} was trained on base weights {manifest['base']['fingerprint'][:12]}..., this "
            f"{manifest['base']['name']} has {model.weights_fingerprint()[:12]}...; an adapter is worthless on another "
            "base: use the same weights (model.weights) or the same vlaexp version"
        )
    head = build_head(config, model, spec, norm_stats)
    head.load_files(folder)
    freeze: Freeze = instantiate(config["freeze"], _convert_="all")
    freeze_parts(model, freeze)
    quantize_base(model, instantiate(config["lora"], _convert_="all"), freeze)
    if (folder / "adapter").is_dir():
        load_adapter(model, folder / "adapter")
    elif config["lora"]["rank"] > 0:
        raise UserError(f"policy folder {folder} lacks adapter/; copy the whole folder or train again")
    path = folder / "head.safetensors"
    copy_strictly(head.own_tensors(), read_safetensors(path), str(path))
    return head.eval()
