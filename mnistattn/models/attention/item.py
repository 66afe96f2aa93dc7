"""Item-wise attention: `item-soft` and `item-hard`. What is attended to are items, regions of the
map, not its positions (the four kinds, item- or location-wise and soft or hard, are those of Wang &
Tax, "Survey on the attention based RNN model and its applications in computer vision",
arXiv 1601.06823).

    v_k = mean of x over box k,   w = softmax_k g(v_k, q)
    item-soft: output = sum_k w_k v_k  (as Anderson et al., CVPR 2018, over proposed regions)
    item-hard: s ~ w, output = v_s

The output is that of a map: with |k| the cells of box k,
    sum_k w_k v_k = sum_ij a_ij x_ij,   a_ij = sum_k w_k [ij in k] / |k|,
the boxes painted back, each with its weight. It sums to 1 exactly as w does.

Our choices, which no source states: the proposals are a fixed grid of squares that overlap by half
(sides of 1, 2, ... cells, clipped to the map; at the right and lower edge one more, so that each
side's boxes cover the map), where the papers take a detector's; g is soft.py's, and is told a box's
side by a learned vector, so that it can prefer a size; item-hard chooses as `hard` does (hard.py).

How well: on MREF, after the board's two epochs, `item-soft` has 57.9 %, the most of those on the
last map alone, and the highest correctness of all, 0.057; `item-hard` less than `none`
(docs/zoo.md).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from mnistattn.models.attention import check
from mnistattn.models.attention.hard import Choice, returned
from mnistattn.models.attention.soft import Score


@dataclass(frozen=True)
class Boxes:
    """All boxes of one side on a map: each of m intervals of rows with each of n of columns.

    side: in cells, from 1; where it is clipped, the one asked for. rows (m, H), columns (n, W):
    1 / length in an interval, 0 outside.
    """

    side: int
    rows: Tensor
    columns: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.rows), len(self.columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)


@lru_cache(maxsize=64)
def grid(
    height: int, width: int, sides: int, device: torch.device, dtype: torch.dtype
) -> tuple[Boxes, ...]:
    """The boxes of a map of height x width cells: of 1 to `sides` cells a side, without those that
    are another side's once they are clipped."""
    kept: dict[tuple[int, int], Boxes] = {}
    with torch.inference_mode(False):  # kept for later, where a gradient may pass
        for side in range(1, sides + 1):
            clipped = (min(side, height), min(side, width))
            if clipped not in kept:
                lines = (_intervals(*of) for of in zip((height, width), clipped, strict=True))
                kept[clipped] = Boxes(side, *(line.to(device, dtype) for line in lines))
    return tuple(kept.values())


def _intervals(length: int, side: int) -> Tensor:
    """Intervals of `side` cells that overlap by half and cover `length`, as rows that sum to 1."""
    starts = [*range(0, length - side, max(1, side // 2)), length - side]
    cell, start = torch.arange(length), torch.tensor(starts)[:, None]
    return ((cell >= start) & (cell < start + side)).double() / side


def pool(x: Tensor, boxes: tuple[Boxes, ...]) -> Tensor:
    """The mean of x (B, C, H, W) over each box: v (B, K, C). Rows first, then columns: two small
    products a side, however many boxes there are."""
    v = [
        torch.einsum("mh,bchw,nw->bmnc", b.rows.to(x.dtype), x, b.columns.to(x.dtype))
        for b in boxes
    ]
    return torch.cat([part.flatten(1, 2) for part in v], 1)


def paint(w: Tensor, boxes: tuple[Boxes, ...]) -> Tensor:
    """The boxes' weights (B, K) painted back, each spread evenly over its box: (B, 1, H, W)."""
    a = w.new_zeros(())
    for part, b in zip(w.split([len(b) for b in boxes], 1), boxes, strict=True):
        part = part.unflatten(1, b.shape)
        # Sums, not products, for autocast would make these bfloat16, and a map sum to 0.99.
        part = (part[..., None] * b.columns).sum(2)
        a = a + (part[:, :, None] * b.rows[..., None]).sum(1)
    return a[:, None]


class ItemSoft(nn.Module):
    """Soft attention over a grid of boxes.

    Args:
        channels, query_dim: C and Q.
        last: not used: the map sums to 1 in any layer.
        hidden: of both hidden layers of g, from 1.
        sides: boxes of 1 to `sides` cells a side, from 1 (the positions alone).

    Raises InputError for an option out of its range.
    """

    placement = "last"
    paper = "Anderson et al., CVPR 2018"
    summary = "item-wise soft attention over a grid of boxes"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, hidden: int = 32, sides: int = 4
    ) -> None:
        super().__init__()
        check.whole(hidden=hidden, sides=sides)
        self.score = Score(channels, query_dim, hidden)
        self.side = nn.Parameter(torch.zeros(sides, hidden))

    def items(self, x: Tensor, query: Tensor) -> tuple[tuple[Boxes, ...], Tensor, Tensor]:
        """The boxes of x (B, C, H, W), their vectors v (B, K, C) and their scores (B, K)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        boxes = grid(*x.shape[2:], len(self.side), x.device, wide)
        v = pool(x, boxes)
        offset = torch.cat([self.side[b.side - 1].expand(len(b), -1) for b in boxes])
        return boxes, v, self.score(v, query, offset)

    def forward(self, x: Tensor, query: Tensor) -> Tensor | tuple[Tensor, dict]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) that sums to 1 over positions."""
        boxes, _, score = self.items(x, query)
        return paint(torch.softmax(score, 1), boxes)


class ItemHard(ItemSoft):
    """Hard attention over a grid of boxes: one is sampled in training, the best taken in eval.

    Args:
        channels, query_dim, last, hidden, sides: see ItemSoft.
        estimator, temperature, baseline, entropy, expected: see Hard.

    Raises InputError for an option out of its range.
    """

    paper = "Wang & Tax, arXiv 2016"
    summary = "item-wise hard attention: one sampled box of a grid"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, hidden: int = 32, sides: int = 4,
        estimator: str = "score", temperature: float = 1.0, baseline: bool = True,
        entropy: float = 0.01, expected: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(channels, query_dim, last=last, hidden=hidden, sides=sides)
        self.choice = Choice(channels, query_dim, hidden, estimator, temperature, baseline,
                             entropy, expected)  # fmt: skip

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """x (B, C, H, W), query (B, Q) -> the boxes' probabilities, painted, as a map (B, 1, H, W)
        that sums to 1, and the features (B, C, H, W): x over the chosen box, divided by its cells,
        0 elsewhere, which sum to the box's mean; in training maybe a loss."""
        boxes, v, score = self.items(x, query)
        p, weights, loss = self.choice(score, v, query)
        return returned(paint(p, boxes), x * paint(weights, boxes), loss)
