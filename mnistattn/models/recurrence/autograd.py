"""What the compiled backends have in common: how a forward and a backward operator become one
differentiable function of a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(forward: Any, backward: Any, inputs_kept: int) -> Callable[..., Tensor]:
    """Join two custom operators; the function that `mnistattn.models.recurrence` calls a backend.

    forward(x, input_weight, recurrent_weight, offset, keep): x (B, m, n, C) -> hidden (B, m, n, 2t)
    and what it keeps for the backward. backward(grad_hidden, the first `inputs_kept` inputs, all
    that forward gave) -> the gradients of the four tensors. It has no derivative of its own.
    """

    def setup(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:inputs_kept], *output)

    def gradient(ctx: Any, grad_hidden: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_hidden is None:
            return None, None, None, None, None
        return (*backward(grad_hidden, *ctx.saved_tensors), None)

    forward.register_autograd(gradient, setup_context=setup)

    def diagonal_lstm(
        x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor
    ) -> Tensor:
        inputs = (x.permute(0, 2, 3, 1), input_weight, recurrent_weight, offset)
        keep = torch.is_grad_enabled() and any(v.requires_grad for v in inputs)
        return forward(*inputs, keep)[0].permute(0, 3, 1, 2)

    return diagonal_lstm
