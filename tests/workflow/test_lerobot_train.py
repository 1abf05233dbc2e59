"""LeRobot's own trainer, unmodified, runs on what `vlaexp record` wrote."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_act_trains(shared_outputs, tmp_path):
    command = [
        str(Path(sys.executable).with_name("lerobot-train")),
        "--policy.type=act",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--policy.pretrained_backbone_weights=null",  # nothing is downloaded
        "--dataset.repo_id=local/tabletop_pick",
        f"--dataset.root={shared_outputs / 'datasets' / 'tabletop_pick'}",
        f"--output_dir={tmp_path / 'act'}",
        "--steps=2",
        "--batch_size=2",
        "--num_workers=0",
        "--log_freq=1",
        "--wandb.enable=false",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "act/checkpoints/000002/pretrained_model/model.safetensors").is_file()
