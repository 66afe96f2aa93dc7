"""The diagonal LSTM alone: the backends of a CPU and the naive loop, forward and backward in turns.

    python benchmarks/recurrence.py --hidden 32

ms an image for the four maps of a 100-pixel image (50, 25, 12, 6 cells a side), 32 channels of
context, the input product included; --repeat rounds, each backend in turn. FLOP/s counts the
products alone: 2 (C + 2t) 4t a cell and direction forward, twice that backward.
"""

import argparse
import time
from pathlib import Path

from mnistattn.process import keep_freed_memory, sleep_between_parallel_regions

sleep_between_parallel_regions()  # before torch

import torch
from common import machine, machine_line, spread, summary, table, write_json
from naive import diagonal_lstm as naive_lstm

from mnistattn.models.recurrence import diagonal_lstm

BACKENDS = ("reference", "cpu")  # of a CPU; gpu.py has the others
MAPS = (50, 25, 12, 6)
CONTEXT = 32


def inputs(side: int, batch: int, t: int) -> list[torch.Tensor]:
    """Random operands of one map, all to be differentiated."""
    x = torch.randn(batch, CONTEXT, side, side).to(memory_format=torch.channels_last)
    weights = (torch.randn(2, CONTEXT, 4 * t) / 8, torch.randn(2, 2 * t, 4 * t) / 8)
    return [v.requires_grad_() for v in (x, *weights, torch.randn(batch, 2, 4 * t))]


def seconds(run, maps: list[list[torch.Tensor]]) -> tuple[float, float]:
    """Of the forward and of the backward passes over all maps."""
    forward = backward = 0.0
    for tensors in maps:
        start = time.perf_counter()
        hidden = run(*tensors)
        middle = time.perf_counter()
        torch.autograd.grad(hidden, tensors, torch.ones_like(hidden))
        forward, backward = forward + middle - start, backward + time.perf_counter() - middle
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=32, help="t")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=7, help="rounds")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = machine()
    print(machine_line(about))
    t, batch = arguments.hidden, arguments.batch_size
    torch.manual_seed(0)
    maps = [inputs(side, batch, t) for side in MAPS]
    runs = {
        name: lambda *tensors, name=name: diagonal_lstm(*tensors, backend=name) for name in BACKENDS
    } | {"naive": naive_lstm}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        seconds(run, maps)
    for _ in range(arguments.repeat):
        for name, run in runs.items():
            times[name].append(seconds(run, maps))
    flops = 3 * 2 * sum(side * side for side in MAPS) * 2 * (CONTEXT + 2 * t) * 4 * t
    rows, results = [], {}
    for name, pairs in times.items():
        forward, backward = ([1e3 * s / batch for s in part] for part in zip(*pairs, strict=True))
        total = [a + b for a, b in zip(forward, backward, strict=True)]
        gain = [sum(n) / sum(p) for n, p in zip(times["naive"], pairs, strict=True)]
        rate = [flops / 1e6 / ms for ms in total]
        rows.append([name, spread(forward), spread(backward), spread(total), spread(gain, 1),
                     f"{summary(rate)['median']:.0f}"])  # fmt: skip
        results[name] = {"forward_ms": summary(forward), "backward_ms": summary(backward),
                         "ms_per_image": summary(total), "times_as_fast_as_naive": summary(gain),
                         "gflops": summary(rate)}  # fmt: skip
    print(f"{torch.get_num_threads()} threads, t = {t}, batches of {batch}, "
          f"{arguments.repeat} rounds; {flops / 1e6:.0f} MFLOP an image\n")  # fmt: skip
    print(table(["backend", "forward, ms", "backward, ms", "both", "times naive", "GFLOP/s"], rows))
    write_json(arguments.json, {
        "machine": about, "threads": torch.get_num_threads(), "hidden": t, "context": CONTEXT,
        "maps": MAPS, "batch_size": batch, "repeat": arguments.repeat,
        "flops_per_image": flops, "backends": results,
    })  # fmt: skip


if __name__ == "__main__":
    main()
