"""Location-wise hard attention: `hard`, the stochastic one of "Show, Attend and Tell" (Xu et al.,
ICML 2015, section 4.1). One position is looked at, and the output is its feature vector.

    p = softmax_ij(g(x_ij, q)),   s ~ p,   output = x_s,   on the last map only.

The choice has no gradient of its own. `estimator` says what takes its place:
    score              (R - b) d log p(s), R = -cross entropy, b a learned baseline: unbiased
                       (Williams 1992; see policy.py). With an entropy bonus, as in the paper.
    straight-through   forward one-hot(s), backward as if it were p (Bengio et al., "Estimating or
                       propagating gradients through stochastic neurons", 2013): biased
    gumbel             forward one-hot(s), backward as if it were softmax((log p + G) / T), with the
                       noise G that s = arg max(log p + G) was drawn with (Jang et al., ICLR 2017;
                       Maddison et al., ICLR 2017): biased; T is the option `temperature`
`benchmarks/gradient_variance.py` measures bias and variance of the three.

In training the features are those of the sampled position; but half of the images, as in the paper,
get the mean under p instead (`expected`; in a short test on made-up features `score` came to 93 %
with it and to 62 % without). In eval they are those of the most probable position, without noise.
The map is p in both: where it looks, were it asked many times.

Our choices, which no source states: g is soft.py's; b is a small network of what the choice had to
choose from (the mean of all vectors, their mean under p, and the query, all detached), where the
paper has a moving average for all images, and starts at the reward of a guess among five answers;
its squared error is minimised along; the entropy bonus's weight.

How well: on MREF, after the board's two epochs, 30.4 %, less than `none` (41.2; docs/zoo.md).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import check
from mnistattn.models.attention.activate import wide
from mnistattn.models.attention.policy import score_function
from mnistattn.models.attention.soft import Score, positions

ESTIMATORS = ("score", "straight-through", "gumbel")


class Choice(nn.Module):
    """One of N vectors, chosen by its score: a sample in training, the arg max in eval.

    Args:
        channels, query_dim: of a vector and of the query.
        estimator, temperature, baseline, entropy, expected: see Hard.
        hidden: of the baseline's hidden layer.
    """

    def __init__(
        self, channels: int, query_dim: int, hidden: int, estimator: str, temperature: float,
        baseline: bool, entropy: float, expected: float,
    ) -> None:  # fmt: skip
        super().__init__()
        check.one_of("estimator", estimator, ESTIMATORS)
        check.number(0.01, temperature=temperature)
        check.truth(baseline=baseline)
        check.number(0, entropy=entropy, expected=expected)
        if expected > 1:
            raise InputError(f"expected {expected} is impossible: give a share from 0 to 1.")
        self.estimator, self.temperature = estimator, temperature
        self.entropy, self.expected = entropy, expected
        self.baseline = None
        if estimator == "score" and baseline:
            last = nn.Linear(hidden, 1)
            nn.init.constant_(last.bias, -math.log(5))
            self.baseline = nn.Sequential(
                nn.Linear(2 * channels + query_dim, hidden), nn.ReLU(), last
            )

    def forward(
        self, score: Tensor, v: Tensor, query: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | Callable[[Tensor], Tensor] | None]:
        """score (B, N), v (B, N, C), query (B, Q) -> p (B, N); the weights of the vectors (B, N),
        one-hot but for the images that `expected` picks; a loss as the contract has it, or None."""
        log_p = torch.log_softmax(score, 1)
        p = log_p.exp()
        if not self.training:
            return p, one_hot(score), None
        noise = gumbel_like(score)
        weights = one_hot(log_p.detach() + noise)
        log_prob = (weights * log_p).sum(1)
        if self.estimator == "straight-through":
            weights = weights + (p - p.detach())  # in this order: exactly one-hot
        elif self.estimator == "gumbel":
            relaxed = torch.softmax((log_p + noise) / self.temperature, 1)
            weights = weights + (relaxed - relaxed.detach())
        if self.expected:
            mean = torch.rand_like(score[:, :1]) < self.expected
            weights = torch.where(mean, p, weights)
            log_prob = log_prob.masked_fill(mean[:, 0], 0.0)  # nothing was sampled there
        bonus = self.entropy * (p * log_p).sum(1).mean() if self.entropy else None
        if self.estimator != "score":
            return p, weights, bonus
        policy = score_function(log_prob, self.expect(p, v, query))
        if bonus is None:
            return p, weights, policy
        return p, weights, lambda cross_entropy: policy(cross_entropy) + bonus

    def expect(self, p: Tensor, v: Tensor, query: Tensor) -> Tensor:
        """b, the reward to be expected before the choice, (B,): 0 without a baseline."""
        if self.baseline is None:
            return torch.zeros_like(p[:, 0])
        v, p, query = v.detach(), p.detach(), query.detach()
        seen = torch.cat([wide(v.mean(1)), torch.einsum("bn,bnc->bc", p, wide(v)), wide(query)], 1)
        return wide(self.baseline(seen))[:, 0]


def gumbel_like(score: Tensor) -> Tensor:
    """Standard Gumbel noise of score's shape. Row by row: an image's does not depend on others'."""
    return -torch.empty_like(score).exponential_().log()


def one_hot(score: Tensor) -> Tensor:
    """score (B, N) -> 1 at each row's maximum, the first of them, else 0; no gradient."""
    best = score.detach().argmax(1, keepdim=True)
    return torch.zeros_like(score).scatter_(1, best, 1.0)


def returned(a: Tensor, features: Tensor, loss: Tensor | Callable | None) -> tuple[Tensor, dict]:
    """What an attention with features of its own returns, by the contract."""
    return a, {"features": features} | ({} if loss is None else {"loss": loss})


class Hard(nn.Module):
    """Hard attention over the positions of one map.

    Args:
        channels, query_dim: C and Q.
        last: not used: one position is chosen, and the map is a softmax, in any layer.
        hidden: of the hidden layers of g and of the baseline, from 1.
        estimator: `score`, `straight-through` or `gumbel`.
        temperature: of `gumbel`'s backward, from 0.01.
        baseline: of `score`: whether the reward is compared with a learned one.
        entropy: weight of the entropy bonus, from 0: p's mean entropy is added to the reward.
        expected: share of the images of training, drawn anew each time, that get the mean under p
            instead of a sample, 0 to 1. In eval nobody does.

    Raises InputError for an option out of its range.
    """

    placement = "last"
    paper = "Xu et al., ICML 2015"
    summary = "location-wise hard attention: one sampled position"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, hidden: int = 32,
        estimator: str = "score", temperature: float = 1.0, baseline: bool = True,
        entropy: float = 0.01, expected: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        check.whole(hidden=hidden)
        self.score = Score(channels, query_dim, hidden)
        self.choice = Choice(channels, query_dim, hidden, estimator, temperature, baseline,
                             entropy, expected)  # fmt: skip

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """x (B, C, H, W), query (B, Q) -> p as a map (B, 1, H, W) that sums to 1, and the features
        (B, C, H, W): x at the chosen position, 0 elsewhere; in training maybe a loss."""
        v = positions(x)
        p, weights, loss = self.choice(self.score(v, query), v, query)
        p, weights = (a.view(len(x), 1, *x.shape[2:]) for a in (p, weights))
        return returned(p, x * weights, loss)
