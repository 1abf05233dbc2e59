"""What a training step and a policy folder have cost on this machine: read from the manifests of finished runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaexp import manifest

HOUR = 3600  # s


@dataclass(frozen=True)
class MeasuredStep:
    """Of one run: seconds per step, and bytes of a policy folder and of the resume checkpoint."""

    seconds: float
    milestone_bytes: int
    checkpoint_bytes: int
    device: str
    run: str

    def expected(self, steps: int) -> dict[str, Any]:
        """Hours for so many steps, and where that comes from."""
        return {"hours": steps * self.seconds / HOUR, "seconds_per_step": self.seconds, "measured_in": self.run}


def measured_steps(outputs: Path, device: str | None = None) -> dict[str, MeasuredStep]:
    """The newest measured step of each kind of work.

    Args:
        outputs: folder of runs.
        device: only runs on a device of this name; None for any.
    """
    found: dict[str, MeasuredStep] = {}
    paths = outputs.glob(f"runs/*/milestones/*/{manifest.MANIFEST_FILE}")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        record = manifest.read(path.parent)
        runtime = record["runtime"]
        alone = runtime.get("packed", 1) == 1  # the time of a pack is that of all its trainings
        if alone and runtime.get("steps") and (device is None or device in record["device"]):
            checkpoint = path.parents[2] / "checkpoint.ckpt"
            found[work_key(record["config"])] = MeasuredStep(
                runtime["seconds"] / runtime["steps"],
                sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
                + sum(file.stat().st_size for file in path.parent.glob("adapter/*")),
                checkpoint.stat().st_size if checkpoint.exists() else 0,
                record["device"],
                record["run"],
            )
    return found


def work_key(config: Mapping[str, Any]) -> str:
    """What decides how long a step takes and how much a policy folder holds, beside the device."""
    model = {key: value for key, value in config["model"].items() if key != "weights"}
    keys = ("batch_size", "precision", "accumulate_grad_batches", "devices", "num_threads")
    trainer = [config["trainer"].get(key) for key in keys]
    parts = [model, config["head"], config["lora"], config["freeze"], config["action_horizon"], trainer]
    return json.dumps(parts, sort_keys=True)
