"""Soft attention of Stacked Attention Networks: `san` (Yang et al., CVPR 2016), one glimpse.

a_ij = softmax_ij(w . tanh(W_x x_ij + W_q q)), on the last map only.
"""

import torch
from torch import Tensor, nn

from mnistattn.models.attention import check
from mnistattn.models.attention.activate import gate_or_softmax


class SAN(nn.Module):
    """Soft attention over the positions of one map."""

    def __init__(self, channels: int, query_dim: int, *, last: bool, hidden: int = 32):
        super().__init__()
        check.whole(hidden=hidden)
        self.features = nn.Conv2d(channels, hidden, 1, bias=False)
        self.query = nn.Linear(query_dim, hidden)
        self.score = nn.Conv2d(hidden, 1, 1, bias=False)  # softmax ignores a bias

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) that sums to 1 over positions."""
        e = torch.tanh(self.features(x) + self.query(query)[:, :, None, None])
        return gate_or_softmax(self.score(e), True)
