"""Export a data set to formats that other tools read. A format is a row of FORMATS and a file.

A format's file has one function, `write(job)`: it writes all of the job's splits into the job's
folder, and reads them only as `job.pieces(split)`, which compares what it gave with the digest of
the card. The folder gets its final name, or its files go to their final places, when all of it is
whole and every digest was right; so an export that failed or was interrupted leaves nothing.

Every export holds every array, and the list LIST of its files: `sha256sum -c` checks it, and
`overwrite` knows by it which files it may remove. The same data set gives the same bytes, with the
same versions of Pillow (PNG) and of the library that writes the format; the pixels always.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mnistattn.dataset.export.common import Job, describe, licences, sha256
from mnistattn.dataset.format import CARD, ContentDigest, split_file
from mnistattn.dataset.read import Card, batches, differing_arrays, read_card
from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators.variants import choose

LIST = "mnistattn-export.sha256"
HEAD = "# mnistattn export to "  # the first line of LIST, and the format
SHARD_IMAGES = 10_000
PIECE_BYTES = 16 << 20  # of images and masks in memory


@dataclass(frozen=True)
class Format:
    """One row of the table: the library that `write` needs, and a line that reads the result."""

    library: str
    read: str


FORMATS = {
    "webdataset": Format(
        "webdataset", "webdataset.WebDataset('{out}/{split}-000000.tar', shardshuffle=False)"
    ),
    "coco": Format("pycocotools", "pycocotools.coco.COCO('{out}/{split}.json')"),
    "croissant": Format(
        "pyarrow", "mlcroissant.Dataset(jsonld='{out}/croissant.json').records('{split}')"
    ),
    "parquet": Format("pyarrow", "datasets.load_dataset('{out}')"),
}


def export(
    data: str | Path, to: str, out: str | Path | None = None,
    splits: Sequence[str] | str | None = None, overwrite: bool = False, progress: bool = True,
    say: Callable[[str], None] = print, shard_images: int = SHARD_IMAGES,
) -> Path:  # fmt: skip
    """Write the data set in `data` in another format, and return the export's directory.

    to: a name of FORMATS. out: default DATA-TO, beside `data`. splits: default all. shard_images:
    most images in a tar or parquet file. overwrite: replace an export that is in `out`, and
    nothing else there. progress shows a bar; `say` is told what to mind before sharing. Raises
    InputError for a request that cannot be met or a damaged data set, MnistattnError where the disk
    fails; then nothing is left behind, and what was in `out` is as it was.
    """
    choose("format", to, FORMATS)
    card = read_card(data)
    named = card.splits if splits is None else [splits] if isinstance(splits, str) else splits
    wanted = tuple(dict.fromkeys(named))
    for split in wanted:
        choose(f"split of {card.path}", split, card.splits)
    if not wanted:
        raise InputError(f"no split of {card.path} was asked for: name one, or none for all.")
    if shard_images < 1:
        raise InputError(f"{shard_images} images in a shard are impossible: give 1 or more.")
    write = _writer(to)
    if out is None:
        source = card.path if card.path.name not in ("", "..") else card.path.resolve()
        out = source.parent / f"{source.name}-{to}"
    out = Path(out)

    # A new directory appears whole. One that is there is filled file by file, from within it: it
    # may be a link, or a disk of its own.
    try:
        _check_out(out, to, overwrite)
        partial = (out if out.is_dir() else out.parent) / f".{out.name}.partial-{os.getpid()}"
        parent_is_new = not out.parent.exists()
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}.") from error
    try:
        total = sum(card.splits[split]["count"] for split in wanted)
        with tqdm(total=total, unit="image", desc=f"export to {to}",
                  disable=None if progress else True, leave=False) as bar:  # fmt: skip
            write(
                Job(card, wanted, partial, shard_images,
                    lambda split: _pieces(card, split, shard_images, bar))
            )  # fmt: skip
        _write_list(partial, f"{HEAD}{to}\n# {describe(card, wanted)}\n")
        _put_in_place(partial, out)
    except OSError as error:
        raise MnistattnError(f"cannot write {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if parent_is_new:
            with suppress(OSError):  # it holds the export, unless that failed
                out.parent.rmdir()
    if terms := [f"{name} ({covers})" for name, _, covers in licences(card)[1:]]:
        say(f"before you share the export, mind the licences of others: {'; '.join(terms)}.")
    return out


def _writer(to: str) -> Callable[[Job], None]:
    """The format's function. InputError if its library is missing."""
    library = FORMATS[to].library
    try:
        import_module(library)
    except ImportError as error:
        raise InputError(
            f"export to {to} needs {library}: pip install 'mnistattn[export]'."
        ) from error
    return import_module(f"mnistattn.dataset.export.{to}").write


def _check_out(out: Path, to: str, overwrite: bool) -> None:
    """Refuse a place that holds anything, unless it is an export of this kind to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise InputError(f"{out} exists and is no directory: give another --out.")
    if (out / CARD).exists():
        raise InputError(f"{out} is a data set, which no export goes into: give another --out.")
    if not overwrite:
        raise InputError(
            f"{out} exists and is not empty: give another --out, or --overwrite to replace an "
            "export in it."
        )
    kind = _kind(out / LIST)
    if kind not in (None, to):
        raise InputError(f"{out} holds an export to {kind}: give another --out, or delete it.")


def _pieces(
    card: Card, split: str, shard: int, bar: tqdm
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """A split's (number of the first image, arrays), none across a shard's end; InputError after
    the last one if they are not what the card's digest was taken of."""
    n, digest = card.splits[split]["count"], ContentDigest(card.spec, card.splits[split]["count"])
    rows = max(1, PIECE_BYTES // (card.spec.size * card.spec.size * 4))
    for first, arrays in batches(card, split, rows):
        digest.update_all(arrays)
        start, end = first, min(first + rows, n)
        while start < end:
            stop = min(end, (start // shard + 1) * shard)
            yield start, {name: a[start - first : stop - first] for name, a in arrays.items()}
            bar.update(stop - start)
            start = stop
    if differ := differing_arrays(card, split, digest):
        raise InputError(
            f"{split_file(card.path, split)} does not have the digest of its card "
            f"({', '.join(differ)} differ): generate the data set again."
        )


# ---------------------------------------------------------------- the list, and putting in place


def _write_list(folder: Path, head: str) -> None:
    """Write LIST: head, and a line "SHA-256  name" for each file, as sha256sum reads them."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    with open(folder / LIST, "w", newline="\n") as file:
        file.write(head)
        file.writelines(f"{sha256(folder / name)}  {name}\n" for name in names)


def _kind(file: Path) -> str | None:
    """The format of the export whose LIST is `file`; None if there is none."""
    try:
        first = file.read_text().partition("\n")[0]
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return first.removeprefix(HEAD) if first.startswith(HEAD) else None


def _listed(file: Path) -> set[tuple[str, str]]:
    """The (SHA-256, name) of LIST; none if there is no LIST of ours. Two exports whose exchange was
    interrupted share one, and then a name may have two hashes."""
    if _kind(file) is None:
        return set()
    lines = [line.partition("  ") for line in file.read_text().splitlines() if line[:1] != "#"]
    return {(digest, name) for digest, _, name in lines}


def _put_in_place(partial: Path, out: Path) -> None:
    """Give a whole export its final name; or, if it was written within out, move its files up and
    remove those of an earlier export that are no longer written, unless somebody changed them."""
    if partial.parent != out:
        partial.rename(out)
        return
    old, new = _listed(out / LIST), _listed(partial / LIST)
    names = {name for _, name in new}
    for name in sorted(names):
        inner = [out / parent for parent in list(Path(name).parents)[:-1]]
        if (out / name).is_dir() or any(p.exists() and not p.is_dir() for p in inner):
            raise InputError(f"{out / name} cannot be written, for what is there: move it.")
    # Till the exchange is over, old and new are on the list: if it stops midway, `sha256sum -c`
    # tells, and the next one finds the files of both.
    both = partial / f"{LIST}.both"
    lines = [f"{digest}  {name}\n" for digest, name in sorted(old | new)]
    both.write_text(f"{HEAD}{_kind(partial / LIST)}\n" + "".join(lines))
    os.replace(both, out / LIST)
    for name in sorted(names):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, out / name)
    for digest, name in sorted(old):
        file = out / name
        inside = file.resolve().is_relative_to(out.resolve())
        if name not in names and inside and file.is_file() and sha256(file) == digest:
            file.unlink()
            if file.parent != out:
                with suppress(OSError):  # something else is in it
                    file.parent.rmdir()
    os.replace(partial / LIST, out / LIST)
