"""One training by several processes: `torchrun --nproc-per-node 2 -m mnistattn evaluate ...`.

Each process (rank) takes its part of every batch, and gradients, batch statistics, losses and hits
are those of the whole batch, so that the training is that of one process up to rounding; only what
a network draws itself (dropout, sampled attention) is drawn anew. The first rank alone writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from mnistattn.errors import InputError, MnistattnError
from mnistattn.models.network import is_ours

# The others wait while the first rank makes a data set; one that dies is noticed at once.
PATIENCE = timedelta(hours=24)
State = tuple[dict[str, Tensor], dict]


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training: number `rank` of `size`, `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """This rank's part of n images: parts differ by one image at most."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def note(self, value: Any) -> Any:
        """What the first rank has, a plain value (JSON), for all; the others' is not looked at."""
        if self.size == 1:
            return value
        return json.loads(self._bytes(json.dumps(value).encode()))

    def state(self, found: State | None) -> State | None:
        """The tensors and the note that the first rank has found, for all."""
        if self.size == 1:
            return found
        note = self.note(found and found[1])
        if note is None:
            return None
        tensors = {k: v.cpu().contiguous() for k, v in found[0].items()} if found else {}
        return unpack(self._bytes(pack(tensors))), note

    def _bytes(self, data: bytes) -> bytes:
        count = torch.tensor([len(data) if self.first else 0])
        dist.broadcast(count, 0)
        whole = torch.zeros(int(count), dtype=torch.uint8)
        if self.first:
            whole.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(whole, 0)
        return whole.numpy().tobytes()


ALONE = Ranks()


def launched() -> Ranks:
    """This process's place as torchrun tells it in the environment; ALONE without torchrun."""
    try:
        rank, size, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError):
        return ALONE
    return Ranks(rank, size, local) if size > 1 else ALONE


@contextmanager
def together(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect this process with the others; nothing to do for one alone.

    MnistattnError where they do not find each other, or one of them ends before its time.
    """
    if ranks.size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, MnistattnError) or not _lost(error):
            raise
        raise MnistattnError(
            f"process {ranks.rank} of {ranks.size} lost the others: see what they said, and give "
            "the same command again to go on."
        ) from error
    finally:
        leave(ranks)


def leave(ranks: Ranks) -> None:
    """Let the others go: from here on each process is by itself."""
    if ranks.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def _lost(error: Exception) -> bool:
    words = ("connect", "gloo", "nccl", "closed by peer", "timed out", "socket")
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in words)


def check_batch(ranks: Ranks, batch_size: int) -> None:
    """InputError if a batch has less than an image for each process."""
    if batch_size < ranks.size:
        raise InputError(f"a batch of {batch_size} images cannot be shared by {ranks.size} "
                         "processes: give a larger --batch-size, or fewer processes.")  # fmt: skip


class Together(nn.parallel.DistributedDataParallel):
    """A network whose gradients and batch norms are over the images of all ranks, until `release`.

    Parameters stay the network's own, so an optimiser of it goes on with them.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__(
            network, device_ids=[device.index] if device.type == "cuda" else None,
            # Of a module of the user's, nobody knows whether it uses all its parameters each time.
            find_unused_parameters=not all(is_ours(m) for m in network.modules()),
        )  # fmt: skip
        self.norms = [m for m in network.modules() if isinstance(m, BatchNorm)]
        self.shared = True  # False: each rank has the same images, so its own statistics are right
        for norm in self.norms:
            norm.forward = _SharedNorm(norm, self)  # type: ignore[method-assign, assignment]

    def release(self) -> nn.Module:
        """The network, each of its norms again one of this process alone."""
        for norm in self.norms:
            del norm.forward
        return self.module


class _SharedNorm:
    """The forward of a batch norm, with the statistics of all ranks' images while it is trained
    (Ioffe and Szegedy, 2015, equation 1, over the union). torch.nn.SyncBatchNorm is for GPUs only.
    """

    def __init__(self, norm: BatchNorm, together: Together) -> None:
        self.norm, self.together = norm, together

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not (norm.training and self.together.shared):
            return type(norm).forward(norm, x)
        norm._check_input_dim(x)
        over = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = wide.new_tensor([x.numel() // x.shape[1]])
        sums = all_reduce(torch.cat([wide.sum(over), count]))
        n, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = wide - mean.view(shape)  # the mean first: no difference of large squares
        var = all_reduce(centred.square().sum(over)) / n
        self._remember(mean.detach(), var.detach() * n / (n - 1))
        y = centred * torch.rsqrt(var + norm.eps).view(shape)
        if norm.affine:
            y = y * norm.weight.view(shape) + norm.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        norm = self.norm
        if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
            return
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        rate = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.item()
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), rate)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), rate)
