"""`vlaexp train`: from a configuration to policy folders, and their evaluation at each milestone."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from vlaexp import manifest
from vlaexp.config import resolved, run_id
from vlaexp.dataset.batches import ChunkDataset
from vlaexp.dataset.demonstrations import Demonstrations
from vlaexp.errors import UserError
from vlaexp.eval.offline import held_out_error
from vlaexp.head.base import Head
from vlaexp.ledger import Ledger
from vlaexp.trainer.build import build as build_policy
from vlaexp.trainer.build import head_name, head_origin
from vlaexp.trainer.callbacks import CHECKPOINT, checkpoint_step
from vlaexp.trainer.dry_run import find_dead_adapters
from vlaexp.trainer.fit import Fit, fit, val_loader
from vlaexp.trainer.policy_folder import load_policy, save_policy
from vlaexp.trainer.tracking import RunLog, flat_params
from vlaexp.workflow.data import assign_cameras, load_demonstrations, training_frames
from vlaexp.workflow.evaluate import EvalResult, evaluate_milestones
from vlaexp.workflow.memory import check_gpu


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind."""

    run: Path
    milestones: dict[int, Path]
    held_out: dict[str, Any]
    evaluation: dict[int, EvalResult]


@dataclass(frozen=True)
class Parts:
    """Everything built from a configuration before the first step."""

    config: dict[str, Any]
    demos: Demonstrations
    head: Head
    adapter: Any
    ledger: Ledger
    settings: Fit
    run: Path
    identity: str

    @cached_property
    def dead_adapters(self) -> list[str]:
        """Found at the first milestone, on the device of the training."""
        return find_dead_adapters(self.head, self.settings.precision)


def build(cfg: DictConfig) -> Parts:
    """Dataset, model, adapter and head of a configuration, and the folder that the run belongs to."""
    config = resolved(cfg)
    settings: Fit = instantiate(cfg.trainer)
    demos = load_demonstrations(cfg)
    assign_cameras(demos, config["model"]["cameras"], guess=config["dataset"]["cameras"] == "auto")
    statistics = demos.statistics()
    check_gpu(config, settings, demos.spec, demos.state_dim, statistics)
    built = build_policy(config, demos.spec, demos.state_dim, statistics)
    head = built.head
    content = {
        "dataset": demos.content_hash(),
        "split": json.dumps([demos.split.train, demos.split.val]),
        "action_spec": json.dumps(demos.spec.to_dict(), sort_keys=True),
        "base": head.model.weights_fingerprint(),
        "norm_stats": head.norm_stats.content_hash(),
    }
    identity = run_id(config, content)
    return Parts(
        config=config,
        demos=demos,
        head=head,
        adapter=built.adapter,
        ledger=built.ledger,
        settings=settings,
        run=Path(cfg.outputs) / "runs" / f"{cfg.name}-{identity}",
        identity=identity,
    )


def train(cfg: DictConfig) -> TrainResult:
    """Train, or continue, or find finished; then evaluate each milestone on the configured panel."""
    parts = build(cfg)
    parts.head.model.read_instructions(sorted(set(parts.demos.columns.instructions)))
    run = parts.run
    run.mkdir(parents=True, exist_ok=True)
    if getattr(rank_zero_only, "rank", 0) != 0:
        _follow(cfg, parts)
        return TrainResult(run, {}, {}, {})
    try:
        with FileLock(run / ".lock", timeout=0):
            return _train_locked(cfg, parts)
    except Timeout as error:
        raise UserError(
            f"another process is training in {run}; wait for it, or change the configuration (seed=1, say)"
        ) from error


def _train_locked(cfg: DictConfig, parts: Parts) -> TrainResult:
    run, settings, head = parts.run, parts.settings, parts.head
    wanted = sorted({*settings.milestones, settings.max_steps})
    folders = {step: run / "milestones" / f"step_{step:06d}" for step in wanted}
    done = checkpoint_step(run / CHECKPOINT)
    passed = [step for step, folder in folders.items() if step <= done and not folder.is_dir()]
    if passed:
        raise UserError(
            f"{run} was trained to step {done} without milestones at {passed}, and training does not go back; it has "
            f"{sorted(p.name for p in (run / 'milestones').glob('step_*'))}; ask for one of those, or remove the run"
        )
    (run / "config.yaml").write_text(yaml.safe_dump(parts.config, sort_keys=False))
    data, val = _chunks(cfg, parts)
    _announce(parts, data, val, done)
    log = RunLog(
        run,
        instantiate(cfg.tracker),
        run.name,
        flat_params(parts.config) | {"trainable_parameters": parts.ledger.trainable},
        _tags(cfg, parts),
        resume_step=done,
    )
    began = time.perf_counter()

    def milestone(step: int) -> None:
        if step in folders:
            record = make_manifest(parts, data, step, step - done, time.perf_counter() - began)
            save_policy(folders[step], head, parts.adapter, parts.config, record)

    status = "failed"
    try:
        if done < settings.max_steps:
            fit(head, data, val, settings, run, log, milestone, run.name)
        # a training found finished has left `head` as it was built
        last = head if done < settings.max_steps else load_policy(folders[settings.max_steps])
        held_out = _held_out(parts, last, val)
        if held_out:
            (run / "held_out.json").write_text(json.dumps(held_out, indent=1) + "\n")
            errors = {f"held_out/{name}": value for name, value in held_out.items() if name.endswith("_mse")}
            log.log(errors, settings.max_steps)
        evaluation = evaluate_milestones(cfg, folders, log)
        status = "finished"
    finally:
        log.finish(status)
    print(log.describe(), file=sys.stderr)
    return TrainResult(run, folders, held_out, evaluation)


def _follow(cfg: DictConfig, parts: Parts) -> None:
    """The part of a data-parallel rank beside the first: it trains, and leaves folders, logs and evaluation alone."""
    data, val = _chunks(cfg, parts)
    fit(parts.head, data, val, parts.settings, parts.run, None, lambda step: None, parts.run.name)


def _chunks(cfg: DictConfig, parts: Parts) -> tuple[ChunkDataset, ChunkDataset | None]:
    """Training and held-out data."""
    demos, head = parts.demos, parts.head
    frames, cached = training_frames(parts.config, demos, head.model, Path(cfg.outputs) / "cache")

    def chunks(episodes: Sequence[int]) -> ChunkDataset:
        return demos.chunks(episodes, frames, head.n_obs_steps, cached, head.model.label_steps)

    return chunks(demos.split.train), chunks(demos.split.val) if demos.split.val else None


def _held_out(parts: Parts, head: Head, val: ChunkDataset | None) -> dict[str, Any]:
    loader = val_loader(val, parts.settings)
    if loader is None:
        return {}
    mean = parts.demos.statistics().quantities["action"].mean  # the head's may be of the weights
    return held_out_error(head.eval().cpu(), loader, mean)


def _announce(parts: Parts, data: ChunkDataset, val: ChunkDataset | None, done: int) -> None:
    demos, settings = parts.demos, parts.settings
    origin = head_origin(parts.config, parts.head.model, demos.spec.space)
    lines = [
        f"run {parts.run}",
        f"dataset {demos.root}: {len(demos.split.train)} episodes ({len(data)} frames) to train on, "
        f"{len(demos.split.val)} held out ({0 if val is None else len(val)} frames)",
        f"actions {demos.spec.space} against {demos.spec.reference}: {demos.spec.dim} dimensions, "
        f"horizon {parts.head.action_horizon}, {parts.head.n_action_steps} executed",
        f"head {head_name(parts.config)} from {origin}; norm stats: {parts.head.norm_stats.source}",
        *parts.ledger.lines(),
        f"steps {done} of {settings.max_steps} done; milestones {sorted({*settings.milestones, settings.max_steps})}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _tags(cfg: DictConfig, parts: Parts) -> dict[str, str]:
    tags = {"vlaexp.run_id": parts.identity, "vlaexp.run_folder": str(parts.run.resolve())}
    if cfg.parent_run is not None:
        tags["mlflow.parentRunId"] = cfg.parent_run
    return tags


def make_manifest(parts: Parts, data: ChunkDataset, step: int, steps: int, seconds: float) -> dict[str, Any]:
    """What the policy at `step` is, for another lab; the last `steps` of it took this process `seconds`."""
    demos, head, config = parts.demos, parts.head, parts.config
    recorded = demos.card.recorded
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_memory()
    return {
        "run": parts.run.name,
        "run_id": parts.identity,
        "step": step,
        "task": sorted(set(demos.columns.instructions))[:50],
        "base": {
            "name": config["model"]["_target_"],
            "fingerprint": head.model.weights_fingerprint(),
            "weights": config["model"].get("weights"),
            "reinitialized": list(head.model.reinitialized),
            "training_seeds": [list(span) for span in head.model.training_seeds],
        },
        "head": head_name(config),
        "head_from": head_origin(config, head.model, demos.spec.space),
        "action_spec": demos.spec.to_dict(),
        "action_horizon": head.action_horizon,
        "n_action_steps": head.n_action_steps,
        "n_obs_steps": head.n_obs_steps,
        "adaptation": parts.ledger.to_dict() | {"dead_adapters": parts.dead_adapters},
        "freeze": config["freeze"]["parts"],
        "embodiment": demos.card.embodiment,
        "cameras": {name: demos.cameras[name] for name in head.model.cameras},
        "image_pipeline": head.model.image_pipeline(),
        "dataset": {
            "name": demos.name,
            "revision": config["dataset"].get("revision"),
            "files": demos.files,
            "content": demos.content_hash(),
            "train_episodes": list(demos.split.train),
            "val_episodes": list(demos.split.val),
            "episode_fingerprints": demos.episode_fingerprints,
            "recorded": recorded,
            "fps": demos.folder.fps,
        },
        "norm_stats": {"source": head.norm_stats.source, "content": head.norm_stats.content_hash()},
        "seed": config["seed"],
        "config": config,
        "runtime": {
            "seconds": round(seconds, 1),
            "steps": steps,
            "batch_size": parts.settings.batch_size,
            "peak_memory_mb": round(peak / 1e6, 1),
            "frames": len(data),
        },
        **manifest.surroundings(),
    }


def _peak_memory() -> float:
    """Peak resident memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
