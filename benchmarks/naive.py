"""What the speed of the recurrence is measured against: AttentionRNN's as one would first write it.

The paper's skew made a tensor with padding, a loop over its columns that slices it, one direction
after the other. (Its values differ at the row starts: the padding's cells run on the biases.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def diagonal_lstm(
    x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor
) -> Tensor:
    """As mnistattn.models.recurrence.diagonal_lstm, but for what leaks from the padding."""
    left = _direction(x, input_weight[0], recurrent_weight[0], offset[:, 0])
    right = _direction(x.flip(3), input_weight[1], recurrent_weight[1], offset[:, 1])
    return torch.cat((left, right.flip(3)), 1)


def _direction(x: Tensor, input_weight: Tensor, recurrent: Tensor, offset: Tensor) -> Tensor:
    batch, channels, rows, columns = x.shape
    t = recurrent.shape[1] // 4
    skewed = x.new_zeros(batch, channels, rows, columns + rows - 1)
    for i in range(rows):
        skewed[:, :, i, i : i + columns] = x[:, :, i]
    gates = F.conv2d(skewed, input_weight.T[:, :, None, None]) + offset[:, :, None, None]
    kernel = torch.stack((recurrent[t:].T, recurrent[:t].T), 2)  # the row above, the same row
    h = c = x.new_zeros(batch, t, rows)
    hidden = []
    for j in range(columns + rows - 1):
        z = gates[:, :, :, j] + F.conv1d(F.pad(h, (1, 0)), kernel)
        o, f, i, g = z.split(t, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        hidden.append(h)
    out = torch.stack(hidden, 3)
    return torch.stack([out[:, :, i, i : i + columns] for i in range(rows)], 2)
