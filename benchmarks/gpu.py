"""All figures that need a GPU, in one call of at most 8 minutes; every row is written as soon as it is found.

    python benchmarks/gpu.py --out gpu.jsonl                       # an H100 or H200 alone, 60 GiB of it
    python benchmarks/gpu.py --out gpu.jsonl --sections small numbers
    python benchmarks/gpu.py --out try.jsonl --tiny                # small shapes, also on a CPU: does it run?

Sections, most wanted first; one that no longer fits into --minutes is left out, and said:

    small    steps of momatch, eager and recorded, beside the bare network calls, eager and recorded
    numbers  50 losses: recorded and compiled against eager; recorded against itself after a resume
    large    391 M parameters at 64×64 in bfloat16: bare calls and joint updates, as TFLOP/s and share of peak
    memory   the plan of each option against the allocator's peak
    profile  where the time of a large joint update goes, by kind of kernel
    quality  digits students in float32 eager and in bfloat16 recorded, their FD
    nccl     FSDP2 in a world of one process against the plain step

Times are medians of at least 20 after a warm-up, waited for; nothing else may run on the card. Data are
random but in `quality`: time and memory do not depend on what they show.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from momatch.config.recipes import recipe
from momatch.config.schema import DistillConfig, MonitorConfig, TrainConfig
from momatch.data.images import ImageSet, Split
from momatch.data.sources import load_data
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.evaluation.evaluate import evaluate_at
from momatch.methods.alternating import AlternatingConfig
from momatch.methods.base import MethodConfig
from momatch.methods.instant import InstantConfig
from momatch.models.model import Model
from momatch.networks import registry
from momatch.networks.configs import UNetConfig, UViTConfig
from momatch.training import plan as planning
from momatch.training.build import distillation, teacher_of
from momatch.training.loop import train

PEAK = 989e12  # bfloat16 of an H100 or H200, dense, in operations a second
METHODS: dict[str, MethodConfig] = {
    "alternating": AlternatingConfig(),
    "joint": AlternatingConfig("joint"),
    "instant": InstantConfig(lambda_steps=2),
}
PAIR = {"alternating": 2, "joint": 1, "instant": 1}  # updates that make a pair


@dataclass(frozen=True)
class Case:
    """A network and what it works on."""

    name: str
    network: UNetConfig | UViTConfig
    side: int
    batch: int


SMALL = [
    Case(
        "digits U-Net, 8×8", UNetConfig(channels=(16, 32, 64), attention_levels=(2,), num_classes=10), 8, 128
    ),
    Case(
        "U-ViT, 16×16",
        UViTConfig(image_channels=3, channels=(64,), width=192, depth=4, num_classes=10),
        16,
        64,
    ),
    Case("U-Net, 28×28", UNetConfig(channels=(48, 96, 192), blocks_per_level=2, num_classes=10), 28, 128),
]
TINY = [Case("tiny U-Net", UNetConfig(channels=(8, 16), num_classes=10, embedding_dim=16), 8, 8)]


class Out:
    """Rows, each on the disk at once."""

    def __init__(self, path: Path, arguments: argparse.Namespace):
        self.path, self.arguments, self.begun = path, arguments, time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self("start", card=card, torch=torch.__version__, tiny=arguments.tiny)

    def __call__(self, section: str, **row: Any) -> None:
        """Write a row."""
        row = {"section": section, "at": round(time.monotonic() - self.begun, 1), **row}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    @property
    def graph(self) -> str:
        """What updates are recorded by, where they can be."""
        return "graph" if self.device.type == "cuda" else "none"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], times: int = 20, warm: int = 5, most: float = 20.0) -> float:
    """Median of single calls; fewer where they would take longer than `most` seconds."""
    for _ in range(warm):
        work()
    found, begun = [], time.perf_counter()
    while len(found) < times and (len(found) < 3 or time.perf_counter() - begun < most):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def data_for(case: Case) -> Split:
    count = max(2 * case.batch, 200)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, case.network.image_channels, case.side, case.side, generator=generator) * 2 - 1
    classes = case.network.num_classes
    rows = ImageSet(images, torch.arange(count) % max(classes, 1), max(classes, 1), "random")
    return Split(rows, rows)


def teacher_for(case: Case) -> Model:
    """Random weights, all of them: a fresh network's last layer is zero, and with it most gradients."""
    torch.manual_seed(0)
    network = registry.build(case.network)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    classes = case.network.num_classes
    shape = (case.network.image_channels, case.side, case.side)
    denoiser = Denoiser(network, "v", {"label": classes} if classes else {})
    return Model(denoiser, case.network, schedules.cosine(), shape, 64, classes, {"role": "teacher"})


def config_for(
    case: Case, method: str, out: Out, precision: Any = "float32", **settings: Any
) -> DistillConfig:
    settings = {"num_steps": 10**6, "batch_size": case.batch, "log_every": 10**6, **settings}
    return DistillConfig(
        steps=8,
        method=METHODS[method],
        precision=precision,
        train=TrainConfig(**settings, checkpoint_every=10**6),
        monitor=MonitorConfig(every=0),
        device=str(out.device),
        student_dropout=0.0,
    )


@contextlib.contextmanager
def updates(config: DistillConfig, case: Case) -> Iterator[Callable[[], None]]:
    """One pair of updates of momatch at a time."""
    run = distillation(teacher_for(case), data_for(case), config)
    records = train(run.method, run.batches, config.train, config.optim)
    pair = PAIR[config.method.name if getattr(config.method, "update", "") != "joint" else "joint"]

    def work() -> None:
        for _ in range(pair):
            next(records)

    with contextlib.closing(records):
        yield work
    clean()


def bare(case: Case, method: str, out: Out, precision: str = "float32") -> Callable[[], None]:
    """The network calls and Adam steps of a pair of updates, on fixed inputs, by hand."""
    networks = [teacher_for(case).denoiser.network.to(out.device) for _ in range(3)]
    teacher, student, auxiliary = networks
    teacher.requires_grad_(False)
    capturable = out.device.type == "cuda"
    adams = {
        id(n): torch.optim.Adam(n.parameters(), 1e-6, (0.0, 0.99), 1e-12, fused=True, capturable=capturable)
        for n in (student, auxiliary)
    }
    shape = (case.batch, case.network.image_channels, case.side, case.side)
    z, logsnr = torch.randn(shape, device=out.device), torch.randn(case.batch, device=out.device)
    cond = {"label": torch.arange(case.batch, device=out.device) % 10} if case.network.num_classes else None
    low = torch.autocast(
        out.device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    )

    def call(network: nn.Module) -> Tensor:
        with low:
            return network(z, logsnr, cond).float()

    def learn(*learners: nn.Module) -> None:
        outputs = [call(learner) for learner in learners]
        for learner, output in zip(learners, outputs, strict=True):
            adams[id(learner)].zero_grad(set_to_none=False)
            output.sum().backward()
            adams[id(learner)].step()

    def frozen(*others: nn.Module) -> None:
        with torch.no_grad():
            for other in others:
                call(other)

    def pair() -> None:
        if method == "joint":
            frozen(teacher)
            learn(student, auxiliary)
        elif method == "alternating":
            frozen(student, teacher)
            learn(auxiliary)
            frozen(auxiliary, teacher)
            learn(student)
        else:
            learn(student)

    return pair


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """As a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def small(out: Out) -> None:
    for case in TINY if out.arguments.tiny else SMALL:
        size = sum(p.numel() for p in registry.build(case.network).parameters())
        about = {"case": case.name, "parameters": size, "batch": case.batch}
        for method in METHODS:
            row: dict[str, Any] = {**about, "method": method}
            if method != "instant":  # its products have no short form by hand here: benchmarks/step_cost.py
                work = bare(case, method, out)
                row["bare_eager_ms"] = milliseconds(work)
                if out.device.type == "cuda":
                    row["bare_graph_ms"] = milliseconds(recorded(work))
                del work
                clean()
            for compile in ("none", out.graph):
                start = time.perf_counter()
                with updates(config_for(case, method, out, compile=compile), case) as work:
                    row[f"momatch_{compile}_ms"] = milliseconds(work, warm=6)
                    row[f"momatch_{compile}_first_s"] = time.perf_counter() - start
            out("small", **row)


def numbers(out: Out) -> None:
    """Relative differences of 50 losses, and of the weights, in units of the largest."""
    case = (TINY if out.arguments.tiny else SMALL)[0]
    steps = 8 if out.arguments.tiny else 50
    found: dict[tuple[str, str, str], tuple[list[float], Tensor]] = {}
    for method in METHODS:
        for compile, note in (("none", ""), (out.graph, ""), (out.graph, "again"), ("default", "")):
            if compile == "default" and (out.arguments.tiny or method == "instant"):
                continue
            settings = {"num_steps": steps, "log_every": 1, "compile": compile}
            run = distillation(teacher_for(case), data_for(case), config_for(case, method, out, **settings))
            key = METHODS[method].headline
            losses = [event.record.metrics[key] for event in run]
            weights = torch.cat(
                [p.detach().flatten().cpu() for p in run.method.trainable["student"].parameters()]
            )
            found[method, compile, note] = losses, weights
            clean()
        base = found[method, "none", ""]
        for (name, compile, note), (losses, weights) in found.items():
            if name == method:
                largest = max(map(abs, base[0]))  # the first is 0: all networks begin alike
                worst = max(abs(a - b) for a, b in zip(losses, base[0], strict=True)) / largest
                apart = float((weights - base[1]).abs().max() / base[1].abs().max())
                out("numbers", method=method, compile=compile, note=note, losses=worst, weights=apart)
        first, again = found[method, out.graph, ""], found[method, out.graph, "again"]
        out("numbers", method=method, same=first[0] == again[0] and bool(torch.equal(first[1], again[1])))


def large_case(out: Out, batch: int) -> Case:
    if out.arguments.tiny:
        return replace(TINY[0], batch=batch // 8)
    config = recipe("imagenet64-teacher")
    return Case("ImageNet-64 U-ViT", config.network, 64, batch)  # type: ignore[union-attr]


def flops_of_a_call(case: Case, out: Out) -> int:
    network = teacher_for(case).denoiser.network.to(out.device)
    shape = (case.batch, case.network.image_channels, case.side, case.side)
    cond = {"label": torch.zeros(case.batch, dtype=torch.int64, device=out.device)}
    cond = cond if case.network.num_classes else None  # type: ignore[assignment]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(shape, device=out.device), torch.zeros(case.batch, device=out.device), cond)
    return counter.get_total_flops()


def large(out: Out) -> None:
    for batch in (32, 64):
        case = large_case(out, batch)
        flops = flops_of_a_call(case, out)
        clean()
        for compile in ("none", "default"):
            if compile == "default" and out.arguments.tiny:
                continue
            config = config_for(case, "joint", out, "bfloat16", compile=compile)
            start = time.perf_counter()
            with updates(config, case) as work:
                work()
                wait()
                first = time.perf_counter() - start
                ms = milliseconds(work, warm=3)
                peak = torch.cuda.max_memory_allocated() / 2**30 if out.device.type == "cuda" else 0
            rate = 7 * flops / ms * 1000  # two backwards of two forwards each, three forwards
            out(
                "large",
                batch=batch,
                compile=compile,
                joint_ms=ms,
                first_s=first,
                tflops=rate / 1e12,
                share=rate / PEAK,
                peak_gib=peak,
            )
        work = bare(case, "instant", out, "bfloat16")  # forward, backward, Adam
        ms = milliseconds(work, warm=3)
        out("large", batch=batch, bare_ms=ms, tflops=3 * flops / ms / 1e9, share=3 * flops / ms * 1000 / PEAK)
        del work
        clean()


def memory(out: Out) -> None:
    options: dict[str, tuple[str, str, dict[str, Any]]] = {
        "joint, float32": ("joint", "float32", {}),
        "joint, bfloat16": ("joint", "bfloat16", {}),
        "joint, bfloat16, accumulate 4": ("joint", "bfloat16", {"accumulate": 4}),
        "joint, bfloat16, checkpointing": ("joint", "bfloat16", {"checkpointing": True}),
        "alternating, bfloat16": ("alternating", "bfloat16", {}),
    }
    case = large_case(out, 32)
    for name, (method, precision, settings) in options.items():
        config = config_for(case, method, out, precision, **settings)
        planned = planning.plan(config, teacher_for(case), data_for(case), probe_seconds=0)
        clean()
        with updates(config, case) as work:
            for _ in range(3):
                work()
            wait()
            found = torch.cuda.max_memory_allocated() if out.device.type == "cuda" else planned.memory
        out("memory", option=name, plan_gib=planned.memory / 2**30, allocator_gib=found / 2**30)


KINDS = {
    "attention": ("flash", "attention", "fmha"),
    "convolution": ("conv", "fprop", "dgrad", "wgrad", "implicit"),
    "matrix products": ("gemm", "cutlass", "matmul", "nvjet"),
    "norms": ("norm", "welford"),
    "optimizer": ("adam", "multi_tensor"),
    "copies and casts": ("copy", "memcpy", "memset", "cast", "transpose"),
    "elementwise": ("elementwise", "vectorized", "triton_poi"),
    "reductions": ("reduce", "triton_red", "triton_per"),
}


def profile(out: Out) -> None:
    case = large_case(out, 32)
    with updates(config_for(case, "joint", out, "bfloat16"), case) as work:
        for _ in range(3):
            work()
        wait()
        on_gpu = out.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as found:
            work()
            wait()
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        spent[next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "other")] += (
            micro
        )
    total = sum(spent.values()) or 1
    out("profile", milliseconds=total / 1000, shares={k: round(v / total, 3) for k, v in spent.most_common()})


def quality(out: Out) -> None:
    base = recipe("digits-8")
    assert isinstance(base, DistillConfig)
    data, tiny = load_data("digits"), out.arguments.tiny
    ways = (
        [("float32", "none"), ("bfloat16", out.graph)] if out.device.type == "cuda" else [("float32", "none")]
    )
    for precision, compile in ways:
        settings = replace(base.train, compile=compile, **({"num_steps": 20} if tiny else {}))
        config = replace(base, precision=precision, train=settings, device=str(out.device))
        config = replace(config, monitor=MonitorConfig(every=0))
        run = distillation(teacher_of(config), data, config)
        start = time.perf_counter()
        for _ in run:
            pass
        seconds = time.perf_counter() - start
        row = evaluate_at(run.finish(), "student", data, 8, 500 if tiny else 20_000)
        fd = next(m for m in row.result.measurements if m.metric == "frechet")
        out(
            "quality",
            precision=precision,
            compile=compile,
            seconds=seconds,
            fd=[fd.value, fd.low, fd.high],
        )


def nccl(out: Out) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if out.device.type == "cuda" else "gloo")
    case = large_case(out, 32)
    try:
        for way in ("plain", "fsdp"):
            network = teacher_for(case).denoiser.network.to(out.device)
            if way == "fsdp":
                for parameter in network.parameters():
                    parameter.data = parameter.data.contiguous()
                fully_shard(network)
            adam = torch.optim.Adam(network.parameters(), 1e-6, (0.0, 0.99), fused=True)
            shape = (case.batch, case.network.image_channels, case.side, case.side)
            z, logsnr = torch.randn(shape, device=out.device), torch.randn(case.batch, device=out.device)
            cond = {"label": torch.arange(case.batch, device=out.device) % 10}

            def work(network=network, adam=adam, z=z, logsnr=logsnr, cond=cond) -> None:
                with torch.autocast(out.device.type, torch.bfloat16):
                    loss = network(z, logsnr, cond).float().square().mean()
                adam.zero_grad()
                loss.backward()
                adam.step()

            out("nccl", way=way, step_ms=milliseconds(work, warm=3))
            del network, adam, work
            clean()
    finally:
        dist.destroy_process_group()


SECTIONS = {f.__name__: f for f in (small, numbers, large, memory, profile, quality, nccl)}
EXPECTED = {"small": 120, "numbers": 60, "large": 90, "memory": 60, "profile": 15, "quality": 90, "nccl": 20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", nargs="*", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    out = Out(arguments.out, arguments)
    for name in arguments.sections:
        left = 60 * arguments.minutes - (time.monotonic() - out.begun)
        if left < EXPECTED[name] and not arguments.tiny:
            out(name, left_out=f"{left:.0f} s left, it takes about {EXPECTED[name]}")
            continue
        try:
            SECTIONS[name](out)
        except Exception as error:  # the other sections' figures must not be lost with it
            out(name, failed=f"{type(error).__name__}: {error}"[:500])
            traceback.print_exc()
        clean()


if __name__ == "__main__":
    main()
