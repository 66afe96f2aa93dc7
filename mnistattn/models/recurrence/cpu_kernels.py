"""The CPU's diagonal LSTM: compiled passes over a tile of a few images, forward and backward.

A tile of images is one direction's LSTM on up to TILE images; tiles share nothing, so they run on
any number of threads with the same result. Within a tile the cells go in raster order, and a cell
is one small matrix product, whose operands stay in the processor's caches:

    forward     z = offset + [x_ij; h_prev; h_up] W        (images, C + 2t) x (C + 2t, 4t)
    backward    dW += [x_ij; h_prev; h_up]^T dz            (C + 2t, images) x (images, 4t)
                [dx_ij; dh_prev; dh_up] = dz W^T           (images, 4t) x (4t, C + 2t)

with the gates between them on what has just been computed. Kept for the backward are the four
gates and c alone (x and h are there anyway). Arrays are flat and every index unsigned: only then
do the inner loops vectorise without an overhead larger than themselves.

The matrix product is written in the compiler's own vector instructions (`_tile`), as a BLAS would
spend more time on packing and checking than on sums this small.
"""

import math

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array

TILE = 8  # images a tile
TOGETHER = 8  # cells whose share of the weight gradient is taken at once
ROWS, PANEL = 4, 2  # of the register block: rows, and vectors in a row

_jit = njit(nogil=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
_WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
VECTOR_BYTES = 64 if _WIDE else 32
u = np.uint64
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)


def panel_width(dtype) -> int:
    """Columns of a register block: a matrix's columns are padded with zeros to its multiples."""
    return PANEL * VECTOR_BYTES // np.dtype(dtype).itemsize


# ---------------------------------------------------------------------------- matrix product


def _tile(rows: int):
    """An intrinsic: c[c0 + i c_row + j] += sum_k a[a0 + i a_row + k a_k] b[b0 + k b_k + j] for
    `rows` rows i and one panel of columns j, the sums in registers."""

    @intrinsic
    def tile(typing, c, c0, c_row, a, a0, a_row, a_k, b, b0, b_k, count):
        def generate(context, builder, signature, arguments):
            data = {
                place: make_array(signature.args[place])(context, builder, arguments[place]).data
                for place in (0, 3, 7)
            }
            scalar = context.get_data_type(c.dtype)
            lanes = VECTOR_BYTES * 8 // c.dtype.bitwidth
            vector = ir.VectorType(scalar, lanes)
            lane0 = ir.Constant(ir.IntType(32), 0)
            spread = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            width = ir.IntType(64)

            def address(place, index):
                return builder.gep(data[place], [index])

            def vector_at(place, index):
                return builder.bitcast(address(place, index), vector.as_pointer())

            def load(place, index):
                return builder.load(vector_at(place, index), align=c.dtype.bitwidth // 8)

            def row_start(start, stride, i):
                return builder.add(start, builder.mul(stride, ir.Constant(width, i)))

            _, c0_, c_row_, _, a0_, a_row_, a_k_, _, b0_, b_k_, count_ = arguments
            blocks = [(i, j) for i in range(rows) for j in range(PANEL)]
            where = {
                (i, j): builder.add(row_start(c0_, c_row_, i), ir.Constant(width, j * lanes))
                for i, j in blocks
            }
            sums = {}
            for block in blocks:
                sums[block] = cgutils.alloca_once(builder, vector)
                builder.store(load(0, where[block]), sums[block])
            with cgutils.for_range(builder, count_, intp=width) as loop:
                at_b = builder.add(b0_, builder.mul(b_k_, loop.index))
                at_a = builder.add(a0_, builder.mul(a_k_, loop.index))
                columns = [
                    load(7, builder.add(at_b, ir.Constant(width, j * lanes))) for j in range(PANEL)
                ]
                for i in range(rows):
                    one = builder.load(address(3, row_start(at_a, a_row_, i)))
                    one = builder.insert_element(ir.Constant(vector, ir.Undefined), one, lane0)
                    one = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), spread)
                    for j in range(PANEL):
                        product = builder.fmul(one, columns[j], flags=["contract"])
                        total = builder.fadd(builder.load(sums[i, j]), product, flags=["contract"])
                        builder.store(total, sums[i, j])
            for block in blocks:
                builder.store(
                    builder.load(sums[block]), vector_at(0, where[block]),
                    align=c.dtype.bitwidth // 8,
                )  # fmt: skip
            return context.get_dummy_value()

        return types.void(c, c0, c_row, a, a0, a_row, a_k, b, b0, b_k, count), generate

    return tile


_tile_rows, _tile_row = _tile(ROWS), _tile(1)


@_jit
def product(c, c0, c_row, a, a0, a_row, a_k, b, b_k, b_panel, panel, rows, columns, count):
    """c (rows, columns) += a (rows, count) b (count, columns), for any strides of a.

    b lies in panels: column j of row k at (j // panel) * b_panel + k * b_k + j % panel. columns is
    a multiple of panel.
    """
    whole = rows - rows % u(ROWS)
    for p in range(columns // panel):
        for i in range(u(0), whole, u(ROWS)):
            _tile_rows(c, c0 + i * c_row + u(p) * panel, c_row, a, a0 + i * a_row, a_row, a_k,
                       b, u(p) * b_panel, b_k, count)  # fmt: skip
        for i in range(whole, rows):
            _tile_row(c, c0 + i * c_row + u(p) * panel, c_row, a, a0 + i * a_row, a_row, a_k,
                      b, u(p) * b_panel, b_k, count)  # fmt: skip


# --------------------------------------------------------------------------------- the gates


def tanh(x):
    """tanh of a float32 to a few units in the last place (the rational minimax approximation that
    Eigen uses): nothing but arithmetic, so that loops around it vectorise. A NaN stays one.
    Of a float64: the library's."""
    return math.tanh(x)


@overload(
    tanh, jit_options={"fastmath": {"contract", "nsz"}, "error_model": "numpy"}, inline="always"
)
def _tanh(x):
    if x == types.float32:
        return _rational_tanh
    return lambda x: math.tanh(x)


def _rational_tanh(x):
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


@_jit
def _squash(z, z0, n):
    for k in range(n):
        z[z0 + k] = tanh(z[z0 + k])


@_jit
def _cell(z, z0, c_before, left, c, own, hidden, h0, t):
    """z holds tanh of the gates (half their argument for the sigmoids): c and h of one image."""
    f, i, g = z0 + t, z0 + u(2) * t, z0 + u(3) * t
    for k in range(t):
        forget, write = _HALF + _HALF * z[f + k], _HALF + _HALF * z[i + k]
        now = forget * c_before[left + k] + write * z[g + k]
        c[own + k] = now
        hidden[h0 + k] = (_HALF + _HALF * z[z0 + k]) * tanh(now)


@_jit
def _cell_gradient(z, z0, c_before, left, c, own, dh, h0, dc, at, dz, d0, t):
    """dh[h0:] and dc[at:] (from the next cell) to dz[d0:]; dc[at:] becomes the next one's."""
    f, i, g = z0 + t, z0 + u(2) * t, z0 + u(3) * t
    to_f, to_i, to_g = d0 + t, d0 + u(2) * t, d0 + u(3) * t
    for k in range(t):
        o, forget = _HALF + _HALF * z[z0 + k], _HALF + _HALF * z[f + k]
        write, new = _HALF + _HALF * z[i + k], z[g + k]
        squashed = tanh(c[own + k])
        gradient = dc[at + k] + dh[h0 + k] * o * (_ONE - squashed * squashed)
        dz[d0 + k] = dh[h0 + k] * squashed * o * (_ONE - o)
        dz[to_f + k] = gradient * c_before[left + k] * forget * (_ONE - forget)
        dz[to_i + k] = gradient * new * write * (_ONE - write)
        dz[to_g + k] = gradient * write * (_ONE - new * new)
        dc[at + k] = gradient * forget


@_jit
def _copy(source, at, target, to, n):
    for k in range(n):
        target[to + k] = source[at + k]


@_jit
def _add(source, at, target, to, n):
    for k in range(n):
        target[to + k] += source[at + k]


@_jit
def _fill(target, to, n):
    for k in range(n):
        target[to + k] = _ZERO


@_jit
def _row_from(maps, at, step, target, to, to_step, to_image, images, cells, columns, n):
    """target[to + j * to_step + b * to_image:] = the n values of cell j of image b, for a row of
    every image: maps[at + (b * cells + j) * step:]. An image's row at a time, as that streams."""
    for b in range(images):
        for j in range(columns):
            source = at + (u(b) * cells + u(j)) * step
            _copy(maps, source, target, to + u(j) * to_step + u(b) * to_image, n)


@_jit
def _row_to(source, at, at_step, at_image, maps, to, step, images, cells, columns, n):
    """The reverse of _row_from."""
    for b in range(images):
        for j in range(columns):
            target = to + (u(b) * cells + u(j)) * step
            _copy(source, at + u(j) * at_step + u(b) * at_image, maps, target, n)


# ---------------------------------------------------------------------------------- the passes


@_jit
def forward(x, weight, offset, hidden, gates, c, keep, first, images, rows, columns, c_in, t_, s_):
    """Images first .. first + images of x (B, m, n, C) flat -> their share of hidden.

    weight: of direction s, packed: (C + 2t, 4t) in panels, the sigmoids' columns halved. offset
    (B, 2, 4t), halved alike. hidden (B, m, n, 2, t). gates and c: (2, cells, images, 4t, padded to
    whole panels, or t) of each tile after the other; if not keep, of two cells instead of all.
    """
    t, channels, s = u(t_), u(c_in), u(s_)
    four_t, o_row = u(4) * t, channels + u(2) * t
    panel = u(PANEL * VECTOR_BYTES // x.itemsize)
    width = (four_t + panel - u(1)) // panel * panel
    cells, size = u(rows * columns), u(images)
    kept = cells if keep else u(2)
    start = (u(offset.size // (8 * t_)) * s + u(first)) * kept  # of the tile, in images
    # A row's operands [x; h of the cell before; h of the cell above], cell by cell.
    operand = np.zeros(columns * images * int(o_row), x.dtype)
    o_step = size * o_row
    outside = np.zeros(t_, x.dtype)
    h0 = channels + t
    for i in range(rows):
        row = u(first) * cells + u(i * columns)
        _row_from(x, row * channels, channels, operand, u(0), o_step, o_row, images, cells,
                  columns, channels)  # fmt: skip
        for step in range(columns):
            j = u(columns - 1 - step if s else step)
            following = j - u(1) if s else j + u(1)
            if keep:
                place = u(i * columns) + j
                before = place + u(1) if s else place - u(1)
            else:  # the two places in turn
                place, before = u(step % 2), u(1 - step % 2)
            own, left = start + place * size, start + before * size
            for b in range(images):
                _copy(offset, (u(first + b) * u(2) + s) * four_t, gates, (own + u(b)) * width,
                      four_t)  # fmt: skip
                for k in range(four_t, width):
                    gates[(own + u(b)) * width + k] = _ZERO
            product(gates, own * width, width, operand, j * o_step, o_row, u(1), weight, panel,
                    panel * o_row, panel, size, width, o_row)  # fmt: skip
            _squash(gates, own * width, size * width)
            for b in range(images):
                at = j * o_step + u(b) * o_row + h0  # h goes where the row below looks for it
                z0, c0 = (own + u(b)) * width, (own + u(b)) * t
                if step:
                    _cell(gates, z0, c, (left + u(b)) * t, c, c0, operand, at, t)
                else:
                    _cell(gates, z0, outside, u(0), c, c0, operand, at, t)
                if step < columns - 1:
                    _copy(operand, at, operand, following * o_step + u(b) * o_row + channels, t)
        _row_to(operand, h0, o_step, o_row, hidden, (row * u(2) + s) * t, u(2) * t, images, cells,
                columns, t)  # fmt: skip


@_jit
def backward(
    grad_hidden, x, weight_t, hidden, gates, c, grad_x, grad_weight, grad_offset,
    first, images, rows, columns, c_in, t_, s_,
):  # fmt: skip
    """The gradients of one tile: grad_x (2, B, m, n, C) and grad_offset (B, 2, 4t) are its own
    part of them, grad_weight (C + 2t, padded 4t), zero before, the tile's alone. weight_t: packed
    W^T (4t, C + 2t)."""
    t, channels, s = u(t_), u(c_in), u(s_)
    four_t, o_row = u(4) * t, channels + u(2) * t
    panel = u(PANEL * VECTOR_BYTES // x.itemsize)
    width = (four_t + panel - u(1)) // panel * panel
    d_row = (o_row + panel - u(1)) // panel * panel
    cells, size = u(rows * columns), u(images)
    batch = u(grad_offset.size // (8 * t_))
    start = (batch * s + u(first)) * cells
    operand = np.zeros(columns * images * int(o_row), x.dtype)
    o_step, h_step, x_step = size * o_row, size * t, size * channels
    # The weight's gradient is taken for TOGETHER cells at once, to load and store it less often.
    dz = np.zeros(TOGETHER * images * int(width), x.dtype)
    d_operand = np.empty(images * int(d_row), x.dtype)
    dc = np.zeros(images * t_, x.dtype)
    dh = np.zeros(columns * images * t_, x.dtype)  # of a row: what comes to it from below
    from_above = np.zeros(columns * images * t_, x.dtype)  # and from grad_hidden
    from_next = np.zeros(images * t_, x.dtype)
    dx = np.empty(columns * images * c_in, x.dtype)
    outside = np.zeros(t_, x.dtype)
    for i in range(rows - 1, -1, -1):
        row = u(first) * cells + u(i * columns)
        h_row = (row * u(2) + s) * t
        _row_from(
            grad_hidden, h_row, u(2) * t, from_above, u(0), h_step, t, images, cells, columns, t
        )
        _add(from_above, u(0), dh, u(0), u(columns) * h_step)
        _row_from(x, row * channels, channels, operand, u(0), o_step, o_row, images, cells,
                  columns, channels)  # fmt: skip
        # h of the cells before: the row, one place on.
        shift = u(0) if s else o_step
        _row_from(hidden, h_row + (u(2) * t if s else u(0)), u(2) * t, operand, shift + channels,
                  o_step, o_row, images, cells, columns - 1, t)  # fmt: skip
        edge = u(columns - 1) * o_step if s else u(0)
        for b in range(images):
            _fill(operand, edge + u(b) * o_row + channels, t)
        if i:
            _row_from(hidden, h_row - u(columns) * u(2) * t, u(2) * t, operand, channels + t,
                      o_step, o_row, images, cells, columns, t)  # fmt: skip
        else:
            for k in range(columns * images):
                _fill(operand, u(k) * o_row + channels + t, t)
        _fill(dc, u(0), h_step)
        _fill(from_next, u(0), h_step)
        waiting, waiting_from = u(0), u(0)
        for back in range(columns - 1, -1, -1):
            j = u(columns - 1 - back if s else back)
            cell = u(i * columns) + j
            before = cell + u(1) if s else cell - u(1)
            own, left = start + cell * size, start + before * size
            # dz of a run of cells, in the order of their columns, as their operands lie.
            if waiting == u(0):
                run = min(u(TOGETHER), u(back + 1))
                waiting_from = j if s else j + u(1) - run
            d_first = (j - waiting_from) * size * width
            _add(from_next, u(0), dh, j * h_step, h_step)
            for b in range(images):
                at, z0, c0 = u(b) * t, (own + u(b)) * width, (own + u(b)) * t
                d0 = d_first + u(b) * width
                if back:
                    _cell_gradient(gates, z0, c, (left + u(b)) * t, c, c0, dh, j * h_step + at,
                                   dc, at, dz, d0, t)  # fmt: skip
                else:
                    _cell_gradient(gates, z0, outside, u(0), c, c0, dh, j * h_step + at, dc, at,
                                   dz, d0, t)  # fmt: skip
                _add(dz, d0, grad_offset, (u(first + b) * u(2) + s) * four_t, four_t)
            _fill(d_operand, u(0), size * d_row)
            product(d_operand, u(0), d_row, dz, d_first, width, u(1), weight_t, panel,
                    panel * four_t, panel, size, d_row, four_t)  # fmt: skip
            waiting += u(1)
            if waiting == run:
                product(grad_weight, u(0), width, operand, waiting_from * o_step, u(1), o_row, dz,
                        width, panel, panel, o_row, width, waiting * size)  # fmt: skip
                waiting = u(0)
            for b in range(images):
                at, d0 = u(b) * t, u(b) * d_row
                _copy(d_operand, d0, dx, j * x_step + u(b) * channels, channels)
                _copy(d_operand, d0 + channels, from_next, at, t)
                _copy(d_operand, d0 + channels + t, dh, j * h_step + at, t)  # for the row above
        _row_to(dx, u(0), x_step, channels, grad_x, (batch * s * cells + row) * channels, channels,
                images, cells, columns, channels)  # fmt: skip
