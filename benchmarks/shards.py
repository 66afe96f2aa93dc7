"""How generation grows with workers: Dask workers on this machine against one process, and the
memory of each over the run.

    python benchmarks/shards.py --train 200000 --shards 64 --workers 2

Interleaved --repeat times, in alternating order, always the whole command line, imports included:

    one process   mnistattn generate --shards N --workers 1
    workers       mnistattn generate --shards N --scheduler tcp://127.0.0.1:..., of --workers
                  processes `dask worker` that were started before, with one thread each
    ratio         images/s of the workers / of the one process, pair by pair

A process draws with one thread, beside which it hashes; so on a machine with more cores than
workers one process uses somewhat more than one core. --pin gives it, and each worker, one core
alone. The command that the workers serve reads all shards back, to fold the digest, on whatever is
free: with as many workers as cores it takes its share of theirs.

Memory is the resident set (/proc), sampled four times a second, of each worker and of the command;
flat means that the peak of the last half is at most 5 % above that of the first half, which is past
the start-up. Then `verify` of the result is timed, once. Beside it, what the figures come to for
--plan images. Linux. Exit code 1 if digests differ or a worker's memory is not flat.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from common import machine, machine_line, spread, summary, table, write_json

from mnistattn.dataset.read import read_card
from mnistattn.dataset.verify import verify

FLAT = 1.05
SAMPLE_SECONDS = 0.25


class Memory:
    """Samples the resident set of processes, in MB, until it is stopped."""

    def __init__(self, pids: dict[str, int]):
        self.samples: dict[str, list[float]] = {name: [] for name in pids}
        self._pids, self._stop = pids, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            for name, pid in self._pids.items():
                try:
                    text = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                for line in text.splitlines():
                    if line.startswith("VmRSS"):
                        self.samples[name].append(int(line.split()[1]) / 1024)

    def stop(self) -> dict[str, dict]:
        """The peak of each process, of the whole and of each half, and whether it is flat."""
        self._stop.set()
        self._thread.join()
        found = {}
        for name, samples in self.samples.items():
            half = len(samples) // 2
            first, last = max(samples[:half], default=0), max(samples[half:], default=0)
            found[name] = {"first_half": first, "last_half": last, "peak": max(first, last),
                           "flat": last <= FLAT * first}  # fmt: skip
        return found


def command(args, out: Path) -> list[str]:
    """What both sides have in common."""
    line = [
        sys.executable, "-m", "mnistattn", "generate", "--variant", args.variant, "--train",
        args.train, "--val", args.val, "--test", args.test, "--digits", args.digits,
        "--data-root", args.data_root, "--backgrounds", args.backgrounds, "--shards", args.shards,
        "--out", out,
    ]  # fmt: skip
    return [str(word) for word in line]


def cores(args, number: int | None):
    """What confines a child to one core, if that was asked for."""
    if not args.pin or number is None:
        return None
    mine = sorted(os.sched_getaffinity(0))
    return lambda: os.sched_setaffinity(0, {mine[number % len(mine)]})


def timed(line: list[str], workers: dict[str, int], confine=None) -> tuple[float, dict]:
    """Seconds of a command, and the memory of it and of the workers."""
    os.sync()
    begun = time.perf_counter()
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL, preexec_fn=confine)
    memory = Memory({"command": child.pid} | workers)
    code = child.wait()
    seconds = time.perf_counter() - begun
    used = memory.stop()
    if code:
        raise SystemExit(f"error: {' '.join(line)} failed with code {code}")
    return seconds, used


@contextmanager
def cluster(args, work: Path):
    """A Dask scheduler and workers, each a process; yields the address and the workers' ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port",
         str(port), "--no-dashboard"], **quiet)]  # fmt: skip
    try:
        for number in range(args.workers):
            started.append(subprocess.Popen(
                [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1",
                 "--no-nanny", "--no-dashboard", "--host", "127.0.0.1", "--local-directory",
                 str(work)],
                preexec_fn=cores(args, number), **quiet))  # fmt: skip
        wait_for(address, args.workers)
        yield address, {f"worker {k}": p.pid for k, p in enumerate(started[1:])}
    finally:
        for process in reversed(started):
            process.kill()  # a worker that cannot say goodbye to its scheduler waits long
        for process in started:
            process.wait(30)


def wait_for(address: str, workers: int) -> None:
    from distributed import Client

    for _ in range(60):
        try:
            with Client(address, timeout=2) as client:
                client.wait_for_workers(workers, timeout=60)
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("error: the Dask scheduler did not start")


def digests(out: Path) -> dict[str, str]:
    return {split: entry["digest"] for split, entry in read_card(out).splits.items()}


def measure(args, home: Path) -> dict:
    """All repeats."""
    out, images = home / "set", args.train + args.val + args.test
    times: dict[str, list[float]] = {"one process": [], "workers": []}
    memory: dict[str, list[dict]] = {"one process": [], "workers": []}
    seen, size, checked = [], 0, 0.0
    with cluster(args, home) as (address, workers):

        def one():
            return timed([*command(args, out), "--workers", "1"], {}, cores(args, 0))

        def many():
            return timed([*command(args, out), "--scheduler", address], workers)

        runs = [("one process", one), ("workers", many)]
        for number in range(args.repeat):
            for name, run in runs if number % 2 == 0 else reversed(runs):
                seconds, used = run()
                times[name].append(seconds)
                memory[name].append(used)
                seen.append(digests(out))
                size = sum(file.stat().st_size for file in out.iterdir())
                if number == args.repeat - 1 and not checked:
                    begun = time.perf_counter()
                    if verify(out, 0).problems:
                        raise SystemExit("error: verify found damage")
                    checked = time.perf_counter() - begun
                shutil.rmtree(out)
                os.sync()
    rates = {name: [images / s for s in values] for name, values in times.items()}
    ratios = [b / a for a, b in zip(rates["one process"], rates["workers"], strict=True)]
    return {
        "images": images, "bytes": size, "images_per_second": {n: summary(r) for n, r in
        rates.items()}, "ratio": summary(ratios), "memory": memory, "verify_seconds": checked,
        "digests_equal": all(d == seen[0] for d in seen),
        "flat": all(used["flat"] for run in memory["workers"] for used in run.values()),
    }  # fmt: skip


def show(args, result: dict) -> None:
    """The tables."""
    rates = {name: r["values"] for name, r in result["images_per_second"].items()}
    print(f"{args.variant}, {result['images']:,} images, {args.shards} shards, "
          f"{args.workers} workers" + (", a core each" if args.pin else ""))  # fmt: skip
    rows = [[name, spread(values, 0)] for name, values in rates.items()]
    rows.append(["ratio", spread(result["ratio"]["values"])])
    print(table(["", "images/s: median (min .. max)"], rows))
    rows = [
        [f"{side}, {name}, repeat {k + 1}", f"{used['first_half']:,.0f}",
         f"{used['last_half']:,.0f}", "flat" if used["flat"] else "GROWS"]
        for side, runs in result["memory"].items() for k, run in enumerate(runs)
        for name, used in run.items()
    ]  # fmt: skip
    print(table(["peak memory, MB", "first half", "last half", ""], rows))
    print(f"digests: {'equal' if result['digests_equal'] else 'DIFFERENT'}; verify: "
          f"{result['images'] / result['verify_seconds']:,.0f} images/s")  # fmt: skip
    each = result["images_per_second"]["workers"]["median"] / args.workers
    per_image = result["bytes"] / result["images"]
    print(
        f"{args.plan:,} images at these figures: {args.plan / each / 3600:,.0f} hours of one "
        f"worker, {args.plan * per_image / 1e12:,.2f} TB, "
        f"{args.plan // args.per_shard:,} shards of {args.per_shard * per_image / 1e6:,.0f} MB, "
        f"each {args.per_shard / each / 60:,.1f} minutes"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: a temporary folder "
                        "here, which is removed)")  # fmt: skip
    parser.add_argument("--variant", default="mbg")
    for split, n in (("train", 200_000), ("val", 0), ("test", 0)):
        parser.add_argument(f"--{split}", type=int, default=n, metavar="N", help=f"images ({n})")
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pin", action="store_true", help="a core for each worker")
    parser.add_argument("--repeat", type=int, default=3, metavar="R")
    parser.add_argument("--digits", default="strokes", help="mnist or strokes")
    parser.add_argument("--data-root", default="data", help="folder that holds MNIST/raw")
    parser.add_argument("--backgrounds", default="textures", help="textures or a folder of photos")
    parser.add_argument("--plan", type=int, default=100_000_000, help="images of a plan (10^8)")
    parser.add_argument("--per-shard", type=int, default=25_000, help="of them, in a shard (25000)")
    args = parser.parse_args()
    if min(args.repeat, args.workers, args.shards) < 1:
        parser.error("give --repeat, --workers and --shards of at least 1")
    if not sys.platform.startswith("linux"):
        parser.error("it reads /proc: Linux alone has that")
    return args


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # a long run can be watched through a pipe
    args = parse()
    about = machine()
    print(machine_line(about))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shards-", dir=args.out or ".") as home:
        result = measure(args, Path(home).absolute())
    show(args, result)
    options = {name: str(value) for name, value in vars(args).items() if name != "json"}
    write_json(args.json, {"benchmark": "shards", "machine": about,
                           "options": json.loads(json.dumps(options))} | result)  # fmt: skip
    return 0 if result["digests_equal"] and result["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
