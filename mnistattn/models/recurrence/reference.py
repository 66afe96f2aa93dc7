"""The definition of the diagonal LSTM in plain torch: any device, any derivative, short.

The paper skews the map (row i shifted right by i) and runs over the columns of the skewed map. A
column of it is a diagonal i + j = d of the map, so here the cells of a diagonal are one batched
step, and the skew's empty cells do not exist: nothing, a bias say, can leak from them, and the
state outside the map is zero. The right LSTM is the same on the column-mirrored map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def diagonal_lstm(
    x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor
) -> Tensor:
    """See `mnistattn.models.recurrence.diagonal_lstm`."""
    if x.is_meta:
        return _without_values(x, input_weight, recurrent_weight)
    left = _one_direction(x, input_weight[0], recurrent_weight[0], offset[:, 0])
    right = _one_direction(x.flip(3), input_weight[1], recurrent_weight[1], offset[:, 1]).flip(3)
    return torch.cat((left, right), 1).contiguous(memory_format=torch.channels_last)


def _without_values(x: Tensor, input_weight: Tensor, recurrent_weight: Tensor) -> Tensor:
    """On the meta device, where FLOPs are counted: the answer's shape, from as many multiplications
    as all cells take, in one product instead of hundreds, which take seconds to count."""
    batch, channels, rows, columns = x.shape
    t = recurrent_weight.shape[2] // 4
    cells = x.permute(0, 2, 3, 1).reshape(-1, channels)
    seen = torch.cat((cells, cells.new_empty(len(cells), 2 * t)), 1)  # and h before and above
    gates = seen.expand(2, -1, -1) @ torch.cat((input_weight, recurrent_weight), 1)
    hidden = (
        gates[..., :t].unflatten(1, (batch, rows, columns)).permute(1, 0, 4, 2, 3).flatten(1, 2)
    )
    return hidden.contiguous(memory_format=torch.channels_last)


def _one_direction(x: Tensor, input_weight: Tensor, recurrent: Tensor, offset: Tensor) -> Tensor:
    """x (B, C, m, n), (C, 4t), (2t, 4t), (B, 4t) -> (B, t, m, n)."""
    batch, _, rows, columns = x.shape
    t = recurrent.shape[1] // 4
    gates = (x.permute(2, 3, 0, 1) @ input_weight + offset).flatten(0, 1)  # (mn, B, 4t)
    diagonals = _diagonals(rows, columns, x.device)
    # Taken apart before the loop: a slice inside it would make the backward quadratic.
    inputs = gates[torch.cat([cells for _, cells in diagonals])].split(
        [len(cells) for _, cells in diagonals]
    )
    hidden: list[Tensor] = []
    h = c = gates.new_zeros(0, batch, t)
    first_before = 0
    for (first, cells), z in zip(diagonals, inputs, strict=True):
        # A zero row on either side stands for the outside of the map.
        h_rows, c_rows = (F.pad(state, (0, 0, 0, 0, 1, 1)) for state in (h, c))
        at = first - first_before  # of the cell above; the cell before is the next one
        above, before = h_rows[at : at + len(cells)], h_rows[at + 1 : at + 1 + len(cells)]
        z = z + torch.cat((before, above), -1) @ recurrent
        c = c_rows[at + 1 : at + 1 + len(cells)]
        o, f, i, g = z.split(t, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hidden.append(h)
        first_before = first
    order = torch.cat([cells for _, cells in diagonals]).argsort()
    return torch.cat(hidden)[order].view(rows, columns, batch, t).permute(2, 3, 0, 1)


def _diagonals(rows: int, columns: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """Of each diagonal its first row and its cells' places in the row-major map."""
    found = []
    for d in range(rows + columns - 1):
        first, last = max(0, d - columns + 1), min(d, rows - 1)
        row = torch.arange(first, last + 1, device=device)
        found.append((first, row * columns + d - row))
    return found
