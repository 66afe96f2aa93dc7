"""The diagonal LSTM of AttentionRNN (Khandelwal & Sigal, ICCV 2019, eqs. 4-6), exactly.

Cell (i, j) of the left-to-right LSTM, with G_ij = K^x * X^c_ij + bias computed beforehand:

    [o, f, i, g] = [sigm, sigm, sigm, tanh](W_left h_{i,j-1} + W_up h_{i-1,j} + G_ij)
    c_ij = f . c_{i,j-1} + i . g
    h_ij = o . tanh(c_ij)

This is the paper's recurrence on the skewed map (row i shifted right by i; K^h a 2 x 1 convolution
over the previous column's same row and row above) written on the map itself: a column of the
skewed map is a diagonal i + j = d, and its cells are one batched step. The skew's empty cells do
not exist here, so nothing (a bias, say) can leak from them: the state outside the map is zero.
The right-to-left LSTM is the same on the column-mirrored map; its diagonals are the map's
anti-diagonals, so no mirrored copy is made.

Two implementations of the same function: `_Fused` (CPU) has a hand-written backward, one matrix
product per diagonal and everything else of the step in one compiled pass; `_by_autograd` is plain
torch, for the other devices and as what the first is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DIRECTIONS = 2


def diagonal_lstm(gates: Tensor, recurrent_weight: Tensor, offset: Tensor | None = None) -> Tensor:
    """Runs the left-to-right and the right-to-left LSTM over a map, one step per diagonal.

    Args:
        gates: (m, n, B, 2, 4t), what the input adds to each gate at each cell: [..., 0, :] of the
            left-to-right LSTM, [..., 1, :] of the right-to-left one (both at the cell's own
            place: nothing is to be mirrored). Gate order o, f, i, g.
        recurrent_weight: (2, 2t, 4t) per direction: rows [0, t) multiply the h of the previous
            cell in the row (the left neighbour; for the right-to-left LSTM the right one), rows
            [t, 2t) the h of the cell above.
        offset: (B, 2, 4t), added to `gates` at every cell: the bias, and whatever else is the
            same all over a map. Broadcasting it into `gates` is the same, but costs passes over
            by far the largest array here.

    Returns:
        hidden (m, n, B, 2, t): h of both LSTMs at each cell. That of the left-to-right LSTM sees
        rows <= i and columns <= j, that of the right-to-left LSTM rows <= i and columns >= j.
    """
    if gates.dim() != 5 or gates.shape[3] != DIRECTIONS or gates.shape[4] % 4:
        raise ValueError(f"gates must be (m, n, B, 2, 4t), got {tuple(gates.shape)}")
    t = gates.shape[4] // 4
    if recurrent_weight.shape != (DIRECTIONS, 2 * t, 4 * t):
        raise ValueError(
            f"recurrent_weight must be {(DIRECTIONS, 2 * t, 4 * t)}, "
            f"got {tuple(recurrent_weight.shape)}"
        )
    if offset is None:
        offset = gates.new_zeros(gates.shape[2:])
    if offset.shape != gates.shape[2:]:
        raise ValueError(f"offset must be {tuple(gates.shape[2:])}, got {tuple(offset.shape)}")
    kind = gates.device.type
    known = torch.amp.is_autocast_available(kind)  # not on the meta device
    with torch.autocast(kind, enabled=False) if known else nullcontext():
        # The recurrence is long: half precision in it would add up.
        if gates.dtype != torch.float64:
            gates, recurrent_weight, offset = (x.float() for x in (gates, recurrent_weight, offset))
        if kind != "cpu":
            return _by_autograd(gates, recurrent_weight, offset)
        inputs = (gates, recurrent_weight, offset)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return _Fused.apply(*inputs, keep)


@cache
def _plan(rows: int, columns: int) -> np.ndarray:
    """Per diagonal d: first row, length, and its slice (start, step) of the row-major map for
    each direction (the mirrored diagonal's column is columns - 1 - (d - i))."""
    plan = []
    for d in range(rows + columns - 1):
        first, last = max(0, d - columns + 1), min(d, rows - 1)
        left = first * columns + d - first
        right = first * columns + columns - 1 - (d - first)
        plan.append((first, last - first + 1, left, max(1, columns - 1), right, columns + 1))
    return np.array(plan, dtype=np.int64)


# ------------------------------------------------------------------------------ plain torch


def _by_autograd(gates: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    rows, columns, batch, _, four_t = gates.shape
    t = four_t // 4
    plan = _plan(rows, columns).tolist()
    order = torch.tensor(
        [
            [p[2 + 2 * s] + k * p[3 + 2 * s] for p in plan for k in range(p[1])]
            for s in range(DIRECTIONS)
        ],
        device=gates.device,
    )
    flat = (gates + offset).reshape(rows * columns, batch, DIRECTIONS, four_t)
    by_diagonal = torch.stack([flat[order[s], :, s] for s in range(DIRECTIONS)])
    # Split once: a slice taken inside the loop would make the backward quadratic.
    inputs = by_diagonal.split([p[1] for p in plan], dim=1)
    zero = gates.new_zeros(DIRECTIONS, 1, batch, t)
    hidden: list[Tensor] = []
    h = c = zero
    first_before = 0  # with one zero row before and after: h_before[:, i - first_before + 1]
    for (first, length, *_), x in zip(plan, inputs, strict=True):
        if hidden:
            padded_h, padded_c = (torch.cat((zero, s, zero), dim=1) for s in (h, c))
            at = first - first_before + 1
            left, up = padded_h[:, at : at + length], padded_h[:, at - 1 : at - 1 + length]
            state = torch.cat((left, up), dim=-1).flatten(1, 2)
            x = x + torch.bmm(state, weight).view_as(x)
            c = padded_c[:, at : at + length]
        sigmoids, g = x.split((3 * t, t), dim=-1)
        o, f, i = sigmoids.sigmoid().split(t, dim=-1)
        c = f * c + i * g.tanh()
        h = o * c.tanh()
        hidden.append(h)
        first_before = first
    back = torch.empty_like(order)
    for s in range(DIRECTIONS):
        back[s, order[s]] = torch.arange(rows * columns, device=order.device)
    h = torch.cat(hidden, dim=1)
    h = torch.stack([h[s, back[s]] for s in range(DIRECTIONS)], dim=2)
    return h.view(rows, columns, batch, DIRECTIONS, t)


# ------------------------------------------------------------------------------------ fused


class _Fused(torch.autograd.Function):
    """The same with a hand-written backward.

    What the backward needs is stored diagonal by diagonal, each (2, length, B, .) contiguous, so
    that a diagonal of both directions is one batched matrix product with no copy around it; the
    kernels read `gates` and write `hidden` in the map's own order. The weight's gradient is summed
    diagonal by diagonal too, while the operands are still in the cache.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, offset: Tensor, keep: bool) -> Tensor:
        rows, columns, batch, _, four_t = gates.shape
        t = four_t // 4
        plan = _plan(rows, columns)
        kernels = _kernels(gates.dtype)
        gates, weight, offset = (x.contiguous() for x in (gates, weight, offset))
        sizes = DIRECTIONS * batch * plan[:, 1]
        # Nothing to keep: two diagonals' worth of room, used in turn.
        turn = np.arange(len(plan)) % 2 * sizes.max()
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1])) if keep else turn
        room = int(sizes.sum() if keep else 2 * sizes.max())
        acts, state = gates.new_empty(room, four_t), gates.new_empty(room, 2 * t)
        c, tanh_c = gates.new_empty(room, t), gates.new_empty(room, t)
        hidden = gates.new_empty(rows, columns, batch, DIRECTIONS, t)
        tensors = (gates, offset, acts, c, tanh_c, state, hidden)
        arrays = [x.detach().view(-1).numpy() for x in tensors]
        for k, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
            if k:
                torch.bmm(
                    state[start : start + size].view(DIRECTIONS, -1, 2 * t),
                    weight,
                    out=acts[start : start + size].view(DIRECTIONS, -1, four_t),
                )
            kernels.forward(*arrays, plan, starts, k, batch, t)
        if keep:
            ctx.plan, ctx.starts = plan, starts
            # Not as attributes of ctx: saved this way they are freed by the backward, even while
            # the caller still holds the loss.
            ctx.save_for_backward(weight, acts, c, tanh_c, state)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        weight, acts, c, tanh_c, state = ctx.saved_tensors
        plan, starts = ctx.plan, ctx.starts
        rows, columns, batch, _, t = grad_hidden.shape
        four_t = 4 * t
        kernels = _kernels(grad_hidden.dtype)
        grad_hidden = grad_hidden.contiguous()
        new = grad_hidden.new_empty
        sizes = DIRECTIONS * batch * plan[:, 1]
        room = int(sizes.max())
        d_acts, d_state = new(room, four_t), new(room, 2 * t)
        carry = new(2 * room, t)  # the gradient of c that goes to the diagonal before, in turn
        grad_gates = new(rows, columns, batch, DIRECTIONS, four_t)
        grad_offset = grad_hidden.new_zeros(batch, DIRECTIONS, four_t)
        grad_weight = torch.zeros_like(weight)
        weight_t = weight.transpose(1, 2).contiguous()
        kept = (grad_hidden, acts, c, tanh_c, d_state, carry)
        arrays = [
            x.detach().view(-1).numpy() for x in (*kept, d_acts, grad_gates, grad_offset, new(2, t))
        ]
        for k in range(len(plan) - 1, -1, -1):
            kernels.backward(*arrays, plan, starts, k, batch, t)
            if k:
                start, size = int(starts[k]), int(sizes[k])
                d = d_acts[:size].view(DIRECTIONS, -1, four_t)
                before = state[start : start + size].view(DIRECTIONS, -1, 2 * t)
                grad_weight.baddbmm_(before.transpose(1, 2), d)
                torch.bmm(d, weight_t, out=d_state[:size].view(DIRECTIONS, -1, 2 * t))
        return grad_gates, grad_weight, grad_offset, None


def _rational_tanh(x: np.float32) -> np.float32:
    """tanh in float32 to a few units in the last place (the rational minimax approximation that
    Eigen uses): nothing but arithmetic, so that the compiler can vectorise the loop around it."""
    x = _LIMIT if x > _LIMIT else x  # this way round a NaN stays a NaN
    x = -_LIMIT if x < -_LIMIT else x
    s = x * x
    p = _P6 * s + _P5
    p = p * s + _P4
    p = p * s + _P3
    p = p * s + _P2
    p = p * s + _P1
    p = p * s + _P0
    q = _Q3 * s + _Q2
    q = q * s + _Q1
    q = q * s + _Q0
    return x * p / q


_LIMIT = np.float32(7.90531110763549805)
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (
    np.float32(v)
    for v in (
        4.89352455891786e-03,
        6.37261928875436e-04,
        1.48572235717979e-05,
        5.12229709037114e-08,
        -8.60467152213735e-11,
        2.00018790482477e-13,
        -2.76076847742355e-16,
    )
)
_Q0, _Q1, _Q2, _Q3 = (
    np.float32(v)
    for v in (
        4.89352518554385e-03,
        2.26843463243900e-03,
        1.18534705686654e-04,
        1.19825839466702e-06,
    )
)


@cache
def _kernels(dtype: torch.dtype) -> SimpleNamespace:
    """The compiled part of a step, forward and backward, for float32 or float64."""
    single = dtype == torch.float32
    jit = numba.njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")
    tanh: Callable = jit(_rational_tanh) if single else math.tanh
    half, one, zero = (np.float32(v) if single else v for v in (0.5, 1.0, 0.0))

    # The arrays are flat and every index unsigned: only then do the inner loops, over the t
    # channels of one vector, vectorise without an overhead larger than themselves. (A signed
    # index could be negative, and a view of a row costs a reference count.)
    u = np.uint64

    @jit
    def activate(acts, a, gates, x, offset, y, recurrent, t):
        """acts[a:] = act(recurrent product, there already, + gates[x:] + offset[y:])."""
        sigmoids, every = u(3) * t, u(4) * t
        if recurrent:
            for k in range(every):
                acts[a + k] += gates[x + k] + offset[y + k]
        else:
            for k in range(every):
                acts[a + k] = gates[x + k] + offset[y + k]
        for k in range(sigmoids):  # sigm(x) = (1 + tanh(x / 2)) / 2
            acts[a + k] = half + half * tanh(half * acts[a + k])
        for k in range(t):
            acts[a + sigmoids + k] = tanh(acts[a + sigmoids + k])

    @jit
    def cell_state(acts, a, c, left, own, tanh_c, has_left, t):
        f, i, g = a + t, a + u(2) * t, a + u(3) * t
        if has_left:
            for k in range(t):
                c[own + k] = acts[f + k] * c[left + k] + acts[i + k] * acts[g + k]
        else:
            for k in range(t):
                c[own + k] = acts[i + k] * acts[g + k]
        for k in range(t):
            tanh_c[own + k] = tanh(c[own + k])

    @jit
    def copy(source, at, target, to, t):
        for k in range(t):
            target[to + k] = source[at + k]

    @jit
    def add(source, at, target, to, t):
        for k in range(t):
            target[to + k] += source[at + k]

    @jit
    def neighbours(plan, starts, d, s, r, batch):
        """Of cell r of diagonal d in direction s: its position in the map, its first row (that of
        batch entry 0) in the diagonal-by-diagonal arrays, that of its left neighbour; then, in
        the next diagonal alone, of the cell it is left of, and of the cell it is above. -1: none.
        """
        row = plan[d, 0] + r
        position = plan[d, 2 + 2 * s] + r * plan[d, 3 + 2 * s]
        own = starts[d] + (s * plan[d, 1] + r) * batch
        left = right = below = -1
        if d > 0:
            r_left = row - plan[d - 1, 0]
            if r_left < plan[d - 1, 1]:
                left = starts[d - 1] + (s * plan[d - 1, 1] + r_left) * batch
        if d + 1 < len(plan):
            r_right, length = row - plan[d + 1, 0], plan[d + 1, 1]
            if r_right >= 0:
                right = (s * length + r_right) * batch
            if r_right + 1 < length:
                below = (s * length + r_right + 1) * batch
        return position, own, left, right, below

    @jit
    def forward(
        gates, offset, acts, c, tanh_c, state, hidden, plan, starts, d, batch, channels
    ):  # fmt: skip
        """acts holds the recurrent product; writes acts, c, tanh_c, hidden and the next state."""
        t = u(channels)
        after = starts[d + 1] if d + 1 < len(plan) else 0
        for s in range(DIRECTIONS):
            for r in range(plan[d, 1]):
                position, own, left, right, below = neighbours(plan, starts, d, s, r, batch)
                for b in range(batch):
                    place, a = u((position * batch + b) * DIRECTIONS + s) * t, u(own + b) * t
                    y = u(b * DIRECTIONS + s) * t
                    activate(acts, u(4) * a, gates, u(4) * place, offset, u(4) * y, d > 0, t)
                    c_left = u(left + b) * t if left >= 0 else a
                    cell_state(acts, u(4) * a, c, c_left, a, tanh_c, left >= 0, t)
                    for k in range(t):
                        hidden[place + k] = acts[u(4) * a + k] * tanh_c[a + k]
                    if right >= 0:
                        copy(hidden, place, state, u(2) * u(after + right + b) * t, t)
                    if below >= 0:
                        copy(hidden, place, state, u(2) * u(after + below + b) * t + t, t)
            if d + 1 < len(plan):  # the cells on the map's border lack a neighbour
                cells = plan[d + 1, 1]
                first, last = after + s * cells * batch, after + (s * cells + cells - 1) * batch
                for b in range(batch):
                    if plan[d + 1, 0] == 0:
                        at = u(2) * u(first + b) * t + t
                        for k in range(t):
                            state[at + k] = zero
                    if plan[d + 1, 0] + cells > plan[d, 0] + plan[d, 1]:
                        at = u(2) * u(last + b) * t
                        for k in range(t):
                            state[at + k] = zero

    @jit
    def gate_gradients(
        dh, dc, acts, a, c, left, tanh_c, own, d_acts, to, carry, carry_to, has_left, t
    ):  # fmt: skip
        """From dh and what came to dc from the next diagonal: d_acts and this diagonal's carry."""
        f, i, g = a + t, a + u(2) * t, a + u(3) * t
        to_f, to_i, to_g = to + t, to + u(2) * t, to + u(3) * t
        for k in range(t):
            o, squashed = acts[a + k], tanh_c[own + k]
            d_acts[to + k] = dh[k] * squashed * o * (one - o)
            dc[k] += dh[k] * o * (one - squashed * squashed)
        if has_left:
            for k in range(t):
                d_acts[to_f + k] = dc[k] * c[left + k] * acts[f + k] * (one - acts[f + k])
        else:
            for k in range(t):
                d_acts[to_f + k] = zero
        for k in range(t):
            d_acts[to_i + k] = dc[k] * acts[g + k] * acts[i + k] * (one - acts[i + k])
            d_acts[to_g + k] = dc[k] * acts[i + k] * (one - acts[g + k] * acts[g + k])
        for k in range(t):
            carry[carry_to + k] = dc[k] * acts[f + k]

    @jit
    def backward(
        grad_hidden, acts, c, tanh_c, d_state, carry, d_acts, grad_gates, grad_offset, scratch,
        plan, starts, d, batch, channels,
    ):  # fmt: skip
        """d_state and carry come from the next diagonal; writes d_acts, the gradients, carry."""
        t, none = u(channels), u(0)
        half_carry = carry.size // (2 * channels)
        carry_in, carry_out = ((d + 1) % 2) * half_carry, (d % 2) * half_carry
        dh, dc = scratch[:channels], scratch[channels:]
        for s in range(DIRECTIONS):
            for r in range(plan[d, 1]):
                position, own, left, right, below = neighbours(plan, starts, d, s, r, batch)
                local = own - starts[d]
                for b in range(batch):
                    place, a = u((position * batch + b) * DIRECTIONS + s) * t, u(own + b) * t
                    copy(grad_hidden, place, dh, none, t)
                    if right >= 0:
                        add(d_state, u(2) * u(right + b) * t, dh, none, t)
                        copy(carry, u(carry_in + right + b) * t, dc, none, t)
                    else:
                        for k in range(t):
                            dc[k] = zero
                    if below >= 0:
                        add(d_state, u(2) * u(below + b) * t + t, dh, none, t)
                    to, carry_to = u(4) * u(local + b) * t, u(carry_out + local + b) * t
                    c_left = u(left + b) * t if left >= 0 else a
                    gate_gradients(
                        dh, dc, acts, u(4) * a, c, c_left, tanh_c, a, d_acts, to, carry, carry_to,
                        left >= 0, t,
                    )  # fmt: skip
                    copy(d_acts, to, grad_gates, u(4) * place, u(4) * t)
                    y = u(4) * u(b * DIRECTIONS + s) * t
                    add(d_acts, to, grad_offset, y, u(4) * t)

    return SimpleNamespace(forward=forward, backward=backward)
