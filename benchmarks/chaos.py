"""What is lost, and what false is accepted, when `generate`, `evaluate` and `sweep` are killed over
and over, and when bits of a data set flip.

    python benchmarks/chaos.py --kills 50 --flips 200

kills    SIGKILLs that hit something alive, shared out among the subjects: `mnistattn generate
         --shards` and `mnistattn sweep`, on each engine, and `mnistattn evaluate`. A command is
         started; the main process, one worker or all workers are killed; after that, every file
         that passes for whole is compared with the undisturbed run's (chaos_generate.py and
         chaos_runs.py say how), and the same command is started again. When all is made in spite
         of that, the command runs through once more, the result is compared, and all begins anew.
         Of five kills two come at a random time after a start's first file, two within the next
         write of a file from there on, and one at any time of a run, most of which is imports.
         Reported: kills within a write that left half a file; how often a training had to go on
         after an epoch of an earlier start; how often a run that a sweep had finished was found
         untouched after the next one; files accepted that are not what they should be (must be 0);
         whether the result is the undisturbed run's (digests; weights, bit for bit, and scores);
         and what is left beside it.
flips    a random bit of a random file of a data set of shards, and of one without, is flipped,
         --flips times in all: is it found, is the place told right (the file; the array and a
         range of images that holds the bit, or HDF5's own bytes), and is the data set, after
         `verify --repair`, byte for byte what it was? Half of the flips are in files drawn by
         their number, not their size, so that cards and manifests get their share.

Linux. Exit code 1 if anything false was accepted, not found, or not the same at the end, if a
command showed a traceback or gave up, or if anything is left behind.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from chaos_flips import flips
from chaos_generate import Generate
from common import machine, machine_line, table, write_json
from killing import Subject, chaos

SUBJECTS = ("generate", "evaluate", "sweep")


def subjects(args, home: Path) -> list[Subject]:
    """Each subject, on each engine if it has workers."""
    made: list[Subject] = []
    for name in args.subjects:
        if name != "generate":
            from chaos_runs import Evaluate, Sweep, make_data  # torch takes seconds

            data = home / "data"
            if not data.exists():
                make_data(data, args.images)
        for engine in args.engines if name != "evaluate" else ("",):
            folder = home / f"{name}{engine}"
            folder.mkdir()
            if name == "generate":
                made.append(Generate(args, folder, engine))
            else:
                made.append((Sweep if engine else Evaluate)(args, data, folder, engine))
    return made


def show_kills(results: list[dict]) -> None:
    rows = [
        [f"{r['subject']} {r['engine']}".strip(), str(r["kills"]),
         " / ".join(str(r["killed"][k]) for k in ("main", "worker", "workers")),
         *(str(r[name]) for name in ("torn", "rounds", "resumed", "kept")),
         str(len(r["false"])), "equal" if r["equal"] else "DIFFERENT", str(len(r["left"]))]
        for r in results
    ]  # fmt: skip
    head = ["", "kills", "main / a worker / all workers", "in a write", "made", "trainings resumed",
            "runs kept", "false files accepted", "result", "left behind"]  # fmt: skip
    print(table(head, rows))
    for r in results:
        for line in [*r["false"], *r["left"], *r["said"]]:
            print(f"  {r['subject']} {r['engine']}: {line}")


def good(kills: list[dict], flipped: dict | None) -> bool:
    """True if nothing false was accepted, and nothing lost."""
    return all(
        not r["false"] and not r["left"] and not r["said"] and r["equal"] for r in kills
    ) and (flipped is None or not flipped["missed"])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: a temporary folder "
                        "here, which is removed)")  # fmt: skip
    parser.add_argument("--kills", type=int, default=50, help="over all subjects and engines (50)")
    parser.add_argument("--flips", type=int, default=200, help="of bits (200)")
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="comma-separated")
    parser.add_argument("--engines", help="of generate and sweep, comma-separated (local, and dask "
                        "where it is installed)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the moments and bits")
    data = parser.add_argument_group("the data set of generate, and of the flips")
    data.add_argument("--variant", default="mbg")
    for split, n in (("train", 4000), ("val", 500), ("test", 500)):
        data.add_argument(f"--{split}", type=int, default=n, metavar="N", help=f"images ({n})")
    data.add_argument("--shards", type=int, default=16)
    data.add_argument("--workers", type=int, default=2)
    data.add_argument("--digits", default="strokes", help="mnist or strokes")
    data.add_argument("--data-root", default="data", help="folder that holds MNIST/raw")
    runs = parser.add_argument_group("the trainings of evaluate and sweep")
    runs.add_argument("--images", type=int, default=100, metavar="N", help="of an epoch (100)")
    runs.add_argument("--epochs", type=int, default=16, metavar="N", help="of a run (16)")
    runs.add_argument("--seeds", default="0-1", help="of a sweep, of two models (0-1)")
    args = parser.parse_args()
    args.subjects = args.subjects.split(",")
    if unknown := set(args.subjects) - set(SUBJECTS):
        parser.error(f"unknown subjects {', '.join(unknown)}: of {', '.join(SUBJECTS)}")
    dask = find_spec("distributed") is not None
    if args.engines is None and not dask:
        print("engine dask is left out: Dask's distributed is not installed")
    args.engines = (args.engines or ("local,dask" if dask else "local")).split(",")
    if not sys.platform.startswith("linux"):
        parser.error("it finds processes in /proc: Linux alone has that")
    return args


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # a long run can be watched through a pipe
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what it started ends with it
    args = parse()
    about = machine()
    print(machine_line(about))
    rng = random.Random(args.seed)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=args.out or ".") as folder:
        home, kills = Path(folder).absolute(), []
        chosen = subjects(args, home) if args.kills else []
        for k, subject in enumerate(chosen):
            share = args.kills // len(chosen) + (k < args.kills % len(chosen))
            if share:
                kills.append(chaos(subject, share, rng))
                print(f"{subject.name} {subject.engine}: killed {share} times".replace(" :", ":"))
        if kills:
            show_kills(kills)
        flipped = flips(args, args.flips, home, rng) if args.flips else None
    if flipped:
        print(f"\n{flipped['flips']} flipped bits ({json.dumps(flipped['files'])}): "
              f"{flipped['found']} found, {flipped['located']} at the right place, "
              f"{flipped['repaired']} repaired, byte for byte")  # fmt: skip
        for line in flipped["missed"]:
            print(f"  missed: {line}")
    write_json(
        args.json, {"benchmark": "chaos", "machine": about, "kills": kills, "flips": flipped}
    )
    return 0 if good(kills, flipped) else 1


if __name__ == "__main__":
    sys.exit(main())
