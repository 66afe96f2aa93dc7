"""A loss that makes a map small where the answer is right already. Ours, of no paper.

    lit = (sum a)^2 / (H W sum a^2)                   the share of the map that is lit
    loss = weight * mean_b max(0, 2 p_b - 1) lit_b    p: the probability of the right answer

A gate that multiplies features has no reason to be shut where nothing is to be seen, nor to open on
a digit rather than to shut on it: a later BatchNorm can turn the sign. This gives it one: the small
thing is lit, not its large surroundings. `lit` does not change when a map is scaled, so that no map
vanishes. It waits until an image's answer is right, since maps that are concentrated before that
stay where they are by chance.
"""

from collections.abc import Callable

from torch import Tensor

from mnistattn.models.attention.activate import wide


def lit(a: Tensor) -> Tensor:
    """Maps a (B, 1, H, W), not negative -> the share of each that is lit, (B,), float32 or more: 1
    if it is the same everywhere, 1 / (H W) if it is one position; 0 of a map that is zero.

    >>> import torch
    >>> lit(torch.tensor([[1.0, 1, 1, 1], [0, 2, 0, 0], [3, 0, 0, 3]]).view(3, 1, 2, 2))
    tensor([1.0000, 0.2500, 0.5000])
    """
    flat = wide(a).flatten(1)
    return flat.mean(1).square() / flat.square().mean(1).clamp(min=1e-20)


def focus_loss(a: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
    """The loss of maps a (B, 1, H, W), as the contract has it: a function of the images' cross
    entropies (B,)."""
    small = lit(a)

    def loss(cross_entropy: Tensor) -> Tensor:
        sure = (2 * (-cross_entropy).exp() - 1).clamp(min=0)
        return weight * (sure.to(small.dtype) * small).mean()

    return loss
