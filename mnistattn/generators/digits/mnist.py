"""Digit source `mnist`: the real MNIST (LeCun et al. 1998), where torchvision keeps it.

Read straight from the IDX files, so that generating needs no torch; only a download, when the
files are missing, goes through torchvision.
"""

import gzip
import hashlib
import socket
import zlib
from pathlib import Path

import numpy as np

from mnistattn.errors import InputError

FILES = {"train": 60_000, "t10k": 10_000}
TRAIN_PART = 50_000  # of MNIST's training set; the other 10,000 are for validation
DOWNLOAD_TIMEOUT = 8.0  # seconds


def read_mnist(data_root: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str]:
    """MNIST's two parts {"train", "t10k"} as (images (n, 28, 28), labels (n,)) uint8; SHA-256.

    Raises FileNotFoundError where there is none, InputError where a file is not MNIST.
    """
    parts, checksum = {}, hashlib.sha256()
    for part, n in FILES.items():
        images = _read_idx(data_root, f"{part}-images-idx3-ubyte", 2051, (n, 28, 28))
        labels = _read_idx(data_root, f"{part}-labels-idx1-ubyte", 2049, (n,))
        if labels.max() > 9:
            raise InputError(f"{data_root}/MNIST/raw/{part}-labels-idx1-ubyte is not MNIST's.")
        parts[part] = images, labels
        checksum.update(images.data)
        checksum.update(labels.data)
    return parts, checksum.hexdigest()


def _read_idx(data_root: Path, name: str, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    path = Path(data_root) / "MNIST" / "raw" / name
    if path.exists():
        data = path.read_bytes()
    elif path.with_name(name + ".gz").exists():
        path = path.with_name(name + ".gz")
        try:
            data = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error):
            data = b""
    else:
        raise FileNotFoundError(path)
    header = np.array([magic, *shape], ">u4").tobytes()
    if data[: len(header)] != header or len(data) != len(header) + np.prod(shape):
        raise InputError(
            f"{path} is damaged or not MNIST's ({len(data)} bytes): delete it and "
            "download it again, or use --digits strokes."
        )
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def download_mnist(data_root: Path) -> None:
    """Let torchvision download MNIST into data_root; InputError if it cannot, soon."""
    from torchvision.datasets import MNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        for train in (True, False):
            MNIST(str(data_root), train=train, download=True)
    except Exception as error:  # torchvision lets URLError, RuntimeError, OSError ... through
        raise InputError(
            f"MNIST is not in {data_root}/MNIST/raw and could not be downloaded "
            f"({type(error).__name__}): put it there, or use --digits strokes."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def split_mnist(parts, split: str, digit_split: str) -> tuple[np.ndarray, np.ndarray]:
    """The (images, labels) that a split draws from; `pooled` shares all 70,000, as PAN's code."""
    if digit_split == "pooled":
        images, labels = (np.concatenate([parts["train"][i], parts["t10k"][i]]) for i in (0, 1))
        return images, labels
    if split == "test":
        return parts["t10k"]
    part = slice(TRAIN_PART) if split == "train" else slice(TRAIN_PART, None)
    return parts["train"][0][part], parts["train"][1][part]
