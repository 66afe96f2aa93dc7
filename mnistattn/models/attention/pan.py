"""PAN's attention, with and without local context: `ctx` and `noctx` (-CTX).

Progressive Attention Networks (Seo et al., BMVC 2018), as its released code has it:
    e = W_1 * X + W_q q,   a = sigmoid(w_2 . ReLU(e)),   softmax over positions in the last layer.
W_1 is a 3 x 3 convolution ('same') in ctx and 1 x 1 in noctx; ctx too is 1 x 1 in the last layer.
The code has an embedding of the query per layer; here W_q maps the network's shared one, which for
a query out of ten is the same thing.

`gate_bias` is ours, off by default: a bias that the inner gates start with. A gate that starts
half open may as well learn to shut on the digits as to open on them, since a later BatchNorm can
turn the sign; one that starts nearly shut (-2: 0.12) has to open where something is to be seen.
`focus`, ours too, is the weight of a loss that makes maps small (focus.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.models.attention import check
from mnistattn.models.attention.activate import gate_or_softmax
from mnistattn.models.attention.focus import focus_loss


class CTX(nn.Module):
    """Local attention on a 3 x 3 neighbourhood (1 x 1 in the last layer)."""

    context = 3

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, hidden: int = 32,
        gate_bias: float = 0.0, focus: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        check.whole(hidden=hidden)
        check.number(-20, gate_bias=gate_bias)
        check.number(0, focus=focus)
        self.focus = focus
        size = 1 if last else self.context
        self.last = last
        self.features = nn.Conv2d(channels, hidden, size, padding=size // 2)
        self.query = nn.Linear(query_dim, hidden, bias=False)
        self.score = nn.Conv2d(hidden, 1, 1)
        if not last and self.score.bias is not None:
            with torch.no_grad():
                self.score.bias.add_(gate_bias)

    def forward(self, x: Tensor, query: Tensor) -> Tensor | tuple[Tensor, Callable]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) in (0, 1); sums to 1 if last. With
        `focus`, in training, its loss beside it."""
        e = F.relu(self.features(x) + self.query(query)[:, :, None, None], inplace=True)
        a = gate_or_softmax(self.score(e), self.last)
        return (a, focus_loss(a, self.focus)) if self.focus and self.training else a


class NoCTX(CTX):
    """Local attention on the position alone."""

    context = 1
