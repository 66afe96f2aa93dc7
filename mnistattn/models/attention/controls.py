"""Floor and ceiling: attention that is no attention, so that a reader sees what a score means.

`uniform`, `center` and `random` look at nothing; `oracle` is told the true mask. None has a
parameter to learn. Like the others they give gates in inner layers and a distribution in the last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.models.attention import check


class _Control(nn.Module):
    """forward(x (B, C, H, W), query) -> map (B, 1, H, W), the peak of a gate 1 at most."""

    def __init__(self, channels: int, query_dim: int, *, last: bool):
        super().__init__()
        self.last = last

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """See the class."""
        height, width = x.shape[2:]
        a = self.draw(height, width).to(x)
        return (a / a.sum() if self.last else a).expand(len(x), 1, height, width)

    def draw(self, height: int, width: int) -> Tensor:
        """The gate (H, W)."""
        raise NotImplementedError


class Uniform(_Control):
    """The same attention everywhere: correctness is the mask's area."""

    def draw(self, height: int, width: int) -> Tensor:
        """Ones."""
        return torch.ones(height, width)


class Center(_Control):
    """A Gaussian at the middle of the image, `width` of its side wide: the prior of photos."""

    def __init__(self, channels: int, query_dim: int, *, last: bool, width: float = 0.25):
        super().__init__(channels, query_dim, last=last)
        check.number(1e-3, width=width)
        self.width = width

    def draw(self, height: int, width: int) -> Tensor:
        """The Gaussian, 1 at the middle."""
        rows, columns = (
            torch.exp(-0.5 * (((torch.arange(n) + 0.5) / n - 0.5) / self.width) ** 2)
            for n in (height, width)
        )
        return rows[:, None] * columns


class Random(_Control):
    """A map of independent uniform numbers, drawn once of `map_seed`: the same for all images."""

    def __init__(self, channels: int, query_dim: int, *, last: bool, map_seed: int = 0):
        super().__init__(channels, query_dim, last=last)
        check.number(0, map_seed=map_seed)
        self.map_seed = int(map_seed)

    def draw(self, height: int, width: int) -> Tensor:
        """Uniform in 0 .. 1; a function of seed and size alone."""
        generator = torch.Generator().manual_seed(self.map_seed * 1_000_003 + 4096 * height + width)
        return torch.rand(height, width, generator=generator)


class Oracle(nn.Module):
    """The true mask, averaged to each map's resolution: what perfect attention could reach here.

    Where the last map's cells hold nothing of the mask it would be empty: it is uniform then.
    """

    sees_mask = True

    def __init__(self, channels: int, query_dim: int, *, last: bool):
        super().__init__()
        self.last = last

    def forward(self, x: Tensor, query: Tensor, mask: Tensor) -> Tensor:
        """mask bool (B, S, S), the pixels of what is asked for -> map (B, 1, H, W) in 0 .. 1,
        the covered share of each cell; summing to 1 if last."""
        covered = F.adaptive_avg_pool2d(mask[:, None].to(x.dtype), (x.shape[2], x.shape[3]))
        if not self.last:
            return covered
        total = covered.sum((2, 3), keepdim=True)
        return torch.where(total > 0, covered / total.clamp(min=1e-12), 1 / covered[0].numel())
