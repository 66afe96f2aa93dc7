"""What an attention module, or a whole model, of one's own has to be: the contract of the board.

Nothing has to be inherited or imported. A class that fits is plugged in by

    mnistattn evaluate --model my_attention.py:MyAttention --data data/mbg
    mnistattn evaluate --model my_package.my_module:MyAttention --data data/mbg
    an entry point of an installed package, group "mnistattn.attention", name = "module:Class"
    @mnistattn.register("my-attention"), then mnistattn.evaluate("my-attention", data=...)

`mnistattn new-attention my_attention.py` writes one to start from, `mnistattn check --model ...`
tries what is said here, point by point.
"""

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Attention(Protocol):
    """An nn.Module, one of which stands after each pooling (or where `placement` says).

    Construction: `MyAttention(channels, query_dim, *, last, OPTIONS)`. channels, query_dim: 32 and
    32, of the features and of the encoded query. last: whether this one's map is the network's
    last (6 x 6 of a 100-pixel image). OPTIONS: keyword arguments with defaults, as many as you
    like; `--set NAME=VALUE` sets them. Raise ValueError, with a sentence, for impossible values.

    Class attributes, all optional:
        placement   where it stands: "every" pooling (default), the "first" or the "last" only, or
                    the sizes of the maps, as (25, 6). Images of 100 pixels have maps of 50, 25, 12
                    and 6, those of 224 pixels 112, 56, 28, 14 and 7.
        paper       where it comes from, as "Woo et al., ECCV 2018"
        summary     one line (default: the first of the docstring)
        cuda_graph  True: on a GPU the training step may be captured in a CUDA graph, which is
                    several times as fast. Python is then run once and not at every step: so only
                    for a forward that neither counts nor decides anything in Python, and reads no
                    number from the GPU. Every module inside must say so, torch's excepted.

    A map multiplies the features, channel by channel, and is what mask correctness is taken of.
    Its positions are those of the image: it is upsampled to it as a whole. It is a distribution
    (not negative, sum 1 over positions: a softmax) or a gate (each value in 0 .. 1: a sigmoid).
    The built-in ones give gates in inner layers, and where `last` a softmax. Other maps that are
    finite and not negative work too.

    A sample: draw it where `self.training` is true, with torch's own random numbers (the trainer
    seeds them); in eval return the mean or the mode, so that a score can be repeated. To offer
    several samples an image set `has_samples = True` and take `samples=K`: maps (B, K, H, W).

    A loss of one's own (sparsity, entropy, ...): return (map, loss), loss a scalar tensor; the
    losses of all layers are added to the cross entropy as they are. One that depends on how the
    answer turned out (a policy gradient): in training, loss may be a function that the trainer
    calls once, with the cross entropy of each image (B,), detached, for the scalar tensor;
    `mnistattn.models.attention.policy` has one.

    Features of one's own, where a map times x is not what the attention does (a channel gate, a
    warp, a residual): return (map, {"features": f}), f (B, C, H, W), which takes the place of
    map * x; where `last`, f may have any height and width. "loss" may be there too. The map is
    then for the metrics alone: it must say honestly where f comes from.
    """

    def forward(self, x: Tensor, query: Tensor) -> Tensor | tuple[Tensor, Tensor | Callable | dict]:
        """x (B, C, H, W) float, query (B, Q) float -> map (B, 1, H, W), same device, of x's dtype
        or float32; or (map, loss); or (map, {"features": (B, C, H, W), "loss": loss}).

        H and W are 1 or more and need not be equal. On a GPU or a processor with bf16 it runs
        under autocast. Samples of a batch must not see each other (statistics of a BatchNorm
        while training excepted).
        """


@runtime_checkable
class WholeModel(Protocol):
    """A whole network of one's own, an nn.Module with the class attribute `placement = "whole"`.

    Construction: `MyModel(size, queries, answers, *, OPTIONS)`: pixels of a side (100, 224 or the
    data set's), how many queries (10, or 5 in mbg-inv) and answers (5, or 10) there are.
    """

    placement: ClassVar[str]

    def forward(self, images: Tensor, query: Tensor) -> tuple[Tensor, dict]:
        """images (B, 3, S, S) float in 0 .. 1, query (B,) int64 -> (logits (B, answers), out).

        out["attention"]: a list of maps (B, 1, h, w), h and w at most S, finite and not negative,
        which are upsampled and multiplied for mask correctness; empty for none. out["loss"], if
        it is there: a scalar tensor that is added to the cross entropy, or a function, as above.
        """
