"""PAN's attention, with and without local context: `ctx` and `noctx` (-CTX).

Progressive Attention Networks (Seo et al., BMVC 2018), as its released code has it:
    e = W_1 * X + W_q q,   a = sigmoid(w_2 . ReLU(e)),   softmax over positions in the last layer.
W_1 is a 3 x 3 convolution ('same') in ctx and 1 x 1 in noctx; ctx too is 1 x 1 in the last layer.
The code has an embedding of the query per layer; here W_q maps the network's shared one, which for
a query out of ten is the same thing.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.models.attention import check
from mnistattn.models.attention.activate import gate_or_softmax


class CTX(nn.Module):
    """Local attention on a 3 x 3 neighbourhood (1 x 1 in the last layer)."""

    context = 3

    def __init__(self, channels: int, query_dim: int, *, last: bool, hidden: int = 32):
        super().__init__()
        check.whole(hidden=hidden)
        size = 1 if last else self.context
        self.last = last
        self.features = nn.Conv2d(channels, hidden, size, padding=size // 2)
        self.query = nn.Linear(query_dim, hidden, bias=False)
        self.score = nn.Conv2d(hidden, 1, 1)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) in (0, 1); sums to 1 if last."""
        e = F.relu(self.features(x) + self.query(query)[:, :, None, None], inplace=True)
        return gate_or_softmax(self.score(e), self.last)


class NoCTX(CTX):
    """Local attention on the position alone."""

    context = 1
