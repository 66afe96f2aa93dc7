"""What a network costs."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from mnistattn.models.network import Network


def flops_per_image(network: Network, size: int) -> int:
    """Floating-point operations of the forward pass of one image of size x size (convolutions and
    matrix products).

    Counted on the meta device, where every model takes its plain torch path; what does not fit the
    maps of that size (a block larger than one) raises its InputError here.
    """
    shadow = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(
            torch.empty(1, 3, size, size, device="meta"),
            torch.empty(1, dtype=torch.int64, device="meta"),
        )
    return counter.get_total_flops()
