"""Background source: a folder of photos. A background is a random crop resized to the canvas.

Each photo is decoded once and kept as a small pyramid: shrunk (or enlarged) so that its shorter
side is 1, 4/3 and 5/3 of the canvas. A background is a canvas-sized window of one level, so a crop
covers 100, 75 or 60 % of the shorter side, and costs no more than a copy.
"""

import hashlib
import io
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

from mnistattn.errors import InputError
from mnistattn.generators.jit import jit
from mnistattn.generators.random import BACKGROUND, below, next_u32, open_stream
from mnistattn.generators.resize import resize_turned_rgb, turn_rgb
from mnistattn.generators.variants import SPLITS

LEVELS = ((1, 1), (4, 3), (5, 3))  # of the canvas
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
CACHE_BYTES = 3 << 30  # of decoded photos; SUN397 has more, and then decodes again
LONGEST = 4  # a side longer than 4 times the shorter is cut around its centre


def list_photos(folder: Path) -> dict[str, list[Path]]:
    """The photos of each split, sorted, no photo in two.

    FOLDER/train, /val, /test are kept apart where they exist. A missing split takes a share of
    another's by a hash of the file's name: test half of val's, or both of them a tenth of train's;
    and a folder without such parts is divided 80 / 10 / 10. Raises InputError if a split is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"backgrounds '{folder}' is not a folder of photos, nor a known source.")
    parts = {split: _images(folder / split) for split in SPLITS if (folder / split).is_dir()}
    if "train" not in parts:
        rest = _images(folder)
        shares = {split: [p for p in rest if _share(p, folder) in buckets] for split, buckets in
                  {"train": range(2, 10), "val": (0,), "test": (1,)}.items()}  # fmt: skip
    else:
        shares = {"train": parts["train"]}
        if "val" in parts and "test" in parts:
            shares = parts
        elif "val" in parts:
            for split, odd in (("val", 0), ("test", 1)):
                shares[split] = [p for p in parts["val"] if _share(p, folder) % 2 == odd]
        else:
            test = parts.get("test")
            taken = {0} if test else {0, 1}
            shares["val"] = [p for p in parts["train"] if _share(p, folder) == 0]
            shares["test"] = test or [p for p in parts["train"] if _share(p, folder) == 1]
            shares["train"] = [p for p in parts["train"] if _share(p, folder) not in taken]
    for split in SPLITS:
        if not shares[split]:
            raise InputError(
                f"backgrounds '{folder}' leaves no photo for the {split} split: it needs images "
                f"({', '.join(sorted(SUFFIXES))}), at any depth."
            )
    return shares


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _share(path: Path, folder: Path) -> int:
    """A number in 0 .. 9 from the file's name below the folder."""
    return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()[0] % 10


class Photos:
    """The photos of one split, as backgrounds. Safe to use from several threads."""

    def __init__(self, paths: list[Path], folder: Path, size: int):
        self._paths, self._size = paths, size
        self._cache: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._held, self._lock = 0, threading.Lock()
        checksum = hashlib.sha256()
        for path in paths:
            data = _read(path)
            _open(path, data)  # a broken header is found now rather than in the middle
            name = path.relative_to(folder).as_posix()
            checksum.update(f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode())
        self.card = {"count": len(paths), "sha256": checksum.hexdigest()}

    def fill(self, image: np.ndarray, key: np.ndarray, indices: np.ndarray) -> None:
        """Copy into image (n, S, S, 3) uint8 the background of each of scenes `indices`."""
        choices = np.empty((len(indices), 4), np.int64)
        _choose(key, indices, len(self._paths), len(LEVELS), choices)
        for k, (number, level, u, v) in enumerate(choices.tolist()):
            photo = self._pyramid(number)[level]
            top = u * (photo.shape[0] - self._size + 1) >> 32
            left = v * (photo.shape[1] - self._size + 1) >> 32
            image[k] = photo[top : top + self._size, left : left + self._size]

    def _pyramid(self, number: int) -> list[np.ndarray]:
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        levels = _shrink(_decode(self._paths[number]), self._size)
        with self._lock:
            if number not in self._cache:
                self._cache[number] = levels
                self._held += sum(level.nbytes for level in levels)
            while self._held > CACHE_BYTES and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._held -= sum(level.nbytes for level in old)
        return levels


@jit
def _choose(key, indices, photos, levels, choices):
    """Per scene: photo, level, and the 32-bit draws of top and left."""
    for k in range(indices.shape[0]):
        stream = open_stream(key, BACKGROUND, 0, indices[k])
        choices[k, 0], choices[k, 1] = below(stream, photos), below(stream, levels)
        choices[k, 2], choices[k, 3] = next_u32(stream), next_u32(stream)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"photo {path} cannot be read: {error.strerror}.") from error


def _open(path: Path, data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"photo {path} is no image that Pillow can read: remove it.") from error


def _decode(path: Path) -> np.ndarray:
    """The photo as (h, w, 3) uint8; EXIF rotation is not applied."""
    picture = _open(path, _read(path))
    try:
        return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"photo {path} is broken ({error}): remove it.") from error


def _shrink(photo: np.ndarray, size: int) -> list[np.ndarray]:
    h, w = photo.shape[:2]
    side = min(h, w)
    keep_h, keep_w = min(h, LONGEST * side), min(w, LONGEST * side)
    top, left = (h - keep_h) // 2, (w - keep_w) // 2
    turned = turn_rgb(photo[top : top + keep_h, left : left + keep_w])
    levels = []
    for above, below_ in LEVELS:
        short = -(-size * above // below_)
        levels.append(resize_turned_rgb(turned, keep_h * short // side, keep_w * short // side))
    return levels
