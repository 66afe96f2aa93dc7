"""Verify a data set: every byte of every file against what is kept of it in the card (seal.py),
images drawn anew against those stored; and make good again what is found damaged.

`verify` reads each file once, some at a time, and holds a few MB of it. A data set that was made
before files were sealed is compared with its content digest alone.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mnistattn.dataset.format import CARD, ContentDigest, shard_mark
from mnistattn.dataset.paint import Sources
from mnistattn.dataset.read import Card, batches, is_foreign, open_split, read_card
from mnistattn.dataset.seal import STRUCTURE, Damage, damage_of, is_sealed
from mnistattn.dataset.shards import Shard, facts, read_manifest
from mnistattn.errors import InputError
from mnistattn.generators.variants import Spec

REDRAWN = 32  # images a split
SHOWN = 20  # damages told one by one


@dataclass
class Verdict:
    """What `verify` found. problems is empty if all is well; notes say what was not checked.

    damage: the problems that are damaged bytes, which `repair` can put right.
    """

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)

    def add(self, damage: list[Damage]) -> None:
        """Note damage."""
        room = SHOWN - len(self.damage)
        self.damage += damage
        self.problems += [str(d) for d in damage[: max(room, 0)]]
        if 0 <= room < len(damage):
            self.problems.append("There is more.")


@dataclass(frozen=True)
class Part:
    """One HDF5 file of a split; manifest: what the card says is its SHA-256, "" for no shard."""

    shard: Shard
    file: Path
    manifest: str = ""

    @property
    def manifest_file(self) -> Path:
        """Where a shard's manifest lies."""
        return self.file.with_suffix(".json")


def verify(
    path: str | Path, redraw: int = REDRAWN, data_root: str | Path = "data",
    backgrounds: str | None = None, say: Callable[[str], None] = lambda line: None,
) -> Verdict:  # fmt: skip
    """Check every byte of every file, and `redraw` random images of each split against the seed.

    data_root and backgrounds say where the sources are now (default: where the card says). If they
    are not to be had, or are not the same, images cannot be drawn anew: a note says so. InputError
    if there is no card, or one that cannot be read.
    """
    card = read_card(path)
    verdict = Verdict()
    if damage := damage_of_card(card):
        verdict.add(damage)
        verdict.notes.append("no other file was checked, for the card says what they should be")
        return verdict
    sources = None
    if redraw:
        try:
            sources = open_sources(card, data_root, backgrounds)
        except InputError as error:
            verdict.notes.append(f"no image was drawn anew: {error}")
    for split, entry in card.splits.items():
        say(f"{split}: {entry['count']} images")
        parts = list(parts_of(card, split))
        if is_kept(card, split):
            readable = _check_bytes(card, split, parts, verdict)
        else:
            readable = _check_content(card, split, verdict)
        if sources and readable:
            _redraw(card, split, sources, redraw, verdict)
    return verdict


def damage_of_card(card: Card) -> list[Damage]:
    """What is wrong with the card's own bytes."""
    file = card.path / CARD
    whole = is_sealed(file.read_bytes())
    if whole is None and not any("file" in e or "shards" in e for e in card.splits.values()):
        return []  # made before cards were sealed
    return [] if whole else [Damage(file, what="is not as it was written (its seal is broken)")]


def is_kept(card: Card, split: str) -> bool:
    """True if it is kept what each byte of a split's files should be."""
    return "file" in card.splits[split] or "shards" in card.splits[split]


def parts_of(card: Card, split: str) -> Iterator[Part]:
    """The files of a split, in order."""
    entry, files = card.splits[split], card.files(split)
    if "shards" not in entry:
        yield Part(Shard(split, 0, 1, 0, entry["count"]), files[0])
        return
    first = 0
    for number, (file, noted) in enumerate(zip(files, entry["shards"], strict=True)):
        shard = Shard(split, number, len(files), first, noted["count"])
        first += shard.count
        yield Part(shard, file, noted["manifest"])


def entry_of(card: Card, part: Part) -> dict | None:
    """What is kept of a file, as in seal.py; None if its manifest is not what the card says."""
    if not part.manifest:
        entry = card.splits[part.shard.split]
        return entry["file"] | {"arrays": entry["arrays"]}
    found = read_manifest(card.path, card.raw["request"]["of"], part.shard)
    return facts(found[0]) if found is not None and found[1] == part.manifest else None


def damage_of_part(card: Card, part: Part, feed=None, quick: bool = False) -> list[Damage]:
    """What is wrong with a file and its manifest."""
    entry, shard = entry_of(card, part), part.shard
    if entry is None:
        return [Damage(part.manifest_file, what=_lost(part.manifest_file))]
    found = damage_of(part.file, entry, card.spec, shard.count, shard.first, feed, quick)
    if part.manifest and any(d.array == STRUCTURE for d in found):
        mark = shard_mark(card.raw["request"]["of"], shard.split, shard.first)
        if is_foreign(part.file, mark):
            return [Damage(part.file, what="is of another data set, or another shard of this one")]
    return found


def _lost(manifest: Path) -> str:
    if not manifest.exists():
        return "is missing"
    return "is damaged, or of another data set"


def _check_bytes(card: Card, split: str, parts: list[Part], verdict: Verdict) -> bool:
    """Compare every byte; True if the split can be read."""
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        found = [d for part in pool.map(lambda part: damage_of_part(card, part), parts)
                 for d in part]  # fmt: skip
    if not found and len(parts) > 1:
        # Each file is as it was made; that their sum is what the card says is one hash in order.
        digest = ContentDigest(card.spec, card.splits[split]["count"])
        for part in parts:
            found += damage_of_part(
                card, part, lambda name, piece: digest.update(name, np.frombuffer(piece, "u1")),
                quick=True,
            )  # fmt: skip
        whole = digest.hexdigest()
    else:
        whole = _digest_of(card.spec, card.splits[split])
    verdict.add(found)
    if found:
        return all(d.array for d in found) and all(d.array != STRUCTURE for d in found)
    if whole != card.digest(split):
        verdict.problems.append(f"{split} does not have the digest of its card.")
    else:
        verdict.checked.append(
            f"{split}: digest {whole[:16]}... of all arrays, and every other byte"
        )
    return True


def _digest_of(spec: Spec, entry: dict) -> str:
    """A split's digest, of its arrays' own hashes."""
    return ContentDigest(spec, entry["count"]).of_arrays(entry["arrays"])


def _check_content(card: Card, split: str, verdict: Verdict) -> bool:
    """Compare the arrays of an unsealed file with the digest; True if the split can be read."""
    entry = card.splits[split]
    digest = ContentDigest(card.spec, entry["count"])
    try:
        for _, arrays in batches(card, split):
            digest.update_all(arrays)
    except InputError as error:
        verdict.problems.append(str(error))
        return False
    if digest.hexdigest() == entry["digest"]:
        verdict.checked.append(f"{split}: digest {entry['digest'][:16]}... of all arrays")
        verdict.notes.append(
            f"{split}: made before whole files were sealed, so its arrays alone were checked"
        )
    else:
        noted = entry.get("arrays", {})
        differ = [name for name, h in digest.arrays().items() if noted.get(name) != h]
        verdict.problems.append(
            f"{split}.h5 does not have its digest: {', '.join(differ or ['the card'])} differ from "
            "the card."
        )
    return True


# ---------------------------------------------------------------- drawing anew


def open_sources(card: Card, data_root: str | Path, backgrounds: str | None) -> Sources:
    """The card's sources, opened again; InputError if they are missing or not what they were."""
    noted = card.raw["sources"]
    place = backgrounds or noted["backgrounds"].get("path") or noted["backgrounds"]["source"]
    digits = noted["digits"]
    sources = Sources(card.spec, card.raw["seed"], digits["source"], digits["split"], place,
                      Path(data_root), lambda line: None)  # fmt: skip
    if sources.card["digits"] != digits:
        raise InputError("the digits at hand are not those of the card (SHA-256).")
    return sources


def open_painter(card: Card, sources: Sources, split: str):
    """A split's painter; InputError if its photos are not what they were."""
    painter = sources.painter(split)
    noted = card.raw["sources"]["backgrounds"].get("splits", {}).get(split)
    if sources.card["backgrounds"].get("splits", {}).get(split) != noted:
        raise InputError("the photos at hand are not those of the card.")
    return painter


def _redraw(card: Card, split: str, sources: Sources, redraw: int, verdict: Verdict) -> None:
    try:
        painter = open_painter(card, sources, split)
    except InputError as error:
        verdict.notes.append(f"{split}: no image was drawn anew: {error}")
        return
    n = card.splits[split]["count"]
    picked = np.sort(np.random.default_rng().choice(n, min(n, redraw), replace=False))
    drawn, _ = painter.paint(picked.astype(np.int64))
    with open_split(card, split) as h5:
        differ = sorted(
            {int(i) for name in drawn for k, i in enumerate(picked)
             if not np.array_equal(drawn[name][k], h5[name][int(i)])}
        )  # fmt: skip
    if differ:
        verdict.problems.append(
            f"{Path(card.place(split)).name}: image {differ[0]} (of {len(differ)} of {len(picked)} "
            "drawn anew) is not what the seed gives."
        )
    else:
        verdict.checked.append(f"{split}: {len(picked)} random images drawn anew, byte for byte")
