"""The diagonal LSTM in Triton: one kernel forward, one backward, each with the whole loop inside.

A program runs one direction of IMAGES images. Its tile has R rows for each (the map's, rounded up
to a power of two), and step d works at the cells (i, d - i): a column of the paper's skewed map,
which is never made. On the chip stay the weights and the states h and c of the last diagonal. The
cell above (i - 1, j) was computed one step before, a row higher in the tile: h is shifted by a row
through shared memory (`gather`). The inputs of step d + 1 are asked for before step d is computed,
so that their way from memory is hidden.

Forward keeps c and nothing else for the backward, which computes the gates again from x and h: they
are four times as wide as h, and a step waits for the one before it, not for arithmetic. Backward
writes the gradient of the gates' arguments; the weights' gradients are products over all cells
after the loop (cuda.py).

Sizes: C and T are channels and t rounded up to powers of two, at least 16; what is added is zero.
Memory is (B, m, n, ...) with channels last. Products are of the inputs' type, float32 by three
passes of tf32 (its error is that of float32) or bfloat16, and are summed up in float32; the gates
and c are always float32.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    if FAST:  # one instruction with 2^-11 of error, which bfloat16 does not show
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # Of |x|, so that exp stays below 1, and exact to rounding near 0: no 1 - (1 - small).
        e = tl.exp(-2 * tl.abs(x))
        small = x * (1 + x * x * (-1 / 3 + x * x * (2 / 15 - x * x * (17 / 315))))
        large = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)
        return tl.where(tl.abs(x) < 0.1, small, large)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    if FAST:
        return 0.5 * _tanh(0.5 * x, FAST) + 0.5
    else:
        return 1 / (1 + tl.exp(-x))


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """acc + a @ b. WIDEN: Triton's interpreter multiplies the bit patterns of bfloat16."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc)
    else:
        return tl.dot(a, b, acc=acc, input_precision="tf32x3")


@triton.jit
def _matrix(at, rows, t, ROWS: tl.constexpr, T: tl.constexpr):
    """The columns of one gate, (rows, t) at a pointer, with zeros up to (ROWS, T)."""
    k, u = tl.arange(0, ROWS)[:, None], tl.arange(0, T)[None, :]
    return tl.load(at + k * 4 * t + u, mask=(k < rows) & (u < t), other=0.0)


@triton.jit
def _all_gates(at, rows, t, ROWS: tl.constexpr, T: tl.constexpr):
    """The matrices of o, f, i and g."""
    return (
        _matrix(at, rows, t, ROWS, T), _matrix(at + t, rows, t, ROWS, T),
        _matrix(at + 2 * t, rows, t, ROWS, T), _matrix(at + 3 * t, rows, t, ROWS, T),
    )  # fmt: skip


@triton.jit
def _argument(
    gate: tl.constexpr, x, before, above, held, at, tile, sizes, C: tl.constexpr, T: tl.constexpr,
    HOLD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What a gate's activation is taken of, (rows of the tile, T) float32: the products of its
    weights with x, with h of the cell before in the row, and with h of the cell above."""
    image, inside = tile
    channels, t = sizes
    x_at, before_at, above_at, offset_at = at
    z = _vectors(offset_at + gate * t, image, inside, t, 8 * t, T)
    if HOLD:
        of_x, of_before, of_above = held[0][gate], held[1][gate], held[2][gate]
    else:
        of_x = _matrix(x_at + gate * t, channels, t, C, T)
        of_before = _matrix(before_at + gate * t, t, t, T, T)
        of_above = _matrix(above_at + gate * t, t, t, T, T)
    z = _dot(before, of_before, _dot(x, of_x, z, WIDEN), WIDEN)
    return _dot(above, of_above, z, WIDEN)


@triton.jit
def _back(
    grad_o, grad_f, grad_i, grad_g, acc, held, at, t, T: tl.constexpr, HOLD: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """acc plus the gradient of h, of the gradients of the gates' arguments."""
    if HOLD:
        o, f, i, g = held
    else:
        o, f, i, g = _all_gates(at, t, t, T, T)
    acc = _dot(grad_f, tl.trans(f), _dot(grad_o, tl.trans(o), acc, WIDEN), WIDEN)
    return _dot(grad_g, tl.trans(g), _dot(grad_i, tl.trans(i), acc, WIDEN), WIDEN)


@triton.jit
def _vectors(at, cell, valid, width, stride, WIDTH: tl.constexpr):
    """One vector a row of the tile: (rows of the tile, WIDTH), zero where `valid` is not."""
    k = tl.arange(0, WIDTH)[None, :]
    return tl.load(at + cell[:, None] * stride + k, mask=valid[:, None] & (k < width), other=0.0)


@triton.jit
def _store(at, cell, valid, values, width, stride, WIDTH: tl.constexpr):
    k = tl.arange(0, WIDTH)[None, :]
    values = values.to(at.dtype.element_ty)
    tl.store(at + cell[:, None] * stride + k, values, mask=valid[:, None] & (k < width))


@triton.jit
def _cells(d, i, inside, origin, direction, columns):
    """At step d: the place of each row's cell in memory, and whether there is one."""
    j = d - i
    valid = inside & (j >= 0) & (j < columns)
    return origin + tl.where(direction == 0, j, columns - 1 - j), valid


@triton.jit
def _tile(batch, rows, columns, R: tl.constexpr, IMAGES: tl.constexpr):
    """The program's first image, and of each row of its tile: its place, image, row of the map,
    whether there is one, and the place of the map's column 0."""
    # All places count from the first image of the program, so that 32 bits are enough for them.
    first = tl.program_id(0).to(tl.int64) * IMAGES
    place = tl.arange(0, R * IMAGES)
    image, i = place // R, place % R
    inside = (first + image < batch) & (i < rows)
    return first, place, image, i, inside, (image * rows + i) * columns


@triton.jit
def _weights(
    input_weight_at, recurrent_weight_at, offset_at, direction, first, channels, t,
    C: tl.constexpr, T: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Pointers to a direction's weights for x, for the cell before and for the cell above, and to
    the offset; and, if HOLD, the weights themselves, gate by gate."""
    before_at = recurrent_weight_at + direction * 8 * t * t
    at = (input_weight_at + direction * channels * 4 * t, before_at, before_at + 4 * t * t,
          offset_at + (2 * first + direction) * 4 * t)  # fmt: skip
    held = (0, 0, 0)
    if HOLD:
        held = (_all_gates(at[0], channels, t, C, T), _all_gates(at[1], t, t, T, T),
                _all_gates(at[2], t, t, T, T))  # fmt: skip
    return at, held


@triton.jit
def forward(
    x_at, input_weight_at, recurrent_weight_at, offset_at, hidden_at, c_at,
    batch, rows, columns, channels, t,
    R: tl.constexpr, IMAGES: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    HOLD: tl.constexpr, KEEP: tl.constexpr, FAST: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x (B, m, n, C), weights (2, C, 4t) and (2, 2t, 4t), offset (B, 2, 4t) float32 -> hidden
    (B, m, n, 2t) and, if KEEP, c likewise, float32. Grid: (batch / IMAGES, 2)."""
    direction = tl.program_id(1)
    first, place, image, i, inside, origin = _tile(batch, rows, columns, R, IMAGES)
    first_cell = first * rows * columns
    higher = tl.broadcast_to(tl.maximum(place - 1, 0)[:, None], (R * IMAGES, T))
    below = (i > 0)[:, None]

    at, held = _weights(input_weight_at, recurrent_weight_at, offset_at, direction, first,
                        channels, t, C, T, HOLD)  # fmt: skip
    tile, sizes = (image, inside), (channels, t)
    x_at += first_cell * channels
    hidden_at += (2 * first_cell + direction) * t
    c_at += (2 * first_cell + direction) * t

    h = tl.zeros((R * IMAGES, T), tl.float32)
    c = tl.zeros((R * IMAGES, T), tl.float32)
    cell, valid = _cells(0, i, inside, origin, direction, columns)
    x_next = _vectors(x_at, cell, valid, channels, channels, C)
    for d in range(rows + columns - 1):
        x = x_next
        cell_next, valid_next = _cells(d + 1, i, inside, origin, direction, columns)
        x_next = _vectors(x_at, cell_next, valid_next, channels, channels, C)
        before = h.to(x.dtype)
        above = tl.where(below, tl.gather(h, higher, 0), 0.0).to(x.dtype)
        z_o = _argument(0, x, before, above, held, at, tile, sizes, C, T, HOLD, WIDEN)
        z_f = _argument(1, x, before, above, held, at, tile, sizes, C, T, HOLD, WIDEN)
        z_i = _argument(2, x, before, above, held, at, tile, sizes, C, T, HOLD, WIDEN)
        z_g = _argument(3, x, before, above, held, at, tile, sizes, C, T, HOLD, WIDEN)
        c = _sigmoid(z_f, FAST) * c + _sigmoid(z_i, FAST) * _tanh(z_g, FAST)
        h = _sigmoid(z_o, FAST) * _tanh(c, FAST)
        # Outside the map both are zero, whatever the bias makes of nothing.
        c, h = tl.where(valid[:, None], c, 0.0), tl.where(valid[:, None], h, 0.0)
        _store(hidden_at, cell, valid, h, t, 2 * t, T)
        if KEEP:
            _store(c_at, cell, valid, c, t, 2 * t, T)
        cell, valid = cell_next, valid_next


@triton.jit
def backward(
    grad_hidden_at, x_at, input_weight_at, recurrent_weight_at, offset_at, hidden_at, c_at,
    grad_gates_at, batch, rows, columns, channels, t,
    R: tl.constexpr, IMAGES: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    HOLD: tl.constexpr, AHEAD: tl.constexpr, FAST: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As forward, and grad_hidden (B, m, n, 2t) -> grad_gates (B, m, n, 2, 4t): the gradient of
    what the gates' activations are taken of. The diagonals are run through from the last one."""
    direction = tl.program_id(1)
    first, place, image, i, inside, origin = _tile(batch, rows, columns, R, IMAGES)
    first_cell = first * rows * columns
    lower = tl.broadcast_to(tl.minimum(place + 1, R * IMAGES - 1)[:, None], (R * IMAGES, T))
    over = (i < rows - 1)[:, None]
    # The cell above that of step d lies a row of the map before it.
    has_above = inside & (i > 0)

    at, held = _weights(input_weight_at, recurrent_weight_at, offset_at, direction, first,
                        channels, t, C, T, HOLD)  # fmt: skip
    tile, sizes = (image, inside), (channels, t)
    x_at += first_cell * channels
    hidden_at += (2 * first_cell + direction) * t
    c_at += (2 * first_cell + direction) * t
    grad_hidden_at += (2 * first_cell + direction) * t
    out = grad_gates_at + (2 * first_cell + direction) * 4 * t

    grad_h = tl.zeros((R * IMAGES, T), tl.float32)  # from the cells after and below
    grad_c = tl.zeros((R * IMAGES, T), tl.float32)
    last = rows + columns - 2
    cell, valid = _cells(last, i, inside, origin, direction, columns)
    earlier, earlier_valid = _cells(last - 1, i, inside, origin, direction, columns)
    c = _vectors(c_at, cell, valid, t, 2 * t, T)
    x_next = _vectors(x_at, cell, valid, channels, channels, C)
    grad_next = _vectors(grad_hidden_at, cell, valid, t, 2 * t, T)
    before_next = _vectors(hidden_at, earlier, earlier_valid, t, 2 * t, T)
    above_next = _vectors(hidden_at, cell - columns, valid & has_above, t, 2 * t, T)
    c_next = _vectors(c_at, earlier, earlier_valid, t, 2 * t, T)
    for back in range(rows + columns - 1):
        d = last - back
        cell_next, valid_next = earlier, earlier_valid
        earlier, earlier_valid = _cells(d - 2, i, inside, origin, direction, columns)
        if AHEAD:
            x, before, above, c_before, grad = x_next, before_next, above_next, c_next, grad_next
            x_next = _vectors(x_at, cell_next, valid_next, channels, channels, C)
            grad_next = _vectors(grad_hidden_at, cell_next, valid_next, t, 2 * t, T)
            before_next = _vectors(hidden_at, earlier, earlier_valid, t, 2 * t, T)
            above_next = _vectors(
                hidden_at, cell_next - columns, valid_next & has_above, t, 2 * t, T
            )
            c_next = _vectors(c_at, earlier, earlier_valid, t, 2 * t, T)
        else:
            x = _vectors(x_at, cell, valid, channels, channels, C)
            grad = _vectors(grad_hidden_at, cell, valid, t, 2 * t, T)
            before = _vectors(hidden_at, cell_next, valid_next, t, 2 * t, T)
            above = _vectors(hidden_at, cell - columns, valid & has_above, t, 2 * t, T)
            c_before = _vectors(c_at, cell_next, valid_next, t, 2 * t, T)

        z_o = _argument(0, x, before, above, held, at, tile, sizes, C, T, HOLD, WIDEN)
        z_f = _argument(1, x, before, above, held, at, tile, sizes, C, T, HOLD, WIDEN)
        z_i = _argument(2, x, before, above, held, at, tile, sizes, C, T, HOLD, WIDEN)
        z_g = _argument(3, x, before, above, held, at, tile, sizes, C, T, HOLD, WIDEN)
        o, f = _sigmoid(z_o, FAST), _sigmoid(z_f, FAST)
        g_in, g = _sigmoid(z_i, FAST), _tanh(z_g, FAST)

        grad = grad.to(tl.float32) + grad_h
        squashed = _tanh(c, FAST)
        grad_o = grad * squashed * o * (1 - o)
        grad_c += grad * o * (1 - squashed * squashed)
        grad_f = grad_c * c_before * f * (1 - f)
        grad_i = grad_c * g * g_in * (1 - g_in)
        grad_g = grad_c * g_in * (1 - g * g)
        # Where there is no cell, nothing flows: neither to memory nor on to its neighbours.
        there = valid[:, None]
        grad_c = tl.where(there, grad_c * f, 0.0)
        grad_o = tl.where(there, grad_o, 0.0).to(x.dtype)
        grad_f = tl.where(there, grad_f, 0.0).to(x.dtype)
        grad_i = tl.where(there, grad_i, 0.0).to(x.dtype)
        grad_g = tl.where(there, grad_g, 0.0).to(x.dtype)
        _store(out, cell, valid, grad_o, t, 8 * t, T)
        _store(out + t, cell, valid, grad_f, t, 8 * t, T)
        _store(out + 2 * t, cell, valid, grad_i, t, 8 * t, T)
        _store(out + 3 * t, cell, valid, grad_g, t, 8 * t, T)

        to_above = _back(grad_o, grad_f, grad_i, grad_g, tl.zeros_like(grad_h), held[2], at[2], t,
                         T, HOLD, WIDEN)  # fmt: skip
        # A row's share from below comes from the row under it, one step later in the map.
        grad_h = tl.where(over, tl.gather(to_above, lower, 0), 0.0)
        grad_h = _back(grad_o, grad_f, grad_i, grad_g, grad_h, held[1], at[1], t, T,
                       HOLD, WIDEN)  # fmt: skip
        cell, valid, c = cell_next, valid_next, c_before
