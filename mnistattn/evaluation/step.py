"""The training step, and how many of them are taken: one by one, from a captured graph on a GPU, or
by several processes that share each batch.

On a GPU a step of a small network is hundreds of small kernels, and launching them takes longer
than computing them. So there the whole step, from the gathering of the uint8 images to the update
of the weights, is captured once in a CUDA graph, which goes on by itself: it counts the batches,
takes each one's images, queries and learning rate from tables on the device, and adds up loss and
hits there. A step is one launch, and nothing is waited for.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import MnistattnWarning
from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.ranks import ALONE, Ranks, Together
from mnistattn.evaluation.recipes import Recipe
from mnistattn.models.network import is_ours, own_loss

WARM_UPS = 3  # steps before the capture: libraries choose algorithms and take workspaces


def precision(device: torch.device) -> torch.dtype:
    """The dtype of convolutions and matrix products under `autocast`: bfloat16 where the processor
    computes in it, else float32."""
    if device.type == "cuda":
        fits = torch.cuda.get_device_capability(device) >= (8, 0)  # before it is emulated
    else:
        fits = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # AVX2 alone emulates it, 10 x slower
    return torch.bfloat16 if fits else torch.float32


def autocast(device: torch.device):
    """Autocast to the device's `precision`."""
    narrow = precision(device)
    return nullcontext() if narrow == torch.float32 else torch.autocast(device.type, narrow)


def sees_mask(network: nn.Module) -> bool:
    """Whether the network must be given the ground truth: the control `oracle`."""
    return getattr(network, "sees_mask", False) is True


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of all parameters. On a GPU its learning rate is a tensor there, and
    it can be captured."""
    device = next(network.parameters()).device
    capturable = device.type == "cuda"
    rate = torch.tensor(recipe.lr, device=device) if capturable else recipe.lr
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), rate, capturable=capturable)
    # Weight decay is for matrices: biases, norms' gains and embeddings' rows keep their scale.
    decayed = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": rest, "weight_decay": 0.0}]  # fmt: skip
    # Not fused (1 % of a step of ctx faster): on a CPU it does not heed strides, and moments that a
    # checkpoint gives back lie otherwise than channels-last weights.
    return torch.optim.AdamW(groups, rate, capturable=capturable)


def training_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, images: Tensor,
    query: Tensor, answer: Tensor, mask: Tensor | None = None, weight: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward, loss, backward, clipping and update for images (B, 3, S, S) and the query and answer
    (B,) int64 of each, all on one device. mask (B, S, S): for a network that `sees_mask`, else
    None. weight: of this loss, among those of other processes. Returns the loss (), with the
    network's own if it has one, and the logits (B, answers)."""
    with autocast(images.device):
        logits, out = network(images, query, **({} if mask is None else {"mask": mask}))
    loss = F.cross_entropy(logits.float(), answer)
    if "loss" in out:
        each = F.cross_entropy(logits.detach().float(), answer, reduction="none")
        loss = loss + own_loss(out, each)
    optimizer.zero_grad(set_to_none=True)
    (loss * weight).backward()
    nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
    optimizer.step()
    return loss, logits


class Steps:
    """An epoch's steps, one after the other: `start`, then `run(0)`, `run(1)`, ...

    loss (), float32: the last step's. total (), float32: the sum of the losses of all images so
    far; hits (), int64: of the right answers. All on the feed's device, from which reading them
    waits for the steps before.
    """

    ranks = ALONE

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, feed: Feed
    ) -> None:
        self.network, self.optimizer, self.recipe, self.feed = network, optimizer, recipe, feed
        self.loss = torch.zeros((), device=feed.device)
        self.total = torch.zeros((), device=feed.device)
        self.hits = torch.zeros((), dtype=torch.int64, device=feed.device)
        self.asked = torch.zeros(3, 0, dtype=torch.int64, device=feed.device)
        self.rates: list[float] = []

    def start(self, asked: Tensor, rates: list[float]) -> None:
        """Begin an epoch. asked int64 (3, n): image, query and answer of each visit, in order.
        rates: the learning rate of each step."""
        self.asked, self.rates = asked.to(self.feed.device), rates
        self.total.zero_()
        self.hits.zero_()

    def run(self, i: int) -> None:
        """Step i: the visits [i * batch_size, (i + 1) * batch_size)."""
        size = self.recipe.batch_size
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.rates[i])
            else:
                group["lr"] = self.rates[i]
        self._take(self.asked[:, i * size : (i + 1) * size])

    def finish(self) -> None:
        """After the last step of an epoch: `total` and `hits` are those of all images."""

    def release(self) -> None:
        """After the last epoch: the network is again as it was given."""

    def _take(self, asked: Tensor) -> None:
        index, query, answer = asked
        images = self.feed.batch(index)
        mask = self.feed.masks(index, query) if sees_mask(self.network) else None
        loss, logits = training_step(
            self.network, self.optimizer, self.recipe, images, query, answer, mask
        )
        self.loss.copy_(loss.detach())
        self.total += self.loss * len(answer)
        self.hits += (logits.argmax(1) == answer).sum()


class CapturedSteps(Steps):
    """Steps on a GPU, full batches from one CUDA graph. The first ones, which warm up what the
    graph needs, and a last batch that is not full are taken one by one, as on a CPU."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, feed: Feed
    ) -> None:
        super().__init__(network, optimizer, recipe, feed)
        self.place = torch.zeros((), dtype=torch.int64, device=feed.device)  # of the next batch
        self.table = torch.zeros(0, device=feed.device)  # the rates
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = 0
        self.one_by_one = False
        self.side = torch.cuda.Stream(feed.device)

    def start(self, asked: Tensor, rates: list[float]) -> None:
        """See Steps. The graph reads its tables where they were when it was captured."""
        if self.graph is None or self.asked.shape != asked.shape:
            self.graph = None
            super().start(asked, rates)
            self.table = torch.tensor(rates, device=self.feed.device)
        else:
            self.asked.copy_(asked)
            super().start(self.asked, rates)
            self.table.copy_(torch.tensor(rates))
        self.place.zero_()

    def run(self, i: int) -> None:
        size = self.recipe.batch_size
        full = (i + 1) * size <= self.asked.shape[1]
        if full and not self.one_by_one and self.warm >= WARM_UPS and self.graph is None:
            self._capture()
        if full and self.graph is not None:
            self.graph.replay()
            return
        # Autograd remembers the stream that a parameter was first used on: not the default one,
        # which no graph can be captured on.
        current = torch.cuda.current_stream(self.feed.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            super().run(i)
            self.place.fill_(i + 1)
        current.wait_stream(self.side)
        self.warm += full

    def _capture(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.side):
                self._next()
        except RuntimeError as error:
            self.one_by_one = True
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize(self.feed.device)
            line = str(error).strip().splitlines()[0]
            warnings.warn("the training step cannot be captured in a CUDA graph, and is launched "
                          f"kernel by kernel: {line}", MnistattnWarning, stacklevel=2)  # fmt: skip
            return
        self.graph = graph

    def _next(self) -> None:
        """The step that `place` stands at, on tensors alone."""
        size = self.recipe.batch_size
        for group in self.optimizer.param_groups:
            group["lr"].copy_(self.table.index_select(0, self.place.view(1))[0])
        visits = self.place * size + torch.arange(size, device=self.feed.device)
        self._take(self.asked.index_select(1, visits))
        self.place += 1


class SharedSteps(Steps):
    """Steps that several processes take together, each with its part of every batch.

    The mean over a batch of a loss of the network's own (`out["loss"]`) is made of the means over
    the parts, each weighted by its images.
    """

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, feed: Feed,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        super().__init__(network, optimizer, recipe, feed)
        self.ranks = ranks
        self.together = Together(network, feed.device)

    def start(self, asked: Tensor, rates: list[float]) -> None:
        super().start(asked, rates)
        self.together.train()

    def finish(self) -> None:
        self.ranks.add(self.total, self.hits)

    def release(self) -> None:
        self.together.release()

    def _take(self, asked: Tensor) -> None:
        n, size = asked.shape[1], self.ranks.size
        # The last images of an epoch may be too few for all: then everybody takes them all.
        shared = self.together.shared = n >= size
        index, query, answer = asked[:, self.ranks.part(n)] if shared else asked
        mask = self.feed.masks(index, query) if sees_mask(self.network) else None
        # The mean over the ranks, which is taken of the gradients, is to be that over the images.
        loss, logits = training_step(
            self.together, self.optimizer, self.recipe, self.feed.batch(index), query, answer, mask,
            weight=len(answer) * size / n if shared else 1.0,
        )  # fmt: skip
        self.loss.copy_(loss.detach())
        if shared or self.ranks.first:
            self.total += self.loss * len(answer)
            self.hits += (logits.argmax(1) == answer).sum()


def make_steps(
    network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, feed: Feed,
    ranks: Ranks = ALONE,
) -> Steps:  # fmt: skip
    """The quickest steps for the device: captured ones on a GPU that holds the images, of a network
    that may be captured. Processes that share a training take theirs one by one."""
    if ranks.size > 1:
        return SharedSteps(network, optimizer, recipe, feed, ranks)
    captured = feed.images.is_cuda and may_be_captured(network)
    return (CapturedSteps if captured else Steps)(network, optimizer, recipe, feed)


def may_be_captured(network: nn.Module) -> bool:
    """Whether a graph of one step is good for all. Python is not run again when a graph is, so what
    a module counts or decides in Python would be frozen: of the user's own modules only those are
    captured that say `cuda_graph = True`."""
    return all(
        is_ours(module) or getattr(module, "cuda_graph", False) is True
        for module in network.modules()
    )
