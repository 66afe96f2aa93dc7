"""The `cpu` backend: the compiled passes of cpu_kernels.py as a custom operator of torch.

Registered with fake and autograd rules, so torch.compile and DDP see one opaque, differentiable
operator. Work is divided by direction and tiles of images, never by the number of threads, so that
the result is the same to the bit on any number of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistattn.models.recurrence import cpu_kernels as compiled
from mnistattn.models.recurrence.autograd import differentiable

DIRECTIONS = 2
kernels: Any = compiled  # to mypy, compiled functions take no arguments


@torch.library.custom_op("mnistattn::diagonal_lstm", mutates_args=(), device_types="cpu")
def forward(
    x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, m, n, C), input_weight (2, C, 4t), recurrent_weight (2, 2t, 4t), offset (B, 2, 4t),
    all float32 or all float64 -> hidden (B, m, n, 2t); and, for the backward, if keep, gates and c.
    """
    _check_finite(
        {
            "the features": x,
            "input_weight": input_weight,
            "recurrent_weight": recurrent_weight,
            "the query or the bias": offset,
        }
    )
    x = x.contiguous()
    batch, rows, columns, channels = x.shape
    t = recurrent_weight.shape[2] // 4
    weight = _halve_sigmoids(torch.cat((input_weight, recurrent_weight), 1))
    panel = kernels.panel_width(_dtype(x))
    packed = [_flat(_panels(w, panel)) for w in weight]
    offset = _halve_sigmoids(offset)
    cells = rows * columns if keep else 2
    hidden = x.new_empty(batch, rows, columns, DIRECTIONS * t)
    gates = x.new_empty(DIRECTIONS * batch * cells * _padded(4 * t, panel))
    c = x.new_empty(DIRECTIONS * batch * cells * t)
    arrays = [_flat(v) for v in (hidden, gates, c)]
    x_, offset_ = _flat(x), _flat(offset)
    _run(
        lambda s, first, images, _: kernels.forward(
            x_, packed[s], offset_, *arrays, keep, first, images, rows, columns, channels, t, s
        ),
        batch, kernels.TILE,
    )  # fmt: skip
    # A NaN that arises in any cell reaches the last one of its direction.
    if x.numel() and hidden[:, -1, (0, -1)].isnan().any():
        raise FloatingPointError("the recurrence overflowed, although its inputs are finite")
    return (hidden, gates, c) if keep else (hidden, x.new_empty(0), x.new_empty(0))


@forward.register_fake
def _(x, input_weight, recurrent_weight, offset, keep):
    batch, rows, columns, _ = x.shape
    t = recurrent_weight.shape[2] // 4
    vectors = DIRECTIONS * batch * rows * columns if keep else 0
    width = _padded(4 * t, kernels.panel_width(_dtype(x)))
    hidden = x.new_empty(batch, rows, columns, DIRECTIONS * t)
    return hidden, x.new_empty(vectors * width), x.new_empty(vectors * t)


@torch.library.custom_op("mnistattn::diagonal_lstm_backward", mutates_args=(), device_types="cpu")
def backward(
    grad_hidden: Tensor, x: Tensor, input_weight: Tensor, recurrent_weight: Tensor,
    hidden: Tensor, gates: Tensor, c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, input_weight, recurrent_weight and offset."""
    x, grad_hidden = x.contiguous(), grad_hidden.contiguous()
    batch, rows, columns, channels = x.shape
    t = recurrent_weight.shape[2] // 4
    weight = torch.cat((input_weight, recurrent_weight), 1)
    panel = kernels.panel_width(_dtype(x))
    packed = [_flat(_panels(w.T, panel)) for w in weight]
    tiles = -(-batch // kernels.TILE)
    grad_x = x.new_empty(DIRECTIONS, *x.shape)
    grad_offset = x.new_zeros(batch, DIRECTIONS, 4 * t)
    width = _padded(4 * t, panel)
    grad_weight = x.new_zeros(DIRECTIONS, tiles, weight.shape[1], width)
    inputs = [_flat(v) for v in (hidden, gates, c, grad_x)]
    each, grad_offset_ = grad_weight.numpy(), _flat(grad_offset)
    grad_hidden_, x_ = _flat(grad_hidden), _flat(x)
    _run(
        lambda s, first, images, tile: kernels.backward(
            grad_hidden_, x_, packed[s], *inputs, each[s, tile].reshape(-1), grad_offset_,
            first, images, rows, columns, channels, t, s,
        ),
        batch, kernels.TILE,
    )  # fmt: skip
    grad = grad_weight.sum(1)[..., : 4 * t]
    return (
        grad_x.sum(0), grad[:, :channels].contiguous(), grad[:, channels:].contiguous(), grad_offset
    )  # fmt: skip


@backward.register_fake
def _(grad_hidden, x, input_weight, recurrent_weight, hidden, gates, c):
    batch, t = x.shape[0], recurrent_weight.shape[2] // 4
    return (
        x.new_empty(x.shape), input_weight.new_empty(input_weight.shape),
        recurrent_weight.new_empty(recurrent_weight.shape), x.new_empty(batch, DIRECTIONS, 4 * t),
    )  # fmt: skip


diagonal_lstm = differentiable(forward, backward, inputs_kept=3)


def _halve_sigmoids(gates: Tensor) -> Tensor:
    """(..., 4t): the arguments of o, f and i halved, as sigm(z) = (1 + tanh(z / 2)) / 2."""
    t = gates.shape[-1] // 4
    return torch.cat((gates[..., : 3 * t] / 2, gates[..., 3 * t :]), -1)


def _panels(weight: Tensor, panel: int) -> Tensor:
    """(K, N) -> (N / panel, K, panel), N padded with zeros."""
    padded = F.pad(weight, (0, -weight.shape[1] % panel))
    return padded.view(len(weight), -1, panel).transpose(0, 1).contiguous()


def _padded(n: int, panel: int) -> int:
    return -(-n // panel) * panel


def _flat(x: Tensor):
    return x.detach().contiguous().view(-1).numpy()


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _run(work: Callable, batch: int, tile: int) -> None:
    """work(direction, first image, images, number of the tile) for all, on torch's thread count."""
    tasks = [
        (s, first, min(tile, batch - first), number)
        for number, first in enumerate(range(0, batch, tile))
        for s in range(DIRECTIONS)
    ]
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        run: Iterable = map(lambda task: work(*task), tasks)
    else:
        run = _pool(os.getpid(), threads).map(lambda task: work(*task), tasks)
    for _ in run:
        pass


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads are not inherited by a forked process: one pool a process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="diagonal-lstm")


def _check_finite(tensors: dict[str, Tensor]) -> None:
    """A sum is a tenth of a pass of isfinite; where it overflows, that decides."""
    if all(math.isfinite(value.sum().item()) for value in tensors.values()):
        return
    where = [name for name, value in tensors.items() if not value.isfinite().all()]
    if where:
        raise FloatingPointError(
            f"the recurrence of AttentionRNN met NaN or infinity in {' and in '.join(where)}"
        )
