"""A board with invented, seeded numbers and pictures, to show and to test on."""

import dataclasses

import numpy as np

from mnistattn.leaderboard.board import Bin, Board, Entry, Estimate, Group, Retest

ODD_NAME = "Mine <b>&"
EDGES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
COUNTS = (5320, 2410, 1210, 690, 370)
COLOURS = {
    "red": (146, 16, 16), "green": (16, 166, 81), "blue": (16, 98, 192),
    "yellow": (255, 241, 78), "white": (224, 224, 224),
}  # fmt: skip

# name, paper's name, kind, summary, accuracy, correctness, parameters, flops, train and inference
# cost, sharpness of the invented maps (0: flat; negative: beside the target)
ROWS: tuple[tuple, ...] = (
    ("ctx", "CTX", "model", "local attention, 3 x 3", .9039, .382, 118_405, 61e6, 1.31, 1.12, 3.0),
    ("arnn", "ARNN", "model", "AttentionRNN: two diagonal LSTMs over the map", .8916, .109,
     142_917, 68e6, 2.49, 1.61, 1.0),
    ("arnn hidden=32", "ARNN", "model", "AttentionRNN: two diagonal LSTMs over the map", .8871,
     .151, 221_300, 82e6, 3.02, 1.93, 1.3),
    (ODD_NAME, "-", "plugged", "a plugged one & its <i>docs</i>", .8702, .274, 97_210, 58e6, 1.18,
     1.07, 2.2),
    ("brnn", "BRNN", "model", "AttentionRNN on blocks of 2 x 2", .8304, .093, 139_020, 63e6, 1.72,
     1.24, .8),
    ("noctx", "-CTX", "model", "local attention, on the position alone", .6489, .112, 95_301, 56e6,
     1.09, 1.04, 1.4),
    ("san", "SAN", "model", "soft attention on the last map", .6331, .048, 88_120, 52e6, 1.04, 1.02,
     .3),
    ("none", "NONE", "model", "query and pooled features only", .3928, None, 85_005, 51e6, 1.0, 1.0,
     None),
    ("gradcam", "-", "post-hoc", "Grad-CAM of none", .3928, .071, 85_005, 51e6, 1.0, 2.61, .9),
    ("input-gradient", "-", "post-hoc", "gradient of none on the input", .3928, .058, 85_005, 51e6,
     1.0, 2.58, .5),
    ("oracle", "-", "control", "all of it on the target", .9912, 1.0, 85_005, 51e6, 1.02, 1.0,
     9.0),
    ("center", "-", "control", "a blob in the middle", .3511, .052, 85_005, 51e6, 1.01, 1.0, -2),
    ("uniform", "-", "control", "the same everywhere", .3902, .041, 85_005, 51e6, 1.0, 1.0,
     0.0),
    ("random", "-", "control", "random attention", .3377, .0408, 85_005, 51e6, 1.02, 1.0, -1),
)  # fmt: skip


def example_board(size: int = 100, gallery: int = 16) -> Board:
    """Two groups: 14 entries with a gallery on data that nobody can remake, and one entry alone."""
    rng = np.random.default_rng(7)
    images, masks, captions = _images(rng, gallery, size)
    entries = tuple(_entry(rng, row, masks) for row in ROWS)
    entries = tuple(sorted(entries, key=lambda entry: -entry.accuracy.value))
    first = Group(
        key="mbg-8e1d",
        title="MBG (MNIST digits over photos)",
        recipe="fast: 12 epochs, batch 32, one query an image",
        dataset=_dataset("mbg", {"source": "folder", "path": "photos"}, "a"),
        public=False,
        n=10_000,
        entries=entries,
        images=images,
        masks=masks,
        captions=captions,
    )
    alone = dataclasses.replace(
        entries[1], rank={"accuracy": 1}, marks=(), retest=None, correctness=None, chance=None,
        maps=None, correct=None, answers=(),
        bins=tuple(dataclasses.replace(b, correctness=None) for b in entries[1].bins),
    )  # fmt: skip
    second = Group(
        key="mref-03c2",
        title="MREF (MNIST digits on black)",
        recipe="fast: 5 epochs, batch 32, fresh queries",
        dataset=_dataset("mref", {"source": "black"}, "b"),
        public=True,
        n=10_000,
        entries=(alone,),
    )
    return Board(
        (first, second),
        ("runs/broken/result.json: it is cut off after 812 bytes; train it again.",),
        "c0ffee" * 8,
    )


def _dataset(variant: str, backgrounds: dict, letter: str) -> dict:
    return {
        "variant": variant, "paper_name": variant.upper(),
        "spec": {"variant": variant, "distractors": "patches", "placement": "paper", "size": 100,
                 "min_scale": 0.5, "max_scale": 3.0, "min_objects": 5, "max_objects": 9},
        "seed": 0,
        "sources": {"digits": {"source": "mnist", "split": "separate", "sha256": "06b0" * 16},
                    "backgrounds": backgrounds},
        "digests": {split: (letter + digit) * 32 for split, digit in
                    (("train", "1"), ("val", "2"), ("test", "3"))},
    }  # fmt: skip


def _entry(rng: np.random.Generator, row: tuple, masks: np.ndarray) -> Entry:
    name, paper_name, kind, summary, accuracy, correctness, parameters, flops, *rest = row
    train_cost, inference_cost, sharpness = rest
    seeds = (0,) if kind == "plugged" else (0, 1, 2)
    spread = None if len(seeds) == 1 else 0.002 + 0.008 * (1 - accuracy)
    tilt = np.array([-0.06, 0.05, 0.03, -0.04, -0.12]) * (1.1 - accuracy) * 2
    # Post-hoc maps explain a network, so they share the accuracy of `none`, bins included.
    shape = 0.0 if accuracy == 0.3928 else rng.normal(0, 0.008)
    bins = []
    for i, n in enumerate(COUNTS):
        share = float(np.clip(accuracy + tilt[i] + shape * (i - 2), 0.02, 0.998))
        found = None
        if correctness is not None:
            found = _estimate(min(1.0, correctness * (0.45 + 0.4 * i)) if name != "oracle" else 1.0)
        bins.append(Bin(EDGES[i], EDGES[i + 1], n, _estimate(share, 1 / n**0.5, spread), found))
    marks, retest, paper = [], None, {"accuracy": None, "correctness": None}
    if kind == "plugged":
        marks.append("1 seed: the interval does not know how much trainings differ.")
    if name.startswith("arnn"):
        marks.append("trained with 12 epochs of 30,000 images, not to the end.")
    if kind in ("model", "plugged"):
        drop = -0.0231 if name == "brnn" else -0.0011
        retest = Retest(_estimate(accuracy + drop, 0.01, spread), None, 1001, 10_000, drop,
                        0.0004 if name == "brnn" else 0.61, name == "brnn")  # fmt: skip
    if name in ("ctx", "arnn"):
        paper = {"ctx": {"accuracy": 79.0, "correctness": 0.31},
                 "arnn": {"accuracy": 85.84, "correctness": 0.42}}[name]  # fmt: skip
    better = sum(r[4] > accuracy + 0.006 for r in ROWS)
    rank = {"accuracy": 1 + better}
    if correctness is not None:
        rank["correctness"] = 1 + sum((r[5] or 0) > correctness + 0.004 for r in ROWS)
    answers, correct, maps = (), None, None
    if sharpness is not None:
        correct = rng.random(len(masks)) < accuracy
        names = list(COLOURS)
        answers = tuple(
            names[i % 5] if right else names[(i + 2) % 5] for i, right in enumerate(correct)
        )
        maps = _maps(rng, masks, sharpness)
    return Entry(
        name=name, model=name.split()[0], paper_name=paper_name, kind=kind, summary=summary,
        seeds=seeds, epochs=12, rank=rank, accuracy=_estimate(accuracy, 0.01, spread),
        correctness=None if correctness is None else _estimate(correctness, 0.004, 0.003),
        chance=None if correctness is None else 0.0412, bins=tuple(bins), parameters=parameters,
        flops=int(flops), train_cost=train_cost, inference_cost=inference_cost,
        train_seconds=600 * train_cost, paper=paper, code="0.1.0", marks=tuple(marks),
        retest=retest, maps=maps, correct=correct, answers=answers,
    )  # fmt: skip


def _estimate(value: float, width: float = 0.01, deviation: float | None = None) -> Estimate:
    return Estimate(value, max(0.0, value - width), min(1.0, value + width), deviation)


def _images(
    rng: np.random.Generator, count: int, size: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Coloured rings over a blurred, noisy ground, as busy as a photo."""
    rows, columns = np.mgrid[:size, :size]
    images = np.zeros((count, size, size, 3), np.uint8)
    masks = np.zeros((count, size, size), bool)
    names, captions = list(COLOURS), []
    for i in range(count):
        ground = np.kron(rng.integers(20, 150, (10, 10, 3)), np.ones((size // 10, size // 10, 1)))
        ground = ground + rng.normal(0, 14, (size, size, 3))
        for k in range(6):
            radius = rng.uniform(6, 9) if k else 7 + 18 * (i % 5) / 4
            top, left = rng.uniform(radius + 1, size - radius - 1, 2)
            away = np.hypot(rows - top, (columns - left) * 1.3)
            ring = (away < radius) & (away > 0.55 * radius)
            ground[ring] = COLOURS[names[(i + k) % 5]]
            masks[i] = ring if k == 0 else masks[i] & ~ring
        images[i] = np.clip(ground, 0, 255)
        captions.append(f"{i % 10} -> {names[i % 5]}")
    return images, masks, tuple(captions)


def _maps(rng: np.random.Generator, masks: np.ndarray, sharpness: float) -> np.ndarray:
    """Maps that lean to the mask by `sharpness`; 0: flat, -1: noise, -2: a blob in the middle."""
    n, height, width = masks.shape
    rows, columns = np.mgrid[:height, :width]
    maps = np.zeros(masks.shape, np.float64)
    for i in range(n):
        if sharpness == 9:
            maps[i] = masks[i]
        elif sharpness == 0:
            maps[i] = 1
        elif sharpness == -1:
            maps[i] = rng.random((height, width))
        else:
            inside = np.argwhere(masks[i])
            middle = inside.mean(0) if sharpness > 0 else np.array([height / 2, width / 2])
            middle = middle + rng.normal(0, 18 / (1 + max(0, sharpness)), 2)
            away = np.hypot(rows - middle[0], columns - middle[1])
            maps[i] = np.exp(-((away / (8 + 8 / max(0.5, sharpness))) ** 2))
            stray = np.hypot(rows - rng.uniform(0, height), columns - rng.uniform(0, width))
            maps[i] += max(0.0, 1 - sharpness / 3) * np.exp(-((stray / 12) ** 2))
        maps[i] /= maps[i].max()
    return np.rint(255 * maps).astype(np.uint8)
