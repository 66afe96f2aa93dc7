"""How fast data sets are generated: `generate` against plainly writing as many bytes to the same
disk, and the drawing against an image-by-image loop; and that the bytes never differ.

    python benchmarks/generate.py --digits mnist --data-root data --backgrounds textures

For each variant, in one process and interleaved --repeat times, after a warm-up that compiles:

    generate     wall time of mnistattn.dataset.write.generate for the whole data set: reading the
                 sources, drawing on all cores, hashing, HDF5, fsync
    plain write  wall time of writing three plain files of exactly as many bytes, with fsync. The
                 bytes are images of that data set, so a disk that compresses gains equally.
    ratio        generate / plain write, pair by pair; the goal is a median of at most 2

`os.sync` comes before each timing, each pair's order alternates, and one data set at a time is on
the disk (2 GB at the default counts). Beside it:

    compile      the first call in a process with an empty Numba cache, less the second call
    plain loop   benchmarks/plain_loop.py, one thread, nothing stored: the digits alone (on black),
                 and with the variant's background (textures have no plain counterpart)
    drawing      SceneDrawer on one thread, the digits alone, on black
    digests      of 1, 2 and 3 workers, and of a small set drawn with the compiler off

Exit code 1 if any two digests differ.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from common import machine, machine_line, spread, summary, table, write_json
from plain_loop import (
    black_background,
    draw_scene,
    patches_background,
    photo_background,
)

from mnistattn.dataset.paint import Painter
from mnistattn.dataset.write import BATCH_BYTES, generate
from mnistattn.errors import MnistattnError
from mnistattn.generators.backgrounds import open_background
from mnistattn.generators.backgrounds.photos import list_photos
from mnistattn.generators.digits import open_digits
from mnistattn.generators.digits.pool import DigitPool
from mnistattn.generators.digits.strokes import stroke_glyphs
from mnistattn.generators.random import stream_key
from mnistattn.generators.scene import SceneDrawer
from mnistattn.generators.variants import SPLITS, VARIANTS, Spec

GOAL = 2
SAMPLE = 2000  # images of the warm-up, whose bytes the plain write repeats
BLOCK = 8 << 20  # bytes of a plain write
SMALL = {"train": 6, "val": 2, "test": 2}  # with the compiler off, a photo takes seconds


def make(out: Path, variant: str, counts: dict, options: dict, **more) -> tuple[float, dict]:
    """Generate; returns seconds and the card."""
    start = time.perf_counter()
    generate(variant, out, **counts, **options, progress=False, say=lambda _: None, **more)
    seconds = time.perf_counter() - start
    return seconds, json.loads((out / "dataset.json").read_text())


def made_digests(out: Path, variant: str, counts: dict, options: dict, **more) -> dict[str, str]:
    """Digests of the splits of a data set that is generated and removed."""
    try:
        return digests(make(out, variant, counts, options, **more)[1])
    finally:
        shutil.rmtree(out, ignore_errors=True)


def digests(card: dict) -> dict[str, str]:
    """Each split's digest."""
    return {split: entry["digest"] for split, entry in card["splits"].items()}


def write_plain(folder: Path, sizes: list[int], data: memoryview) -> float:
    """Seconds for writing a file of each size, data repeated, with fsync."""
    start = time.perf_counter()
    folder.mkdir()
    for number, size in enumerate(sizes):
        with open(folder / f"{number}.bin", "wb", buffering=0) as file:
            at = 0
            while size:
                size -= file.write(data[at : at + min(BLOCK, size)])
                at = (at + BLOCK) % len(data)
            os.fsync(file.fileno())
    return time.perf_counter() - start


def sample_bytes(out: Path) -> memoryview:
    """The images of a data set's first split, as bytes, a whole number of blocks."""
    with h5py.File(next(out.glob("*.h5")), "r") as h5:
        data = h5["image"][()].tobytes()
    data *= -(-BLOCK // len(data))
    return memoryview(data)[: len(data) // BLOCK * BLOCK]


def quiet(folder: Path) -> None:
    """Remove what was written and wait until the disk has nothing left to do."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def time_pairs(args, variant: str, counts: dict, options: dict, work: Path) -> dict:
    """generate and the plain write, interleaved."""
    warm = work / "warm"
    first_split = next(split for split, n in counts.items() if n)
    few = {split: 0 for split in SPLITS} | {first_split: min(SAMPLE, counts[first_split])}
    sources = make(warm, variant, few, options)[1]["sources"]
    data = sample_bytes(warm)
    quiet(warm)

    out, plain = work / "set", work / "plain"
    ours, theirs, seen, sizes = [], [], [], []

    def run_generate():
        quiet(out)
        seconds, card = make(out, variant, counts, options)
        ours.append(seconds)
        seen.append(digests(card))
        sizes[:] = [file.stat().st_size for file in sorted(out.glob("*.h5"))]
        quiet(out)

    def run_plain():
        quiet(plain)
        theirs.append(write_plain(plain, sizes, data))
        quiet(plain)

    for number in range(args.repeat):
        # The number of bytes is known after the first generate.
        for run in (run_generate, run_plain) if number % 2 == 0 else (run_plain, run_generate):
            run()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    megabytes, images = sum(sizes) / 1e6, sum(counts.values())
    rows = [
        ["generate", spread(ours), f"{images / summary(ours)['median']:,.0f}",
         f"{megabytes / summary(ours)['median']:,.0f}"],
        ["plain write", spread(theirs), "", f"{megabytes / summary(theirs)['median']:,.0f}"],
        ["ratio", spread(ratios), "", ""],
    ]  # fmt: skip
    print(f"digits {sources['digits']['source']}, {images:,} images, {megabytes:,.0f} MB")
    print(table(["", "seconds: median (min .. max)", "images/s", "MB/s"], rows))
    met = summary(ratios)["median"] <= GOAL
    print(f"goal, a ratio of at most {GOAL}: {'met' if met else 'MISSED'}")
    same = all(d == seen[0] for d in seen)
    return {
        "images": images, "bytes": sum(sizes), "digits": sources["digits"]["source"],
        "backgrounds": sources["backgrounds"]["source"], "generate_seconds": summary(ours),
        "plain_write_seconds": summary(theirs), "ratio": summary(ratios), "goal_met": met,
        "repeats_equal": same, "digests": seen[0],
    }  # fmt: skip


def time_drawing(args, variant: str, options: dict, written: float) -> dict:
    """The plain loop and the drawer alone, interleaved; images/s."""
    spec = Spec(variant)
    pools, _ = open_digits(options["digits"], Path(args.data_root), "separate", 0, lambda _: None)
    pool = pools("train")
    classes = [
        pool.images[pool.order[a:b]] for a, b in zip(pool.start, pool.start[1:], strict=False)
    ]
    drawer, key = SceneDrawer(spec, pool), stream_key(0, "train")
    step = max(1, BATCH_BYTES // (spec.size * spec.size * 4))

    if spec.background == "photo" and args.backgrounds != "textures":
        paths = photo_paths(args)
        under = lambda rng: photo_background(rng, paths, spec.size)  # noqa: E731
    elif spec.background == "patches":
        under = lambda rng: patches_background(rng, pool.images, spec.size)  # noqa: E731
    else:
        under = None if spec.background == "photo" else lambda rng: black_background(spec.size)

    def plain(background):
        rng = np.random.default_rng(0)
        start = time.perf_counter()
        for _ in range(args.plain):
            draw_scene(rng, classes, background(rng))
        return args.plain / (time.perf_counter() - start)

    def drawn():
        start = time.perf_counter()
        for first in range(0, args.drawn, step):
            indices = np.arange(first, min(first + step, args.drawn))
            drawer.draw(drawer.empty(len(indices)), key, indices)
        return args.drawn / (time.perf_counter() - start)

    alone, whole, ours = [], [], []
    drawer.draw(drawer.empty(8), key, np.arange(8))
    for _ in range(args.repeat):
        alone.append(plain(lambda rng: black_background(spec.size)))
        ours.append(drawn())
        if under is not None:
            whole.append(plain(under))
    factor = summary(ours)["median"] / summary(alone)["median"]
    rows = [
        ["plain loop, digits alone", spread(alone, 0)],
        ["plain loop, with background", spread(whole, 0) if whole else "none"],
        ["drawing, digits alone, 1 thread", spread(ours, 0)],
        ["generate, written and synced", f"{written:,.0f}"],
    ]
    print(table(["", "images/s: median (min .. max)"], rows))
    print(f"drawing / plain loop, digits alone: {factor:.1f}")
    return {
        "plain_loop_digits": summary(alone),
        "plain_loop_whole": summary(whole) if whole else None,
        "drawing_digits": summary(ours), "generate": written, "drawing_over_plain_loop": factor,
    }  # fmt: skip


def photo_paths(args) -> list[Path]:
    """The photos of the train split."""
    if args.backgrounds == "sun397":
        from mnistattn.generators.backgrounds.sun397 import sun397_folder

        return list_photos(sun397_folder(Path(args.data_root)))["train"]
    return list_photos(Path(args.backgrounds))["train"]


def small_digests(args, variant: str) -> dict[str, str]:
    """SHA-256 of each array of a few images, of a small pool of strokes, by split and name."""
    spec, found = Spec(variant), {}
    backgrounds, _ = open_background(spec, args.backgrounds, Path(args.data_root))
    for split, n in SMALL.items():
        pool = DigitPool.from_labels(*stroke_glyphs(0, split, 40))
        painter = Painter(spec, 0, split, pool, backgrounds(split, pool))
        for name, values in painter.paint(np.arange(n))[0].items():
            found[f"{split} {name}"] = hashlib.sha256(values.tobytes()).hexdigest()
    return found


def few_digests(args, variant: str, digits: str, folder: Path) -> dict[str, str]:
    """What is compared with the compiler on and off."""
    if digits == "mnist":
        options = source_options(args) | {"digits": "mnist"}
        return made_digests(folder / "few", variant, SMALL, options, workers=1)
    return small_digests(args, variant)


def check_digests(args, variant: str, options: dict, digits: str, work: Path) -> dict:
    """Digests for 1, 2 and 3 workers, and without the compiler."""
    n = args.check
    counts = {"train": n, "val": n // 4, "test": n // 4}
    by_workers = [
        made_digests(work / f"workers-{w}", variant, counts, options, workers=w) for w in (1, 2, 3)
    ]
    result = {"workers_equal": all(d == by_workers[0] for d in by_workers)}
    print(f"1, 2, 3 workers, {sum(counts.values()):,} images: {word(result['workers_equal'])}")
    if not args.skip_jit_off:
        start = time.perf_counter()
        off = child(args, "digests", variant, digits, work, {"NUMBA_DISABLE_JIT": "1"})
        on = few_digests(args, variant, digits, work)
        result["jit_off_equal"] = off == on
        what = "data set on MNIST" if digits == "mnist" else "arrays on 40 strokes a split"
        print(
            f"compiler on and off, {what}, {sum(SMALL.values())} images, "
            f"{time.perf_counter() - start:.0f} s: {word(result['jit_off_equal'])}"
        )
    return result


def time_compile(args, variant: str, digits: str, work: Path) -> dict:
    """Seconds of the first call with an empty Numba cache, and of the second."""
    with tempfile.TemporaryDirectory(prefix="numba-", dir=work) as cache:
        times = child(args, "compile", variant, digits, work, {"NUMBA_CACHE_DIR": cache})
    print(
        f"compile: first call {times['first']:.1f} s, second {times['second']:.1f} s: "
        f"{times['first'] - times['second']:.1f} s of compiling, once on a machine"
    )
    return times | {"compile": times["first"] - times["second"]}


def child(args, job: str, variant: str, digits: str, work: Path, env: dict) -> dict:
    """Do a job of `as_child` in a process of its own, with more environment variables."""
    command = [
        sys.executable, __file__, "--child", job, "--variants", variant, "--digits", digits,
        "--data-root", args.data_root, "--backgrounds", args.backgrounds, "--out", str(work),
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: the process for '{job}' failed with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def as_child(args) -> int:
    """The side of `child` in the new process: prints JSON."""
    variant, work = args.variants[0], Path(args.out)
    if args.child == "digests":
        print(json.dumps(few_digests(args, variant, args.digits, work / "child")))
        return 0
    seconds = []
    for number in range(2):
        start = time.perf_counter()
        made_digests(work / f"compile-{number}", variant, SMALL, source_options(args), workers=1)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"first": seconds[0], "second": seconds[1]}))
    return 0


def source_options(args) -> dict:
    """What `generate` is told of the sources."""
    return {"digits": args.digits, "backgrounds": args.backgrounds, "data_root": args.data_root}


def word(equal: bool) -> str:
    """As it is printed."""
    return "equal" if equal else "DIFFERENT"


def benchmark(args, variant: str, work: Path) -> dict:
    """All of one variant."""
    counts = {"train": args.train, "val": args.val, "test": args.test}
    options = source_options(args)
    print(f"\n{variant}")
    result = time_pairs(args, variant, counts, options, work)
    written = result["images"] / result["generate_seconds"]["median"]
    options["digits"] = args.digits = result["digits"]  # auto has chosen
    result["images_per_second"] = time_drawing(args, variant, options, written)
    if not args.skip_compile:
        result["compile_seconds"] = time_compile(args, variant, args.digits, work)
    result["digests_equal"] = check_digests(args, variant, options, args.digits, work)
    print(f"{args.repeat} repeats: {word(result['repeats_equal'])}")
    result["all_equal"] = result["repeats_equal"] and all(result["digests_equal"].values())
    return result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: a temporary folder "
                        "here, which is removed)")  # fmt: skip
    for split, n in (("train", 30_000), ("val", 10_000), ("test", 10_000)):
        parser.add_argument(f"--{split}", type=int, default=n, metavar="N", help=f"images ({n})")
    parser.add_argument("--variants", default="mref,mdist,mbg", help="comma-separated")
    parser.add_argument("--data-root", default="data", help="folder that holds MNIST/raw")
    parser.add_argument("--digits", default="auto", help="auto, mnist or strokes")
    parser.add_argument("--backgrounds", default="textures", help="textures or a folder of photos")
    parser.add_argument("--repeat", type=int, default=3, metavar="R")
    parser.add_argument("--plain", type=int, default=1000, help="images of the plain loop (1000)")
    parser.add_argument("--drawn", type=int, default=5000, help="images of the drawer (5000)")
    parser.add_argument("--check", type=int, default=1000, help="images whose digests are compared")
    parser.add_argument("--skip-jit-off", action="store_true", help="not with the compiler off")
    parser.add_argument("--skip-compile", action="store_true", help="not the time to compile")
    parser.add_argument("--child", choices=("digests", "compile"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.variants = args.variants.split(",")
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variants {', '.join(unknown)}: of {', '.join(VARIANTS)}")
    if min(args.train, args.val, args.test) < 0 or args.train + args.val + args.test < 1:
        parser.error("give at least one split a count above 0")
    if min(args.repeat, args.plain, args.drawn) < 1 or args.check < 4:
        parser.error("give --repeat, --plain, --drawn of at least 1, --check of at least 4")
    return args


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # a long run can be watched through a pipe
    args = parse()
    if args.child:
        return as_child(args)
    about = machine()
    print(machine_line(about))
    results = {}
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.out or ".") as work:
        try:
            for variant in args.variants:
                results[variant] = benchmark(args, variant, Path(work))
        except MnistattnError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    write_json(args.json, {"benchmark": "generate", "machine": about, "variants": results})
    return 0 if all(result["all_equal"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
