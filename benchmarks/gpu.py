"""`make bench-gpu`: the large bases at full size on one GPU, with random weights: memory, speed, latency.

Each base is built on the meta device, its memory predicted as `vlaexp plan` does, and then given random weights on the
GPU, 4-bit layers one after the other. Results go to benchmarks/results/gpu.json and gpu.md. Without a GPU the tests'
small checkpoints run on the CPU, to show that the script works; their numbers go to outputs/ and mean nothing.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hydra.utils import instantiate
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.surroundings import ROOT, surroundings
from vlaexp.config import compose, resolved
from vlaexp.head.base import Head
from vlaexp.head.diffusion import DiffusionHead
from vlaexp.model import quantize
from vlaexp.model.rdt import RDT
from vlaexp.model.rdt_language import embedding_file
from vlaexp.trainer.dry_run import autocast, made_up_batch
from vlaexp.trainer.fit import Fit
from vlaexp.workflow.memory import GIB, build_for_planning, memory_gib
from vlaexp.workflow.plan import find_shapes

COMMAND = "make bench-gpu"
PRECISION = "bf16-mixed"
ADAPTERS = ["freeze=all", "lora=r32", "lora.targets=all-linear", "augmentation=none", f"trainer.precision={PRECISION}"]
TOKENS = ["model=openvla_7b", "head=discrete_token", "n_action_steps=1"]
BASES = {
    "openvla_7b": [*TOKENS, "head.decoding=parallel", "action_horizon=8"],
    "pi0": ["model=pi0", "head=flow", "head.samples_per_observation=1"],
    "smolvla": ["model=smolvla", "head=flow", "head.samples_per_observation=1"],
    "rdt_1b": ["model=rdt_1b", "head=diffusion", "action_horizon=64", "lora.targets=[projector,language,decoder]"],
}
TRAININGS = {"LoRA r32": ([], (1, 8, 16)), "QLoRA r32": (["lora.quantize=nf4"], (1,))}
LATENCIES = {
    "openvla_7b, autoregressive, 1 step": [*TOKENS, "head.decoding=autoregressive", "action_horizon=1"],
    "openvla_7b, parallel, 8 steps": BASES["openvla_7b"],
} | {name: keys for name, keys in BASES.items() if name != "openvla_7b"}
SMALL_HORIZON = ["action_horizon=4", "n_action_steps=1"]  # of the tests' RDT


@dataclass(frozen=True)
class Training:
    """One training step, measured; memory is None on a CPU, everything where it did not fit."""

    base: str
    adapters: str
    batch_size: int
    predicted_gib: float
    peak_gib: float | None
    samples_per_s: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.peak_gib is None else self.predicted_gib / self.peak_gib


@dataclass(frozen=True)
class Latency:
    """One prediction for one observation, measured."""

    what: str
    milliseconds: float
    actions_per_s: float


@dataclass(frozen=True)
class Measured:
    """All rows."""

    device: str
    trainings: list[Training]
    latencies: list[Latency]

    @property
    def speed_up(self) -> float:
        """Actions/s of OpenVLA's parallel decoding, 8 at once, over autoregressive single steps."""
        found = {row.what: row.actions_per_s for row in self.latencies}
        return found["openvla_7b, parallel, 8 steps"] / found["openvla_7b, autoregressive, 1 step"]

    def peak_gib(self, adapters: str, batch_size: int) -> float:
        """Of OpenVLA-7B; infinite where it did not fit."""
        wanted = ("openvla_7b", adapters, batch_size)
        (row,) = (r for r in self.trainings if (r.base, r.adapters, r.batch_size) == wanted)
        return float("inf") if row.peak_gib is None else row.peak_gib


def main() -> int:
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        print("no GPU: the tests' small checkpoints on the CPU; these are not the figures", file=sys.stderr)
    found = measure()
    folder = ROOT / "benchmarks" / "results" if on_gpu else ROOT / "outputs" / "benchmark_gpu"
    folder.mkdir(parents=True, exist_ok=True)
    trainings = [asdict(row) | {"ratio": row.ratio} for row in found.trainings]
    rows = {"trainings": trainings, "latencies": [asdict(row) for row in found.latencies]}
    about = {"command": COMMAND, "full_size": on_gpu, **surroundings()}
    (folder / "gpu.json").write_text(json.dumps(about | rows, indent=1) + "\n")
    (folder / "gpu.md").write_text(page(found, about))
    print(f"{(folder / 'gpu.md').read_text()}\nmade {folder / 'gpu.json'} and {folder / 'gpu.md'}")
    return 0


def measure() -> Measured:
    """Every training and every latency; one model on the device at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = (lambda base: []) if device == "cuda" else stack.enter_context(small_checkpoints(folder))
        trainings = [row for base in BASES for row in train(base, weights(base), device, folder)]
        latencies = []
        for what, keys in LATENCIES.items():
            head, *_ = build([*ADAPTERS, *keys, *weights(what.split(",")[0])], folder)
            materialise(head, torch.device(device))
            latencies.append(latency(what, head.eval()))
            del head
    return Measured(device, trainings, latencies)


def build(keys: Sequence[str], folder: Path) -> tuple[Head, dict[str, Any], Fit, float]:
    """A head on the meta device, its configuration, and its training's predicted memory in GiB."""
    rdt = [f"model.language_embeddings={folder / 'language'}"] if "model=rdt_1b" in keys else []
    cfg = compose("plan", [*keys, *rdt, f"outputs={folder}"])
    config, settings, shapes = resolved(cfg), instantiate(cfg.trainer), find_shapes(cfg)
    built, _ = build_for_planning(config, shapes.spec, shapes.state_dim, shapes.statistics)
    if isinstance(built.head.model, RDT):
        write_language(built.head.model, folder / "language")
    return built.head, config, settings, memory_gib(built, config, settings)["total"]


def materialise(head: Head, device: torch.device) -> None:
    """Random weights for a head that was built on the meta device; norm stats that change nothing."""
    for name, layer in list(head.named_modules()):
        if isinstance(layer, nn.Linear) and quantize.statistics(layer.weight):
            size, bias = (layer.in_features, layer.out_features), layer.bias is not None
            parent, _, child = name.rpartition(".")
            owner = head.get_submodule(parent)
            setattr(owner, child, nn.Linear(*size, bias, device, layer.weight.dtype).requires_grad_(False))
            quantize.quantize(owner, [child])

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if not tensor.is_floating_point():  # positions
            return torch.arange(tensor.numel(), device=device).to(tensor.dtype).view(tensor.shape)
        return torch.empty_like(tensor, device=device).normal_(0, 0.02)

    head._apply(real).to(device)
    for buffer in head.buffers():
        if buffer.is_floating_point():
            buffer.fill_(1)
    if isinstance(head, DiffusionHead):  # its tables are neither parameters nor buffers
        head.noise_schedule = DDPMScheduler.from_config(head.noise_schedule.config)  # type: ignore[assignment]


def write_language(model: RDT, folder: Path) -> None:
    """Embeddings of made-up instructions."""
    folder.mkdir(exist_ok=True)
    width = model.language.adaptor[0].in_features
    for text in () if model.language.known() else [*model.sample_instructions, ""]:  # which dropout puts in their place
        embedding = torch.randn(16, width)  # type: ignore[arg-type]
        save_file({"embedding": embedding}, embedding_file(folder, text), metadata={"instruction": text})


def train(base: str, weights: Sequence[str], device: str, folder: Path) -> Iterator[Training]:
    """Each kind of adapters at each batch size."""
    for adapters, (keys, batch_sizes) in TRAININGS.items():
        for size in batch_sizes if device == "cuda" else (1,):
            common = [*ADAPTERS, *BASES[base], *weights, *keys, f"trainer.batch_size={size}"]
            peak = speed = None
            head, config, settings, predicted = build(common, folder)
            try:
                materialise(head, torch.device(device))
                peak, speed = steps(head, config, settings)
            except torch.cuda.OutOfMemoryError:
                print(f"{base} {adapters} batch {size}: out of memory", file=sys.stderr)
            yield Training(base, adapters, size, predicted, peak, speed)
            print(f"{base} {adapters} batch {size}: {peak} GiB, {speed} samples/s", file=sys.stderr)
            del head  # before the next comes to the device


def steps(head: Head, config: dict[str, Any], settings: Fit, count: int = 10) -> tuple[float | None, float]:
    """Peak GiB and samples/s of training steps as Lightning does them, without loading data."""
    on_gpu = head.device.type == "cuda"
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = instantiate(config["optimizer"])([{"params": trained}])
    batch = made_up_batch(head.train(), settings.batch_size)

    def step() -> None:
        with autocast(head.device, PRECISION):
            loss, _ = head.compute_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = time_of(step, count, head.device)
    return torch.cuda.max_memory_allocated() / GIB if on_gpu else None, settings.batch_size / seconds


def latency(what: str, head: Head) -> Latency:
    """Median time of a prediction for one observation."""
    observation = made_up_batch(head, 1).observation

    def act() -> None:
        with torch.inference_mode(), autocast(head.device, PRECISION):
            head.predict_action(observation)

    seconds = time_of(act, 20, head.device)
    return Latency(what, 1000 * seconds, head.action_horizon / seconds)


def time_of(work: Callable[[], None], count: int, device: torch.device) -> float:
    """Median seconds of `work`, after three times to warm up; on a CPU it runs once, to show that it does."""
    times, warm_up = [], 3 if device.type == "cuda" else 0
    for i in range(count + 3 if warm_up else 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times += [time.perf_counter() - began] if i >= warm_up else []
    return statistics.median(times)


@contextmanager
def small_checkpoints(folder: Path) -> Iterator[Callable[[str], list[str]]]:
    """Overrides by base that name small checkpoints, which the tests write; LeRobot's names mean small sizes inside."""
    sys.path.append(str(ROOT / "tests"))
    import lerobot_checkpoints  # type: ignore[import-not-found]
    import openvla_checkpoint  # type: ignore[import-not-found]
    import rdt_checkpoint  # type: ignore[import-not-found]

    made = {"openvla_7b": openvla_checkpoint.write(folder / "openvla_7b"), "rdt_1b": folder / "rdt_1b"}
    rdt_checkpoint.write(made["rdt_1b"])
    with lerobot_checkpoints.small():
        vlm = lerobot_checkpoints.write_vlm(folder / "vlm")
        policies = {"pi0": lerobot_checkpoints.pi0_policy(), "smolvla": lerobot_checkpoints.smolvla_policy(vlm)}
        made |= {name: lerobot_checkpoints.write(folder / name, policy, 17) for name, policy in policies.items()}
        more = {"rdt_1b": SMALL_HORIZON}
        yield lambda base: [f"model.weights={made[base]}", *more.get(base, [])]


def page(found: Measured, about: dict[str, Any]) -> str:
    """gpu.md."""
    note = "" if about["full_size"] else "\n**Small checkpoints on a CPU: these are not the figures.**\n"
    lines = [
        "# The large bases on a GPU",
        "",
        f"Written by `{COMMAND}` at {about['commit']} on {about['machine']}, {about['date']}.",
        f"Random weights, precision `{PRECISION}`, adapters on every linear layer, frozen base, no",
        "gradient checkpointing. *Peak* is what torch allocated at most, *predicted* the total of `vlaexp plan`.",
        note,
        "| base | adapters | batch | predicted GiB | peak GiB | ratio | samples/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found.trainings:
        numbers = (row.predicted_gib, row.peak_gib, row.ratio, row.samples_per_s)
        shown = ["-" if number is None else f"{number:.2f}" for number in numbers]
        lines.append(f"| {row.base} | {row.adapters} | {row.batch_size} | {' | '.join(shown)} |")
    lines += ["", "| one observation | ms | actions/s |", "|---|---:|---:|"]
    lines += [f"| {row.what} | {row.milliseconds:.1f} | {row.actions_per_s:.1f} |" for row in found.latencies]
    return "\n".join([*lines, "", f"Parallel decoding gives {found.speed_up:.1f} times the actions/s.", ""])


if __name__ == "__main__":
    sys.exit(main())
