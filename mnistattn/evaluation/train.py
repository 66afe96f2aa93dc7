"""Train a network by a recipe; keep the weights of the best validation epoch.

An epoch depends only on the weights, the optimiser's state and (seed, epoch), so a killed run that
is started again goes on after its last whole epoch to the same numbers.
"""

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation.checkpoint import (
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
    save_tensors,
)
from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.metrics import combine, correctness
from mnistattn.evaluation.ranks import ALONE, Ranks
from mnistattn.evaluation.recipes import Recipe
from mnistattn.evaluation.step import Steps, autocast, make_optimizer, make_steps, sees_mask

STATE = "training.safetensors"  # after the last whole epoch
PREVIOUS = "training.previous.safetensors"  # after the one before: should the last be damaged
SHOW_SECONDS = 1.0  # between looks at the loss, each of which waits for a GPU


def train(
    network: nn.Module, recipe: Recipe, feed: Feed, validation: Feed, seed: int,
    run_dir: Path | None = None, identity: dict | None = None, progress: bool = True,
    title: str = "train", ranks: Ranks = ALONE,
) -> list[dict]:  # fmt: skip
    """Train in place; on return the network has its best epoch's weights. Returns the history.

    The history has per epoch: loss, train_accuracy, lr, seconds, images_per_second, and what
    `validate` gives: val_accuracy and, if `validation` has the ground truth, val_correctness.
    run_dir: where the training state is kept after each epoch, and from where it is resumed if
    `identity` (model, data, recipe, seed) is the same. ranks: the processes that share the
    training, of which each calls this, and the first alone reads and writes `run_dir`. Raises
    MnistattnError if the loss diverges.
    """
    if recipe.glorot:
        _glorot(network)
    optimizer = make_optimizer(network, recipe)
    history: list[dict] = []
    best: dict[str, torch.Tensor] = {}
    if found := ranks.state(load_state(run_dir) if run_dir and ranks.first else None):
        history, best = _resume(*found, identity, network, optimizer)
    steps = make_steps(network, optimizer, recipe, feed, ranks)
    done, n = len(history), _pairs_per_epoch(feed, recipe)
    with tqdm(total=recipe.epochs * n, initial=done * n, unit="image", desc=title,
              disable=None if progress else True, leave=False, smoothing=0.05) as bar:  # fmt: skip
        for epoch in range(done, recipe.epochs):
            if _stopped(history, recipe):
                break
            try:
                entry = _epoch(steps, seed, epoch, bar)
                entry |= validate(network, validation, ranks=ranks)
            except FloatingPointError as error:  # a recurrence met NaN, and says where
                raise MnistattnError(
                    f"the training diverged in epoch {epoch + 1}: {error}; give a smaller --lr."
                ) from error
            history.append(entry)
            if entry["val_accuracy"] >= max(e["val_accuracy"] for e in history):
                best = {k: v.detach().clone() for k, v in network.state_dict().items()}
            bar.set_postfix(loss=f"{entry['loss']:.3f}", val=f"{100 * entry['val_accuracy']:.1f}%")
            if run_dir and ranks.first:
                tensors = {f"last.{k}": v for k, v in network.state_dict().items()}
                tensors |= {f"best.{k}": v for k, v in best.items()} | optimizer_tensors(optimizer)
                if (run_dir / STATE).exists():
                    (run_dir / STATE).replace(run_dir / PREVIOUS)
                save_tensors(run_dir / STATE, tensors, {"identity": identity, "history": history})
    steps.release()
    network.load_state_dict(best)
    return history


def _epoch(steps: Steps, seed: int, epoch: int, bar) -> dict:
    recipe, feed = steps.recipe, steps.feed
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    # Dropout and sampled attention, of whose draws each rank has its own.
    torch.manual_seed(_mix(seed, epoch) ^ steps.ranks.rank << 54)
    asked = torch.stack(feed.pairs(recipe.queries, generator))
    n, size = asked.shape[1], recipe.batch_size
    count = -(-n // size)
    rates = [recipe.learning_rate(epoch * count + i, count) for i in range(count)]
    steps.network.train()
    steps.start(asked, rates)
    started = shown = time.perf_counter()
    for i in range(count):
        images = min(size, n - i * size)
        if images < 2:  # BatchNorm needs two
            continue
        steps.run(i)
        bar.update(images)
        if (now := time.perf_counter()) - shown > SHOW_SECONDS:
            bar.set_postfix(loss=f"{steps.loss.item():.3f}", refresh=False)
            shown = now
    steps.finish()
    mean = steps.total.item() / n
    if mean != mean or mean == float("inf"):
        raise MnistattnError(f"the loss diverged in epoch {epoch + 1}: give a smaller --lr.")
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch + 1, "loss": mean, "train_accuracy": steps.hits.item() / n,
        "lr": rates[-1], "seconds": seconds, "images_per_second": n / seconds,
    }  # fmt: skip


@torch.inference_mode()
def validate(
    network: nn.Module, feed: Feed, batch_size: int = 256, ranks: Ranks = ALONE
) -> dict[str, float]:
    """val_accuracy: share of images whose fixed query gets a right answer, in 0 .. 1. If there are
    maps, and the feed has the ground truth, val_correctness: mean share of the attention that lies
    on it. Each rank looks at its part of every batch."""
    network.eval()
    hits = torch.zeros((), dtype=torch.int64, device=feed.device)
    mass, scored = (torch.zeros((), dtype=torch.float64, device=feed.device) for _ in range(2))
    for whole in feed.in_order(batch_size):
        index = whole[ranks.part(len(whole))]
        if not len(index):
            continue
        query = feed.query[index].to(feed.device)
        mask = feed.masks(index, query) if feed.instances is not None else None
        told = {"mask": mask} if sees_mask(network) else {}
        with autocast(feed.device):
            logits, out = network(feed.batch(index), query, **told)
        right = feed.answers[index].to(feed.device)
        hits += right.gather(1, logits.argmax(1, keepdim=True)).sum()
        if out.get("attention") and mask is not None:
            with suppress(ValueError):  # maps that cannot be scored: `score_samples` will say it
                size = (mask.shape[1], mask.shape[2])
                maps = combine([a.float() for a in out["attention"]], size)
                on_target = correctness(maps, mask)
                mass += on_target.nansum()
                scored += (~on_target.isnan()).sum()
    ranks.add(hits, mass, scored)
    found = {"val_accuracy": hits.item() / len(feed)}
    return found | ({"val_correctness": (mass / scored).item()} if scored else {})


def _pairs_per_epoch(feed: Feed, recipe: Recipe) -> int:
    return int(feed._askable().sum()) if recipe.queries == "all" else len(feed)


def _mix(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF


def _stopped(history: list[dict], recipe: Recipe) -> bool:
    if not recipe.patience or not history:
        return False
    scores = [entry["val_accuracy"] for entry in history]
    return len(scores) - 1 - scores.index(max(scores)) >= recipe.patience


def _glorot(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


def load_state(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The tensors and the note of the newest training state that is whole; None if there is none.
    InputError if all that there are are damaged."""
    files = [file for name in (STATE, PREVIOUS) if (file := run_dir / name).exists()]
    for file in files:
        try:
            return load_tensors(file)
        except InputError:
            if file == files[-1]:
                raise
    return None


def _resume(tensors: dict, note: dict, identity, network, optimizer) -> tuple[list[dict], dict]:
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
