"""Location-wise soft attention: `soft`, the deterministic kind of "Show, Attend and Tell" (Xu et
al., ICML 2015, section 4.2).

    e_ij = g(x_ij, q),   a = softmax_ij(e),   output = sum_ij a_ij x_ij,   on the last map only.

g is a multilayer perceptron in the paper, with one hidden layer of tanh in its released code: that
is `san`. There a feature and the query meet in a sum alone, under one tanh.

Our choices, which no source states: a second hidden layer, which `san` has not, so that g can be a
conjunction of feature and query,
    g = w . tanh(W_h ReLU(W_x x_ij + W_q q + b) + b_h);
the query in place of the state of the paper's LSTM. Left out, as there is one step and not a
sentence: the gate on the output (a factor of the query alone here) and the "doubly stochastic"
penalty, which asks that all positions be looked at in turn.

How well: on MREF, after the board's two epochs, 42.8 %, hardly more than `none` (docs/zoo.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.models.attention import check
from mnistattn.models.attention.activate import wide


class Score(nn.Module):
    """g: how much each of some vectors fits a query. Shared by soft and hard, positions and items.

    channels, query_dim: of a vector and of the query. hidden: of both hidden layers.
    """

    def __init__(self, channels: int, query_dim: int, hidden: int):
        super().__init__()
        self.features = nn.Linear(channels, hidden, bias=False)
        self.query = nn.Linear(query_dim, hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # softmax ignores a bias

    def forward(self, v: Tensor, query: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """v (B, N, C), query (B, Q) -> e (B, N), float32 or more. offset: added before the first
        hidden layer's activation, (N, hidden)."""
        e = F.relu(self.features(v) + self.query(query)[:, None] + offset)
        return wide(self.score(torch.tanh(self.hidden(e))))[..., 0]


def positions(x: Tensor) -> Tensor:
    """x (B, C, H, W) -> its vectors (B, H W, C), row by row."""
    return x.flatten(2).transpose(1, 2)


class Soft(nn.Module):
    """Soft attention over the positions of one map.

    hidden: of both hidden layers of g, from 1. Raises InputError for an impossible one.
    """

    placement = "last"
    paper = "Xu et al., ICML 2015"
    summary = "location-wise soft attention, a two-layer score"

    def __init__(self, channels: int, query_dim: int, *, last: bool, hidden: int = 32):
        super().__init__()
        check.whole(hidden=hidden)
        self.score = Score(channels, query_dim, hidden)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) that sums to 1 over positions."""
        a = torch.softmax(self.score(positions(x), query), 1)
        return a.view(len(x), 1, *x.shape[2:])
