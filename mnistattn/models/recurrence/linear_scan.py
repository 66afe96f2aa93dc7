"""Gated linear recurrences along the rows or the columns of a map, both ways, as one operator.

With [f, v] = gates + offset of a cell, and h of the cell before it zero outside the map:

    h = sigm(f) . h_before + (1 - sigm(f)) . v

Linear in h, so that all cells of a line follow from few passes over it (Martin & Cundy,
"Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018), and the lines of a
map, its rows say, share nothing. h is a weighted mean of the v so far and 0, so it cannot grow.

backend      where                         what it is
loop         any device and dtype          plain torch, a step at a time: the definition
doubling     any device and dtype          plain torch; log2(steps) passes over the whole map, each
                                           of which joins runs of cells twice as long; no loop over
                                           cells, so few launches on a GPU
cpu          CPU; not float64              compiled, hand-written backward (linear_scan_cpu.py);
                                           not with NUMBA_DISABLE_JIT=1
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistattn.errors import InputError
from mnistattn.models.recurrence import _compiler

ROWS, COLUMNS = 2, 1  # the axis of (B, m, n, channels) along which cells follow each other


def gated_scan(gates: Tensor, offset: Tensor, axis: int, backend: str | None = None) -> Tensor:
    """Run both directions of one axis.

    Args:
        gates: (B, m, n, 4t), channels last as a linear layer gives them: f and v, t each, of the
            direction that goes right (or down), then f and v of the one that goes left (or up).
        offset: (B, 4t), added at every cell.
        axis: ROWS, 2, to go along the rows (right and left), COLUMNS, 1, for down and up.
        backend: a name of BACKENDS; None: the fastest for the device and dtype.

    Returns:
        h (B, m, n, 2t): the t channels of the direction that goes right (or down), which see the
        cells up to their own, then those of the other, which see the cells from their own on.

    float64 is computed in float64, all else in float32, also under autocast, and float16 and
    bfloat16 are answered in their own dtype. ValueError for wrong shapes; InputError for an unknown
    backend, or `cpu` where it cannot compute.
    """
    if gates.dim() != 4 or gates.shape[3] % 4 or 0 in gates.shape[1:]:
        raise ValueError(f"gates must be (B, m, n, 4t), none of m, n, t zero, got "
                         f"{tuple(gates.shape)}")  # fmt: skip
    wanted = (len(gates), gates.shape[3])
    if offset.shape != wanted:
        raise ValueError(f"offset must be {wanted}, got {tuple(offset.shape)}")
    if axis not in (ROWS, COLUMNS):
        raise ValueError(f"axis must be {COLUMNS} or {ROWS}, got {axis}")
    kind = gates.device.type
    if backend is None:
        compiled = kind == "cpu" and gates.dtype != torch.float64 and _compiler()
        backend = "cpu" if compiled else "loop" if kind == "cpu" else "doubling"
    if backend not in BACKENDS:
        raise InputError(f"unknown backend '{backend}': it is one of {', '.join(BACKENDS)}.")
    if backend == "cpu" and (kind != "cpu" or gates.dtype == torch.float64):
        raise InputError(f"backend 'cpu' cannot compute {gates.dtype} on {kind}: use 'loop'.")
    dtype = torch.float64 if gates.dtype == torch.float64 else torch.float32
    known = torch.amp.is_autocast_available(kind)  # not on the meta device
    with torch.autocast(kind, enabled=False) if known else nullcontext():
        h = BACKENDS[backend](gates.to(dtype), offset.to(dtype), axis)
    return h.to(gates.dtype)


def _loop(gates: Tensor, offset: Tensor, axis: int) -> Tensor:
    f, v = _both_forward(gates, offset, axis)
    states = [v.new_zeros(v[0].shape)]
    for keep, new in zip(f.sigmoid().unbind(), v.unbind(), strict=True):
        states.append(keep * states[-1] + (1 - keep) * new)
    return _back(torch.stack(states[1:]), axis)


def _doubling(gates: Tensor, offset: Tensor, axis: int) -> Tensor:
    f, v = _both_forward(gates, offset, axis)
    keep = f.sigmoid()
    h = (1 - keep) * v
    # After a pass, h is what the last 1, 2, 4, ... cells gave, and keep how much of what was before
    # them is left. Outside the map there is nothing: zero.
    run = 1
    while run < len(h):
        h = h + keep * _later(h, run)
        keep = keep * _later(keep, run)
        run *= 2
    return _back(h, axis)


def _later(x: Tensor, steps: int) -> Tensor:
    return F.pad(x[:-steps], (0, 0) * (x.dim() - 1) + (steps, 0))


def _both_forward(gates: Tensor, offset: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """f and v, (steps, B, lines, 2, t) each, of which the second direction's are mirrored."""
    z = (gates + offset[:, None, None]).unflatten(3, (2, 2, -1)).movedim(axis, 0)
    f, v = torch.stack((z[..., 0, :, :], z[..., 1, :, :].flip(0)), 3).unbind(4)
    return f, v


def _back(h: Tensor, axis: int) -> Tensor:
    """(steps, B, lines, 2, t), the second direction's mirrored -> (B, m, n, 2t)."""
    h = torch.cat((h[..., 0, :], h[..., 1, :].flip(0)), -1)
    return h.movedim(0, axis).contiguous()


def _cpu(gates: Tensor, offset: Tensor, axis: int) -> Tensor:
    from mnistattn.models.recurrence import linear_scan_cpu  # compiled: imported when needed

    return linear_scan_cpu.gated_scan(gates, offset, axis)


BACKENDS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "loop": _loop, "doubling": _doubling, "cpu": _cpu,
}  # fmt: skip
