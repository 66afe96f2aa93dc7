"""Train a network by a recipe; keep the weights of the best validation epoch.

An epoch depends only on the weights, the optimiser's state and (seed, epoch), so a killed run that
is started again goes on after its last whole epoch to the same numbers.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mnistattn.errors import MnistattnError
from mnistattn.evaluation.checkpoint import (
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
    save_tensors,
)
from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.recipes import Recipe

STATE = "training.safetensors"


def autocast(device: torch.device):
    """bf16 autocast where the processor computes in bf16, else nothing."""
    if device.type == "cuda":
        fits = torch.cuda.is_bf16_supported()
    else:
        fits = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # AVX2 alone emulates it, 10 x slower
    return torch.autocast(device.type, torch.bfloat16) if fits else nullcontext()


def train(
    network: nn.Module, recipe: Recipe, feed: Feed, validation: Feed, seed: int,
    run_dir: Path | None = None, identity: dict | None = None, progress: bool = True,
    title: str = "train",
) -> list[dict]:  # fmt: skip
    """Train in place; on return the network has its best epoch's weights. Returns the history.

    The history has per epoch: loss, train_accuracy, val_accuracy, lr, seconds, images_per_second.
    run_dir: where the training state is kept after each epoch, and from where it is resumed if
    `identity` (model, data, recipe, seed) is the same. Raises MnistattnError if the loss diverges.
    """
    if recipe.glorot:
        _glorot(network)
    optimizer = make_optimizer(network, recipe)
    history: list[dict] = []
    best: dict[str, torch.Tensor] = {}
    state_file = run_dir / STATE if run_dir else None
    if state_file and state_file.exists():
        history, best = _resume(state_file, identity, network, optimizer)
    done, n = len(history), _pairs_per_epoch(feed, recipe)
    with tqdm(total=recipe.epochs * n, initial=done * n, unit="image", desc=title,
              disable=None if progress else True, leave=False, smoothing=0.05) as bar:  # fmt: skip
        for epoch in range(done, recipe.epochs):
            if _stopped(history, recipe):
                break
            try:
                entry = _epoch(network, optimizer, recipe, feed, seed, epoch, bar)
                entry["val_accuracy"] = accuracy(network, validation)
            except FloatingPointError as error:  # a recurrence met NaN, and says where
                raise MnistattnError(
                    f"the training diverged in epoch {epoch + 1}: {error}; give a smaller --lr."
                ) from error
            history.append(entry)
            if entry["val_accuracy"] >= max(e["val_accuracy"] for e in history):
                best = {k: v.detach().clone() for k, v in network.state_dict().items()}
            bar.set_postfix(loss=f"{entry['loss']:.3f}", val=f"{100 * entry['val_accuracy']:.1f}%")
            if state_file:
                tensors = {f"last.{k}": v for k, v in network.state_dict().items()}
                tensors |= {f"best.{k}": v for k, v in best.items()} | optimizer_tensors(optimizer)
                save_tensors(state_file, tensors, {"identity": identity, "history": history})
    network.load_state_dict(best)
    return history


def training_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, images: torch.Tensor,
    query: torch.Tensor, answer: torch.Tensor, mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Forward, loss, backward, clipping and update for images (B, 3, S, S) and the query and answer
    (B,) int64 of each, all on one device. mask (B, S, S): for a network that `sees_mask`, else
    None. Returns the loss (), with the network's own if it has one, and the logits (B, answers)."""
    with autocast(images.device):
        logits, out = network(images, query, **({} if mask is None else {"mask": mask}))
    loss = F.cross_entropy(logits.float(), answer)
    if "loss" in out:
        loss = loss + out["loss"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
    optimizer.step()
    return loss, logits


def _epoch(network, optimizer, recipe: Recipe, feed: Feed, seed: int, epoch: int, bar) -> dict:
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    torch.manual_seed(_mix(seed, epoch))  # dropout and sampled attention
    images, queries, answers = feed.pairs(recipe.queries, generator)
    device, n, size = feed.device, len(images), recipe.batch_size
    steps = -(-n // size)
    network.train()
    total = torch.zeros((), device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    started = time.perf_counter()
    for i in range(steps):
        index = slice(i * size, (i + 1) * size)
        if len(images[index]) < 2:  # BatchNorm needs two
            continue
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(epoch * steps + i, steps)
        query, answer = queries[index].to(device), answers[index].to(device)
        batch = feed.batch(images[index])
        mask = feed.masks(images[index], query) if sees_mask(network) else None
        loss, logits = training_step(network, optimizer, recipe, batch, query, answer, mask)
        total += loss.detach() * len(answer)
        hits += (logits.argmax(1) == answer).sum()
        bar.update(len(answer))
        if i % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    mean = total.item() / n
    if mean != mean or mean == float("inf"):
        raise MnistattnError(f"the loss diverged in epoch {epoch + 1}: give a smaller --lr.")
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch + 1, "loss": mean, "train_accuracy": hits.item() / n,
        "lr": optimizer.param_groups[0]["lr"], "seconds": seconds, "images_per_second": n / seconds,
    }  # fmt: skip


@torch.inference_mode()
def accuracy(network: nn.Module, feed: Feed, batch_size: int = 256) -> float:
    """Share of images whose fixed query gets a right answer, in 0 .. 1."""
    network.eval()
    hits = 0
    for start in range(0, len(feed), batch_size):
        index = torch.arange(start, min(start + batch_size, len(feed)))
        query = feed.query[index].to(feed.device)
        told = {"mask": feed.masks(index, query)} if sees_mask(network) else {}
        with autocast(feed.device):
            logits, _ = network(feed.batch(index), query, **told)
        hits += int(feed.answers[index, logits.argmax(1).cpu()].sum())
    return hits / len(feed)


def sees_mask(network: nn.Module) -> bool:
    """Whether the network must be given the ground truth: the control `oracle`."""
    return getattr(network, "sees_mask", False) is True


def _pairs_per_epoch(feed: Feed, recipe: Recipe) -> int:
    return int(feed._askable().sum()) if recipe.queries == "all" else len(feed)


def _mix(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF


def _stopped(history: list[dict], recipe: Recipe) -> bool:
    if not recipe.patience or not history:
        return False
    scores = [entry["val_accuracy"] for entry in history]
    return len(scores) - 1 - scores.index(max(scores)) >= recipe.patience


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of all parameters."""
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), recipe.lr)
    # Weight decay is for matrices: biases, norms' gains and embeddings' rows keep their scale.
    decayed = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": rest, "weight_decay": 0.0}]  # fmt: skip
    # Not fused (1 % of a step of ctx faster): on a CPU it does not heed strides, and moments that a
    # checkpoint gives back lie otherwise than channels-last weights.
    return torch.optim.AdamW(groups, recipe.lr)


def _glorot(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


def _resume(state_file: Path, identity, network, optimizer) -> tuple[list[dict], dict]:
    tensors, note = load_tensors(state_file)
    if note.get("identity") != identity:
        return [], {}
    parts = {
        part: {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        for part in ("last.", "best.")
    }
    network.load_state_dict(parts["last."])
    restore_optimizer(optimizer, tensors)
    return note["history"], parts["best."]


def describe(recipe: Recipe) -> dict:
    """A recipe as plain values, for identities and results."""
    return asdict(recipe)
