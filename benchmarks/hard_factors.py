"""How much harder each setting of mbg-hard makes an image for networks that were trained on MBG.

    python -m benchmarks.hard_factors RUN.. --data-root DATA --backgrounds PHOTOS [--json FILE]

Test scenes of MBG, of which one thing is changed at a time, and at last all, as in mbg-hard: the
same digits, colours and photos as far as the change allows, for scenes are drawn by index. A row is
the accuracy of each network; its last column is by how many points the best and the worst of them
differ. Networks that were trained on mbg-hard may be given, too.
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
FACTORS = {
    "MBG": {},
    "8 to 10 digits": {"objects": HARD.objects},
    "clutter": {"clutter": True},
    "a band missing": {"occluded": True},
    "all (mbg-hard)": {"objects": HARD.objects, "clutter": True, "occluded": True},
    "balanced scales": {"placement": "balanced"},  # not in mbg-hard: see docs/measurements.md
}  # fmt: skip
BATCH = 250


def scenes(changes: dict, n: int, args) -> dict[str, np.ndarray]:
    """n test scenes of MBG with its row of the table changed."""
    row = {name: value for name, value in changes.items() if name != "placement"}
    VARIANTS["changed"] = replace(VARIANTS["mbg"], **row)
    spec = Spec("changed", placement=changes.get("placement", "paper"))
    data = Path(args.data_root)
    sources = Sources(
        spec, args.seed, args.digits, "separate", args.backgrounds, data, lambda _: None
    )
    return sources.painter("test").paint(np.arange(n))[0]


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
    parser.add_argument("runs", nargs="+", metavar="RUN")
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
    print("setting".ljust(18), *networks, "spread")
    for name, changes in FACTORS.items():
        arrays = scenes(changes, args.n, args)
        found[name] = {label: accuracy(net, arrays) for label, net in networks.items()}
        values = [100 * value for value in found[name].values()]
        print(name.ljust(18), *(f"{v:6.2f}" for v in values), f"{max(values) - min(values):6.2f}",
              flush=True)  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps({"n": args.n, "accuracy": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
