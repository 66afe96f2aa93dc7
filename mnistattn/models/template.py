"""MyAttention: one line that says what it is; boards and `mnistattn models` show the class's.

    mnistattn check --model my_attention.py:MyAttention
    mnistattn evaluate --model my_attention.py:MyAttention --data data/mbg
    mnistattn leaderboard

This is a plain PyTorch module: nothing has to be inherited from mnistattn. One of it stands after
each pooling of a small CNN, and its map multiplies the features there. The whole contract:
python -c "import mnistattn.models.contract as c; help(c)"
"""

import torch
from torch import Tensor, nn


class MyAttention(nn.Module):
    """Attention from the features and the query at each position alone."""

    # Where it stands: "every" pooling, the "last" only, or sizes of maps, as (25, 6); a network of
    # 100-pixel images has maps of 50, 25, 12 and 6 positions a side.
    placement = "every"
    paper = "-"  # as "Woo et al., ECCV 2018"

    # Options are keyword arguments with a default: `--set hidden=16` sets this one.
    def __init__(self, channels: int, query_dim: int, *, last: bool, hidden: int = 32):
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden {hidden} is impossible: give 1 or more")
        self.last = last  # whether this is the network's last map
        self.features = nn.Conv2d(channels, hidden, 1)
        self.query = nn.Linear(query_dim, hidden, bias=False)
        self.score = nn.Conv2d(hidden, 1, 1, bias=False)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """x (B, channels, H, W), query (B, query_dim) -> map (B, 1, H, W), not negative."""
        hidden = torch.relu(self.features(x) + self.query(query)[:, :, None, None])
        score = self.score(hidden)  # (B, 1, H, W), any real number

        # A sample: while training, add noise with torch's own random numbers; in eval do not, so
        # that a score can be repeated:
        #     if self.training:
        #         score = score + 0.1 * torch.randn_like(score)

        # The last map is a distribution over positions, inner ones are gates in 0 .. 1. Over the
        # positions, never over the batch (dim 0): `mnistattn check` finds that out.
        if self.last:
            return torch.softmax(score.flatten(2), dim=2).view_as(score)
        return torch.sigmoid(score)

        # A loss of your own, added to the cross entropy, goes beside the map:
        #     return map, 0.01 * map.mean()
        # So do features of your own, that go on in place of map * x:
        #     return map, {"features": (1 + map) * x}
