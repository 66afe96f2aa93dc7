"""The diagonal LSTM of AttentionRNN (Khandelwal & Sigal, ICCV 2019, eqs. 4-6) as one operator.

Cell (i, j) of the left-to-right LSTM, for a map x:

    [o, f, i, g] = [sigm, sigm, sigm, tanh](W_x x_ij + W_prev h_{i,j-1} + W_up h_{i-1,j} + offset)
    c_ij = f . c_{i,j-1} + i . g
    h_ij = o . tanh(c_ij)

Outside the map h and c are zero. The right-to-left LSTM is the same on the column-mirrored map.

backend      where                         what it is
reference    any device and dtype          plain torch: the definition; can be derived twice
cpu          CPU; float32 and float64      compiled, hand-written backward (cpu_kernels.py, cpu.py);
                                           not with NUMBA_DISABLE_JIT=1
cuda         GPU from 8.0 (A100) on;       one fused Triton kernel a pass, hand-written backward
             float32 and bfloat16          (cuda_kernels.py, cuda.py)
graphed      GPU; any dtype                the reference in CUDA graphs (graphed.py): where cuda
                                           does not fit

A backend is a function of the same four tensors; BACKENDS is the place to add one. Weights do not
depend on it, so a saved model runs on any.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from mnistattn.errors import InputError, MnistattnWarning


def _cpu(*tensors: Tensor) -> Tensor:
    from mnistattn.models.recurrence import cpu  # compiled code: imported when it is needed

    return cpu.diagonal_lstm(*tensors)


def _reference(*tensors: Tensor) -> Tensor:
    from mnistattn.models.recurrence import reference

    return reference.diagonal_lstm(*tensors)


def _cuda(*tensors: Tensor) -> Tensor:
    from mnistattn.models.recurrence import cuda

    return cuda.diagonal_lstm(*tensors)


def _graphed(*tensors: Tensor) -> Tensor:
    from mnistattn.models.recurrence import graphed

    return graphed.diagonal_lstm(*tensors)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": _reference, "cpu": _cpu, "cuda": _cuda, "graphed": _graphed,
}  # fmt: skip


def diagonal_lstm(
    x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Run the left-to-right and the right-to-left LSTM over a map.

    Args:
        x: (B, C, m, n), any strides (channels-last is the fast one).
        input_weight: (2, C, 4t), W_x of the left-to-right ([0]) and the right-to-left LSTM ([1]).
            Gate order o, f, i, g.
        recurrent_weight: (2, 2t, 4t): rows [0, t) multiply the h of the previous cell in the row
            (the left neighbour; the right one for the right-to-left LSTM), rows [t, 2t) the h of
            the cell above.
        offset: (B, 2, 4t) or (2, 4t), added at every cell: the bias, and whatever else is the same
            all over a map. None: zero.
        backend: a name of BACKENDS; None: the fastest for the device and dtype.

    Returns:
        hidden (B, 2t, m, n), channels-last: first the t channels of the left-to-right LSTM, which
        see rows <= i and columns <= j, then those of the other, which see columns >= j.

    float64 is computed in float64, all else in float32 (also under autocast: in a recurrence this
    long, the errors of half precision would add up) and float16 and bfloat16 maps are answered in
    their own dtype. But on the cuda backend a bfloat16 map, as autocast makes it, is multiplied in
    bfloat16; sums, gates and c are float32 (measured error in the tests: 0.4 %).

    On a CPU, NaN or infinity in the inputs raises FloatingPointError, which names where; a GPU is
    not waited for, and NaN goes on into the loss, where training finds it. ValueError for wrong
    shapes; InputError for an unknown backend, or one that cannot compute this.
    """
    offset = _check(x, input_weight, recurrent_weight, offset)
    kind = x.device.type
    sizes = (x.shape[2], x.shape[1], recurrent_weight.shape[-1] // 4)  # rows, C, t
    if backend is None:
        backend = _fastest(x, sizes)
    if backend not in BACKENDS:
        raise InputError(f"unknown backend '{backend}': it is one of {', '.join(BACKENDS)}.")
    if backend == "cpu" and kind != "cpu":
        raise InputError(f"backend 'cpu' cannot compute on {kind}: use 'reference'.")
    if backend == "cuda" and (reason := _obstacle(x, sizes)):
        raise InputError(f"backend 'cuda' cannot compute this: {reason}; use 'reference'.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    narrow = torch.bfloat16 if backend == "cuda" and x.dtype == torch.bfloat16 else dtype
    known = torch.amp.is_autocast_available(kind)  # not on the meta device
    with torch.autocast(kind, enabled=False) if known else nullcontext():
        tensors = (v.to(dtype) for v in (input_weight, recurrent_weight, offset))
        return BACKENDS[backend](x.to(narrow), *tensors).to(x.dtype)


def _fastest(x: Tensor, sizes: tuple[int, int, int]) -> str:
    """The backend for a map. One line tells where a GPU does not get the fused kernels."""
    if x.device.type == "cpu":
        return "cpu" if _compiler() else "reference"
    if x.device.type != "cuda":
        return "reference"
    reason = _obstacle(x, sizes)
    if reason and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        warnings.warn(f"the fused recurrence is not used, but the slower one in CUDA graphs: "
                      f"{reason}.", MnistattnWarning, stacklevel=3)  # fmt: skip
    return "graphed" if reason else "cuda"


def _obstacle(x: Tensor, sizes: tuple[int, int, int]) -> str:
    from mnistattn.models.recurrence import cuda

    return cuda.obstacle(x.device, x.dtype, *sizes)


def _compiler() -> bool:
    """Whether numba compiles: not with NUMBA_DISABLE_JIT=1."""
    import numba

    return not getattr(numba.config, "DISABLE_JIT", False)


def _check(
    x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor | None
) -> Tensor:
    """offset as (B, 2, 4t), or ValueError."""
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (B, C, m, n), none of C, m, n zero, got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    t = recurrent_weight.shape[-1] // 4
    expected = {
        "recurrent_weight": (recurrent_weight, (2, 2 * t, 4 * t)),
        "input_weight": (input_weight, (2, channels, 4 * t)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or not t:
            raise ValueError(f"{name} must be {shape}, t > 0, got {tuple(tensor.shape)}")
    if offset is None:
        return x.new_zeros(batch, 2, 4 * t)
    if offset.shape not in ((2, 4 * t), (batch, 2, 4 * t)):
        raise ValueError(f"offset must be {(batch, 2, 4 * t)}, got {tuple(offset.shape)}")
    return offset.expand(batch, 2, 4 * t)
