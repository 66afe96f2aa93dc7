"""The gradient of a choice: score function with a learned baseline (Williams, "Simple statistical
gradient-following algorithms for connectionist reinforcement learning", Machine Learning 1992).

An attention that samples where it looks has no gradient through the sample. With the reward
R = -cross entropy of an image, and b its baseline, which must not depend on the sample:

    d E[R] / d theta = E[(R - b) d log p(sample) / d theta]

The baseline is fitted to R by its mean squared error.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# Of an attention's own: a scalar, or a function of the cross entropy of each image (B,).
Loss = Tensor | Callable[[Tensor], Tensor]


def score_function(
    log_prob: Tensor, baseline: Tensor, weight: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """A loss as the contract has it: of the cross entropy of each image (B,), detached.

    log_prob: log-probability of what was sampled, (B,). baseline: the reward that was expected
    before, (B,); its gradient is that of the squared error alone, and it gets none from log_prob's
    part. weight: of the log_prob's part. The value of the loss means nothing; its gradient does.
    """

    def loss(cross_entropy: Tensor) -> Tensor:
        reward = -cross_entropy.to(log_prob.dtype)
        advantage = reward - baseline.detach()
        return -weight * (advantage * log_prob).mean() + F.mse_loss(baseline, reward)

    return loss


def summed(losses: list[Loss]) -> Loss:
    """The sum of several losses: a tensor, or a function if one of them is."""
    if any(map(callable, losses)):
        return lambda cross_entropy: sum(
            loss(cross_entropy) if callable(loss) else loss for loss in losses
        )  # type: ignore[return-value]
    return sum(losses)  # type: ignore[arg-type,return-value]
