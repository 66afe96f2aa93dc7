"""How much harder each setting of mbg-hard makes an image for networks that were trained on MBG.

    python -m benchmarks.hard_factors RUN.. --data-root DATA --backgrounds PHOTOS [--json FILE]

Test scenes of MBG, of which one thing is changed at a time, and at last all, as in mbg-hard: the
same digits, colours and photos as far as the change allows, for scenes are drawn by index. A row is
the accuracy of each network, in percent, and before them of an answer that needs no query: the
colour of the largest digit. Without a RUN that alone is counted.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mnistattn.dataset.paint import Sources
from mnistattn.evaluation.reload import load_run
from mnistattn.evaluation.report import changed_options
from mnistattn.evaluation.step import autocast
from mnistattn.generators.variants import VARIANTS, Spec

HARD = VARIANTS["mbg-hard"]
FACTORS: dict[str, tuple[dict, str]] = {  # what is changed in MBG's row, and the placement
    "MBG": ({}, "paper"),
    "8 to 10 digits": ({"objects": HARD.objects}, "paper"),
    "clutter": ({"clutter": True}, "paper"),
    "all (mbg-hard)": ({"objects": HARD.objects, "clutter": True}, "paper"),
    "balanced scales": ({}, "balanced"),  # not in mbg-hard: see docs/measurements.md
}
BATCH = 250


def scenes(changes: dict, placement: str, args) -> dict[str, np.ndarray]:
    """Test scenes of MBG with its row of the table changed."""
    VARIANTS["changed"] = replace(VARIANTS["mbg"], **changes)
    spec = Spec("changed", placement=placement)
    data = Path(args.data_root)
    sources = Sources(
        spec, args.seed, args.digits, "separate", args.backgrounds, data, lambda _: None
    )
    return sources.painter("test").paint(np.arange(args.n))[0]


def blind(arrays: dict[str, np.ndarray]) -> float:
    """The share of right answers of one who never reads the query: the largest digit's colour."""
    largest = arrays["scale"].argmax(1)
    return float((arrays["color"][np.arange(len(largest)), largest] == arrays["answer"]).mean())


def accuracy(network: torch.nn.Module, arrays: dict[str, np.ndarray]) -> float:
    """The share of right answers."""
    hits = 0
    for first in range(0, len(arrays["image"]), BATCH):
        part = {name: torch.from_numpy(a[first : first + BATCH]) for name, a in arrays.items()}
        images = part["image"].permute(0, 3, 1, 2).float() / 255
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), autocast(images.device):
            logits = network(images, part["query"].long())[0]
        hits += int((logits.argmax(1) == part["answer"].long()).sum())
    return hits / len(arrays["image"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--digits", default="mnist")
    parser.add_argument("--backgrounds", default="textures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=4000)
    parser.add_argument("--json")
    args = parser.parse_args()
    runs = [load_run(run) for run in args.runs]
    networks = {
        " ".join(
            [run.row.name, *changed_options(run.raw), run.raw["dataset"]["variant"]]
        ): run.network(torch.device("cpu"))
        for run in runs
    }
    found: dict[str, dict[str, float]] = {}
    print("setting".ljust(18), "largest digit's colour", *networks, sep=" | ")
    for name, (changes, placement) in FACTORS.items():
        arrays = scenes(changes, placement, args)
        found[name] = {"largest digit's colour": blind(arrays)}
        found[name] |= {label: accuracy(net, arrays) for label, net in networks.items()}
        values = (f"{100 * value:6.2f}" for value in found[name].values())
        print(name.ljust(18), *values, sep=" | ", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"n": args.n, "accuracy": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
