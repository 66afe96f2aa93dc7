"""AttentionRNN (Khandelwal & Sigal, "AttentionRNN: A Structured Spatial Attention Mechanism",
ICCV 2019, eqs. 3-10): attention predicted cell by cell in raster order, each value depending on
those before it through the states of two diagonal LSTMs.

    X^c = K^c * X                                    local context, 3 x 3, then [X^c; query]
    [o, f, i, g] = act(K^h * h + K^x * [X^c; query])  left LSTM over diagonals (diagonal_lstm.py)
    c = f . c_left + i . g;  h = o . tanh(c)
    right LSTM: the same on the mirrored map, own weights, mirrored back, shifted down one row
    (mu^l, sigma^l) = f_l(h^l);  (mu^r, sigma^r) = f_r(h^r)
    mu = f_comb(mu^l, sigma^l, mu^r, sigma^r);  a = act(mu)

The shift makes position (i, j) see, to its right, only the rows above. The first row of the right
LSTM is zero, so that f_r there is its bias.

The predicted a is not fed back: the recurrence runs on h alone, so K^c and K^x are applied to the
whole map at once. f_comb's second output, the sigma of a, would be used by the sampled variants
only; here it would be a parameter without a gradient, so f_comb has the one output mu.

Our choices, which no source states: t = 16 hidden channels and 32 context channels; one K^c for
both directions (K^x and K^h are each direction's own); sigmoid on mu in inner layers and softmax
over positions in the last, as in progressive attention (PAN); sigma^l and sigma^r positive through
softplus; the initialisation (see `reset_parameters`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.models.attention.activate import gate_or_softmax
from mnistattn.models.attention.diagonal_lstm import DIRECTIONS, diagonal_lstm

FORGET = 1  # place of the forget gate in the gate order o, f, i, g


class ARNN(nn.Module):
    """Attention map (B, 1, H, W) for a feature map (B, C, H, W) and a query (B, Q).

    Args:
        channels: C.
        query_dim: Q.
        last: softmax over positions (the last attended layer) instead of a sigmoid.
        hidden: t, channels of the LSTMs' states.
        context: channels of the local context X^c.
    """

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, hidden: int = 16, context: int = 32
    ) -> None:
        super().__init__()
        self.last = last
        self.hidden = hidden
        # No bias here: K^x is linear in X^c, so its own bias already does the same.
        self.context = nn.Conv2d(channels, context, 3, padding="same", bias=False)
        # K^x and K^h of the left ([0]) and the right LSTM ([1]).
        self.input_weight = nn.Parameter(torch.empty(DIRECTIONS, 4 * hidden, context + query_dim))
        self.input_bias = nn.Parameter(torch.empty(DIRECTIONS, 4 * hidden))
        self.recurrent_weight = nn.Parameter(torch.empty(DIRECTIONS, 2 * hidden, 4 * hidden))
        self.left = nn.Linear(hidden, 2)
        self.right = nn.Linear(hidden, 2)
        self.combine = nn.Linear(4, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform weights, as the recipe of PAN, and zero biases, but for the recurrence.

        A gate's recurrent weight is a (t, 2t) matrix with orthonormal rows, so that [h_left; h_up]
        is not amplified from diagonal to diagonal (a 50 x 50 map has 99 of them). The forget
        gates' bias is 1, so that c is kept over long rows at the start.
        """
        nn.init.xavier_uniform_(self.context.weight)
        with torch.no_grad():
            for weight in self.input_weight:
                nn.init.xavier_uniform_(weight)
            for direction in self.recurrent_weight:
                for gate in direction.split(self.hidden, dim=1):
                    gate.copy_(nn.init.orthogonal_(torch.empty_like(gate.T)).T)
            self.input_bias.zero_()
            self.input_bias[:, FORGET * self.hidden : (FORGET + 1) * self.hidden] = 1
        for linear in (self.left, self.right, self.combine):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def mean(self, x: Tensor, query: Tensor) -> Tensor:
        """mu before its activation, (B, 1, H, W)."""
        batch, _, rows, columns = x.shape
        context = self.context(x)
        # K^x * [X^c; q] = K^x_c * X^c + K^x_q q exactly, and the second term is the same at every
        # position: q is never spread over the map.
        context_weight, query_weight = self.input_weight.flatten(0, 1).split(
            (context.shape[1], query.shape[1]), dim=1
        )
        gates = F.linear(context.permute(2, 3, 0, 1), context_weight)
        offset = F.linear(query, query_weight, self.input_bias.flatten())
        hidden = diagonal_lstm(
            gates.view(rows, columns, batch, DIRECTIONS, -1),
            self.recurrent_weight,
            offset.view(batch, DIRECTIONS, -1),
        )
        # f_l and f_r as one product over [h^l; h^r]; the shift of h^r commutes with f_r's weight,
        # not with its bias, which therefore comes after it.
        both = F.linear(hidden.flatten(3), torch.block_diag(self.left.weight, self.right.weight))
        left, right = both.split(2, dim=-1)
        mu_l, sigma_l = (left + self.left.bias).unbind(-1)
        right = F.pad(right[:-1], (0, 0, 0, 0, 0, 0, 1, 0))
        mu_r, sigma_r = (right + self.right.bias).unbind(-1)
        gaussians = torch.stack((mu_l, F.softplus(sigma_l), mu_r, F.softplus(sigma_r)), dim=-1)
        return self.combine(gaussians).permute(2, 3, 0, 1)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        return gate_or_softmax(self.mean(x, query), self.last)
