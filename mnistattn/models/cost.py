"""What a network costs."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mnistattn.errors import MnistattnError


def flops_per_image(network: nn.Module, size: int) -> int:
    """Floating-point operations of the forward pass of one image of size x size (convolutions and
    matrix products).

    Counted on the meta device, where every model takes its plain torch path; what does not fit the
    maps of that size (a block larger than one) raises its InputError here. A user's model that
    cannot run there is counted on the CPU.
    """
    try:
        return _count(copy.deepcopy(network).to("meta"), size)
    except MnistattnError:
        raise
    except Exception:
        return _count(copy.deepcopy(network), size)


def _count(shadow: nn.Module, size: int) -> int:
    shadow.eval()
    device = next((p.device for p in shadow.parameters()), torch.device("cpu"))
    given = {"mask": torch.zeros(1, size, size, dtype=torch.bool, device=device)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(
            torch.zeros(1, 3, size, size, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            **(given if getattr(shadow, "sees_mask", False) else {}),
        )
    return counter.get_total_flops()
