"""The network that every attention is compared in: a small CNN with attention after each pooling.

    image (B, 3, S, S) -> [3 x 3 conv, 32 channels -> 2 x 2 max pool -> BatchNorm -> ReLU -> times
    the attention map] four times (100 px: maps of 50, 25, 12, 6) or five (224 px: 112 .. 7)
    -> sum over positions -> BatchNorm -> with the query: linear 64 -> 32, ReLU, linear -> logits

The CNN is the AttentionRNN paper's (section 4.1). Ours, as no source says it: BatchNorm and where
it stands, the shared 32-dimensional query embedding, the head. The head sees the query in every
model, since `none` could not answer otherwise. Pooling comes before BatchNorm and ReLU: the same
function up to the batch statistics, and a quarter of the work.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError, MnistattnError
from mnistattn.models.attention.policy import Loss, summed
from mnistattn.models.registry import Model, choose_options, find, load

CHANNELS = 32
QUERY_DIM = 32


class Network(nn.Module):
    """forward(images (B, 3, S, S) float in 0 .. 1, query (B,) int64) -> (logits (B, answers), out).

    out["attention"] is the list of attention maps (B, 1, h, w), first layer first; empty for none.
    out["loss"] is there if an attention has a loss of its own (see contract.py, and `own_loss`).
    With `samples=K`, of an attention that is a distribution: logits (B, K, answers) and maps
    (B, K, h, w) of K passes, each with its own sample in every layer. ValueError for any other.
    mask bool (B, S, S): the ground truth, which a network that `sees_mask` (the control `oracle`)
    needs, and no other is given. MnistattnError where an attention returns no map.
    """

    def __init__(
        self, attention: Callable[..., nn.Module] | None, placement: str | tuple[int, ...],
        size: int, queries: int, answers: int, dropout: float = 0.0, **options,
    ):  # fmt: skip
        super().__init__()
        stages = 4 if size < 200 else 5
        self.embedding = nn.Embedding(queries, QUERY_DIM)
        self.convs = nn.ModuleList(
            nn.Conv2d(CHANNELS if i else 3, CHANNELS, 3, padding=1, bias=False)
            for i in range(stages)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(stages))
        self.attention = nn.ModuleDict()
        for i in placed(placement, size) if attention else ():
            assert attention is not None
            self.attention[str(i)] = attention(CHANNELS, QUERY_DIM, last=i == stages - 1, **options)
        self.sees_mask = any(getattr(a, "sees_mask", False) for a in self.attention.values())
        self.pooled_norm = nn.BatchNorm1d(CHANNELS)
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(CHANNELS + QUERY_DIM, 32),
            nn.ReLU(),
            nn.Linear(32, answers),
        )

    def forward(
        self,
        images: Tensor,
        query: Tensor,
        samples: int | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict]:
        """See the class."""
        q = self.embedding(query)
        x = images
        maps: list[Tensor] = []
        losses: list[Loss] = []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = self.stage(conv, norm, x)
            if str(i) in self.attention:
                if samples is None:
                    x, a = self._attended(self.attention[str(i)], x, q, mask, losses)
                else:
                    x, q, a = self._sample(i, x, q, len(images), samples)
                    x = x * a
                maps.append(a if samples is None else a.view(-1, samples, *a.shape[2:]))
        pooled = self.pooled_norm(x.sum((2, 3)))
        logits = self.head(torch.cat([pooled, q], 1))
        if samples is not None:
            if not maps:
                raise ValueError("a network without attention has nothing to sample")
            logits = logits.view(-1, samples, logits.shape[1])
        out: dict = {"attention": maps}
        return logits, out | ({"loss": summed(losses)} if losses else {})

    def attend(
        self, images: Tensor, query: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """Logits and the maps to be scored: what forward gives, unless a subclass has others."""
        return self(images, query, mask=mask)

    def stage(self, conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
        """A stack up to its attention: (B, C, H, W) -> (B, 32, H / 2, W / 2)."""
        return F.relu(norm(F.max_pool2d(conv(x), 2)), inplace=True)

    def _attended(
        self, attention: nn.Module, x: Tensor, q: Tensor, mask, losses: list[Loss]
    ) -> tuple[Tensor, Tensor]:
        """What goes on from one layer, and its map, held against the contract; a loss of its own
        goes to `losses`."""
        if getattr(attention, "sees_mask", False):
            a = attention(x, q, mask)
            return x * a, a
        a, features, loss = unpack(attention(x, q))
        wanted = (len(x), 1, *x.shape[2:])
        name = type(attention).__name__
        if not isinstance(a, Tensor) or a.shape != wanted or not a.is_floating_point():
            raise MnistattnError(f"{name} gave {_kind(a)} for features {tuple(x.shape)}: a map "
                                 f"must be a float tensor {wanted}.")  # fmt: skip
        if loss is not None:
            losses.append(loss)
        if features is None:
            return x * a, a
        place = str(len(self.convs) - 1)
        last = place in self.attention and attention is self.attention[place]
        if (
            not isinstance(features, Tensor)
            or features.dim() != 4
            or features.shape[:2] != x.shape[:2]
            or not (last or features.shape == x.shape)
        ):
            size = "of any height and width" if last else f"as x, {tuple(x.shape)}"
            raise MnistattnError(f"{name} gave {_kind(features)} for features {tuple(x.shape)}: "
                                 f"its own must be a float tensor {size}, with {x.shape[1]} "
                                 f"channels of {len(x)} images.")  # fmt: skip
        return features, a

    def _sample(self, i: int, x: Tensor, q: Tensor, images: int, samples: int):
        """Features, query and map, the K passes of an image one after the other, from the first
        attended layer on."""
        if not getattr(self.attention[str(i)], "has_samples", False):
            raise ValueError("this attention is no distribution: there is nothing to sample")
        a = self.attention[str(i)](x, q, samples=samples if len(x) == images else 1)
        if len(x) == images:
            x, q = x.repeat_interleave(samples, 0), q.repeat_interleave(samples, 0)
        return x, q, a.flatten(0, 1)[:, None]


def unpack(output: object) -> tuple[object, object, Loss | None]:
    """What an attention returns, as its map, its features (None: map * x) and its loss (None)."""
    a, extra = output if isinstance(output, tuple) and len(output) == 2 else (output, {})
    if not isinstance(extra, dict):
        extra = {"loss": extra}
    unknown = set(extra) - {"features", "loss"}
    if unknown:
        raise MnistattnError(f"an attention may give features and loss beside its map, not "
                             f"{', '.join(sorted(map(str, unknown)))}.")  # fmt: skip
    return a, extra.get("features"), extra.get("loss")


def own_loss(out: dict, cross_entropy: Tensor) -> Tensor | float:
    """The loss of a network's own, a scalar (0 if it has none), given the cross entropy of each
    image (B,), of which it gets no gradient."""
    loss = out.get("loss", 0.0)
    return loss(cross_entropy.detach()) if callable(loss) else loss


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__


def is_ours(module: nn.Module) -> bool:
    """Whether a module's code is this package's or torch's own, not the user's."""
    return type(module).__module__.startswith(("mnistattn.", "torch."))


def placed(placement: str | tuple[int, ...], size: int) -> list[int]:
    """The stages, from 0, that have an attention. InputError for map sizes that there are not."""
    sizes = [size >> (i + 1) for i in range(4 if size < 200 else 5)]
    if isinstance(placement, str):
        every = range(len(sizes))
        words = {"every": every, "first": every[:1], "last": every[-1:], "nowhere": every[:0]}
        return list(words[placement])
    wrong = [s for s in placement if s not in sizes]
    if wrong:
        raise InputError(f"there is no map of {wrong[0]} pixels: images of {size} have maps of "
                         f"{', '.join(map(str, sizes))}.")  # fmt: skip
    return [sizes.index(s) for s in sorted(placement, reverse=True)]


def build(
    name: str | Model, size: int, queries: int, answers: int, dropout: float = 0.0, **options
) -> Network:
    """The network of a model by name (or row), for images of `size` pixels and so many classes.

    options go to the attention module. Raises InputError for an unknown name or option and for an
    impossible value; one that does not fit the maps (a block larger than them) in the forward pass.
    A whole network of the user's is returned as it is.
    """
    row = find(name)
    chosen = choose_options(row, options)
    attention = row.load() if row.attention else None
    try:
        if row.placement == "whole" and attention:
            return attention(size, queries, answers, **chosen)
        cls = load(row.explain) if row.explain else Network
        return cls(attention, row.placement, size, queries, answers, dropout, **chosen)
    except InputError:
        raise
    except Exception as error:
        if row.kind != "plugged":
            raise
        raise InputError(
            f"{row.name} cannot be built with {chosen}: {type(error).__name__}: {error}."
        ) from error
