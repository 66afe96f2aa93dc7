"""What is lost, and what false is accepted, when `generate` is killed over and over, and when bits
of a data set flip.

    python benchmarks/chaos.py --kills 50 --flips 200

kills    per engine: `mnistattn generate --shards` is started, and killed (SIGKILL) at a random
         moment, the workers, one of them, or the main process, --kills times in all; after each
         kill every file that passes for a whole shard is compared with the undisturbed run's, and
         the same command continues. At the end it runs through. Reported: kills that hit, files
         accepted that are not what they should be (must be 0), whether the digests are those of the
         undisturbed run, and whether anything is left beside the data set. A start-up is longer
         than the work on small data sets, so a moment is drawn from the time from the first shard
         on; every fourth one from the whole run.
flips    a random bit of a random file of a data set of shards, and of one without, is flipped,
         --flips times in all: is it found, is the place told right (the file; the array and a
         range of images that holds the bit, or HDF5's own bytes), and is the data set, after
         `verify --repair`, byte for byte what it was? Half of the flips are in files drawn by
         their number, not their size, so that cards and manifests get their share.

Linux. Exit code 1 if anything false was accepted, not found, or not the same at the end.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import h5py
from common import machine, machine_line, table, write_json

from mnistattn.dataset.format import CARD
from mnistattn.dataset.read import read_card
from mnistattn.dataset.repair import repair
from mnistattn.dataset.seal import STRUCTURE, is_sealed, row_bytes
from mnistattn.dataset.verify import verify
from mnistattn.errors import MnistattnError

PATIENCE = 600  # seconds for one run


def command(out: Path, args, engine: str) -> list[str]:
    """The command line that makes the data set."""
    line = [
        sys.executable, "-m", "mnistattn", "generate", "--variant", args.variant, "--out", out,
        "--train", args.train, "--val", args.val, "--test", args.test, "--digits", args.digits,
        "--data-root", args.data_root, "--shards", args.shards, "--engine", engine,
        "--workers", args.workers,
    ]  # fmt: skip
    return [str(word) for word in line]


def start(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    """The ids of all processes below one."""
    found, at = [], [pid]
    while at:
        parent = at.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                below = [int(word) for word in task.read_text().split()]
            except OSError:
                continue  # it has just ended
            found += below
            at += below
    return found


def digests(out: Path) -> dict[str, str]:
    return {split: entry["digest"] for split, entry in read_card(out).splits.items()}


def false_files(folder: Path, right: dict[str, bytes]) -> list[str]:
    """Shards in a work folder that have a sound manifest, but are not what they should be; and
    manifests likewise, and a card of a data set that is not whole."""
    wrong = []
    for manifest in folder.glob("*-of-*.json"):
        try:
            data = manifest.read_bytes()
            if is_sealed(data):
                shard = manifest.with_suffix(".h5")
                for file, content in ((manifest, data), (shard, shard.read_bytes())):
                    if content != right[file.name]:
                        wrong.append(file.name)
        except FileNotFoundError:  # the folder was renamed, or the shard is missing
            if folder.is_dir() and manifest.exists():
                wrong.append(manifest.name)
    return wrong


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def kill_once(line, out: Path, work: Path, rng: random.Random, seconds: float, early: bool):
    """Start, kill at a random moment; returns (what was killed, was it alive, return code)."""
    child = start(line)
    try:
        deadline = time.monotonic() + PATIENCE
        if not early:  # from the first file of this run on
            before = set(os.listdir(work)) if work.is_dir() else set()
            while child.poll() is None and time.monotonic() < deadline:
                if work.is_dir() and set(os.listdir(work)) - before - {"request.json"}:
                    break
                time.sleep(0.005)
        time.sleep(rng.uniform(0, seconds))
        what = rng.choice(("main", "main", "worker", "workers"))
        alive = child.poll() is None
        victims = [child.pid] if what == "main" else children(child.pid)
        if what == "worker" and victims:
            victims = [rng.choice(victims)]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if what == "main":
            child.wait(60)
        else:  # it has to get over it, or to say why not
            try:
                child.wait(rng.uniform(0.5, 3) + seconds)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(60)
        said = child.stderr.read() if what != "main" or not alive else ""
        return what, alive and bool(victims), child.returncode, said
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def chaos(args, engine: str, kills: int, home: Path, rng: random.Random) -> dict:
    """Kills over one engine; each time that the data set is made in spite of them, anew."""
    whole, out = home / f"{engine}-whole", home / f"{engine}-killed"
    work = out.parent / f".{out.name}.partial-shards"
    begun = time.perf_counter()
    subprocess.run(command(whole, args, engine), check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    seconds = time.perf_counter() - begun
    right, wanted = contents(whole), digests(whole)
    result = {"engine": engine, "seconds": seconds, "kills": 0, "hits": 0, "false": [],
              "rounds": 0, "digests_equal": True, "left": [], "said": [],
              "killed": {"main": 0, "worker": 0, "workers": 0}}  # fmt: skip
    while result["kills"] < kills:
        early = result["kills"] % 4 == 3
        moment = seconds if early else args.window
        line = command(out, args, engine)
        what, hit, code, said = kill_once(line, out, work, rng, moment, early)
        result["kills"] += 1
        result["hits"] += hit
        result["killed"][what] += hit
        if "Traceback" in said and engine == "local":
            result["said"].append(said[-300:])
        if work.is_dir():
            result["false"] += false_files(work, right)
        if out.exists() or result["kills"] == kills:
            finish(result, line, out, home, whole, right, wanted)
    return result


def finish(result: dict, line, out: Path, home: Path, whole: Path, right, wanted) -> None:
    """Run through, compare, and start over."""
    last = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)
    result["rounds"] += 1
    if last.returncode:
        result["said"].append(last.stderr[-300:])
    ours = out.is_dir() and (out / CARD).is_file() and digests(out) == wanted
    result["digests_equal"] &= ours and verify(out, 0).problems == []
    if out.is_dir():
        made = contents(out)
        result["false"] += [name for name in right if made.get(name) != right[name]]
    result["left"] += [p.name for p in home.iterdir() if p not in (whole, out)]
    shutil.rmtree(out, ignore_errors=True)


def part_of(out: Path, file: Path, byte: int) -> tuple[str, int]:
    """(array, image in the split) of a byte of an HDF5 file, or (STRUCTURE, 0)."""
    card = read_card(out)
    split = file.name.split("-")[0].removesuffix(".h5")
    first = 0
    for other in card.files(split):
        with h5py.File(other, "r") as h5:
            n = len(h5["query"])
            if other == file:
                for name, size in row_bytes(card.spec).items():
                    offset = h5[name].id.get_offset()
                    if offset <= byte < offset + n * size:
                        return name, first + (byte - offset) // size
                return STRUCTURE, 0
        first += n
    raise AssertionError(file)


def located(found, out: Path, file: Path, place) -> bool:
    """True if what verify says is one damage, in the right file and place."""
    if place is None:  # a card or a manifest
        return len(found) == 1 and found[0].file == file
    array, image = place
    if len(found) != 1 or found[0].file != file or found[0].array != array:
        return False
    return array == STRUCTURE or found[0].first <= image <= found[0].last


def flips(args, count: int, home: Path, rng: random.Random) -> dict:
    """Flip bits one at a time, find them, repair them."""
    result = {"flips": 0, "found": 0, "located": 0, "repaired": 0, "files": {}, "missed": []}
    for number, sharded in enumerate((True, False)):
        out = home / ("flipped-shards" if sharded else "flipped-files")
        line = command(out, args, "local")
        if not sharded:
            at = line.index("--shards")
            del line[at : at + 4]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        right = contents(out)
        names = sorted(right)
        sizes = [len(right[name]) for name in names]
        for k in range(count // 2 + (number < count % 2)):
            name = rng.choice(names) if k % 2 else rng.choices(names, sizes)[0]
            byte, bit = rng.randrange(len(right[name])), rng.randrange(8)
            file = out / name
            place = part_of(out, file, byte) if file.suffix == ".h5" else None
            with open(file, "r+b") as handle:
                handle.seek(byte)
                handle.write(bytes([right[name][byte] ^ 1 << bit]))
            found, told = find(out, args), f"{name} byte {byte} bit {bit}"
            kind = "card" if name == CARD else file.suffix.removeprefix(".")
            result["files"][kind] = result["files"].get(kind, 0) + 1
            result["flips"] += 1
            result["found"] += bool(found)
            good = found is True and name == CARD  # it cannot even be read, and that says where
            good = good or (found is not True and located(found, out, file, place))
            result["located"] += good
            same = fix(out, args) and contents(out) == right
            result["repaired"] += same
            if not (found and good and same):
                result["missed"].append(told)
                for again, content in right.items():
                    (out / again).write_bytes(content)
    return result


def find(out: Path, args):
    """What verify finds: list[Damage]; True where it cannot even read the card."""
    try:
        verdict = verify(out, 0, args.data_root)
    except MnistattnError as error:
        return CARD in str(error)
    return verdict.damage if verdict.problems else []


def fix(out: Path, args) -> bool:
    try:
        return repair(out, 0, args.data_root).problems == []
    except MnistattnError as error:
        print(f"not repaired: {error}", file=sys.stderr)
        return False


def show_kills(results: list[dict]) -> None:
    rows = [
        [r["engine"], f"{r['kills']}", f"{r['hits']}",
         " / ".join(str(r["killed"][k]) for k in ("main", "worker", "workers")),
         f"{r['rounds']}", f"{len(r['false'])}", "equal" if r["digests_equal"] else "DIFFERENT",
         f"{len(r['left'])}"]
        for r in results
    ]  # fmt: skip
    head = ["engine", "kills", "hit", "main / a worker / all workers", "data sets made",
            "false files accepted", "digests", "left behind"]  # fmt: skip
    print(table(head, rows))
    for r in results:
        for line in [*r["false"], *r["left"], *r["said"]]:
            print(f"  {r['engine']}: {line}")


def good(kills: list[dict], flipped: dict | None) -> bool:
    """True if nothing false was accepted, and nothing lost."""
    return all(
        not r["false"] and not r["left"] and not r["said"] and r["digests_equal"] for r in kills
    ) and (flipped is None or not flipped["missed"])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: a temporary folder "
                        "here, which is removed)")  # fmt: skip
    parser.add_argument("--kills", type=int, default=50, help="over all engines (50)")
    parser.add_argument("--flips", type=int, default=200, help="of bits (200)")
    parser.add_argument("--engines", default="local,dask", help="comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and bits")
    parser.add_argument("--window", type=float, default=3.0, help="seconds from a run's first "
                        "file on, in which it is killed (3)")  # fmt: skip
    parser.add_argument("--variant", default="mbg")
    for split, n in (("train", 4000), ("val", 500), ("test", 500)):
        parser.add_argument(f"--{split}", type=int, default=n, metavar="N", help=f"images ({n})")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--digits", default="strokes", help="mnist or strokes")
    parser.add_argument("--data-root", default="data", help="folder that holds MNIST/raw")
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("it finds processes in /proc: Linux alone has that")
    return args


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # a long run can be watched through a pipe
    args = parse()
    about = machine()
    print(machine_line(about))
    rng, names = random.Random(args.seed), args.engines.split(",")
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=args.out or ".") as home:
        shares = [args.kills // len(names) + (k < args.kills % len(names))
                  for k in range(len(names))]  # fmt: skip
        kills = []
        for engine, share in zip(names, shares, strict=True):
            if share:
                folder = Path(home) / engine
                folder.mkdir()
                kills.append(chaos(args, engine, share, folder, rng))
        if kills:
            show_kills(kills)
        flipped = flips(args, args.flips, Path(home), rng) if args.flips else None
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
