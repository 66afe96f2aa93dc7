"""CBAM (Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018, eqs. 1-3), asked a
question: `cbam`. And `cbam-arnn`, with AttentionRNN in place of the spatial gate, as its paper has
it on CIFAR-100 (Khandelwal & Sigal, ICCV 2019).

    M_c = sigmoid(MLP(avg) + MLP(max)),  avg and max of each channel over positions
    X' = M_c X                                                        channel by channel
    M_s = sigmoid(K * [mean_c X'; max_c X'])                          K: a 7 x 7 convolution
    X'' = M_s X'                                                      position by position
    MLP(v) = W_1 ReLU(W_0 v), of C / r hidden units, r = 16

CBAM has no query. Here it is concatenated to both inputs of the MLP: MLP([avg; q]) + MLP([max; q]).
M_s sees it through X': its mean and maximum are taken of the channels that the query has gated.
(Concatenated there, a map that is the same at every position would give K hardly more than a bias.)

Our choices, which no source states: that; the hidden units are at least `least`, since C / r of 32
channels would be 2; M_s is a softmax over positions in the last layer, as PAN's, so that the
features there are M_c X times a distribution; biases; AttentionRNN sees X' and the query. The
convolution has no BatchNorm after it, as in eq. 3; CBAM's code has one.

The map is M_s; M_c is the same at every position and says nothing of where.

How well: on MREF, after the board's two epochs, `cbam` is still where `none` is (41.8 %; the
spatial gate of examples/cbam_spatial.py: 75.9); `cbam-arnn` has 85.5, more than any but `scan`, at
twice ctx's cost (one seed each; docs/zoo.md).
"""

import torch
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import check
from mnistattn.models.attention.activate import gate_or_softmax
from mnistattn.models.attention.arnn import ARNN


class ChannelGate(nn.Module):
    """M_c (B, C, 1, 1) in (0, 1), of features (B, C, H, W) and a query (B, Q)."""

    def __init__(self, channels: int, query_dim: int, reduction: int, least: int):
        super().__init__()
        hidden = max(channels // reduction, least)
        first, second = nn.Linear(channels + query_dim, hidden), nn.Linear(hidden, channels)
        for linear in (first, second):
            # Few hidden units: torch's own, smaller weights would hardly tell queries apart.
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """See the class."""
        pooled = torch.stack((x.mean((2, 3)), x.amax((2, 3))))
        asked = query.to(pooled.dtype).expand(2, -1, -1)
        return torch.sigmoid(self.mlp(torch.cat((pooled, asked), 2)).sum(0))[:, :, None, None]


class SpatialGate(nn.Module):
    """M_s (B, 1, H, W) of gated features (B, C, H, W): in (0, 1), or summing to 1 if last."""

    def __init__(self, kernel: int, last: bool):
        super().__init__()
        self.last = last
        # A softmax ignores a bias.
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=not last)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """See the class; the query is in x already."""
        pooled = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return gate_or_softmax(self.conv(pooled), self.last)


class _Gates(nn.Module):
    """A channel gate and, of what it lets through, a spatial one."""

    def __init__(self, channel: nn.Module, spatial: nn.Module):
        super().__init__()
        self.channel, self.spatial = channel, spatial

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W), in (0, 1), or a sum of 1 if last; and
        the features X'' (B, C, H, W), of x's dtype."""
        gated = x * self.channel(x, query).to(x.dtype)
        a = self.spatial(gated, query)
        return a, {"features": gated * a.to(x.dtype)}


class CBAM(_Gates):
    """A gate over channels, then one over positions.

    Args:
        channels: C.
        query_dim: Q.
        last: whether this is the last attended layer, where M_s is a softmax.
        reduction: r of the MLP, from 1.
        least: hidden units of the MLP where C / r is fewer, from 1.
        kernel: side of K in pixels, odd.

    Raises InputError for an option out of its range.
    """

    paper = "Woo et al., ECCV 2018"
    summary = "a gate over channels, then one over positions"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, reduction: int = 16, least: int = 4,
        kernel: int = 7,
    ):  # fmt: skip
        check.whole(reduction=reduction, least=least, kernel=kernel)
        if not kernel % 2:
            raise InputError(f"kernel {kernel} is even: give an odd number.")
        super().__init__(
            ChannelGate(channels, query_dim, reduction, least), SpatialGate(kernel, last)
        )


class CBAMARNN(_Gates):
    """CBAM's gate over channels, then AttentionRNN over positions.

    Args:
        channels, query_dim, last, reduction, least: as of CBAM.
        hidden, context, local, sharpness: as of ARNN.

    Raises InputError for an option out of its range.
    """

    paper = "Khandelwal & Sigal, ICCV 2019"
    summary = "CBAM with AttentionRNN as its spatial gate"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, reduction: int = 16, least: int = 4,
        hidden: int = 16, context: int = 32, local: bool = False, sharpness: float = 1.0,
    ):  # fmt: skip
        check.whole(reduction=reduction, least=least)
        super().__init__(
            ChannelGate(channels, query_dim, reduction, least),
            ARNN(channels, query_dim, last=last, hidden=hidden, context=context, local=local,
                 sharpness=sharpness),
        )  # fmt: skip
