"""Spatial Transformer: `stn`, the features warped by an affine transformation.

Jaderberg et al., "Spatial Transformer Networks", NIPS 2015, section 3. A localisation network
gives theta, and the features are sampled, bilinearly, where it maps the regular grid to:

    (x_s, y_s)^T = theta (x_t, y_t, 1)^T,   theta 2 x 3, coordinates in -1 .. 1      (eq. 1)
    V(t) = sum_nm U(n, m) max(0, 1 - |x_s - m|) max(0, 1 - |y_s - n|)               (eqs. 3, 5)

What lies outside the map is zero. It stands after the first pooling alone: the later layers work in
the frame of the warp, so a second one would be one of warped features, whose positions are no
longer those of the image, and its map could not be laid on it.

The map is the density of the sampling: each position's sum of the bilinear weights with which it
enters V, which is the gradient of the sum of V. It is divided by its peak (by its sum if last,
where it is uniform if all was sampled outside).

Our choices, which no source states: the localisation network, `gaussian.Locator`: strided
convolutions, the query added, a softmax of scores over positions. The translation is the expected
position, so that it follows what was found; the rest is a layer on the features there. It starts
as a zoom of `scale` on the middle, and is bounded, since a warp that has left the image sees
nothing that would bring it back: the matrix is scale (I + tanh / 2), and in `zoom`, which has one
scale for both axes and no rotation (the paper's attention, eq. 2), scale 2^tanh I.

A network that sums over positions hardly feels a translation, but for what crosses the window's
edge: where to look is learnt slowly.

How well: on MREF, after the board's two epochs, 38.6 %, less than `none` (41.2); on a small task of
four objects it did not learn where to look either (48 to 51 %, as `none`; docs/zoo.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.models.attention import check
from mnistattn.models.attention.activate import wide
from mnistattn.models.attention.gaussian import Locator

FORMS = ("affine", "zoom")


class STN(nn.Module):
    """The features seen through an affine window.

    Args:
        channels, query_dim, last: as in `contract.Attention`.
        form: `affine`, six free numbers, or `zoom`, a scale and a translation.
        scale: of the first warp, from 0.01 (1: the identity).
        hidden: channels of the localisation network.
    """

    placement = "first"
    paper = "Jaderberg et al., NIPS 2015"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, form: str = "affine",
        scale: float = 0.7, hidden: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        check.whole(hidden=hidden)
        check.one_of("form", form, FORMS)
        check.number(0.01, scale=scale)
        self.form, self.scale, self.last = form, scale, last
        self.locate = Locator(channels, query_dim, hidden, 2, 3)
        self.matrix = nn.Linear(hidden, 4 if form == "affine" else 1)
        with torch.no_grad():
            self.matrix.weight *= 0.1
            self.matrix.bias.zero_()

    def theta(self, x: Tensor, query: Tensor) -> Tensor:
        """x (B, C, H, W), query (B, Q) -> (B, 2, 3), rows x and y, float32 or float64."""
        centre, found = self.locate(x, query)
        change = torch.tanh(wide(self.matrix(found)))
        one = torch.eye(2, device=x.device).flatten()
        matrix = self.scale * (one * 2**change if self.form == "zoom" else one + 0.5 * change)
        return torch.cat((matrix.view(-1, 2, 2), centre.flip(1)[:, :, None]), 2)

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) in 0 .. 1, a sum of 1 if last; and the
        warped {"features": (B, C, H, W)}."""
        u = wide(x)
        grid = F.affine_grid(self.theta(x, query).to(u), list(x.shape), align_corners=False)
        warped = F.grid_sample(u, grid, align_corners=False)
        a = density(grid.detach(), x.shape[2], x.shape[3])
        if self.last:
            total = a.sum((2, 3), keepdim=True)
            inside = total > 0
            a = torch.where(inside, a / total.where(inside, 1), 1 / (a.shape[2] * a.shape[3]))
        else:
            a = a / a.amax((2, 3), keepdim=True).clamp(min=1e-6)
        return a.to(x.dtype), {"features": warped.to(x.dtype)}


def density(grid: Tensor, height: int, width: int) -> Tensor:
    """The bilinear weights of a sampling, added up where they come from: (B, 1, height, width).

    grid (B, h, w, 2): x and y in -1 .. 1 of each sample, as F.grid_sample takes it.
    """
    points = grid.flatten(1, 2)
    # Further out than that, a point has no weight anywhere, and need not fit an integer.
    x = (((points[..., 0] + 1) * width - 1) / 2).clamp(-2, width + 1)
    y = (((points[..., 1] + 1) * height - 1) / 2).clamp(-2, height + 1)
    left, top = x.floor(), y.floor()
    a = points.new_zeros(len(points), height * width)
    for row in (top, top + 1):
        for column in (left, left + 1):
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            a.scatter_add_(1, place.long(), weight * inside)
    return a.view(-1, 1, height, width)
