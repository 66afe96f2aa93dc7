"""What training and answering cost, as a multiple of `none`'s time in the same process.

Seconds differ from machine to machine, and on one from hour to hour; a ratio of two things run in
turns does so far less. That is what the board shows.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.recipes import Recipe
from mnistattn.evaluation.step import WARM_UPS, autocast, make_optimizer, make_steps, sees_mask
from mnistattn.models.network import build

ROUNDS = 15
MOST = 32  # images of a timed batch: a ratio does not need more


def relative_cost(network: nn.Module, recipe: Recipe, feed: Feed, size: int) -> dict[str, dict]:
    """train_times_none and inference_times_none: median, min, max over rounds, in each of which
    both networks take a step (and answer a batch). The network is left as it is, and so are
    torch's random numbers."""
    with torch.random.fork_rng([feed.device] if feed.device.type == "cuda" else []):
        return _relative_cost(network, recipe, feed, size)


def _relative_cost(network: nn.Module, recipe: Recipe, feed: Feed, size: int) -> dict[str, dict]:
    device = feed.device
    plain = build("none", size, 10, feed.answers.shape[1], recipe.dropout)
    pair: list[nn.Module] = [
        copy.deepcopy(network).to(device),
        plain.to(device).to(memory_format=torch.channels_last),
    ]
    size_of_batch = min(recipe.batch_size, MOST)
    index = torch.arange(size_of_batch) % len(feed)  # BatchNorm needs two
    query, answer = feed.query.cpu()[index], feed.answer.cpu()[index]
    images, asked = feed.batch(index), query.to(device)
    masks = [feed.masks(index, asked) if sees_mask(n) else None for n in pair]
    timed = dataclasses.replace(recipe, batch_size=size_of_batch)
    warm = WARM_UPS + 1 if device.type == "cuda" else 1  # the first compile, and capture
    steps = [make_steps(n, make_optimizer(n, timed), timed, feed) for n in pair]
    visits = torch.stack((index, query, answer)).repeat(1, warm + ROUNDS)
    for one in steps:
        one.start(visits, [recipe.lr] * (warm + ROUNDS))

    def step(i: int, turn: int) -> None:
        pair[i].train()
        steps[i].run(turn)

    @torch.inference_mode()
    def infer(i: int, turn: int) -> None:
        pair[i].eval()
        attend = getattr(pair[i], "attend", pair[i])
        with autocast(device):
            attend(images, asked, **({} if masks[i] is None else {"mask": masks[i]}))

    # Inference first: some steps later a network's weights are not what they were.
    inference = _in_turns(infer, device, warm)
    train = _in_turns(step, device, warm)
    return {"train_times_none": train, "inference_times_none": inference}


def _in_turns(run: Callable[[int, int], None], device: torch.device, warm: int) -> dict:
    ratios = []
    for turn in range(warm + ROUNDS):
        times = [0.0, 0.0]
        for i in (0, 1) if turn % 2 else (1, 0):  # neither is always the one after the other
            start = time.perf_counter()
            run(i, turn)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[i] = time.perf_counter() - start
        if turn >= warm:
            ratios.append(times[0] / times[1])
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios),
            "rounds": ROUNDS}  # fmt: skip
