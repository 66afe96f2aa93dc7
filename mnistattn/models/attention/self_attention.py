"""Self-attention over the last map, with the query as one more token: `self`.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017; its encoder over the positions of a map
and a token that collects the answer, as ViT (Dosovitskiy et al., ICLR 2021). The map is attention
roll-out (Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020).

    T_0 = [W_q q; W_x x_ij + p_ij]                                    1 + H W tokens
    T' = T + MHA(LN(T)),  T'' = T' + W_2 GELU(W_1 LN(T'))             `layers` blocks
    features = W_o LN(the query's token), one vector (B, C, 1, 1)
    R = prod over layers of (0.5 A_l + 0.5 I)                         A: mean over heads
    map = R's row of the query's token over positions, divided by its sum

Roll-out is a reading of the weights, not the function that is computed: values, norms and the
feed-forward part do not enter. What the query's token keeps of itself is left out of the map. The
map has no gradient; that of the answer goes through the features.

It stands after the last pooling only: 36 + 1 tokens. The first map's 2,500 would take about 20
times the arithmetic of the CNN around it.

Our choices, which no source states: all sizes; norms before the sublayers and one at the end; no
dropout; p_ij is fixed, half of its width sines and cosines of the row and half of the column, of
frequencies from 1 down to 1 / 100 radian a cell (10,000 in Vaswani et al.: for longer sequences
than a map's side), so that any H x W has one; the query's token has none; no bias in the products
that give queries, keys and values: the norm before them has one. Where it is not last, the
features are the outputs of the positions' tokens, (B, C, H, W), and the map is the mean of their
rows of R.

How well: on MREF, after the board's two epochs, still where `none` is (40.6 %; docs/zoo.md).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import check
from mnistattn.models.attention.activate import wide

LONGEST = 100.0  # 1 / the lowest frequency of positions, in cells a radian
MOST = 1 << 22  # attention weights that roll-out holds at a time: 16 MiB


class Block(nn.Module):
    """An encoder block, norms first: the function of nn.TransformerEncoderLayer."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        nn.init.xavier_uniform_(self.mix.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, N, width) -> tokens, and queries and keys (B, heads, N, width / heads)."""
        parts = self.mix(self.norm1(tokens)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.outer(F.gelu(self.inner(self.norm2(tokens)))), query, key


class SelfAttention(nn.Module):
    """A transformer encoder over the positions and the query, whose token gives the answer.

    Args:
        channels: C.
        query_dim: Q.
        last: whether this is the last attended layer; else the positions' tokens go on.
        layers: encoder blocks, from 1.
        heads: of each, from 1.
        width: of a token, a multiple of 4 and of heads.
        expansion: hidden units of the feed-forward part, as a multiple of width, from 1.

    Raises InputError for an option out of its range.
    """

    placement = "last"
    paper = "Vaswani et al., NeurIPS 2017"
    summary = "self-attention of the last map and the query; the map is attention roll-out"

    def __init__(
        self, channels: int, query_dim: int, *, last: bool, layers: int = 2, heads: int = 4,
        width: int = 32, expansion: int = 4,
    ):  # fmt: skip
        super().__init__()
        check.whole(layers=layers, heads=heads, width=width, expansion=expansion)
        if width % 4 or width % heads:
            raise InputError(
                f"width {width} is impossible with {heads} heads: give a multiple of 4 and of "
                f"{heads}."
            )
        self.last, self.width = last, width
        self.features = nn.Linear(channels, width)
        self.query = nn.Linear(query_dim, width)
        self.blocks = nn.ModuleList(Block(width, heads, expansion * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, channels)
        for linear in (self.features, self.query, self.out):
            # Features and query as large as the positions that they stand beside.
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """x (B, C, H, W), query (B, Q) -> map (B, 1, H, W) that sums to 1 over positions, float32
        (float64 for float64); and features (B, C, 1, 1) if last, else (B, C, H, W)."""
        height, width = x.shape[2:]
        cells = wide(self.features(x.flatten(2).transpose(1, 2)))
        cells = cells + positions(height, width, self.width, x.device).to(cells.dtype)
        tokens = torch.cat((wide(self.query(query))[:, None], cells), 1)
        seen = []
        for block in self.blocks:
            tokens, asking, asked = block(tokens)
            seen.append((asking, asked))
        kept = tokens[:, :1] if self.last else tokens[:, 1:]
        f = self.out(self.norm(kept)).transpose(1, 2)
        f = f.unflatten(2, (1, 1) if self.last else (height, width))
        # Where what goes on comes from: the query's token, or all positions' alike.
        if self.last:
            row = wide(tokens.new_ones(len(tokens), 1))
        else:
            row = wide(tokens.new_full(tokens.shape[:2], 1 / (height * width)))
            row[:, 0] = 0
        return spread(rollout(row, seen)[:, 1:]).view(-1, 1, height, width), {"features": f}


def positions(height: int, width: int, size: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of rows and columns, (height * width, size) float64 in -1 .. 1, row by row;
    size a multiple of 4. Made on the device: a CUDA graph could not copy them there."""
    count = partial(torch.arange, dtype=torch.float64, device=device)
    frequency = LONGEST ** -(count(size // 4) / (size // 4))
    rows, columns = (count(n)[:, None] * frequency for n in (height, width))
    rows = torch.cat((rows.sin(), rows.cos()), 1)[:, None].expand(height, width, -1)
    columns = torch.cat((columns.sin(), columns.cos()), 1).expand(height, width, -1)
    return torch.cat((rows, columns), 2).flatten(0, 1)


@torch.no_grad()
def rollout(row: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
    """row (B, n), a distribution over the first n of the last layer's N tokens -> (B, N), that over
    the first layer's.

    seen: queries and keys (B, heads, N, d) of each layer, first to last. The product of the layers'
    0.5 A + 0.5 I is taken from the left, so that no N x N matrix is multiplied or, for many tokens,
    held.
    """
    for query, key in reversed(seen):
        query = wide(query[:, :, : row.shape[1]]) * query.shape[3] ** -0.5
        key = wide(key).transpose(2, 3)
        size = max(1, MOST // (key.shape[3] * query.shape[:2].numel()))
        mixed = row.new_zeros(len(row), key.shape[3])
        for part, weight in zip(query.split(size, 2), row.split(size, 1), strict=True):
            with torch.autocast(row.device.type, enabled=False):
                a = torch.softmax(part @ key, 3).mean(1)
                mixed += (weight[:, None] @ a)[:, 0]
        row = 0.5 * mixed + 0.5 * F.pad(row, (0, key.shape[3] - row.shape[1]))
    return row


def spread(weight: Tensor) -> Tensor:
    """weight (B, N) not negative -> divided by its sum; uniform where it is nothing but 0."""
    weight = weight + torch.finfo(weight.dtype).tiny
    return weight / weight.sum(1, keepdim=True)
