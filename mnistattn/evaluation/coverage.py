"""Whether the samples of an attention differ: how many of the right digits they find together.

Where the queried digit appears in several colours (mbg-multi), each of them is a right answer, and
one map can point at one of them only. Khandelwal and Sigal (ICCV 2019, Figure 6a) show that samples
of AttentionRNN attend to different ones; here that is a number and a picture.

In the pure functions **maps** are (N, K, H, W) floats >= 0, finite: the combined maps of K > 0
samples, not necessarily normalised. **instances** is (N, H, W) uint8: 0 background, k the k-th
object. **right** is (N, O) bool: which objects answer the query. Wrong shapes and values raise
ValueError.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mnistattn.dataset.read import Card, read_card
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation.feed import Feed, load_feed
from mnistattn.evaluation.metrics import combine, correctness, pointing
from mnistattn.evaluation.picture import samples_picture
from mnistattn.evaluation.reload import load_run
from mnistattn.evaluation.run import choose_device, versions, whole
from mnistattn.evaluation.step import autocast, sees_mask
from mnistattn.models.network import Network

COVERAGE_VERSION = 1
PASSES = 200  # of the network in one batch, images times samples: 0.5 GiB at 100 pixels
ROWS = 8  # images of the picture


# ---- of maps -------------------------------------------------------------------------------------


def covered(maps: Tensor, instances: Tensor, right: Tensor) -> Tensor:
    """The right digits that at least one of the K samples points at: (N, O) bool.

    A sample points at a digit if its strongest pixel lies in it, as in metrics.pointing: a maximum
    that several pixels share, and so a constant or all-zero map, points nowhere. So one sample
    covers at most one digit. False for objects that are not right, or have no pixel.

    >>> maps = torch.tensor([[[[0.0, 2.0, 1.0]], [[0.0, 3.0, 1.0]]]])
    >>> covered(maps, torch.tensor([[[1, 2, 3]]], dtype=torch.uint8), torch.tensor([[True] * 3]))
    tensor([[False,  True, False]])
    """
    return (_by_digit(pointing, maps, instances, right) == 1).any(1)


def largest_share(maps: Tensor, instances: Tensor, right: Tensor) -> Tensor:
    """Per right digit, the largest share of one sample's mass inside it: (N, O) float64 in [0, 1].

    The soft form of `covered`: the best of the K samples by metrics.correctness. An all-zero map
    has a share of 0. NaN for objects that are not right, or have no pixel.

    >>> maps = torch.tensor([[[[0.0, 3.0, 1.0]], [[2.0, 1.0, 1.0]]]])
    >>> right = torch.tensor([[True, True, False]])
    >>> largest_share(maps, torch.tensor([[[1, 2, 3]]], dtype=torch.uint8), right)
    tensor([[0.5000, 0.7500,    nan]], dtype=torch.float64)
    """
    return _by_digit(correctness, maps, instances, right).amax(1)


def _by_digit(
    metric: Callable[[Tensor, Tensor], Tensor], maps: Tensor, instances: Tensor, right: Tensor
) -> Tensor:
    """A metric of metrics.py of each sample's map and each right digit: (N, K, O) float64, NaN
    where the object is not right."""
    if maps.dim() != 4 or maps.shape[1] == 0:
        raise ValueError(f"maps must be (N, K, H, W) with K > 0, not {tuple(maps.shape)}.")
    n, samples, height, width = maps.shape
    if instances.shape != (n, height, width) or instances.dtype != torch.uint8:
        raise ValueError(f"instances must be {(n, height, width)} uint8 like the maps, "
                         f"not {tuple(instances.shape)} {instances.dtype}.")  # fmt: skip
    if right.dim() != 2 or len(right) != n or right.dtype != torch.bool:
        raise ValueError(f"right must be ({n}, O) bool, not {tuple(right.shape)} {right.dtype}.")
    out = maps.new_full((n, samples, right.shape[1]), math.nan, dtype=torch.float64)
    for k in range(right.shape[1]):
        where = right[:, k].nonzero()[:, 0]
        mask = (instances[where] == k + 1).repeat_interleave(samples, 0)
        out[where, :, k] = metric(maps[where].flatten(0, 1), mask).view(-1, samples)
    return out


# ---- of a network --------------------------------------------------------------------------------


@torch.inference_mode()
def coverage(
    network: nn.Module, feed: Feed, samples: int = 20, seed: int = 0, progress: bool = True
) -> dict:
    """What K samples of a network's attention find in all images of a feed, which needs
    `instances`.

    K is `samples` for a network that gives some (`has_samples`), and 1 for any other: its one map,
    the one that is scored. Returns {"samples": K, "images": N} and, as {"value", "se", "n"}, the
    means over the images and their standard errors (None of a single image) of

        right     right digits; 1 in all data sets but mbg-multi
        covered   those of them that at least one sample points at
        share     covered / right
        pointing  samples that point at a right digit, as a share. K equal samples would cover as
                  many digits: what `covered` has beyond `pointing` is the samples' diversity
        chance    what K samples would cover that point at random pixels: they are diverse, but
                  blind, so `covered` means something only beside a high `pointing`
        mass      the largest share of one sample's mass in a right digit, mean over these
        answers   different right answers among the K predictions
        accuracy  right predictions, as a share

    The samples are those of the seed, and torch's own random state is left as it was. Random
    numbers are drawn a batch at a time, so what an image gets depends on the batch it is in: hence
    its size is no option, but PASSES // K. `arnn-ind` draws with a sigma that was never drawn with
    in training, where only the ratio of its two sigmas counts.

    InputError for a network without attention or a feed without images, MnistattnError for maps
    that cannot be scored.
    """
    parts: list[dict[str, Tensor]] = []
    for piece in _batches(network, feed, samples, seed, progress):
        k = piece.maps.shape[1]
        # A constant map's share inside a digit is the digit's area.
        even = torch.ones_like(piece.maps[:, :1])
        area = _by_digit(correctness, even, piece.instances, piece.right)[:, 0]
        mass = largest_share(piece.maps, piece.instances, piece.right)
        right = piece.right.sum(1).double()
        found = covered(piece.maps, piece.instances, piece.right).sum(1).double()
        hits = pointing(piece.maps.flatten(0, 1), piece.mask.repeat_interleave(k, 0))
        parts.append({
            "right": right,
            "covered": found,
            "share": found / right,
            "pointing": hits.view(-1, k).mean(1),
            "chance": (1 - (1 - area) ** k).nansum(1),
            "mass": mass.nanmean(1),
            "answers": _distinct(piece.said, piece.answers).double(),
            "accuracy": piece.answers.gather(1, piece.said).double().mean(1),
        })  # fmt: skip
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    means = {name: _mean(row.cpu().numpy()) for name, row in values.items()}
    return {"samples": k, "images": len(feed)} | means


def has_samples(network: nn.Module) -> bool:
    """Whether `network(images, query, samples=K)` gives K samples: a Network whose attention is a
    distribution, in every layer, or a whole model that says so itself."""
    layers = list(network.attention.values()) if isinstance(network, Network) else [network]
    return bool(layers) and all(getattr(a, "has_samples", False) is True for a in layers)


class _Batch(NamedTuple):
    """B images, on the feed's device."""

    said: Tensor  # (B, K) int64: the answer of each sample
    maps: Tensor  # (B, K, H, W) float64: its combined map
    instances: Tensor  # (B, H, W) uint8
    mask: Tensor  # (B, H, W) bool: the pixels of what is asked for
    right: Tensor  # (B, O) bool: the objects that are asked for
    answers: Tensor  # (B, classes) bool: the right answers


def _batches(
    network: nn.Module, feed: Feed, samples: int, seed: int, progress: bool = False
) -> Iterator[_Batch]:
    """All images in order, PASSES // K at a time, and what K passes of the network make of each."""
    _check_samples(samples, seed)
    if feed.instances is None:
        raise ValueError("coverage needs a feed with instances: load it with masks=True.")
    if len(feed) == 0:
        raise InputError("a test split without images has no coverage.")
    network.eval()
    drawn = has_samples(network)
    k = samples if drawn else 1
    attend = network if drawn else getattr(network, "attend", network)
    size, (height, width) = PASSES // k, feed.images.shape[1:3]
    device = feed.device
    for index in tqdm(feed.in_order(size), total=-(-len(feed) // size), desc="coverage",
                      unit="batch", disable=None if progress else True, leave=False):  # fmt: skip
        query = feed.query[index].to(device)
        mask = feed.masks(index, query)
        told: dict = {"samples": k} if drawn else {"mask": mask} if sees_mask(network) else {}
        # A seed of each batch's own: whoever wants the first images need not draw for the others.
        own = int(np.random.SeedSequence((seed, int(index[0]))).generate_state(1)[0])
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            autocast(device),
        ):
            torch.manual_seed(own)
            logits, out = attend(feed.batch(index), query, **told)
        if not out["attention"]:
            raise InputError("a network without attention points at nothing: it has no coverage.")
        try:  # samples are images of their own to what combines the layers
            maps = combine([a.float().flatten(0, 1)[:, None] for a in out["attention"]],
                           (height, width))  # fmt: skip
        except ValueError as error:
            raise MnistattnError(f"the attention maps cannot be scored: {error}") from error
        objects = feed.color if feed.asks_color else feed.digit
        yield _Batch(
            logits.reshape(len(index), k, -1).argmax(2),
            maps.view(len(index), k, height, width),
            feed.instances[index].to(device),
            mask,
            objects[index].to(device) == query[:, None],
            feed.answers[index].to(device),
        )


def _distinct(said: Tensor, answers: Tensor) -> Tensor:
    """How many of the right answers, bool (B, classes), are among those said, int64 (B, K)."""
    heard = torch.zeros_like(answers).scatter_(1, said, True)
    return (heard & answers).sum(1)


def _mean(values: np.ndarray) -> dict:
    """Mean over the images where a value is defined, its standard error, and their number."""
    values = values[~np.isnan(values)]
    n = len(values)
    se = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"value": float(values.mean()) if n else None, "se": se, "n": n}


def _check_samples(samples: int, seed: int) -> None:
    if not 1 <= samples <= PASSES:
        raise InputError(f"{samples} samples are impossible: give 1 to {PASSES}.")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed {seed} is out of range: give a whole number from 0 to 2^32 - 1.")


# ---- of a run ------------------------------------------------------------------------------------


def coverage_of_run(
    run: str | Path, data: str | Path | Card, samples: int = 20, *, seed: int = 0,
    spread: float | None = None, model: str | None = None, device: str = "auto",
    progress: bool = True,
) -> dict:  # fmt: skip
    """The coverage of a finished run's network on the test split of a data set, which need not be
    the one it was trained on; writes coverage.json and samples.png into the run directory.

    run: the directory (or its result.json), with model.safetensors in it. data: a data set's
    directory or card. spread: what sigma is multiplied by, for models that have this option (the
    paper scaled it up to show several modes); None: as the run has it. model: where a plugged model
    is (FILE.py:CLASS), if not under its own name. Returns what is in coverage.json, with "file" its
    path; if it is there already, of the same weights, test split, samples, seed and spread, nothing
    is computed. InputError for a request that cannot be met.
    """
    _check_samples(samples, seed)
    trained = load_run(run, model)
    file, raw = trained.file, trained.raw
    place = choose_device(device)
    card = data if isinstance(data, Card) else read_card(data)
    changed = {} if spread is None else {"spread": spread}
    request = {
        "format": "mnistattn-coverage", "coverage_version": COVERAGE_VERSION, "model": raw["model"],
        "weights": hashlib.sha256(trained.checkpoint.read_bytes()).hexdigest(),
        "variant": card.raw["variant"], "digest": card.digest("test"), "samples": samples,
        "seed": seed, "spread": (raw["options"] | changed).get("spread"),
    }  # fmt: skip
    target, shown = file.with_name("coverage.json"), file.with_name("samples.png")
    kept = _kept(target, request) if shown.exists() else None
    if kept:
        return kept | {"file": str(target)}
    network = trained.network(place, card, **changed)
    feed = load_feed(card, "test", place, masks=True)
    made = coverage(network, feed, samples, seed, progress)
    title = f"{trained.row.paper_name} on {card.raw['paper_name']}"
    picture = _picture(network, feed, card, samples, seed, title)
    content = request | {"coverage": made, "versions": versions()}
    try:
        whole(shown, lambda partial: picture.save(partial, "PNG"))
        whole(target, lambda partial: partial.write_text(json.dumps(content, indent=1) + "\n"))
    except OSError as error:
        raise MnistattnError(f"cannot write {target}: {error.strerror or error}.") from error
    return content | {"file": str(target)}


def _kept(file: Path, request: dict) -> dict | None:
    """What a coverage.json holds, if it is there, whole, and of this request."""
    try:
        content = json.loads(file.read_bytes())
        fits = all(content[name] == value for name, value in request.items())
        return content if fits and content["coverage"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.inference_mode()
def _picture(
    network: nn.Module, feed: Feed, card: Card, samples: int, seed: int, title: str
) -> Image.Image:
    """The first images with their first samples, which are those that `coverage` counts."""
    parts: list[_Batch] = []
    for piece in _batches(network, feed, samples, seed):
        parts.append(piece)
        if sum(len(part.said) for part in parts) >= ROWS:
            break
    columns = (torch.cat(rows)[:ROWS].cpu() for rows in zip(*parts, strict=True))
    said, maps, _, masks, _, answers = columns
    names = card.answer_names
    rights = [" or ".join(names[a] for a in row.nonzero()[:, 0].tolist()) for row in answers]
    return samples_picture(
        feed.images[: len(said)].cpu().numpy(),
        masks.numpy(),
        maps.numpy(),
        [f"{card.query_names[feed.query[i]]} -> {right}" for i, right in enumerate(rights)],
        [[names[a] for a in row] for row in said.tolist()],
        answers.gather(1, said).tolist(),
        title=title,
    )
