"""The CPU's gated scan: compiled passes, forward and backward, as a custom operator of torch.

A task is one direction of a few images, whose cells it visits in raster order (or from the end),
for either axis: the state before a cell then lies in memory already, a cell or a row away. A cell's
t channels are worked on eight at a time in the compiler's own vector type: its loops would first
ask, for each cell, whether arrays overlap. Nothing but the inputs and the states is kept for the
backward, which computes the gates again.

Tasks depend on the size of the map alone, never on the number of threads, and so neither do the
results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from torch import Tensor

from mnistattn.models.recurrence import cpu, cpu_kernels

TASK_CELLS = 10_000  # cells a task: four maps of 50 x 50, all of a batch of small ones

_jit = njit(nogil=True, cache=True, error_model="numpy")
u = np.uint64


@torch.library.custom_op("mnistattn::gated_scan", mutates_args=(), device_types="cpu")
def forward(gates: Tensor, offset: Tensor, axis: int) -> Tensor:
    """gates (B, m, n, 4t), offset (B, 4t), float32; axis 1 or 2 -> states
    (B, m, n, 2t)."""
    gates, offset = gates.contiguous(), offset.contiguous()
    states = gates.new_empty(*gates.shape[:3], gates.shape[3] // 2)
    z, shift, out = (v.view(-1).numpy() for v in (gates, offset, states))
    sizes = _sizes(gates, axis)
    cpu._run(
        lambda s, first, images, _: _kernels.forward(z, shift, out, first, images, *sizes, s),
        len(gates), _tile(gates),
    )  # fmt: skip
    return states


@forward.register_fake
def _(gates, offset, axis):
    return gates.new_empty(*gates.shape[:3], gates.shape[3] // 2)


@torch.library.custom_op("mnistattn::gated_scan_backward", mutates_args=(), device_types="cpu")
def backward(
    grad: Tensor, gates: Tensor, offset: Tensor, states: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    """The gradients of gates and offset."""
    tensors = [v.contiguous() for v in (grad, gates, offset, states)]
    grad_gates, grad_offset = torch.empty_like(tensors[1]), torch.zeros_like(tensors[2])
    arrays = [v.view(-1).numpy() for v in (*tensors, grad_gates, grad_offset)]
    sizes = _sizes(gates, axis)
    cpu._run(
        lambda s, first, images, _: _kernels.backward(*arrays, first, images, *sizes, s),
        len(gates), _tile(gates),
    )  # fmt: skip
    return grad_gates, grad_offset


@backward.register_fake
def _(grad, gates, offset, states, axis):
    return gates.new_empty(gates.shape), offset.new_empty(offset.shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gates, offset, ctx.axis = inputs
    ctx.save_for_backward(gates, offset, output)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*backward(grad, *ctx.saved_tensors, ctx.axis), None)


forward.register_autograd(_gradient, setup_context=_setup)


def gated_scan(gates: Tensor, offset: Tensor, axis: int) -> Tensor:
    """See `mnistattn.models.recurrence.linear_scan.gated_scan`."""
    return forward(gates, offset, axis)


def _sizes(gates: Tensor, axis: int) -> tuple[int, int, int, bool]:
    _, rows, columns, channels = gates.shape
    return rows, columns, channels // 4, axis == 1


def _tile(gates: Tensor) -> int:
    return max(1, TASK_CELLS // (gates.shape[1] * gates.shape[2]))


# ---------------------------------------------------------------------------------- a cell


class _Vectors:
    """Arithmetic on vectors of float32 in LLVM's builder; a * b + c may become one instruction."""

    def __init__(self, context, builder, signature, arguments, lanes):
        self.context, self.builder, self.types = context, builder, signature.args
        self.arguments, self.lanes = arguments, lanes
        self.type = ir.VectorType(ir.FloatType(), lanes)

    def _address(self, array, index):
        data = make_array(self.types[array])(self.context, self.builder, self.arguments[array]).data
        at = self.builder.gep(data, [self.arguments[index]])
        return self.builder.bitcast(at, self.type.as_pointer())

    def load(self, array, index):
        """The vector that starts at argument `index` of the array that is argument `array`."""
        return self.builder.load(self._address(array, index), align=4)

    def load_if(self, condition, array, index):
        """The same, or zeros. `index` must be inside the array either way."""
        return self.builder.select(
            self.arguments[condition], self.load(array, index), self.number(0)
        )

    def store(self, value, array, index):
        self.builder.store(value, self._address(array, index), align=4)

    def number(self, value):
        return ir.Constant(self.type, [float(value)] * self.lanes)

    def plus(self, a, b):
        return self.builder.fadd(a, b, flags=["contract"])

    def minus(self, a, b):
        return self.builder.fsub(a, b, flags=["contract"])

    def times(self, a, b):
        return self.builder.fmul(a, b, flags=["contract"])

    def sigmoid(self, z):
        """(1 + tanh(z / 2)) / 2, with the tanh of cpu_kernels; a NaN stays one."""
        half, limit = self.number(0.5), cpu_kernels._LIMIT
        x = self.times(half, z)
        for sign, end in ((">", self.number(limit)), ("<", self.number(-limit))):
            x = self.builder.select(self.builder.fcmp_ordered(sign, x, end), end, x)
        square = self.times(x, x)
        p, q = (
            self._polynomial(square, [getattr(cpu_kernels, f"_{letter}{k}") for k in range(count)])
            for letter, count in (("P", 7), ("Q", 4))
        )
        return self.plus(half, self.times(half, self.builder.fdiv(self.times(x, p), q)))

    def _polynomial(self, x, coefficients):
        value = self.number(coefficients[-1])
        for c in coefficients[-2::-1]:
            value = self.plus(self.times(value, x), self.number(c))
        return value


def _forward_cell(lanes: int):
    """An intrinsic: `lanes` channels of states[to:], of the gates z[f:] and z[v:], their offsets
    and the state before, states[before:] if it is inside the map."""

    @intrinsic
    def cell(typing, z, f, v, offset, f_offset, v_offset, states, before, inside, to):
        def generate(context, builder, signature, arguments):
            m = _Vectors(context, builder, signature, arguments, lanes)
            keep = m.sigmoid(m.plus(m.load(0, 1), m.load(3, 4)))
            new = m.plus(m.load(0, 2), m.load(3, 5))
            write = m.minus(m.number(1), keep)
            kept = m.times(keep, m.load_if(8, 6, 7))
            m.store(m.plus(kept, m.times(write, new)), 6, 9)
            return context.get_dummy_value()

        arguments = (z, f, v, offset, f_offset, v_offset, states, before, inside, to)
        return types.void(*arguments), generate

    return cell


def _backward_cell(lanes: int):
    """An intrinsic: the gradients dz[f:] and dz[v:] of `lanes` channels, added to d_offset too, of
    grad[g:] and what the next cell left in carry[c:], where this one leaves its own."""

    @intrinsic
    def cell(typing, z, f, v, offset, f_offset, v_offset, states, before, inside, grad, g, carry, c,
             dz, d_offset):  # fmt: skip
        def generate(context, builder, signature, arguments):
            m = _Vectors(context, builder, signature, arguments, lanes)
            keep = m.sigmoid(m.plus(m.load(0, 1), m.load(3, 4)))
            new = m.plus(m.load(0, 2), m.load(3, 5))
            here = m.plus(m.load(9, 10), m.load(11, 12))
            m.store(m.times(here, keep), 11, 12)
            dv = m.times(here, m.minus(m.number(1), keep))
            df = m.times(m.times(m.minus(m.load_if(8, 6, 7), new), dv), keep)
            for d, at, offset_at in ((df, 1, 4), (dv, 2, 5)):
                m.store(d, 13, at)
                m.store(m.plus(m.load(14, offset_at), d), 14, offset_at)
            return context.get_dummy_value()

        arguments = (z, f, v, offset, f_offset, v_offset, states, before, inside, grad, g, carry, c,
                     dz, d_offset)  # fmt: skip
        return types.void(*arguments), generate

    return cell


LANES = 8
_forward_eight, _forward_one = _forward_cell(LANES), _forward_cell(1)
_backward_eight, _backward_one = _backward_cell(LANES), _backward_cell(1)


# ---------------------------------------------------------------------------------- the passes


@_jit
def _forward(z, offset, states, first, images, rows_, columns_, t_, down, s_):
    """Direction s of images first .. first + images: z (B, m, n, 4t), offset (B, 4t) and states
    (B, m, n, 2t), flat. down: along the columns."""
    t, s, rows, columns = u(t_), u(s_), u(rows_), u(columns_)
    whole, wide, step = t - t % u(LANES), u(2) * t, columns if down else u(1)
    for b in range(u(first), u(first + images)):
        f0 = (u(b) * u(2) + s) * wide  # of the offsets
        v0 = f0 + t
        for i_ in range(rows):
            i = rows - u(1) - u(i_) if s else u(i_)
            for j_ in range(columns):
                j = columns - u(1) - u(j_) if s else u(j_)
                cell = (u(b) * rows + i) * columns + j
                f, at = (cell * u(2) + s) * wide, (cell * u(2) + s) * t
                v, back = f + t, at
                inside = (i_ if down else j_) > 0
                if inside:
                    back = at + step * wide if s else at - step * wide
                for k in range(u(0), whole, u(LANES)):
                    _forward_eight(z, f + k, v + k, offset, f0 + k, v0 + k, states, back + k,
                                   inside, at + k)  # fmt: skip
                for k in range(whole, t):
                    _forward_one(z, f + k, v + k, offset, f0 + k, v0 + k, states, back + k, inside,
                                 at + k)  # fmt: skip


@_jit
def _backward(
    grad, z, offset, states, dz, d_offset, first, images, rows_, columns_, t_, down, s_
):  # fmt: skip
    """The reverse: dz, and d_offset, which is zero before."""
    t, s, rows, columns = u(t_), u(s_), u(rows_), u(columns_)
    carry = np.empty(max(rows_, columns_) * t_, np.float32)  # t of each line
    whole, wide, step = t - t % u(LANES), u(2) * t, columns if down else u(1)
    steps = rows if down else columns
    for b in range(u(first), u(first + images)):
        f0 = (u(b) * u(2) + s) * wide
        v0 = f0 + t
        carry[:] = 0
        for i_ in range(rows):
            i = u(i_) if s else rows - u(1) - u(i_)
            for j_ in range(columns):
                j = u(j_) if s else columns - u(1) - u(j_)
                cell = (u(b) * rows + i) * columns + j
                f, at = (cell * u(2) + s) * wide, (cell * u(2) + s) * t
                v, back, c = f + t, at, (j if down else i) * t
                inside = u(i_ if down else j_) + u(1) < steps
                if inside:
                    back = at + step * wide if s else at - step * wide
                for k in range(u(0), whole, u(LANES)):
                    _backward_eight(z, f + k, v + k, offset, f0 + k, v0 + k, states, back + k,
                                    inside, grad, at + k, carry, c + k, dz, d_offset)  # fmt: skip
                for k in range(whole, t):
                    _backward_one(z, f + k, v + k, offset, f0 + k, v0 + k, states, back + k,
                                  inside, grad, at + k, carry, c + k, dz, d_offset)  # fmt: skip


class _kernels:
    """To mypy, compiled functions take no arguments."""

    forward: Any = _forward
    backward: Any = _backward
