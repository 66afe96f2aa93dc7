"""What a GPU makes of it: the fused recurrence, whole training steps, a full training, memory.

    python benchmarks/gpu.py --json docs/results/gpu.json
    python benchmarks/gpu.py --data data/mbg --json FILE       with a full training of ctx and arnn
    python benchmarks/gpu.py --only recurrence,steps           some of the parts

parts
recurrence   forward and backward of `diagonal_lstm` on the maps of 100-pixel images: the fused
             kernels against the reference in CUDA graphs, the reference launched kernel by kernel
             and the naive loop (naive.py), side by side; microseconds a diagonal, and how far that
             is from the floor: a loop of the same length whose step is nothing but one product, one
             shift by a row and one tanh, each waiting for the one before
tune         the fused kernels with every number of warps and of images a tile
steps        captured training steps (mnistattn.evaluation.step) of none, ctx, arnn and brnn: by
             batch size, the best of each, times CTX's; 224 pixels too; share of the bf16 rate
profile      where the time of a step goes, by kernel
side         trainings side by side in 1, 2 and 4 processes: steps a second of all together
memory       of the recurrence at 112 x 112, batch 64, fused and reference
training     `mnistattn evaluate` of ctx and arnn on --data, from start to result

Everything is timed in turns, --repeat rounds, and shown as median (least .. greatest). A ratio is
taken within a round. Random data; never zeros.
"""

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from common import machine, machine_line, spread, summary, table, write_json
from naive import diagonal_lstm as naive_lstm
from triton.language.extra import libdevice

from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.run import evaluate
from mnistattn.evaluation.step import make_optimizer, make_steps
from mnistattn.models import recurrence
from mnistattn.models.cost import flops_per_image
from mnistattn.models.network import build
from mnistattn.models.recurrence import cuda

PARTS = ("recurrence", "tune", "steps", "profile", "side", "memory", "training")
MAPS = (50, 25, 12, 6)
MODELS = ("none", "ctx", "arnn", "arnn:hidden=32", "brnn")
BATCHES = (64, 128, 256, 512)
DEVICE = torch.device("cuda", 0)


def milliseconds(run: Callable[[], object], times: int = 1) -> float:
    """A call's time on the device, the mean of so many one after the other."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def in_turns(runs: dict[str, Callable[[], object]], repeat: int, times: int = 1) -> dict:
    """Milliseconds of each, --repeat times, in turns whose order is reversed every time."""
    for run in runs.values():
        for _ in range(3):
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            found[name].append(milliseconds(runs[name], times))
    return found


# ------------------------------------------------------------------------------------- recurrence


@triton.jit
def floor_kernel(at, steps, T: tl.constexpr):
    """A product, a shift by a row and a tanh of a (64, T) tile, `steps` times, each waiting."""
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, T)[None, :]
    h = tl.load(at + row * T + column)
    weight = tl.load(at + tl.arange(0, T)[:, None] * T + column)
    higher = tl.broadcast_to(tl.maximum(row - 1, 0), (64, T))
    for _ in range(steps):
        z = tl.dot(tl.gather(h, higher, 0), weight)
        h = libdevice.tanh(z).to(h.dtype)
    tl.store(at + row * T + column, h)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A function of tensors that stay, as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def inputs(batch: int, side: int, t: int, dtype: torch.dtype, channels: int = 32) -> list:
    """x, input_weight, recurrent_weight, offset, which want gradients."""
    draw = functools.partial(torch.randn, device=DEVICE)
    x = draw(batch, channels, side, side).to(dtype, memory_format=torch.channels_last)
    weights = (draw(2, channels, 4 * t) / channels**0.5, draw(2, 2 * t, 4 * t) / (2 * t) ** 0.5)
    return [v.requires_grad_() for v in (x, *weights, draw(batch, 2, 4 * t))]


def both_passes(lstm: Callable, given: list) -> Callable[[], object]:
    """Forward and backward."""

    def run() -> object:
        hidden = lstm(*given)
        return torch.autograd.grad(hidden, given, torch.full_like(hidden, 0.7))

    return run


def show_recurrence(arguments) -> dict:
    found, lines = {}, []
    for side, t in itertools.product(MAPS, (16, 32)):
        given = inputs(arguments.batch_size, side, t, torch.bfloat16)
        fused, plain = (functools.partial(recurrence.diagonal_lstm, backend=name)
                        for name in ("cuda", "reference"))  # fmt: skip
        steps = 2 * side - 1
        tile = torch.randn(64, max(16, t), device=DEVICE, dtype=torch.bfloat16)

        def floor(tile=tile, steps=steps, t=t) -> None:
            floor_kernel[(1,)](tile, steps, T=max(16, t), num_warps=4)

        times = in_turns(
            {
                "fused": captured(both_passes(fused, given)),
                "forward": captured(functools.partial(forward_alone, fused, given)),
                "graphed reference": captured(both_passes(plain, given)),
                "reference": both_passes(plain, given),
                "naive": both_passes(naive_under_autocast, given),
                "floor": captured(floor),
            },
            arguments.repeat,
        )
        ratios = {name: [a / b for a, b in zip(times[name], times["fused"], strict=True)]
                  for name in ("graphed reference", "reference", "naive")}  # fmt: skip
        micro = {name: [1e3 * v / steps for v in times[name]] for name in ("forward", "floor")}
        found[f"{side} x {side}, t {t}"] = {
            "milliseconds": {name: summary(v) for name, v in times.items()},
            "times_fused": {name: summary(v) for name, v in ratios.items()},
            "microseconds_a_diagonal": {name: summary(v) for name, v in micro.items()},
        }
        lines.append([f"{side} x {side}, t {t}", spread(times["fused"], 3),
                      *(f"{statistics.median(v):,.1f}" for v in ratios.values()),
                      spread(micro["forward"]), spread(micro["floor"])])  # fmt: skip
    print(f"\nrecurrence, forward and backward, batch {arguments.batch_size}, bfloat16\n")
    print(table(["map", "fused, ms", "graphed", "reference", "naive", "us a diagonal", "floor"],
                lines))  # fmt: skip
    return found


def naive_under_autocast(*given: torch.Tensor) -> torch.Tensor:
    """The naive loop as it would run in training."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return naive_lstm(*given)


def forward_alone(lstm: Callable, given: list) -> None:
    with torch.no_grad():
        lstm(*given)


def show_tune(arguments) -> dict:
    found, lines = {}, []
    usual = cuda._plan_for
    for side, t in itertools.product(MAPS, (16, 32)):
        given = inputs(arguments.batch_size, side, t, torch.bfloat16)
        runs = {}
        for warps, images in itertools.product((2, 4, 8), (1, 2, 4, 8)):
            made = [usual(given[0].permute(0, 2, 3, 1), t, back) for back in (False, True)]
            if not 16 <= made[0].rows * images <= 128:
                continue
            plans = [replace(p, warps=warps, images=images) for p in made]
            cuda._plan_for = lambda x, t, back, plans=plans: plans[back]
            lstm = functools.partial(recurrence.diagonal_lstm, backend="cuda")
            runs[f"{images} images, {warps} warps"] = captured(both_passes(lstm, given))
            cuda._plan_for = usual
        times = in_turns(runs, arguments.repeat)
        best = min(times, key=lambda name: statistics.median(times[name]))
        found[f"{side} x {side}, t {t}"] = {n: summary(v) for n, v in times.items()}
        chosen = f"{made[0].images} images, {made[0].warps} warps"
        lines.append([f"{side} x {side}, t {t}", best, spread(times[best], 3), chosen,
                      spread(times[chosen], 3)])  # fmt: skip
    print("\ntune: the quickest plan, and the one that is taken; milliseconds\n")
    print(table(["map", "quickest", "ms", "taken", "ms"], lines))
    return found


# ------------------------------------------------------------------------------------------ steps


class Training:
    """A model's captured training steps on random images, one after the other."""

    def __init__(self, text: str, size: int, batch: int) -> None:
        name, _, option = text.partition(":")
        key, _, value = option.partition("=")
        torch.manual_seed(0)
        network = build(name, size, 10, 5, **({key: int(value)} if key else {}))
        self.flops = 3 * flops_per_image(network, size)
        self.batch = batch
        n = 4 * batch
        drawn = functools.partial(torch.randint, device=DEVICE)
        images = drawn(256, (n, size, size, 3), dtype=torch.uint8)
        digit, color = (torch.randint(high, (n, 1), device=DEVICE) for high in (10, 5))
        answers = torch.nn.functional.one_hot(color[:, 0], 5).bool()
        feed = Feed(images, digit, color, digit[:, 0], color[:, 0], answers, False, DEVICE)
        network = network.to(DEVICE, memory_format=torch.channels_last).train()
        recipe = replace(make_recipe("fast"), batch_size=batch)
        self.steps = make_steps(network, make_optimizer(network, recipe), recipe, feed)
        self.asked = torch.stack(feed.pairs("one", torch.Generator().manual_seed(0)))

    def epoch(self) -> None:
        """Four steps."""
        self.steps.start(self.asked, [1e-3] * 4)
        for i in range(4):
            self.steps.run(i)


def matrix_rate(repeat: int) -> list[float]:
    """FLOP/s of a large bf16 product."""
    n = 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return [2e3 * n**3 / v for v in in_turns({"product": lambda: a @ b}, repeat)["product"]]


def show_steps(arguments) -> dict:
    rates = matrix_rate(arguments.repeat)
    found: dict = {"matrix_flops_per_second": summary(rates)}
    print(f"\ntraining steps; bf16 matrix rate {statistics.median(rates) / 1e12:,.0f} TFLOP/s\n")
    for size, models, batches in ((100, MODELS, BATCHES), (224, ("ctx", "brnn"), (64, 128))):
        lines = []
        best: dict[str, tuple[float, int]] = {}
        for batch in batches:
            runs = {name: Training(name, size, batch) for name in models}
            times = in_turns({n: run.epoch for n, run in runs.items()}, arguments.repeat)
            for name in models:
                image = [1e3 * v / 4 / batch for v in times[name]]
                ratio = [a / b for a, b in zip(times[name], times["ctx"], strict=True)]
                share = 1e6 * runs[name].flops / statistics.median(image)
                share /= statistics.median(rates)
                best[name] = min(best.get(name, (1e9, 0)), (statistics.median(image), batch))
                found[f"{name}, {size} px, batch {batch}"] = {
                    "microseconds_an_image": summary(image), "times_ctx": summary(ratio),
                    "share_of_matrix_rate": share, "flops_per_image_step": runs[name].flops,
                }  # fmt: skip
                lines.append([f"{name}, {size} px", str(batch), spread(image), spread(ratio),
                              f"{100 * share:.1f} %"])  # fmt: skip
            del runs
            torch.cuda.empty_cache()
        print(table(["model", "batch", "us an image", "times ctx", "rate"], lines))
        for name, (micro, batch) in best.items():
            times_ctx = micro / best["ctx"][0]
            found[f"best of {name}, {size} px"] = {"batch": batch, "times_ctx": times_ctx}
            print(f"best of {name}: {micro:.2f} us an image (batch {batch}), {times_ctx:.2f} x ctx")
        print()
    return found


def show_profile(arguments) -> dict:
    found = {}
    for name in ("none", "ctx", "arnn"):
        training = Training(name, 100, arguments.batch_size)
        for _ in range(3):
            training.epoch()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            training.epoch()
            torch.cuda.synchronize()
        rows = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
        total = sum(e.self_device_time_total for e in rows) or 1
        found[name] = [{"kernel": e.key, "calls": e.count, "microseconds": e.self_device_time_total}
                       for e in rows]  # fmt: skip
        print(f"\nprofile of four steps of {name}, batch {arguments.batch_size}\n")
        print(table(["kernel", "calls", "us", "share"], [
            [e.key[:70], str(e.count), f"{e.self_device_time_total:,.0f}",
             f"{100 * e.self_device_time_total / total:.1f} %"] for e in rows[:15]
        ]))  # fmt: skip
    return found


def show_side(arguments) -> dict:
    """Each process trains alone; together they share the GPU by turns."""
    found = {}
    for name, count in itertools.product(("ctx", "arnn"), (1, 2, 4)):
        command = [sys.executable, __file__, "--one", name, "--batch-size",
                   str(arguments.batch_size)]  # fmt: skip
        begin = time.time() + 40  # when all of them are warm
        running = [subprocess.Popen([*command, "--begin", str(begin)], stdout=subprocess.PIPE,
                                    text=True) for _ in range(count)]  # fmt: skip
        rates = [json.loads(p.communicate()[0]) for p in running]
        found[f"{name} x {count}"] = {"images_per_second": sum(rates), "each": rates}
        print(f"{count} trainings of {name} side by side: {sum(rates):,.0f} images a second")
    return found


def one_of_several(name: str, batch: int, begin: float) -> None:
    """Images a second of a training that starts at a set time, over ten seconds."""
    training = Training(name, 100, batch)
    for _ in range(3):
        training.epoch()
    torch.cuda.synchronize()
    time.sleep(max(0.0, begin - time.time()))
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < 10:
        training.epoch()
        done += 4 * batch
        torch.cuda.synchronize()
    print(json.dumps(done / (time.perf_counter() - start)))


# ------------------------------------------------------------------------------ memory, training


def show_memory(arguments) -> dict:
    found = {}
    for backend, t in itertools.product(("cuda", "reference"), (16, 32)):
        given = inputs(64, 112, t, torch.bfloat16)
        lstm = functools.partial(recurrence.diagonal_lstm, backend=backend)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            both_passes(lstm, given)()
            mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        except torch.cuda.OutOfMemoryError:
            mib = float("inf")
        found[f"{backend}, t {t}"] = None if mib == float("inf") else mib
        print(f"112 x 112, batch 64, t {t}, {backend}: {mib:,.0f} MiB")
    return found


def show_training(arguments) -> dict:
    if not arguments.data:
        print("\ntraining: give --data, a data set of 'mnistattn generate --variant mbg'")
        return {}
    found = {}
    for model in ("ctx", "arnn"):
        start = time.perf_counter()
        result = evaluate(model, arguments.data, out=arguments.runs / f"gpu-{model}", device="cuda")
        seconds = time.perf_counter() - start
        scores = result["scores"]
        found[model] = {"seconds": seconds, "train_seconds": result["cost"]["train_seconds"],
                        "accuracy": scores["accuracy"], "masks": scores["masks"]}  # fmt: skip
        print(f"{model}: {seconds:.0f} s from start to result, accuracy "
              f"{100 * scores['accuracy']['value']:.2f} %, correctness "
              f"{scores['masks']['correctness']['value']:.3f}")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--data", type=Path, default=None, help="an MBG, for the full training")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where trainings go")
    parser.add_argument("--batch-size", type=int, default=64, help="of recurrence, profile, side")
    parser.add_argument("--repeat", type=int, default=9, help="rounds")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}: they are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; gpu_compile.py needs none")
    if arguments.one:
        one_of_several(arguments.one, arguments.batch_size, arguments.begin)
        return
    properties = torch.cuda.get_device_properties(DEVICE)
    about = machine() | {
        "gpu": properties.name, "processors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(DEVICE)),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }  # fmt: skip
    print(f"{properties.name}, CUDA {torch.version.cuda}; {machine_line(about)}")
    result: dict = {"machine": about, "batch_size": arguments.batch_size,
                    "repeat": arguments.repeat}  # fmt: skip
    for part in (p for p in PARTS if p in wanted):
        result[part] = globals()[f"show_{part}"](arguments)
        write_json(arguments.json, result)  # what has been measured stays, whatever comes


if __name__ == "__main__":
    main()
