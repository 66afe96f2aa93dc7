"""Recurrent model of visual attention: `ram`, a whole network that looks at an image by glimpses.

Mnih et al., "Recurrent Models of Visual Attention", NIPS 2014, with the two recurrent layers and
the context of Ba et al., "Multiple Object Recognition with Visual Attention", ICLR 2015:

    h^2_0 = context(the whole image, coarse)                  where to look: the second layer
    l_t ~ N(mu(h^2_t), sigma) in training, its mean in eval
    g_t = glimpse(crops at several scales around l_t, l_t)    side g, 2 g, 4 g, each as g x g
    h^1_t = GRU(g_t; h^1_{t-1}), from h^1_{-1} = layer(q)     what is seen: the first layer
    h^2_{t+1} = GRU(h^1_t, l_t, q; h^2_t)
    answer from h^1 after the last glimpse

A location has no gradient from the cross entropy. It is trained by the score function, with the
reward -cross entropy and a baseline of h^2_t a step (`attention/policy.py`).

It is a whole network, on pixels, since a glimpse is cut out of an image at its full resolution: of
a first map it would be smaller than the map, and a last one of 6 x 6 is not worth cutting. The
context reaches the answer through the locations alone, as in Ba et al.: so all that is answered was
seen in a glimpse, and the map, the windows painted, is honest about it.

Our choices, which no source states: a GRU for the LSTM; where the query goes in, which is also the
convolutions; mu is the expected position under a softmax of scores of the context's features and
h^2_t (the paper: tanh of a layer of h), since one reward an image teaches which feature to go to
sooner than which coordinates, and cannot drive a tanh to the corners; the convolutions are shared
by the crops, at all scales, and the context, whose gradient they do not get, so that what
recognises a digit in a glimpse, trained by the cross entropy, is there to find it; a crop's
features are averaged and normalised (BatchNorm, as the features of the other networks); h^1 is
detached on its way to h^2; crops come from a pyramid of averages, bilinearly, so that the coarse
ones do not alias, and are zero outside the image. The map: the window of each scale and step as a
box of mass 1 / (glimpses * scales), what lies outside the image dropped (the bilinear margin of
half a cell is not painted).

How well: on MREF, after the board's two epochs, 31.3 %, less than `none` (41.2), but 76.5 % on the
largest digits, which no window can miss: it learns to see before it learns where to look, and that
slowly (docs/zoo.md).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import check
from mnistattn.models.attention.activate import wide
from mnistattn.models.attention.gaussian import SHARPNESS, indices
from mnistattn.models.attention.policy import Loss, score_function, summed

CHANNELS = 32
QUERY_DIM = 32
CONTEXT = 64  # pixels of the coarse image's side, at most
POOLED = 4  # times that the convolutions make it smaller


class RAM(nn.Module):
    """forward(images (B, 3, S, S), query (B,)) -> (logits (B, answers), {"attention", "loss"}).

    Args:
        size, queries, answers: as in `contract.WholeModel`.
        glimpses: T, from 1.
        side: g, of the smallest crop in pixels, from 4.
        scales: crops a glimpse, each of twice the side of the one before.
        sigma: deviation of a location in training, in halves of the image's side, from 0.001.
        hidden: of the glimpse and of both recurrent layers.
        weight: of the score function's loss.
    """

    placement = "whole"
    paper = "Mnih et al., NIPS 2014"

    def __init__(
        self, size: int, queries: int, answers: int, *, glimpses: int = 4, side: int = 16,
        scales: int = 3, sigma: float = 0.15, hidden: int = 128,
        weight: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check.whole(glimpses=glimpses, side=side, scales=scales, hidden=hidden)
        check.number(1e-3, sigma=sigma)
        check.number(0, weight=weight)
        if side < 4:
            raise InputError(f"side {side} is impossible: a crop is pooled twice, give 4 or more.")
        if side * 2 ** (scales - 1) > 2 * size:
            raise InputError(
                f"{scales} scales of side {side} reach {side * 2 ** (scales - 1)} pixels, over "
                f"twice an image's {size}: give fewer."
            )
        self.glimpses, self.side, self.scales = glimpses, side, scales
        self.sigma, self.weight = sigma, weight
        self.embedding = nn.Embedding(queries, QUERY_DIM)
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.third = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.query = nn.Linear(QUERY_DIM, CHANNELS, bias=False)
        self.pooled_norm = nn.BatchNorm1d(scales * CHANNELS)
        self.what = nn.Linear(scales * CHANNELS, hidden)
        self.where = nn.Linear(2, hidden, bias=False)
        self.begin = nn.Linear(QUERY_DIM, hidden)
        self.see = nn.GRUCell(hidden, hidden)
        self.answer = nn.Linear(hidden, answers)
        self.find = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.start = nn.Linear(CHANNELS + QUERY_DIM, hidden)
        self.aim = nn.Linear(hidden, CHANNELS, bias=False)
        self.score = nn.Conv2d(CHANNELS, 1, 1, bias=False)  # softmax ignores a bias
        self.baseline = nn.Linear(hidden, 1)
        with torch.no_grad():
            for layer in (self.first, self.second, self.third, self.what, self.find):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            self.score.weight *= 0.05
            self.baseline.bias.fill_(-math.log(answers))  # the reward of a guess
        if glimpses > 1:
            self.look = nn.GRUCell(hidden + 2 + QUERY_DIM, hidden)

    def forward(self, images: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """See the class. out["attention"]: one map (B, 1, S // 2, S // 2), which sums to the share
        of the windows that lies inside the image. out["loss"], in training: a function of the
        cross entropies (B,), as in `contract.Attention`."""
        q = self.embedding(query)
        levels = pyramid(images, self.scales)
        found, look = self.context(images, q)
        seen = torch.tanh(self.begin(q))
        places: list[Tensor] = []
        losses: list[Loss] = []
        for t in range(self.glimpses):
            mean = self.locate(found, look, images.shape[-1])
            at = mean.detach()
            if self.training:
                at = at + self.sigma * torch.randn_like(at)
                log_prob = -(((at - mean) / self.sigma) ** 2).sum(1) / 2  # up to a constant
                baseline = wide(self.baseline(look.detach()))[:, 0]
                losses.append(score_function(log_prob, baseline, self.weight))
            places.append(at)
            seen = self.see(self.glimpse(levels, at, q, images.shape[-1]), seen)
            if t + 1 < self.glimpses:
                look = self.look(torch.cat([seen.detach(), at.to(seen), q], 1), look)
        out: dict = {"attention": [self.paint(torch.stack(places, 1), images.shape[-1])]}
        if losses:
            out["loss"] = summed(losses)  # each has the reward of the end
        return self.answer(seen), out

    def trunk(self, x: Tensor, q: Tensor) -> Tensor:
        """x (B, 3, h, w), q (B, Q) -> (B, 32, h // 4, w // 4), not negative."""
        x = F.relu(F.max_pool2d(self.first(x), 2))
        x = F.relu(F.max_pool2d(self.second(x), 2))
        return F.relu(self.third(x) + self.query(q)[:, :, None, None])

    def context(self, images: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 32, h, w) to go to, of the image at 64 pixels a side or less, and h^2_0."""
        x = self.trunk(F.avg_pool2d(images, _block(images.shape[-1]), ceil_mode=True), q).detach()
        return self.find(x), self.start(torch.cat([x.mean((2, 3)), q], 1))

    def locate(self, found: Tensor, look: Tensor, size: int) -> Tensor:
        """mu (B, 2), of an image of `size` pixels: y and x, -1 and 1 the image's edges."""
        e = F.relu(found + self.aim(look)[:, :, None, None])
        share = torch.softmax(SHARPNESS * wide(self.score(e)).flatten(1), 1)
        share = share.view(len(e), *e.shape[2:])
        cell = POOLED * _block(size)  # pixels
        rows, columns = ((indices(n, share) + 0.5) * 2 * cell / size - 1 for n in e.shape[2:])
        return torch.stack((share.sum(2) @ rows, share.sum(1) @ columns), 1)

    def glimpse(self, levels: list[Tensor], at: Tensor, q: Tensor, size: int) -> Tensor:
        """g_t (B, hidden), of an image of `size` pixels. levels: its `pyramid`. at (B, 2): y and x,
        -1 and 1 the image's edges."""
        centre = (at + 1) * size / 2
        x = torch.cat([crop(u, centre, self.side, 2**k) for k, u in enumerate(levels)])
        # All scales in one batch, scale by scale.
        x = self.trunk(x, q.repeat(self.scales, 1))
        x = x.mean((2, 3)).view(self.scales, len(at), -1).transpose(0, 1).flatten(1)
        return F.relu(self.what(self.pooled_norm(x)) + self.where(at.to(x)))

    def paint(self, places: Tensor, size: int) -> Tensor:
        """The map of places (B, T, 2) on an image of `size` pixels: (B, 1, size // 2, size // 2),
        or one cell for an image of one pixel."""
        sides = self.side * 2 ** indices(self.scales, places)
        centre = ((places + 1) * size / 2)[:, :, None, :, None]  # pixels
        half = sides[:, None, None] / 2
        cells = max(1, size // 2)
        edges = indices(cells + 1, places) * (size / cells)
        high = torch.minimum(centre + half, edges[1:])
        low = torch.maximum(centre - half, edges[:-1])
        share = (high - low).clamp(min=0) / (2 * half)  # (B, T, scales, 2, cells)
        y, x = share.flatten(1, 2).unbind(2)
        return (torch.einsum("bnh,bnw->bhw", y, x) / y.shape[1])[:, None]


def pyramid(images: Tensor, scales: int) -> list[Tensor]:
    """images (B, 3, S, S) -> their averages over 1, 2, 4, ... pixels a side, `scales` of them; the
    image is first padded with zeros, right and below, to a multiple of the largest."""
    missing = -images.shape[-1] % 2 ** (scales - 1)
    padded = F.pad(images, (0, missing, 0, missing))
    return [padded] + [F.avg_pool2d(padded, 2**k) for k in range(1, scales)]


def crop(level: Tensor, centre: Tensor, side: int, step: int) -> Tensor:
    """side x side samples of a pyramid's level (B, 3, s, s), whose pixels are `step` of the image's
    wide, around centre (B, 2), y and x in the image's pixels from its edge: (B, 3, side, side).
    Outside there is nothing but zeros."""
    offset = (indices(side, centre) - (side - 1) / 2) * step
    y, x = (2 * (centre[:, :, None] + offset) / (step * level.shape[-1]) - 1).unbind(1)
    grid = torch.stack((x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)), 3)
    return F.grid_sample(level, grid.to(level), align_corners=False)


def _block(size: int) -> int:
    """The side in pixels that the context averages into one."""
    return -(-size // CONTEXT)
