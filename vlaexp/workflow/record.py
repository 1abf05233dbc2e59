"""`vlaexp record`: demonstrations of the embedded world."""

from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vlaexp.config import resolved
from vlaexp.dataset.record import Recorder
from vlaexp.errors import UserError


def record(cfg: DictConfig) -> dict[str, Any]:
    """Record `cfg.episodes` demonstrations of `cfg.env` into `cfg.dataset.root`; returns counts and rates."""
    if cfg.dataset.root is None:
        raise UserError("dataset.root is not set; set it to the folder that the recording should become")
    environment = resolved(cfg.env)
    return Recorder(
        make_env=partial(instantiate, OmegaConf.create(environment), _convert_="all"),
        environment=environment,
        root=Path(cfg.dataset.root),
        episodes=cfg.episodes,
        first_seed=cfg.first_seed,
        action_noise=cfg.action_noise,
        defects=dict(cfg.defects or {}),
        use_videos=cfg.use_videos,
        workers=cfg.workers,
    ).run()
