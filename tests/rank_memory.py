"""A program of tests/workflow/test_ddp.py: trains as `vlaexp train` does and says what memory each rank took.

python rank_memory.py FOLDER OVERRIDES...       writes FOLDER/rank0.json, FOLDER/rank1.json
"""

import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlaexp.config import compose
from vlaexp.trainer.fit import fit
from vlaexp.trainer.sharding import layers_to_shard
from vlaexp.workflow.parts import Parts, build
from vlaexp.workflow.train import _chunks


def private_bytes() -> int:
    """Memory of this process alone: not of files that it maps, which the system keeps once for all ranks."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak(threading.Thread):
    """The largest `private_bytes` since it began, above what they were."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._begin, self.value = private_bytes(), 0
        self.start()

    def run(self) -> None:
        while True:
            self.value = max(self.value, private_bytes() - self._begin)
            time.sleep(0.002)


def held(tensors: list[Tensor]) -> int:
    """Bytes of the memory blocks that hold `tensors`, each block once."""
    plain = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain if t.device.type == "cpu"}
    return sum(blocks.values())


class Probe(Callback):
    """Writes the figures at the end of training, when the second step has been done."""

    def __init__(self, folder: Path, parts: Parts, peak: Peak) -> None:
        self._folder, self._peak = folder, peak
        self._base = [p for p in parts.head.parameters() if not p.requires_grad]
        self._shared = [p for layer in layers_to_shard(parts.head) for p in layer.parameters()]
        self._before = {"base": held(self._base), "shared": held(self._shared), "build_peak": peak.value}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        del self._base[:], self._shared[:]  # of the time before they were shared out
        gc.collect()
        alive = held([thing for thing in gc.get_objects() if isinstance(thing, Tensor)])
        frozen = held([p for p in pl_module.parameters() if not p.requires_grad])
        found = self._before | {"frozen": frozen, "alive": alive, "peak": self._peak.value}
        (self._folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


def main(folder: Path, overrides: list[str]) -> None:
    peak = Peak()
    cfg = compose("train", overrides)
    parts = build(cfg)
    parts.head.model.read_instructions(sorted(set(parts.demos.columns.instructions)))
    data, _ = _chunks(cfg, parts)
    torch.set_num_threads(1)
    fit(parts.head, data, None, parts.settings, folder, None, lambda step: None, "", [Probe(folder, parts, peak)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
