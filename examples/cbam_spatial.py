"""CBAM's spatial gate, asked a question: a 7 x 7 convolution of the features' maximum and mean.

    mnistattn check --model examples/cbam_spatial.py:CBAMSpatial
    mnistattn evaluate --model examples/cbam_spatial.py:CBAMSpatial --data data/mref

Woo, Park, Lee, Kweon: CBAM, Convolutional Block Attention Module. ECCV 2018, equation 5:
M(F) = sigmoid(conv_7x7([mean_c F; max_c F])). CBAM has no query. Here the query first gates the
channels, so that maximum and mean are taken of those that matter for what is asked.

Written from the template of `mnistattn new-attention`.
"""

import torch
from torch import Tensor, nn


class CBAMSpatial(nn.Module):
    """CBAM's spatial gate over channels that the query has gated."""

    paper = "Woo et al., ECCV 2018"

    def __init__(self, channels: int, query_dim: int, *, last: bool, kernel: int = 7):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} is impossible: give an odd number")
        self.last = last
        self.channels = nn.Linear(query_dim, channels)
        self.gate = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W): in (0, 1), or summing to 1 if last."""
        asked = x * torch.sigmoid(self.channels(query))[:, :, None, None]
        score = self.gate(torch.cat([asked.mean(1, keepdim=True), asked.amax(1, keepdim=True)], 1))
        if self.last:
            return torch.softmax(score.flatten(2), dim=2).view_as(score)
        return torch.sigmoid(score)
