"""How fast images reach the training, and how fast the training could take them.

    python benchmarks/feed.py --data data/mbg

In one process, interleaved --repeat times, at batch sizes 32 and 64, images in random order:

    feed         Feed.batch: gathered from memory, as float32 on the device (what training uses)
    h5py batch   sorted fancy indexing of the HDF5 file, uint8, nothing more
    h5py item    mnistattn.load(...)[i], one image at a time
    none         training the network without attention, the fastest model: an epoch of
                 mnistattn.evaluation.train over --train-images, feed included
    feed / none  pair by pair; the goal is a median of at least 10

The file is in the page cache, for it was just read.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from common import machine, machine_line, spread, summary, table, wait, write_json

from mnistattn import load
from mnistattn.dataset.format import split_file
from mnistattn.dataset.read import read_card
from mnistattn.errors import MnistattnError
from mnistattn.evaluation.feed import Feed, load_feed
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.train import train
from mnistattn.models.network import build
from mnistattn.process import keep_freed_memory

GOAL = 10
BATCHES = (32, 64)


def feed_speed(feed: Feed, batch: int, images: int, generator: torch.Generator) -> float:
    """Images/s of the training feed alone."""
    order = torch.cat(
        [torch.randperm(len(feed), generator=generator) for _ in range(-(-images // len(feed)))]
    )[:images]
    wait(feed.device)
    start = time.perf_counter()
    for first in range(0, images, batch):
        feed.batch(order[first : first + batch])
    wait(feed.device)
    return images / (time.perf_counter() - start)


def fancy_speed(file: Path, batch: int, images: int, rng: np.random.Generator) -> float:
    """Images/s of reading sorted random batches from the HDF5 file."""
    with h5py.File(file, "r") as h5:
        data = h5["image"]
        order = rng.permutation(len(data))[:images]
        start = time.perf_counter()
        for first in range(0, len(order), batch):
            data[np.sort(order[first : first + batch])]
        return len(order) / (time.perf_counter() - start)


def item_speed(items, images: int, rng: np.random.Generator) -> float:
    """Images/s of mnistattn.load(...)[i]."""
    order = rng.permutation(len(items))[:images].tolist()
    start = time.perf_counter()
    for i in order:
        items[i]
    return len(order) / (time.perf_counter() - start)


def train_speed(card, feed: Feed, few: Feed, batch: int) -> float:
    """Images/s of an epoch of `none` over feed, by the default recipe; few is for validation."""
    names = len(card.query_names), len(card.answer_names)
    torch.manual_seed(0)
    network = build("none", card.spec.size, *names).to(feed.device)
    recipe = make_recipe("fast", epochs=1, batch_size=batch)
    return train(network, recipe, feed, few, 0, progress=False)[0]["images_per_second"]


def first(feed: Feed, n: int) -> Feed:
    """The first n images of a feed, without a copy."""
    names = ("images", "digit", "color", "query", "answer", "answers")
    return dataclasses.replace(feed, **{name: getattr(feed, name)[:n] for name in names})


def main() -> int:
    keep_freed_memory()  # as `evaluate` does: before anything large is allocated
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="a generated data set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--images", type=int, default=30_000, help="of the feed (30000)")
    parser.add_argument("--items", type=int, default=3000, help="read with h5py (3000)")
    parser.add_argument("--train-images", type=int, default=3200, help="trained on (3200)")
    parser.add_argument("--repeat", type=int, default=5, metavar="R")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if min(args.images, args.items, args.repeat) < 1 or args.train_images < 2:
        parser.error("give --images, --items, --repeat of at least 1, --train-images of at least 2")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        parser.error("there is no CUDA device here")
    device = torch.device("cuda" if cuda else "cpu")
    try:
        card = read_card(args.data)
        feed = load_feed(card, args.split, device, check=False)
        items = load(args.data, args.split)
    except MnistattnError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    about = machine() | {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }
    print(machine_line(about) + f"; device {about['device']}, {about['threads']} threads")
    subset, few = first(feed, args.train_images), first(feed, 64)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    file = split_file(args.data, args.split)

    kinds = ("feed", "h5py batch", "none")
    speeds = {f"{kind}, {batch}": [] for batch in BATCHES for kind in kinds}
    speeds["h5py item"] = []
    item_speed(items, 100, rng)
    for batch in BATCHES:  # warm: the libraries choose and compile their kernels at the first call
        feed_speed(feed, batch, 10 * batch, generator)
        train_speed(card, first(feed, 4 * batch), few, batch)
    for _ in range(args.repeat):
        for batch in BATCHES:
            speeds[f"feed, {batch}"].append(feed_speed(feed, batch, args.images, generator))
            speeds[f"none, {batch}"].append(train_speed(card, subset, few, batch))
            speeds[f"h5py batch, {batch}"].append(fancy_speed(file, batch, args.items, rng))
        speeds["h5py item"].append(item_speed(items, args.items, rng))

    print(
        f"\n{card.raw['variant']}, {len(feed):,} images of {card.spec.size} pixels in {args.split}"
    )
    rows = [[name, spread(values, 0)] for name, values in speeds.items()]
    print(table(["", "images/s: median (min .. max)"], rows))
    ratios = {}
    for batch in BATCHES:
        pairs = zip(speeds[f"feed, {batch}"], speeds[f"none, {batch}"], strict=True)
        ratios[batch] = [a / b for a, b in pairs]
        met = summary(ratios[batch])["median"] >= GOAL
        print(f"feed / none, batch {batch}: {spread(ratios[batch], 1)}; goal, at least {GOAL}: "
              f"{'met' if met else 'MISSED'}")  # fmt: skip
    write_json(args.json, {
        "benchmark": "feed", "machine": about, "variant": card.raw["variant"],
        "split": args.split, "size": card.spec.size, "images": len(feed),
        "images_per_second": {name: summary(values) for name, values in speeds.items()},
        "feed_over_none": {str(batch): summary(values) for batch, values in ratios.items()},
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
