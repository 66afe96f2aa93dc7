"""From score to attention: a sigmoid gate in inner layers, a softmax in the last (PAN)."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is that: for what half precision would spoil."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gate_or_softmax(score: Tensor, softmax: bool) -> Tensor:
    """score (B, K, H, W) -> maps (B, K, H, W): in (0, 1), or each summing to 1 over positions."""
    if softmax:
        return torch.softmax(wide(score).flatten(2), 2).view(score.shape).to(score.dtype)
    return torch.sigmoid(score)
