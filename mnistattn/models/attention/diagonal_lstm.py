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
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

try:
    import numba
except ImportError:  # then the plain torch implementation serves the CPU too
    numba = None

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
    with torch.autocast(gates.device.type, enabled=False):
        # The recurrence is long: half precision in it would add up.
        if gates.dtype != torch.float64:
            gates, recurrent_weight, offset = (x.float() for x in (gates, recurrent_weight, offset))
        if numba is None or gates.device.type != "cpu":
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
    def forward(
        ctx: FunctionCtx, gates: Tensor, weight: Tensor, offset: Tensor, keep: bool
    ) -> Tensor:
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
        arrays = [_rows(x, t) for x in tensors]
        for k, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
            if k:
                torch.bmm(
                    state[start : start + size].view(DIRECTIONS, -1, 2 * t),
                    weight,
                    out=acts[start : start + size].view(DIRECTIONS, -1, four_t),
                )
            kernels.forward(*arrays, plan, starts, k, batch)
        if keep:
            ctx.plan, ctx.starts = plan, starts
            ctx.kept = (acts, c, tanh_c, state)  # internal buffers: neither inputs nor outputs
            ctx.save_for_backward(weight)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        acts, c, tanh_c, state = ctx.kept
        (weight,) = ctx.saved_tensors
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
        arrays = [_rows(x, t) for x in (*kept, d_acts, grad_gates, grad_offset, new(2, t))]
        for k in range(len(plan) - 1, -1, -1):
            kernels.backward(*arrays, plan, starts, k, batch)
            if k:
                start, size = int(starts[k]), int(sizes[k])
                d = d_acts[:size].view(DIRECTIONS, -1, four_t)
                before = state[start : start + size].view(DIRECTIONS, -1, 2 * t)
                grad_weight.baddbmm_(before.transpose(1, 2), d)
                torch.bmm(d, weight_t, out=d_state[:size].view(DIRECTIONS, -1, 2 * t))
        return grad_gates, grad_weight, grad_offset, None


def _rows(x: Tensor, t: int) -> np.ndarray:
    """(cells, t), or (cells, 4 or 2, t) where the last dimension holds several vectors of t."""
    x = x.detach()
    return (x.reshape(-1, t) if x.shape[-1] == t else x.reshape(-1, x.shape[-1] // t, t)).numpy()


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

    # Rows are taken as whole one-dimensional views: only then do the inner loops vectorise.

    @jit
    def activate(acts, gates, offset, recurrent):
        for q in range(4):
            a, x, y = acts[q], gates[q], offset[q]
            if recurrent:
                for k in range(a.size):
                    a[k] += x[k] + y[k]
            else:
                for k in range(a.size):
                    a[k] = x[k] + y[k]
            if q < 3:  # sigm(x) = (1 + tanh(x / 2)) / 2
                for k in range(a.size):
                    a[k] = half + half * tanh(half * a[k])
            else:
                for k in range(a.size):
                    a[k] = tanh(a[k])

    @jit
    def cell_state(acts, c_left, c, tanh_c, has_left):
        f, i, g = acts[1], acts[2], acts[3]
        if has_left:
            for k in range(c.size):
                c[k] = f[k] * c_left[k] + i[k] * g[k]
        else:
            for k in range(c.size):
                c[k] = i[k] * g[k]
        for k in range(c.size):
            tanh_c[k] = tanh(c[k])

    @jit
    def copy(source, target):
        for k in range(target.size):
            target[k] = source[k]

    @jit
    def forward(gates, offset, acts, c, tanh_c, state, hidden, plan, starts, d, batch):
        """acts holds the recurrent product; writes acts, c, tanh_c, hidden and the next state."""
        first, length = plan[d, 0], plan[d, 1]
        before = d - 1 if d > 0 else 0
        after = d + 1 if d + 1 < len(plan) else d
        for s in range(DIRECTIONS):
            for r in range(length):
                row = first + r
                position = plan[d, 2 + 2 * s] + r * plan[d, 3 + 2 * s]
                left = row - plan[before, 0]
                has_left = d > 0 and left < plan[before, 1]
                own = starts[d] + (s * length + r) * batch
                left = starts[before] + (s * plan[before, 1] + left) * batch if has_left else own
                # The cells that this one is the left neighbour of, and that this one is above.
                right = row - plan[after, 0] if after > d else -1
                below = right + 1 if after > d and right + 1 < plan[after, 1] else -1
                to = starts[after] + s * plan[after, 1] * batch
                for b in range(batch):
                    place = (position * batch + b) * DIRECTIONS + s
                    activate(acts[own + b], gates[place], offset[b * DIRECTIONS + s], d > 0)
                    cell_state(acts[own + b], c[left + b], c[own + b], tanh_c[own + b], has_left)
                    h, o, squashed = hidden[place], acts[own + b, 0], tanh_c[own + b]
                    for k in range(h.size):
                        h[k] = o[k] * squashed[k]
                    if right >= 0:
                        copy(h, state[to + right * batch + b, 0])
                    if below >= 0:
                        copy(h, state[to + below * batch + b, 1])
            if after > d:  # the cells on the map's border have no one there
                to = starts[after] + s * plan[after, 1] * batch
                if plan[after, 0] == 0:
                    state[to : to + batch, 1] = zero
                if plan[after, 0] + plan[after, 1] > first + length:
                    to += (plan[after, 1] - 1) * batch
                    state[to : to + batch, 0] = zero

    @jit
    def gate_gradients(dh, dc, acts, c_left, tanh_c, d_acts, carry, has_left):
        """From dh and what came to dc from the next diagonal: d_acts and this diagonal's carry."""
        o, f, i, g = acts[0], acts[1], acts[2], acts[3]
        d_o, d_f, d_i, d_g = d_acts[0], d_acts[1], d_acts[2], d_acts[3]
        for k in range(dh.size):
            d_o[k] = dh[k] * tanh_c[k] * o[k] * (one - o[k])
            dc[k] += dh[k] * o[k] * (one - tanh_c[k] * tanh_c[k])
        if has_left:
            for k in range(dh.size):
                d_f[k] = dc[k] * c_left[k] * f[k] * (one - f[k])
        else:
            for k in range(dh.size):
                d_f[k] = zero
        for k in range(dh.size):
            d_i[k] = dc[k] * g[k] * i[k] * (one - i[k])
            d_g[k] = dc[k] * i[k] * (one - g[k] * g[k])
        for k in range(dh.size):
            carry[k] = dc[k] * f[k]

    @jit
    def add(source, target):
        for k in range(target.size):
            target[k] += source[k]

    @jit
    def backward(
        grad_hidden, acts, c, tanh_c, d_state, carry, d_acts, grad_gates, grad_offset, scratch,
        plan, starts, d, batch,
    ):  # fmt: skip
        """d_state and carry come from the next diagonal; writes d_acts, the gradients, carry."""
        first, length = plan[d, 0], plan[d, 1]
        before = d - 1 if d > 0 else 0
        after = d + 1 if d + 1 < len(plan) else d
        carries = carry.shape[0] // 2
        carry_in, carry_out = ((d + 1) % 2) * carries, (d % 2) * carries
        dh, dc = scratch[0], scratch[1]
        for s in range(DIRECTIONS):
            for r in range(length):
                row = first + r
                position = plan[d, 2 + 2 * s] + r * plan[d, 3 + 2 * s]
                left = row - plan[before, 0]
                has_left = d > 0 and left < plan[before, 1]
                local = (s * length + r) * batch
                own = starts[d] + local
                left = starts[before] + (s * plan[before, 1] + left) * batch if has_left else own
                right = row - plan[after, 0] if after > d else -1
                below = right + 1 if after > d and right + 1 < plan[after, 1] else -1
                at = s * plan[after, 1] * batch
                for b in range(batch):
                    place = (position * batch + b) * DIRECTIONS + s
                    copy(grad_hidden[place], dh)
                    if right >= 0:
                        add(d_state[at + right * batch + b, 0], dh)
                        copy(carry[carry_in + at + right * batch + b], dc)
                    else:
                        dc[:] = zero
                    if below >= 0:
                        add(d_state[at + below * batch + b, 1], dh)
                    gate_gradients(
                        dh, dc, acts[own + b], c[left + b], tanh_c[own + b],
                        d_acts[local + b], carry[carry_out + local + b], has_left,
                    )  # fmt: skip
                    for q in range(4):
                        copy(d_acts[local + b, q], grad_gates[place, q])
                        add(d_acts[local + b, q], grad_offset[b * DIRECTIONS + s, q])

    return SimpleNamespace(forward=forward, backward=backward)
