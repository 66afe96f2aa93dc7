"""The network that every attention is compared in: a small CNN with attention after each pooling.

    image (B, 3, S, S) -> [3 x 3 conv, 32 channels -> 2 x 2 max pool -> BatchNorm -> ReLU -> times
    the attention map] four times (100 px: maps of 50, 25, 12, 6) or five (224 px: 112 .. 7)
    -> sum over positions -> BatchNorm -> with the query: linear 64 -> 32, ReLU, linear -> logits

The CNN is the AttentionRNN paper's (section 4.1). Ours, as no source says it: BatchNorm and where
it stands, the shared 32-dimensional query embedding, the head. The head sees the query in every
model, since `none` could not answer otherwise. Pooling comes before BatchNorm and ReLU: the same
function up to the batch statistics, and a quarter of the work.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.models.registry import choose_options, find

CHANNELS = 32
QUERY_DIM = 32


class Network(nn.Module):
    """forward(images (B, 3, S, S) float in 0 .. 1, query (B,) int64) -> (logits (B, answers), out).

    out["attention"] is the list of attention maps (B, 1, h, w), first layer first; empty for none.
    With `samples=K`, of an attention that is a distribution: logits (B, K, answers) and maps
    (B, K, h, w) of K passes, each with its own sample in every layer. ValueError for any other.
    """

    def __init__(
        self, attention: type | None, placement: str, size: int, queries: int, answers: int,
        dropout: float = 0.0, **options,
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
        for i in range(stages):
            last = i == stages - 1
            if attention and (placement == "every" or (placement == "last" and last)):
                self.attention[str(i)] = attention(CHANNELS, QUERY_DIM, last=last, **options)
        self.pooled_norm = nn.BatchNorm1d(CHANNELS)
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(CHANNELS + QUERY_DIM, 32),
            nn.ReLU(),
            nn.Linear(32, answers),
        )

    def forward(
        self, images: Tensor, query: Tensor, samples: int | None = None
    ) -> tuple[Tensor, dict]:
        """See the class."""
        q = self.embedding(query)
        x, maps = images, []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = self.stage(conv, norm, x)
            if str(i) in self.attention:
                if samples is None:
                    a = self.attention[str(i)](x, q)
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
        return logits, {"attention": maps}

    def stage(self, conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
        """A stack up to its attention: (B, C, H, W) -> (B, 32, H / 2, W / 2)."""
        return F.relu(norm(F.max_pool2d(conv(x), 2)), inplace=True)

    def _sample(self, i: int, x: Tensor, q: Tensor, images: int, samples: int):
        """Features, query and map, the K passes of an image one after the other, from the first
        attended layer on."""
        if not getattr(self.attention[str(i)], "has_samples", False):
            raise ValueError("this attention is no distribution: there is nothing to sample")
        a = self.attention[str(i)](x, q, samples=samples if len(x) == images else 1)
        if len(x) == images:
            x, q = x.repeat_interleave(samples, 0), q.repeat_interleave(samples, 0)
        return x, q, a.flatten(0, 1)[:, None]


def build(
    name: str, size: int, queries: int, answers: int, dropout: float = 0.0, **options
) -> Network:
    """The network of a model by name, for images of `size` pixels and so many classes.

    options go to the attention module. Raises InputError for an unknown name or option and for an
    impossible value; one that does not fit the maps (a block larger than them) in the forward pass.
    """
    row, chosen = find(name), choose_options(name, options)
    attention = row.load() if row.attention else None
    return Network(attention, row.placement, size, queries, answers, dropout, **chosen)
