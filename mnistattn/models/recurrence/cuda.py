"""The `cuda` backend: the fused passes of cuda_kernels.py as a custom operator of torch.

Registered with fake and autograd rules, so torch.compile, autocast and DDP see one opaque,
differentiable operator; it takes memory from torch's allocator and never waits for the device, so
a CUDA graph can hold it. With TRITON_INTERPRET=1 in the environment, before Triton is imported, it
computes on CPU tensors in Triton's interpreter: slow, and how the tests know it without a GPU.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mnistattn.models.recurrence.autograd import differentiable

DIRECTIONS = 2
MOST_ROWS, MOST_CHANNELS, MOST_T = 128, 128, 64
CAPABILITY = (8, 0)  # the first with products of bfloat16 and tf32
TILE_ROWS = 64  # of a full tile: what Hopper's product of a warp group takes
MUCH_SHARED = 160 << 10  # bytes of shared memory that weights of t = 64 need with all else


@dataclass(frozen=True)
class Plan:
    """How a kernel is compiled for a size. rows, channels and width are R, C and T of the kernels;
    hold: the weights stay on the chip; ahead: the backward loads a step ahead of its use."""

    rows: int
    images: int
    channels: int
    width: int
    hold: bool
    ahead: bool
    warps: int


def plan(
    rows: int, channels: int, t: int, dtype: torch.dtype, batch: int, processors: int,
    shared: int, backward: bool,
) -> Plan:  # fmt: skip
    """The plan for maps of `rows`, on a GPU of so many multiprocessors with so many bytes of shared
    memory for a program. Chosen by the compiler's report on registers, spills and shared memory
    (benchmarks/gpu.py --compile); `benchmarks/gpu.py --tune` times the alternatives.
    """
    high, width = _power_of_2(rows, 1), _power_of_2(t, 16)
    images = max(1, 16 // high)  # a product has at least 16 rows
    while high * images < TILE_ROWS and DIRECTIONS * batch > 4 * images * processors:
        images *= 2
    narrow = dtype == torch.bfloat16
    # float32's three passes need twice the weights' room, and registers for both halves.
    hold = narrow and (width <= 32 or (shared >= MUCH_SHARED and not backward))
    ahead = narrow and width <= 16
    warps = 4 if high * images <= TILE_ROWS and width <= 16 else 8
    return Plan(high, images, _power_of_2(channels, 16), width, hold, ahead, warps)


def obstacle(device: torch.device, dtype: torch.dtype, rows: int, channels: int, t: int) -> str:
    """Why the kernels cannot compute this, in words about "it", the backend; "" if they can."""
    if dtype == torch.float64:
        return "it has no float64"
    if rows > MOST_ROWS or t > MOST_T or channels > MOST_CHANNELS:
        return (f"it takes maps of at most {MOST_ROWS} rows, {MOST_CHANNELS} channels of context "
                f"and {MOST_T} of state, not {rows}, {channels} and {t}")  # fmt: skip
    if device.type == "cuda":
        return _obstacle_of_device(device.index or 0, torch.compiler.is_compiling())
    return "" if device.type == "cpu" and interpreted() else f"it cannot compute on {device.type}"


@torch.compiler.assume_constant_result
def _obstacle_of_device(index: int, compiling: bool) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}, and the least is 8.0"
    return "" if compiling else _trial(index)


@cache
def _trial(index: int) -> str:
    """Try the smallest map once: Triton may be missing, or the C compiler that it wants."""
    try:
        forward(*(torch.zeros(shape, device=f"cuda:{index}")
                  for shape in ((1, 2, 2, 1), (2, 1, 4), (2, 2, 4), (1, 2, 4))), False)  # fmt: skip
        torch.cuda.synchronize(index)
    except Exception as error:  # whatever a compiler may raise: the reference computes instead
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"Triton does not run here ({line})"
    return ""


def interpreted() -> bool:
    """Whether Triton interprets kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op(
    "mnistattn::diagonal_lstm_cuda", mutates_args=(), device_types=("cuda", "cpu")
)
def forward(
    x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """x (B, m, n, C) float32 or bfloat16; float32: input_weight (2, C, 4t), recurrent_weight
    (2, 2t, 4t), offset (B, 2, 4t) -> hidden (B, m, n, 2t) of x's type and, if keep, c likewise in
    float32."""
    from mnistattn.models.recurrence import cuda_kernels

    x, (batch, rows, columns, channels) = x.contiguous(), x.shape
    t = recurrent_weight.shape[2] // 4
    hidden = x.new_empty(batch, rows, columns, DIRECTIONS * t)
    c = hidden.new_empty(hidden.shape if keep else 0, dtype=torch.float32)
    weights = [w.to(x.dtype).contiguous() for w in (input_weight, recurrent_weight)]
    chosen = _plan_for(x, t, False)
    _launch(
        cuda_kernels.forward, chosen, x,
        (x, *weights, offset.contiguous(), hidden, c, batch, rows, columns, channels, t),
        KEEP=keep,
    )  # fmt: skip
    return hidden, c


@forward.register_fake
def _(x, input_weight, recurrent_weight, offset, keep):
    hidden = x.new_empty(*x.shape[:3], DIRECTIONS * (recurrent_weight.shape[2] // 4))
    return hidden, hidden.new_empty(hidden.shape if keep else 0, dtype=torch.float32)


@torch.library.custom_op(
    "mnistattn::diagonal_lstm_cuda_backward", mutates_args=(), device_types=("cuda", "cpu")
)
def backward(
    grad_hidden: Tensor, x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor,
    hidden: Tensor, c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x (of its type), input_weight, recurrent_weight and offset (float32)."""
    from mnistattn.models.recurrence import cuda_kernels

    x, grad_hidden = x.contiguous(), grad_hidden.contiguous()
    batch, rows, columns, channels = x.shape
    t = recurrent_weight.shape[2] // 4
    narrow = [w.to(x.dtype).contiguous() for w in (input_weight, recurrent_weight)]
    grad_gates = x.new_empty(batch, rows, columns, DIRECTIONS, 4 * t)
    chosen = _plan_for(x, t, True)
    _launch(
        cuda_kernels.backward, chosen, x,
        (grad_hidden, x, *narrow, offset.contiguous(), hidden, c, grad_gates, batch, rows, columns,
         channels, t),
        AHEAD=chosen.ahead,
    )  # fmt: skip
    flat = grad_gates.view(-1, DIRECTIONS * 4 * t)
    grad_x = flat @ narrow[0].transpose(1, 2).reshape(-1, channels)
    grad_input = (x.view(-1, channels).T @ flat).view(channels, DIRECTIONS, 4 * t).transpose(0, 1)
    grad_recurrent = [_neighbours(hidden, s).T @ grad_gates.view(-1, DIRECTIONS, 4 * t)[:, s]
                      for s in range(DIRECTIONS)]  # fmt: skip
    return (
        grad_x.view(x.shape), grad_input.float().contiguous(),
        torch.stack(grad_recurrent).float(), grad_gates.sum((1, 2), dtype=torch.float32),
    )  # fmt: skip


@backward.register_fake
def _(grad_hidden, x, input_weight, recurrent_weight, offset, hidden, c):
    single = {"dtype": torch.float32}
    return (
        x.new_empty(x.shape), x.new_empty(input_weight.shape, **single),
        x.new_empty(recurrent_weight.shape, **single), x.new_empty(offset.shape, **single),
    )  # fmt: skip


def _neighbours(hidden: Tensor, s: int) -> Tensor:
    """What direction s's recurrent weights are multiplied with, (B m n, 2t): h of the cell before
    and h of the cell above, zero outside the map."""
    batch, rows, columns, t = *hidden.shape[:3], hidden.shape[3] // DIRECTIONS
    h = hidden[..., s * t : (s + 1) * t]
    both = hidden.new_zeros(batch, rows, columns, 2, t)
    if s == 0:
        both[:, :, 1:, 0] = h[:, :, :-1]
    else:
        both[:, :, :-1, 0] = h[:, :, 1:]
    both[:, 1:, :, 1] = h[:, :-1]
    return both.view(-1, 2 * t)


# x float32 or bfloat16, the rest float32.
diagonal_lstm = differentiable(forward, backward, inputs_kept=4)


def _plan_for(x: Tensor, t: int, backward: bool) -> Plan:
    batch, rows, _, channels = x.shape
    if x.is_cuda:
        return plan(rows, channels, t, x.dtype, batch, *_device(x.device.index or 0), backward)
    # The interpreter has neither limits nor anything to gain but the loads that it does not make.
    made = plan(rows, channels, t, x.dtype, batch, batch, 0, backward)
    return replace(made, hold=True)


@cache
def _device(index: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory for a program."""
    about: Any = torch.cuda.get_device_properties(index)  # torch's stubs lack some of its fields
    return about.multi_processor_count, about.shared_memory_per_block_optin


def _launch(kernel: Any, chosen: Plan, x: Tensor, arguments: tuple, **flags: bool) -> None:
    """Run a kernel over all images of both directions, on the device that x is on."""
    if not len(x):
        return
    narrow = x.dtype == torch.bfloat16
    grid = (-(-len(x) // chosen.images), DIRECTIONS)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[grid](
            *arguments, R=chosen.rows, IMAGES=chosen.images, C=chosen.channels, T=chosen.width,
            HOLD=chosen.hold, FAST=narrow and x.is_cuda, WIDEN=narrow and not x.is_cuda,
            num_warps=chosen.warps, num_stages=1, **flags,
        )  # fmt: skip


def _power_of_2(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
