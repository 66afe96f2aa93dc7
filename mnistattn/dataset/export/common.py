"""What every format of an export needs: the job, images as PNG, an image's row in plain names, and
what a data set says of itself and of its licences."""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from mnistattn.dataset.read import Card
from mnistattn.generators.variants import COLORS

PNG_LEVEL = 3  # of zlib: half the time of 6, and 3 % more bytes on textures

CITATION = """\
@inproceedings{khandelwal2019attentionrnn, title={AttentionRNN: A Structured Spatial Attention \
Mechanism}, author={Khandelwal, Siddhesh and Sigal, Leonid}, booktitle={ICCV}, year={2019}}
@inproceedings{seo2018progressive, title={Progressive Attention Networks for Visual Attribute \
Prediction}, author={Seo, Paul Hongsuck and Lin, Zhe and Cohen, Scott and Shen, Xiaohui and Han, \
Bohyung}, booktitle={BMVC}, year={2018}}"""

Piece = tuple[int, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Job:
    """What a format's `write` gets.

    folder: where to write; its caller renames it when all is whole. pieces: split -> (number of the
    first image, arrays of some images), in order, none across the end of a shard of `shard_images`.
    They must be read to the end: that is where damage is found.
    """

    card: Card
    splits: tuple[str, ...]
    folder: Path
    shard_images: int
    pieces: Callable[[str], Iterator[Piece]]

    def shards(self, split: str) -> Iterator[tuple[int, Iterator[Piece]]]:
        """A split's (number of the shard, its pieces), in order."""
        return groupby(self.pieces(split), lambda piece: piece[0] // self.shard_images)

    def shard_count(self, split: str) -> int:
        """How many shards a split has."""
        return -(-self.card.splits[split]["count"] // self.shard_images)


def png(image: np.ndarray) -> bytes:
    """An image uint8 (H, W, 3), or a mask uint8 (H, W), as PNG in mode RGB or L: lossless."""
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "PNG", compress_level=PNG_LEVEL)
        return file.getvalue()


def rows(card: Card, first: int, arrays: dict[str, np.ndarray]) -> Iterator[dict]:
    """Each image's numbers as plain Python values, by the names of the data set's arrays.

    index (in the split), query, answer, target; digit, color, scale, box as lists with an entry for
    each object, so without the -1 behind the last one; answers, in mbg-multi only, as a list of
    the right colours' numbers. query_name, answer_name, color_name, answers_name: the same in
    words. Whatever the numbers are: damage is for the digest to find.
    """
    queries, answers, colors = (
        dict(enumerate(names)) for names in (card.query_names, card.answer_names, COLORS)
    )
    there = arrays["digit"] >= 0
    counts = np.where(there.any(1), there.shape[1] - there[:, ::-1].argmax(1), 0)
    values = {name: a.tolist() for name, a in arrays.items() if name not in ("image", "instances")}
    for i, count in enumerate(counts):
        row = {"index": first + i} | {k: values[k][i] for k in ("query", "answer", "target")}
        row |= {"query_name": queries.get(row["query"]), "answer_name": answers.get(row["answer"])}
        if "answers" in values:
            right = [k for k, is_right in enumerate(values["answers"][i]) if is_right]
            row |= {"answers": right, "answers_name": [answers.get(k) for k in right]}
        row |= {k: values[k][i][:count] for k in ("digit", "color", "scale", "box")}
        row["color_name"] = [colors.get(k) for k in row["color"]]
        yield row


def describe(card: Card, splits: tuple[str, ...]) -> str:
    """A data set in one line: what it is, what it was made of, digests, licences."""
    spec, made_by = card.spec, card.raw.get("versions")
    version = made_by.get("mnistattn", "?") if isinstance(made_by, dict) else "?"
    asks, answer = ("colour", "digit") if spec.row.asks == "color" else ("digit", "colour")
    digests = "; ".join(
        f"{split}: {card.splits[split]['count']} images, digest {card.digest(split)}"
        for split in splits
    )
    terms = "; ".join(f"{name} ({covers})" for name, _, covers in licences(card))
    return (
        f"{spec.row.paper_name} ({spec.variant}): coloured digits of many sizes, {spec.size} x "
        f"{spec.size} pixels; a {asks} is asked for, a {answer} answers, and the pixels of every "
        f"object are known. Made by mnistattn {version} with seed {card.raw['seed']}, digits: "
        f"{_source(card, 'digits')}, backgrounds: {_source(card, 'backgrounds')}. {digests}. "
        f"Licences: {terms}."
    )


def _source(card: Card, what: str) -> str:
    """The name of where digits or backgrounds came from; "?" if the card does not say."""
    entry = card.raw["sources"].get(what)
    return str(entry.get("source", "?")) if isinstance(entry, dict) else "?"


def licences(card: Card) -> list[tuple[str, str, str]]:
    """Each licence that a data set falls under: name, address or '', what it covers."""
    digits, grounds = _source(card, "digits"), _source(card, "backgrounds")
    found = [("MIT", "https://spdx.org/licenses/MIT.html", "what mnistattn drew")]
    if digits == "mnist":
        address = "https://creativecommons.org/licenses/by-sa/3.0/"
        covers = "the digits, of MNIST by Y. LeCun, C. Cortes and C. J. C. Burges"
        found.append(("CC BY-SA 3.0", address, covers))
    if grounds == "sun397":
        address = "https://vision.princeton.edu/projects/2010/SUN/"
        found.append(("terms of the SUN database", address, "the photos under the digits"))
    if grounds == "folder":
        found.append(("terms of their owners", "", "the photos under the digits"))
    return found


def sha256(file: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
