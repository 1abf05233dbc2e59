"""Criteria of the large bases at full size, for one GPU of 141 GB: memory, the plan's predictions, decoding."""

from collections.abc import Iterator

from benchmarks.criteria import Found, measures
from benchmarks.gpu import measure

GB = 2**30 / 1e9  # of a GiB


@measures(long=True, needs_gpu=True)
def large_bases() -> Iterator[Found]:
    found = measure()
    for adapters, size, bound in (("LoRA r32", 1, 20), ("QLoRA r32", 1, 10), ("LoRA r32", 16, 50)):
        name = f"OpenVLA-7B {adapters}, batch {size}: peak memory in GB"
        yield Found(name, GB * found.peak_gib(adapters, size), f"<= {bound}", 1)
    ratios = [abs(row.ratio - 1) for row in found.trainings if row.ratio is not None]
    yield Found("memory of vlaexp plan, largest relative error", max(ratios), "<= 0.1", len(ratios))
    yield Found("OpenVLA-7B, actions/s of parallel over autoregressive decoding", found.speed_up, ">= 25", 20)
