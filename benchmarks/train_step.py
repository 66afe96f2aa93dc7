"""What a training step costs: each model against CTX, and AttentionRNN against the naive loop.

    python benchmarks/train_step.py --models none,ctx,arnn,arnn:hidden=32,brnn,arnn:hidden=32@naive
    python benchmarks/train_step.py --size 224 --models ctx,brnn

A model is NAME, or NAME:OPTION=VALUE,OPTION=VALUE; @naive gives it the recurrence of naive.py,
@reference that of mnistattn.models.recurrence.reference; @pool-last pools after BatchNorm and ReLU.
A step is that of mnistattn.evaluation.train: forward, loss, backward, clipping, AdamW, on random
images. All models are timed in one process, --repeat rounds, each round --steps steps of every
model in turn; a ratio is taken within a round. Peak memory is that of a process of its own, above
what it had before its first step (Linux, macOS).

"rate" is arithmetic: the FLOPs of a step (three times those of the forward pass) over its time,
as a share of the machine's rate in a large matrix product of the same type, taken in every round.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mnistattn.process import keep_freed_memory, sleep_between_parallel_regions

sleep_between_parallel_regions()  # before torch

import torch
import torch.nn.functional as F
from common import machine, machine_line, spread, summary, table, wait, write_json
from naive import diagonal_lstm as naive_lstm

from mnistattn.cli.options import parse_settings
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.step import autocast, make_optimizer, training_step
from mnistattn.models import recurrence
from mnistattn.models.attention import arnn
from mnistattn.models.cost import flops_per_image
from mnistattn.models.network import Network, build

RECURRENCES = {
    "": recurrence.diagonal_lstm,
    "naive": naive_lstm,
    "reference": functools.partial(recurrence.diagonal_lstm, backend="reference"),
}
MATRIX = 2048


class PoolLast(Network):
    """The network with pooling after BatchNorm and ReLU: four times their element work."""

    def stage(self, conv, norm, x):
        return F.max_pool2d(F.relu(norm(conv(x)), inplace=True), 2)


class Step:
    """A model's training step, ready to be repeated."""

    def __init__(self, text: str, size: int, batch: int, device: torch.device) -> None:
        model, _, how = text.partition("@")
        name, _, settings = model.partition(":")
        options = parse_settings(tuple(settings.split(",")) if settings else ())
        torch.manual_seed(0)
        self.text, self.device, self.batch = text, device, batch
        self.lstm = RECURRENCES.get(how, recurrence.diagonal_lstm)
        network = build(name, size, 10, 5, **options)
        if how == "pool-last":
            network.__class__ = PoolLast
        self.flops = 3 * flops_per_image(network, size)
        self.parameters = sum(p.numel() for p in network.parameters())
        self.network = network.to(device, memory_format=torch.channels_last)
        self.recipe = make_recipe("fast")
        self.optimizer = make_optimizer(self.network, self.recipe)
        images = torch.rand(batch, 3, size, size)
        self.images = images.to(device, memory_format=torch.channels_last)
        self.query = torch.randint(10, (batch,)).to(device)
        self.answer = torch.randint(5, (batch,)).to(device)

    def run(self, steps: int) -> float:
        """Seconds for so many steps."""
        arnn.diagonal_lstm = self.lstm
        wait(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            training_step(
                self.network, self.optimizer, self.recipe, self.images, self.query, self.answer
            )
        wait(self.device)
        return time.perf_counter() - start


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product in the type that a step computes in."""
    a, b = (torch.rand(MATRIX, MATRIX, device=device) for _ in range(2))
    with autocast(device):
        a @ b
        wait(device)
        start = time.perf_counter()
        for _ in range(3):
            a @ b
        wait(device)
    return 3 * 2 * MATRIX**3 / (time.perf_counter() - start)


def peak_memory(arguments: argparse.Namespace, text: str) -> float:
    """MiB that two steps of a model add to a process of its own."""
    command = [sys.executable, __file__, "--memory-of", text, "--size", str(arguments.size),
               "--batch-size", str(arguments.batch_size), "--device", arguments.device]  # fmt: skip
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_memory(step: Step) -> float:
    """MiB that two steps add to the peak of this process (on a GPU: to the allocator's)."""
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run(2)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = peak()
    step.run(2)
    return peak() - before


def peak() -> float:
    """MiB that this process has held at most. (getrusage's, on Linux, begins at the parent's.)"""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        default="none,ctx,arnn,arnn:hidden=32,brnn",
        help="separated by commas, as the options of a model",
    )
    parser.add_argument("--size", type=int, default=100, help="image side, 100 or 224")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=7, help="rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps of a model in a round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        step = Step(arguments.memory_of, arguments.size, arguments.batch_size, device)
        print(json.dumps(own_memory(step)))
        return
    about = machine()
    print(machine_line(about))
    names = split_models(arguments.models)
    steps = [Step(name, arguments.size, arguments.batch_size, device) for name in names]
    for step in steps:  # compilers, allocators
        step.run(2)
    times: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for number in range(arguments.repeat):
        rates.append(matrix_rate(device))
        for step in steps[:: 1 if number % 2 == 0 else -1]:
            seconds = step.run(arguments.steps)
            times[step.text].append(1e3 * seconds / arguments.steps / arguments.batch_size)
    base = "ctx" if "ctx" in names else names[0]
    rows, results = [], {}
    for step in steps:
        mine = times[step.text]
        ratio = [a / b for a, b in zip(mine, times[base], strict=True)]
        share = [1e3 * step.flops / a / r for a, r in zip(mine, rates, strict=True)]
        memory = peak_memory(arguments, step.text)
        results[step.text] = {
            "ms_per_image": summary(mine), f"ratio_to_{base}": summary(ratio),
            "share_of_matrix_rate": summary(share), "flops_per_image_step": step.flops,
            "peak_memory_mib": memory, "parameters": step.parameters,
        }  # fmt: skip
        rows.append([step.text, spread(mine), spread(ratio), f"{step.flops / 1e6:,.0f}",
                     f"{100 * statistics.median(share):.0f} %", f"{memory:,.0f}"])  # fmt: skip
    print(f"{torch.get_num_threads()} threads, {arguments.size} px, batches of "
          f"{arguments.batch_size}, {arguments.repeat} rounds of {arguments.steps} steps; "
          f"matrix product {statistics.median(rates) / 1e9:,.0f} GFLOP/s\n")  # fmt: skip
    print(table(["model", "ms an image", f"times {base}", "MFLOP", "rate", "MiB"], rows))
    for name in names:
        if "@naive" in name and (ours := name.removesuffix("@naive")) in times:
            gain = [a / b for a, b in zip(times[name], times[ours], strict=True)]
            memory = results[ours]["peak_memory_mib"] / results[name]["peak_memory_mib"]
            print(
                f"\n{ours}: {spread(gain, 1)} times as fast as the naive loop, {memory:.2f} of its "
                "memory"
            )
    write_json(arguments.json, {
        "machine": about, "threads": torch.get_num_threads(), "size": arguments.size,
        "batch_size": arguments.batch_size, "repeat": arguments.repeat, "steps": arguments.steps,
        "matrix_flops_per_second": summary(rates), "base": base, "models": results,
    })  # fmt: skip


def split_models(text: str) -> list[str]:
    """'ctx,arnn:hidden=32,block=2,none' -> ['ctx', 'arnn:hidden=32,block=2', 'none']: what has an
    '=' and no ':' goes on with the options of the model before."""
    names: list[str] = []
    for part in text.split(","):
        if "=" in part and ":" not in part and names:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names


if __name__ == "__main__":
    main()
