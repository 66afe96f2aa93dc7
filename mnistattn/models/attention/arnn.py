"""AttentionRNN (Khandelwal & Sigal, "AttentionRNN: A Structured Spatial Attention Mechanism",
ICCV 2019, eqs. 3-11): attention predicted cell by cell in raster order, each value depending on
those before it through the states of two diagonal LSTMs.

    X^c = K^c * X                                     local context (eq. 9), then [X^c; query]
    h^l, h^r: the two LSTMs over [X^c; query]         (eq. 8; mnistattn.models.recurrence)
    h^r is shifted down one row: position (i, j) sees, to its right, only the rows above
    (mu^l, sigma^l) = f_l(h^l);  (mu^r, sigma^r) = f_r(h^r)                          (eq. 6)
    (mu, sigma) = f_comb(mu^l, sigma^l, mu^r, sigma^r)                               (eq. 10)
    a = act(mu), or act of a sample of N(mu, sigma)                                  (eqs. 4, 5)

    independent:  sigma^2 = 1 / (1/sigma_l^2 + 1/sigma_r^2),
                  mu = sigma^2 (mu_l/sigma_l^2 + mu_r/sigma_r^2)   the product of the Gaussians
    BRNN:         X^ds = g x g conv, stride g; the above on X^ds; a transposed conv back (eq. 11)

The predicted a is not fed back: the recurrence runs on h alone, so K^c and K^x are applied to the
whole map at once. The first row of the shifted h^r is zero, so that f_r there is its bias.

Our choices, which no source states: t and the channels of K^c; one K^c for both directions; the
activation (a sigmoid in inner layers, a softmax over positions in the last, as PAN); a sample is
drawn before the activation, and BRNN's transposed convolution (one channel, nearest upsampling at
the start) acts before it too, so that a map stays in its range; maps that are no multiple of the
block are padded with zeros on the right and below, and the result is cropped; how sigma stays
positive (`sigma`), from 0.001 up; the initialisation (`reset_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import check
from mnistattn.models.attention.activate import gate_or_softmax, wide
from mnistattn.models.attention.context import UNetContext
from mnistattn.models.attention.focus import focus_loss
from mnistattn.models.recurrence import diagonal_lstm

FORGET = 1  # place of the forget gate in the gate order o, f, i, g
SIGMA_MIN = 1e-3
POSITIVE = {"softplus": F.softplus, "exp": lambda s: s.clamp(max=10).exp()}
LAST = ("softmax", "gate")
CONTEXTS = ("conv", "unet")


class ARNN(nn.Module):
    """Attention map (B, 1, H, W) for a feature map (B, C, H, W) and a query (B, Q).

    Args:
        channels: C.
        query_dim: Q.
        last: whether this is the last attended layer, where `last_map` applies.
        hidden: t, channels of the LSTMs' states, from 1.
        context: channels of the local context X^c, from 1.
        context_size: side of K^c in pixels, odd; at every level of a U-Net.
        context_kind: `conv`, one convolution (eq. 9), or `unet`, a small U-Net, as the paper
            suggests for a larger context.
        sampled: a is drawn from N(mu, sigma) in training (reparametrised), instead of being mu.
        independent: the closed-form product of the two Gaussians instead of f_comb.
        sigma: how a sigma is made positive, `softplus` or `exp`.
        spread: sigma is multiplied by it where samples are asked for (the paper scaled sigma up
            to show several modes).
        last_map: `softmax` over positions in the last layer, or a sigmoid `gate` there too.
        block: g of BRNN, from 1 (no blocks) to the map's shorter side.
        local: ours, not in the paper: mu gets a local term too, w . ReLU(X^c + W_q q), which is
            CTX's attention on the same context; what the recurrence blurs need not pass through it.
        sharpness: ours, not in the paper: what a softmax is taken of is multiplied by it, from 0.01
            up. The states are within (-1, 1), so scores grow slowly and maps stay flat. The first
            weights of mu are divided by it: the same maps at the start, which sharpen faster.
        gate_bias: ours, not in the paper: mu of the inner gates starts with this bias, see pan.py.
        focus: ours, not in the paper: weight of a loss that makes maps small, see focus.py.

    Raises InputError for an option out of its range, and in `forward` for a map smaller than the
    block.
    """

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, hidden: int = 16, context: int = 32,
        context_size: int = 3, context_kind: str = "conv", sampled: bool = False,
        independent: bool = False, sigma: str = "softplus", spread: float = 1.0,
        last_map: str = "softmax", block: int = 1, local: bool = False, sharpness: float = 1.0,
        gate_bias: float = 0.0, focus: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check.whole(hidden=hidden, context=context, block=block, context_size=context_size)
        check.truth(sampled=sampled, independent=independent, local=local)
        check.one_of("context_kind", context_kind, CONTEXTS)
        check.one_of("sigma", sigma, POSITIVE)
        check.one_of("last_map", last_map, LAST)
        if not context_size % 2:
            raise InputError(f"context_size {context_size} is even: give an odd number.")
        check.number(0, spread=spread)
        check.number(0.01, sharpness=sharpness)
        check.number(-20, gate_bias=gate_bias)
        check.number(0, focus=focus)
        self.softmax = last and last_map == "softmax"
        self.gate_bias, self.focus = (0.0 if self.softmax else gate_bias), focus
        self.sharpness = sharpness if self.softmax else 1.0
        self.hidden, self.block = hidden, block
        self.sampled, self.independent, self.spread = sampled, independent, spread
        self.positive = POSITIVE[sigma]
        self.has_samples = sampled or independent
        if block > 1:
            self.down = nn.Conv2d(channels, channels, block, stride=block)
            self.up = nn.ConvTranspose2d(1, 1, block, stride=block, bias=False)
        # No bias here: K^x is linear in X^c, so its own bias already does the same.
        make = UNetContext if context_kind == "unet" else partial(nn.Conv2d, bias=False)
        self.context = make(channels, context, context_size, padding=context_size // 2)
        # K^x and K^h of the left ([0]) and the right LSTM ([1]).
        self.input_weight = nn.Parameter(torch.empty(2, context + query_dim, 4 * hidden))
        self.input_bias = nn.Parameter(torch.empty(2, 4 * hidden))
        self.recurrent_weight = nn.Parameter(torch.empty(2, 2 * hidden, 4 * hidden))
        self.left = nn.Linear(hidden, 2)
        self.right = nn.Linear(hidden, 2)
        if not independent:
            # sigma is only for samples, and a softmax ignores mu's bias: neither is there in vain.
            self.combine = nn.Linear(4, 2 if sampled else 1, bias=sampled or not self.softmax)
        if local:
            self.local_query = nn.Linear(query_dim, context)
            self.local_score = nn.Linear(context, 1, bias=False)
        self.local = local
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform weights, as the recipe of PAN, and zero biases, but for the recurrence.

        A gate's recurrent weight is a (t, 2t) matrix with orthonormal rows, so that [h_left; h_up]
        is not amplified from diagonal to diagonal (a 50 x 50 map has 99 of them). The forget
        gates' bias is 1, so that c is kept over long rows at the start.
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        module.bias.zero_()
            for weight in self.input_weight:
                nn.init.xavier_uniform_(weight)
            for direction in self.recurrent_weight:
                for gate in direction.split(self.hidden, dim=1):
                    gate.copy_(nn.init.orthogonal_(torch.empty_like(gate.T)).T)
            self.input_bias.zero_()
            self.input_bias[:, FORGET * self.hidden : (FORGET + 1) * self.hidden] = 1
            if self.block > 1:
                self.up.weight.fill_(1)
            for linear in (self.left, self.right) if self.independent else (self.combine,):
                linear.weight[0] /= self.sharpness  # the row that gives mu
                if linear.bias is not None:
                    linear.bias[0] += self.gate_bias
            if self.local:
                self.local_score.weight /= self.sharpness

    def gaussian(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """mu and sigma of a before its activation, (B, 1, h, w) float each, before a transposed
        convolution: (h, w) is (H, W) divided by the block, rounded up. sigma is None where the
        model has none (neither sampled nor independent)."""
        context = self.context(self._blocks(x))
        # K^x * [X^c; q] = K^x_c * X^c + K^x_q q exactly, and the second term is the same at every
        # position: q is never spread over the map.
        context_weight, query_weight = self.input_weight.split(
            (context.shape[1], query.shape[1]), dim=1
        )
        offset = (query @ query_weight).transpose(0, 1) + self.input_bias
        hidden = diagonal_lstm(context, context_weight, self.recurrent_weight, offset)
        # f_l and f_r as one product over [h^l; h^r]; the shift of h^r commutes with f_r's weight,
        # not with its bias, which therefore comes after it.
        weight = torch.block_diag(self.left.weight, self.right.weight)
        left, right = F.linear(hidden.permute(0, 2, 3, 1), weight).split(2, -1)
        right = F.pad(right[:, :-1], (0, 0, 0, 0, 1, 0))
        mu_l, sigma_l = wide(left + self.left.bias).unbind(-1)
        mu_r, sigma_r = wide(right + self.right.bias).unbind(-1)
        sigma_l, sigma_r = (self.positive(s) + SIGMA_MIN for s in (sigma_l, sigma_r))
        local: Tensor | float = 0.0
        if self.local:
            e = F.relu(context + self.local_query(query)[:, :, None, None]).permute(0, 2, 3, 1)
            local = wide(self.local_score(e)).permute(0, 3, 1, 2)
        if self.independent:
            precision_l, precision_r = sigma_l**-2, sigma_r**-2
            variance = 1 / (precision_l + precision_r)
            mu = variance * (precision_l * mu_l + precision_r * mu_r)
            return mu[:, None] + local, variance.sqrt()[:, None]
        out = wide(self.combine(torch.stack((mu_l, sigma_l, mu_r, sigma_r), -1)))
        if not self.sampled:
            return out[:, None, ..., 0] + local, None
        return out[:, None, ..., 0] + local, self.positive(out[:, None, ..., 1]) + SIGMA_MIN

    def forward(
        self, x: Tensor, query: Tensor, samples: int | None = None
    ) -> Tensor | tuple[Tensor, Callable]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W): in (0, 1), or a sum of 1 if softmax.
        With `focus`, in training, its loss beside it.

        samples: K, for K maps (B, K, H, W) of independent samples (ValueError if the model has no
        sigma). None: of a `sampled` model in training one sample, else the mean.
        """
        mu, sigma = self.gaussian(x, query)
        score = mu
        if samples is not None:
            if sigma is None or not isinstance(samples, int) or samples < 1:
                raise ValueError(f"this attention cannot give {samples} samples")
            score = mu + self.spread * sigma * torch.randn_like(mu.expand(-1, samples, -1, -1))
        elif sigma is not None and self.sampled and self.training:
            score = mu + sigma * torch.randn_like(mu)
        if self.block > 1:
            # Each sample is a map of its own, by the same one-channel transposed convolution.
            score = self.up(score.flatten(0, 1)[:, None])[:, 0].unflatten(0, score.shape[:2])
            score = score[..., : x.shape[2], : x.shape[3]]
        a = gate_or_softmax(self.sharpness * score, self.softmax)
        if self.focus and self.training and samples is None:
            return a, focus_loss(a, self.focus)
        return a

    def _blocks(self, x: Tensor) -> Tensor:
        """X^ds (eq. 11)."""
        if self.block == 1:
            return x
        rows, columns = x.shape[2:]
        if self.block > min(rows, columns):
            raise InputError(
                f"block {self.block} is larger than a map of {rows} x {columns}: "
                f"give a block of at most {min(rows, columns)}."
            )
        return self.down(F.pad(x, (0, -columns % self.block, 0, -rows % self.block)))
