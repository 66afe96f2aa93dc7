"""Bits of a data set that flip, one at a time: found, located, repaired? A part of chaos.py."""

import random
import subprocess
import sys
from pathlib import Path

import h5py
from chaos_generate import command, contents

from mnistattn.dataset.format import CARD
from mnistattn.dataset.read import read_card
from mnistattn.dataset.repair import repair
from mnistattn.dataset.seal import STRUCTURE, row_bytes
from mnistattn.dataset.verify import verify
from mnistattn.errors import MnistattnError


def flips(args, count: int, home: Path, rng: random.Random) -> dict:
    """Flip bits one at a time, find them, repair them."""
    result = {"flips": 0, "found": 0, "located": 0, "repaired": 0, "files": {}, "missed": []}
    for number, sharded in enumerate((True, False)):
        out = home / ("flipped-shards" if sharded else "flipped-files")
        line = command(args, out) + (["--shards", args.shards] if sharded else [])
        subprocess.run(list(map(str, line)), check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)  # fmt: skip
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
