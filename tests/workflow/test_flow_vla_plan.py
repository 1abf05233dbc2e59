"""The published pi0 and SmolVLA are planned without their weights."""

import json
from pathlib import Path

import pytest

from vlaexp import cli

UNUSED = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("model", "base", "last"), [("pi0", 3_238_048_528, 17), ("smolvla", 402_737_376, 15)])
def test_the_published_size_is_planned(capsys, tmp_path: Path, model: str, base: int, last: int) -> None:
    command = ["plan", f"model={model}", "head=flow", "lora=r32", "trainer=cpu", "trainer.batch_size=1", "name=plan"]
    assert cli.main([*command, f"outputs={tmp_path}", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["built_on"] == "meta"
    assert found["parameters"]["base"] == base
    assert found["memory_gib"]["weights"] < 4 * base / 2**30 + 0.01
    # of the last layer the expert reads keys and values, and nothing else
    dead = found["dead_adapters"]
    assert {name.rsplit(".", 1)[-1] for name in dead} == UNUSED
    assert all(f".layers.{last}." in name for name in dead)
