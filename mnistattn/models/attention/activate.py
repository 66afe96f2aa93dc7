"""From score to attention: a sigmoid gate in inner layers, a softmax in the last (PAN)."""

import torch
from torch import Tensor


def gate_or_softmax(score: Tensor, last: bool) -> Tensor:
    """score (B, 1, H, W) -> map (B, 1, H, W): in (0, 1), or summing to 1 over positions if last."""
    if last:
        return torch.softmax(score.flatten(1).float(), 1).view(score.shape).to(score.dtype)
    return torch.sigmoid(score)
