"""A data set on disk as a torch data set, image by image, or as arrays in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from mnistattn.dataset.read import Shards, open_split, read_card, read_split
from mnistattn.errors import InputError
from mnistattn.generators.variants import choose

TARGET_TYPES = ("query", "answer", "mask", "scale", "target", "instances", "answers")
QUERIES = ("one", "all")


class AttentionDataset(VisionDataset):
    """Images, with any of their targets, opened lazily in each loader worker.

    Item i is (image, targets): image a tv_tensors.Image (3, H, W) uint8; targets one value, or a
    tuple where several target_types are asked for:
        query, answer, target   int
        scale                   float, the target's, relative to 28 pixels
        mask                    tv_tensors.Mask (H, W) bool, the pixels of what answers the query
        instances               tv_tensors.Mask (H, W) uint8, k for the k-th object
        answers                 bool tensor (answers,), every right answer
    queries: `one`, the image's own query; `all`, an item for every object that has one right
    answer. transforms / transform / target_transform as in torchvision (v2 transforms move image
    and masks together).
    """

    def __init__(
        self, root: str | Path, split: str = "train",
        target_types: tuple[str, ...] | str = ("query", "answer"), queries: str = "one",
        transforms: Callable | None = None, transform: Callable | None = None,
        target_transform: Callable | None = None,
    ):  # fmt: skip
        super().__init__(str(root), transforms, transform, target_transform)
        self.card = read_card(root)
        self.split = split
        self.target_types = (
            (target_types,) if isinstance(target_types, str) else tuple(target_types)
        )
        for kind in self.target_types:
            choose("target type", kind, TARGET_TYPES)
        choose("queries", queries, QUERIES)
        if queries == "all" and self.card.spec.row.repeats:
            raise InputError("queries='all' needs one right answer a query: mbg-multi has several.")
        names = ["digit", "color", "scale", "query", "answer", "target"]
        names += ["answers"] if self.card.spec.row.repeats else []
        self._rows = read_split(self.card, split, names)
        self._items = self._pairs(queries)
        self._h5: h5py.File | Shards | None = None

    def _pairs(self, queries: str) -> np.ndarray:
        """Each item's image and object, int64 (items, 2)."""
        n = len(self._rows["query"])
        if queries == "one":
            return np.stack([np.arange(n), self._rows["target"].astype(np.int64)], 1)
        there = self._rows["digit"] >= 0
        if self.card.spec.row.asks == "color":
            color = self._rows["color"]
            there &= (color[:, :, None] == color[:, None, :]).sum(2) == 1
        return np.argwhere(there)

    def __len__(self) -> int:
        return len(self._items)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_h5": None}  # an open file does not travel to a worker

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        if self._h5 is None:
            self._h5 = open_split(self.card, self.split)
        i, k = (int(v) for v in self._items[item])
        image = torch.from_numpy(self._h5["image"][i]).permute(2, 0, 1).contiguous()
        targets = tuple(self._target(kind, i, k) for kind in self.target_types)
        pair = tv_tensors.Image(image), targets[0] if len(targets) == 1 else targets
        return self.transforms(*pair) if self.transforms else pair

    def _target(self, kind: str, i: int, k: int) -> Any:
        digit, color = int(self._rows["digit"][i, k]), int(self._rows["color"][i, k])
        asks_color = self.card.spec.row.asks == "color"
        if kind == "query":
            return color if asks_color else digit
        if kind == "answer":
            return digit if asks_color else color
        if kind == "target":
            return k
        if kind == "scale":
            return float(self._rows["scale"][i, k])
        if kind == "answers":
            if "answers" in self._rows:
                return torch.from_numpy(self._rows["answers"][i])
            answers = torch.zeros(len(self.card.answer_names), dtype=torch.bool)
            answers[digit if asks_color else color] = True
            return answers
        assert self._h5 is not None  # __getitem__ opened it
        instances = self._h5["instances"][i]
        if kind == "instances":
            return tv_tensors.Mask(torch.from_numpy(instances))
        right = [k + 1]
        if self.card.spec.row.repeats:
            right = list(np.flatnonzero(self._rows["digit"][i] == digit) + 1)
        return tv_tensors.Mask(torch.from_numpy(np.isin(instances, right)))


def load(path: str | Path, split: str = "train", **options) -> AttentionDataset:
    """The split of the data set in `path` as a torch data set; options as of AttentionDataset."""
    return AttentionDataset(path, split, **options)


def load_arrays(path: str | Path, split: str = "train") -> dict[str, np.ndarray]:
    """The whole split in memory, arrays by name as on disk (image (N, H, W, 3) uint8, ...)."""
    return read_split(read_card(path), split)
