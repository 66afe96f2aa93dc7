"""The training feed: a split in memory as uint8, on the device where it fits; a batch is an index.

Images stay (N, H, W, 3), so a gathered batch, permuted, is channels-last without a copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnistattn.dataset.read import Card, read_split

DEVICE_SHARE = 0.5  # of a GPU's free memory that a split may take


@dataclass
class Feed:
    """A split, ready to be gathered from.

    images uint8 (N, H, W, 3); digit, color int64 (N, O), -1 padded; query, answer int64 (N,);
    answers bool (N, classes): every right answer. instances uint8 (N, H, W), only if they were
    asked for: 0 background, k the k-th object. All lie together: on `device`, where batches go, or
    in the computer's memory if a GPU has not enough.
    """

    images: Tensor
    digit: Tensor
    color: Tensor
    query: Tensor
    answer: Tensor
    answers: Tensor
    asks_color: bool
    device: torch.device
    instances: Tensor | None = None

    def __len__(self) -> int:
        return len(self.query)

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """The images' numbers, int64 (at most batch_size,), where the images are."""
        for start in range(0, len(self), batch_size):
            end = min(start + batch_size, len(self))
            yield torch.arange(start, end, device=self.images.device)

    def batch(self, index: Tensor) -> Tensor:
        """Images index (B,) as float32 (B, 3, H, W) in 0 .. 1, channels-last, on the device."""
        gathered = self.images.index_select(0, index.to(self.images.device))
        return gathered.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float().mul_(1 / 255)

    def masks(self, index: Tensor, query: Tensor) -> Tensor:
        """The pixels of what a query (B,) asks for in images index (B,): bool (B, H, W), on the
        device. Needs `instances`."""
        assert self.instances is not None
        home = self.images.device
        index, query = index.to(home), query.to(home)
        asked = (self.color if self.asks_color else self.digit)[index] == query[:, None]
        shown = F.pad(asked, (1, 0))  # the background is not asked for
        instances = self.instances[index].flatten(1).long()
        mask = shown.gather(1, instances).view(len(index), *self.instances.shape[1:])
        return mask.to(self.device)

    def pairs(self, queries: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """An epoch's (image, query, answer), int64 (n,) each, in random order.

        queries: see Recipe. With `fresh` and `all`, a colour is asked for only if it occurs once.
        """
        n = len(self)
        if queries == "one":
            image, query, answer = torch.arange(n), self.query.cpu(), self.answer.cpu()
        else:
            askable = self._askable().cpu()
            if queries == "all":
                image, which = askable.nonzero(as_tuple=True)
            else:
                image = torch.arange(n)
                which = torch.multinomial(askable.float(), 1, generator=generator)[:, 0]
            pair = self.digit.cpu()[image, which], self.color.cpu()[image, which]
            query, answer = pair[::-1] if self.asks_color else pair
        order = torch.randperm(len(image), generator=generator)
        return image[order], query[order], answer[order]

    def _askable(self) -> Tensor:
        """bool (N, O): which objects can be asked for with one right answer."""
        there = self.digit >= 0
        if not self.asks_color:
            return there
        same = self.color[:, :, None] == self.color[:, None, :]
        return there & (same.sum(2) == 1)


def load_feed(
    card: Card, split: str, device: torch.device, check: bool = True, masks: bool = False
) -> Feed:
    """Read a split into memory (on the device if it takes no more than half its free memory).

    check: compare digests. masks: also keep the instances, for a network that is told the truth.
    """
    arrays = read_split(card, split, check=check)
    answer = torch.from_numpy(arrays["answer"].astype(np.int64))
    if "answers" in arrays:
        answers = torch.from_numpy(arrays["answers"])
    else:
        answers = F.one_hot(answer, len(card.answer_names)).bool()
    tensors = {
        "images": torch.from_numpy(arrays["image"]),
        "digit": torch.from_numpy(arrays["digit"].astype(np.int64)),
        "color": torch.from_numpy(arrays["color"].astype(np.int64)),
        "query": torch.from_numpy(arrays["query"].astype(np.int64)),
        "answer": answer,
        "answers": answers,
    }
    if masks:
        tensors["instances"] = torch.from_numpy(arrays["instances"])
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(v.nbytes for v in tensors.values()) < DEVICE_SHARE * free:
            tensors = {name: v.to(device) for name, v in tensors.items()}
    return Feed(**tensors, asks_color=card.spec.row.asks == "color", device=device)
