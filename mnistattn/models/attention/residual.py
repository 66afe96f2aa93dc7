"""Residual attention (Wang et al., "Residual Attention Network for Image Classification", CVPR
2017, section 3), asked a question: `residual`.

    down:  D_0 = X;  D_k = U(max-pool(D_k-1)),  k = 1 .. depth
    up:    E_depth = U(ReLU(W [D_depth; q]))                          the query joins at the bottom
           E_k-1 = U(bilinear(E_k) + S(D_k-1)),  D_0 = X itself at the top, without U and S
    a = sigmoid(conv_1x1(ReLU(conv_1x1(E_0))))
    output (1 + a) X                                                  attention residual learning
    U, S: residual units, V + conv_3x3(ReLU(conv_3x3(ReLU(V))))

What is not attended still passes, with a weight of 1, in the last layer too: this is the method,
so there is no softmax here. The map is a mask a, a gate in every layer: where the method looks.
The weight that a position's features are given is 1 + a, which never leaves (1, 2) and is therefore
close to uniform, however sharp a is: mask correctness flatters the method when it is taken of a.
`metric="output"` gives the map (1 + a) / 2 instead, for the same network and answers.

Our choices, which no source states: how the query joins ([D; q] at each position, which is one more
bias W_q q); one mask for all channels, since the metric needs one map, unless `per_channel` (the
map is then the mean over channels of theirs); 2 x 2 pooling that keeps a last odd row or column,
so that a side of 1 stays 1 and every depth fits every map; interpolation to the exact size of the
level above, corners not aligned; no BatchNorm in the units, since X comes from one (a batch of one
and a map of 1 x 1 would have no variance); X itself is the trunk's output.

How well: on MREF, after the board's two epochs, still where `none` is (41.2 %; docs/zoo.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.models.attention import check

METRICS = ("mask", "output")


class Unit(nn.Module):
    """A residual unit, activation first: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.second(F.relu(self.first(F.relu(x)), inplace=True))


class Residual(nn.Module):
    """A mask from a small hourglass, and features times 1 + mask.

    Args:
        channels: C.
        query_dim: Q.
        last: whether this is the last attended layer; it changes nothing.
        depth: halvings of the map on the way down, from 1.
        per_channel: a mask for each channel (the paper's mixed attention), not one for all.
        metric: what the map is, `mask`, a, or `output`, (1 + a) / 2.

    Raises InputError for an option out of its range.
    """

    paper = "Wang et al., CVPR 2017"
    summary = "a mask from an hourglass; features times 1 + mask"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, depth: int = 2,
        per_channel: bool = False, metric: str = "mask",
    ):  # fmt: skip
        super().__init__()
        check.whole(depth=depth)
        check.truth(per_channel=per_channel)
        check.one_of("metric", metric, METRICS)
        self.metric = metric
        self.down = nn.ModuleList(Unit(channels) for _ in range(depth))
        self.bottom = nn.Conv2d(channels, channels, 1)
        self.query = nn.Linear(query_dim, channels, bias=False)
        self.turn = Unit(channels)
        # Of the levels between the bottom and the top.
        self.skip = nn.ModuleList(Unit(channels) for _ in range(depth - 1))
        self.up = nn.ModuleList(Unit(channels) for _ in range(depth - 1))
        self.mask = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels if per_channel else 1, 1),
        )

    def soft_mask(self, x: Tensor, query: Tensor) -> Tensor:
        """a (B, 1, H, W), or (B, C, H, W) if per channel, in (0, 1)."""
        levels = [x]
        for unit in self.down:
            levels.append(unit(F.max_pool2d(levels[-1], 2, ceil_mode=True)))
        e = F.relu(self.bottom(levels.pop()) + self.query(query)[:, :, None, None], inplace=True)
        e = self.turn(e)
        for skip, up in zip(self.skip, self.up, strict=True):
            e = up(_enlarged(e, levels[-1]) + skip(levels.pop()))
        return torch.sigmoid(self.mask(_enlarged(e, x) + x))

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) in (0, 1), and the features (1 + a) X
        (B, C, H, W), of x's dtype."""
        a = self.soft_mask(x, query)
        shown = a.mean(1, keepdim=True)
        if self.metric == "output":
            shown = (1 + shown) / 2
        return shown, {"features": (1 + a.to(x.dtype)) * x}


def _enlarged(e: Tensor, above: Tensor) -> Tensor:
    """e (B, C, h, w) -> (B, C, H, W) of `above`."""
    return F.interpolate(e, above.shape[2:], mode="bilinear", align_corners=False)
