"""A window of Gaussians: `gaussian`, a gate, and `gaussian-glimpse`, which zooms.

DRAW (Gregor et al., "DRAW: A Recurrent Neural Network For Image Generation", ICML 2015), the
selective attention of section 3.2. An N x N grid of Gaussian filters lies on the map, by a centre
g, a stride delta and a width sigma; here each of them for either axis, six parameters in all:

    mu^i = g + (i - N / 2 - 0.5) delta,   i = 1 .. N                       (eqs. 19, 20)
    F[i, a] = exp(-(a - mu^i)^2 / (2 sigma^2)) / Z,   sum_a F[i, a] = 1    (eqs. 25, 26)
    glimpse = F_Y x F_X^T                                                  (eq. 27)

`gaussian` multiplies the features by sum_i F_Y[i] outer sum_j F_X[j]: the positions that a glimpse
would be made of. `gaussian-glimpse` stands after the first pooling, takes the glimpse with one
filter a row and a column (N = H, W), and the later layers work in the window's frame. It stands
there because a glimpse of the last map is summed over positions, which is `gaussian` again, and
because after a glimpse maps are no longer aligned with the image.

Our choices, which no source states: where the parameters come from (`Locator`): the centre is the
expectation of the position under a softmax of scores, query added, so that it is where something
is, not a number that a layer has to regress. Scores start small, so that a window starts in the
middle, and are multiplied by 4, so that they sharpen soon. Stride and width are a layer on the
features there, in units of (side - 1) / (N - 1) pixels: a sigmoid (DRAW's delta~, no larger than
the map; at the start 0.7) and a softplus (DRAW has an exponential of each, of pixels the width).
F is computed as a softmax over a: equal to the above, and defined where a narrow filter falls
between two pixels, or far outside, and all its exponentials vanish: it takes the nearest pixel.
DRAW's max(Z, eps) would see nothing there and have no gradient. A width has at least 0.1 pixels,
which bounds the gradient. As a gate, the sum of the filters of an axis is divided by its peak.

How well: on MREF, after the board's two epochs, `gaussian` is still where `none` is (41.1 %), and
`gaussian-glimpse` below it (37.8); on a small task of four objects the former finds the right one
always, the glimpse never (docs/zoo.md).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import check
from mnistattn.models.attention.activate import wide

SHARPNESS = 4.0
SIGMA_MIN = 0.1  # pixels
STRIDE, WIDTH = 0.7, 0.5  # at the start, in units of (side - 1) / (N - 1)


class Locator(nn.Module):
    """Where the queried thing is, and what is there, by a small convolutional network.

    Args:
        channels, query_dim, hidden: of the features, the query and the network's layers.
        strided: how many 3 x 3 convolutions of stride 2 come first, each with a ReLU.
        context: side of the last convolution, odd, to which the query is added before its ReLU.
    """

    def __init__(self, channels: int, query_dim: int, hidden: int, strided: int, context: int):
        super().__init__()
        widths = [channels] + [hidden] * strided
        self.down = nn.ModuleList(
            nn.Conv2d(i, hidden, 3, stride=2, padding=1) for i in widths[:strided]
        )
        self.features = nn.Conv2d(widths[-1], hidden, context, padding=context // 2)
        self.query = nn.Linear(query_dim, hidden, bias=False)
        self.score = nn.Conv2d(hidden, 1, 1, bias=False)  # softmax ignores a bias
        with torch.no_grad():
            for conv in (*self.down, self.features, self.score):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            self.score.weight *= 0.05 / SHARPNESS

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), query (B, Q) -> the expected position (B, 2), y and x in (-1, 1), where
        -1 and 1 are the map's edges; and the expected features (B, hidden). float32 or float64."""
        height, width = x.shape[2:]
        for conv in self.down:
            x = F.relu(conv(x))
        e = F.relu(self.features(x) + self.query(query)[:, :, None, None])
        share = torch.softmax(SHARPNESS * wide(self.score(e)).flatten(1), 1)
        rows, columns = share.view(-1, *e.shape[2:]).sum(2), share.view(-1, *e.shape[2:]).sum(1)
        # A convolution of stride 2 has its cell o over pixel 2 o.
        step = 2 ** len(self.down)
        y, z = ((2 * step * indices(a.shape[1], a) + 1) / side - 1
                for a, side in ((rows, height), (columns, width)))  # fmt: skip
        found = torch.einsum("bp,bcp->bc", share, wide(e).flatten(2))
        return torch.stack((rows @ y, columns @ z), 1), found


def filters(centre: Tensor, stride: Tensor, width: Tensor, count: int, side: int) -> Tensor:
    """DRAW's filters of one axis: F (B, count, side), each row summing to 1.

    centre, stride, width: (B,), in pixels, 0 the middle of the first one; width above 1e-12.
    """
    steps = indices(count, centre) - (count - 1) / 2
    mu = centre[:, None] + steps * stride[:, None]
    away = indices(side, centre) - mu[:, :, None]
    return torch.softmax(-((away / width[:, None, None]) ** 2) / 2, 2)


def indices(n: int, like: Tensor) -> Tensor:
    """0 .. n - 1, made where `like` is: a CUDA graph cannot copy from the computer's memory."""
    return torch.arange(n, dtype=like.dtype, device=like.device)


class _Window(nn.Module):
    """The six parameters of (x, q)."""

    def __init__(self, channels: int, query_dim: int, hidden: int, strided: int, context: int):
        super().__init__()
        self.locate = Locator(channels, query_dim, hidden, strided, context)
        self.shape = nn.Linear(hidden, 4)
        with torch.no_grad():
            self.shape.weight *= 0.1
            self.shape.bias[:2] = math.log(STRIDE / (1 - STRIDE))
            self.shape.bias[2:] = math.log(math.expm1(WIDTH))

    def parameters_of(
        self, x: Tensor, query: Tensor, counts: tuple[int, int]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """x (B, C, H, W), query (B, Q), counts: filters in y and x -> for y and for x the centre,
        stride and width, (B,) each, in pixels, as `filters` takes them."""
        centre, found = self.locate(x, query)
        stride, width = wide(self.shape(found)).split(2, 1)
        stride, width = torch.sigmoid(stride), F.softplus(width)
        axes = []
        for i, count in enumerate(counts):
            side = x.shape[2 + i]
            unit = (side - 1) / max(1, count - 1)
            middle = (centre[:, i] + 1) / 2 * side - 0.5
            axes.append((middle, stride[:, i] * unit, SIGMA_MIN + width[:, i] * unit))
        return axes

    def banks(self, x: Tensor, query: Tensor, counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """F_Y (B, counts[0], H) and F_X (B, counts[1], W), float32 or float64."""
        y, z = self.parameters_of(x, query, counts)
        return filters(*y, counts[0], x.shape[2]), filters(*z, counts[1], x.shape[3])


def window(rows: Tensor, columns: Tensor, last: bool) -> Tensor:
    """F_Y (B, N, H), F_X (B, M, W) -> map (B, 1, H, W), the sums of their filters multiplied: a
    gate with a peak of 1, or a distribution if last."""
    a_y, a_x = rows.sum(1), columns.sum(1)
    if last:
        a_y, a_x = a_y / rows.shape[1], a_x / columns.shape[1]
    else:
        a_y, a_x = a_y / a_y.amax(1, keepdim=True), a_x / a_x.amax(1, keepdim=True)
    return a_y[:, None, :, None] * a_x[:, None, None, :]


class Gaussian(_Window):
    """A window of Gaussian filters as attention map.

    Args:
        channels, query_dim, last: as in `contract.Attention`.
        count: N, filters of an axis, from 2 (one alone has no stride).
        hidden: channels of the scores' features.
        context: side of their convolution, odd; 1 in the last layer, as CTX.
    """

    paper = "Gregor et al., ICML 2015"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, count: int = 4, hidden: int = 32,
        context: int = 3,
    ) -> None:  # fmt: skip
        check.whole(count=count, hidden=hidden, context=context)
        if count < 2:
            raise InputError(f"count {count} is impossible: one filter has no stride, give 2.")
        if not context % 2:
            raise InputError(f"context {context} is even: give an odd number.")
        super().__init__(channels, query_dim, hidden, 0, 1 if last else context)
        self.count, self.last = count, last

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) in 0 .. 1; sums to 1 if last."""
        return window(*self.banks(x, query, (self.count, self.count)), self.last).to(x.dtype)


class GaussianGlimpse(_Window):
    """A window of Gaussian filters that is cut out, at the size of the map.

    Args:
        channels, query_dim, last: as in `contract.Attention`.
        hidden: channels of the network that finds the centre.
    """

    placement = "first"
    paper = "Gregor et al., ICML 2015"

    def __init__(self, channels: int, query_dim: int, *, last: bool, hidden: int = 32) -> None:
        check.whole(hidden=hidden)
        super().__init__(channels, query_dim, hidden, 2, 3)
        self.last = last

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) in 0 .. 1, a sum of 1 if last: the
        share of each position in the glimpse; and the glimpse, {"features": (B, C, H, W)}."""
        rows, columns = self.banks(x, query, (x.shape[2], x.shape[3]))
        glimpse = rows[:, None] @ wide(x) @ columns.transpose(1, 2)[:, None]
        return window(rows, columns, self.last).to(x.dtype), {"features": glimpse.to(x.dtype)}
