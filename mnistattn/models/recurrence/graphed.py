"""The `graphed` backend: the reference in captured CUDA graphs, where the fused kernels do not fit.

The reference launches some ten small kernels a diagonal, and a GPU waits for the launches. A graph
launches them at once. A captured graph works in memory of its own, which its next replay
overwrites; so nothing of a replay is kept: what comes in is copied to the graph's inputs, what
comes out is copied away, and the backward computes the states again before it computes gradients.

On a CPU, inside another capture and under torch.compile it is the reference itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnistattn.models.recurrence import reference

MOST_GRAPHS = 16  # kept at once, two a map size: each holds the memory of its computation
WARM_UPS = 3  # libraries choose algorithms and take workspaces, which no capture may do


class Graph:
    """A function of tensors of fixed shapes, captured. Called, it gives new tensors."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self.inputs = [v.detach().clone() for v in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return [v.clone() for v in self.outputs]


_graphs: OrderedDict[tuple, Graph] = OrderedDict()


def _replay(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """function(*inputs) by the graph for tensors of their shapes, captured at the first call."""
    key = (function, *((v.shape, v.dtype, v.device) for v in inputs))
    with torch.cuda.device_of(inputs[0]):
        if key not in _graphs:
            _graphs[key] = Graph(function, inputs)
            if len(_graphs) > MOST_GRAPHS:
                _graphs.popitem(last=False)
        _graphs.move_to_end(key)
        return _graphs[key](*inputs)


def _values(*inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [reference.diagonal_lstm(*inputs)]


def _gradients(grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in inputs]
        return list(torch.autograd.grad(reference.diagonal_lstm(*leaves), leaves, grad))


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _replay(_values, inputs)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _replay(_gradients, (grad, *ctx.saved_tensors))
        return tuple(g if needed else None
                     for g, needed in zip(found, ctx.needs_input_grad, strict=True))  # fmt: skip


def diagonal_lstm(
    x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor
) -> Tensor:
    """See `mnistattn.models.recurrence.diagonal_lstm`."""
    inputs = (x, input_weight, recurrent_weight, offset)
    plain = torch.compiler.is_compiling() or not x.is_cuda or not len(x)
    if plain or torch.cuda.is_current_stream_capturing():
        return reference.diagonal_lstm(*inputs)
    return _Graphed.apply(*inputs)
