"""Structured attention at the cost of a local one: `scan`. Ours; of no paper.

AttentionRNN's map is structured since every value hears of the others through LSTMs that run over
the map cell by cell. Here the recurrences are linear in their state, and gated by the input:

    E = ReLU(K * X + W_q q)                            CTX's local evidence (PAN; 3 x 3 and query)
    h = f . h_before + (1 - f) . v,   f = sigm(W_f E + U_f q),   v = W_v E + U_v q
        right and left along the rows, then down and up along the columns, whose f and v are of
        [E; h of the rows], so that every position can hear from every other
    a = act(w . ReLU(W [E; h of the rows; h of the columns] + W'_q q))

act: a sigmoid in inner layers, a softmax over positions in the last, as PAN. What it is made of is
known: gated linear recurrences (Martin & Cundy, ICLR 2018; QRNN, Bradbury et al., ICLR 2017;
minGRU, Feng et al., arXiv 2410.01201), rows, then columns (ReNet, Visin et al., arXiv 1505.00393),
scans of feature maps in four directions (VMamba, Liu et al., NeurIPS 2024).

Our choices, which no source states: all of it as attention, and the sizes; the bias of the forget
gates at the start, spread over the channels so that a state is a mean over 2 to 16 cells.
`gate_bias` and `focus`, both off by default, are those of `ctx` (pan.py, focus.py).

How well: on MBG (12 epochs, one query an image) 93.2 %, where `arnn` has 89.2 and `ctx` 90.4 (one
seed each), with a correctness of 0.17 (0.11, 0.38). On MREF, after the board's two epochs, 86.0 %
(80.4, 69.0; two seeds each), with maps that lie no better on the target than theirs (docs/zoo.md).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import check
from mnistattn.models.attention.activate import gate_or_softmax
from mnistattn.models.attention.focus import focus_loss
from mnistattn.models.recurrence.linear_scan import COLUMNS, ROWS, gated_scan

SHORTEST, LONGEST = 2.0, 16.0  # cells that a state spans at the start: 1 / (1 - f)


class Scan(nn.Module):
    """Attention map (B, 1, H, W) for a feature map (B, C, H, W) and a query (B, Q).

    Args:
        channels: C.
        query_dim: Q.
        last: whether the map is a softmax over positions, else a gate.
        hidden: t, channels of a direction's state, from 1; multiples of 8 are the fast ones.
        width: channels of E and of the head, from 1.
        context: side of K in pixels, odd.
        gate_bias: what is added to an inner gate's score, from -20.
        focus: weight of the loss that makes maps small where the answer is right, from 0.

    Raises InputError for an option out of its range.
    """

    summary = "gated linear recurrences along rows, then columns, at nearly the cost of CTX"
    cuda_graph = True

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, hidden: int = 8, width: int = 16,
        context: int = 3, gate_bias: float = 0.0, focus: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check.number(-20, gate_bias=gate_bias)
        check.number(0, focus=focus)
        self.focus = focus
        check.whole(hidden=hidden, width=width, context=context)
        if not context % 2:
            raise InputError(f"context {context} is even: give an odd number.")
        self.last = last
        self.local = nn.Conv2d(channels, width, context, padding=context // 2)
        # Of each product over [E; states; q] a part for each, so that nothing is concatenated and
        # the query is never spread over the map. W_. E of the rows, the columns and the head:
        self.evidence = nn.ModuleList(
            nn.Linear(width, n, bias=False) for n in (4 * hidden, 4 * hidden, width)
        )
        self.rows_to_columns = nn.Linear(2 * hidden, 4 * hidden, bias=False)
        self.rows_to_head = nn.Linear(2 * hidden, width, bias=False)
        self.columns_to_head = nn.Linear(2 * hidden, width, bias=False)
        self.query = nn.Linear(query_dim, width, bias=False)
        self.rows_query = nn.Linear(query_dim, 4 * hidden)
        self.columns_query = nn.Linear(query_dim, 4 * hidden)
        self.head_query = nn.Linear(query_dim, width)
        self.score = nn.Linear(width, 1, bias=not last)  # which a softmax would not see
        if not last:
            with torch.no_grad():
                self.score.bias.add_(gate_bias)
        self._forget_slowly(hidden)

    def _forget_slowly(self, hidden: int) -> None:
        """The forget gates' bias: a state spans 1 / (1 - f) cells, SHORTEST .. LONGEST of them."""
        spans = torch.logspace(math.log2(SHORTEST), math.log2(LONGEST), hidden, base=2)
        with torch.no_grad():
            for linear in (self.rows_query, self.columns_query):
                bias = linear.bias.view(2, 2, hidden)  # direction, f and v
                bias.zero_()
                bias[:, 0] = torch.log(spans - 1)  # sigm(log(s - 1)) = 1 - 1 / s

    def forward(self, x: Tensor, query: Tensor) -> Tensor | tuple[Tensor, Callable]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) in (0, 1); sums to 1 if last. With
        `focus`, in training, its loss beside it."""
        e = F.relu(self.local(x) + self.query(query)[:, :, None, None], inplace=True)
        to_rows, to_columns, to_head = (part(e.permute(0, 2, 3, 1)) for part in self.evidence)
        rows = gated_scan(to_rows, self.rows_query(query), ROWS)
        to_columns = to_columns + self.rows_to_columns(rows)
        columns = gated_scan(to_columns, self.columns_query(query), COLUMNS)
        known = to_head + self.rows_to_head(rows) + self.columns_to_head(columns)
        known = F.relu(known + self.head_query(query)[:, None, None], inplace=True)
        a = gate_or_softmax(self.score(known).permute(0, 3, 1, 2), self.last)
        return (a, focus_loss(a, self.focus)) if self.focus and self.training else a
