"""Local context for an attention: a small U-Net (Ronneberger et al., MICCAI 2015), in place of one
convolution, as AttentionRNN's section 3.1 suggests."""

import torch.nn.functional as F
from torch import Tensor, nn


class UNetContext(nn.Module):
    """Features (B, C, H, W) -> context (B, out, H, W) that sees about 4 x 4 times as far as one
    convolution does.

    Two levels down (2 x 2 max pooling, any size from 1 x 1), a convolution at each, and up again
    by nearest upsampling; a skip is added to what comes from below. Linear at the top, so that it
    takes the place of a convolution.
    """

    levels = 2

    def __init__(self, channels: int, out: int, size: int, padding: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Conv2d(out if level else channels, out, size, padding=padding)
            for level in range(self.levels + 1)
        )
        self.top = nn.Conv2d(out, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        skips = []
        for level, conv in enumerate(self.down):
            if level:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x = F.relu(conv(x))
            skips.append(x)
        x = skips.pop()
        for skip in reversed(skips):
            x = skip + F.interpolate(x, skip.shape[2:])
        return self.top(x)
