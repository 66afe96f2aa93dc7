"""What a board shows: groups of comparable entries, as plain data. `build.py` makes it of results,
`text.py` and `page.py` show it."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its 95 % interval; deviation: between seeds (None for one seed)."""

    value: float
    low: float
    high: float
    deviation: float | None = None


@dataclass(frozen=True)
class Bin:
    """An entry in one range of scales (lower end open, but for the first). Estimates are None
    where there is no image or no attention."""

    low: float
    high: float
    n: int
    accuracy: Estimate | None
    correctness: Estimate | None


@dataclass(frozen=True)
class Retest:
    """The same checkpoints on a fresh test set. drop: accuracy there minus here, mean over the
    seeds that were retested; p: two-sided, of no drop; flagged: a drop that is more than chance."""

    accuracy: Estimate
    correctness: Estimate | None
    test_seed: int
    n: int
    drop: float
    p: float
    flagged: bool


@dataclass(frozen=True)
class Entry:
    """A model, with its options, over its seeds.

    name: as shown, options that are not the defaults included ("arnn block=2"); unique in a group.
    kind: "model" (of the package), "plugged" (a user's), "control" or "post-hoc".
    rank: by measure ("accuracy", "correctness"): 1 + the number of entries that are significantly
    better (so ties share a rank); absent for controls, for correctness where there is no
    attention, and for the accuracy of post-hoc maps, which is that of none.
    parameters and flops (an image, forward) are counts; train_cost and inference_cost are times
    those of `none`, medians over seeds. paper: what the AttentionRNN paper prints, accuracy (%) and
    correctness, None where it prints nothing. marks: sentences a reader must know ("2 seeds: ...").
    maps: uint8 (n, h, w), the first seed's combined maps of the group's gallery, each divided by
    its maximum; correct, bool (n,), and answers, str (n,), what it answered there.
    """

    name: str
    model: str
    paper_name: str
    kind: str
    summary: str
    seeds: tuple[int, ...]
    epochs: int
    rank: dict[str, int]
    accuracy: Estimate
    correctness: Estimate | None
    chance: float | None
    bins: tuple[Bin, ...]
    parameters: int
    flops: int
    train_cost: float
    inference_cost: float
    train_seconds: float
    paper: dict[str, float | None]
    code: str
    marks: tuple[str, ...] = ()
    retest: Retest | None = None
    maps: np.ndarray | None = None
    correct: np.ndarray | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Entries that may be compared: one data set (by digest) and one recipe.

    key: short and unique, fit for an HTML id. title: the data set's name and what it is made of;
    recipe: the recipe in words. dataset: the result's own section on it (variant, spec, seed,
    sources, digests). public: anyone can remake its bytes. n: test images. images uint8
    (k, H, W, 3), masks bool (k, H, W) and captions ("8 -> red") are the gallery's, or None.
    entries: best accuracy first.
    """

    key: str
    title: str
    recipe: str
    dataset: dict
    public: bool
    n: int
    entries: tuple[Entry, ...]
    images: np.ndarray | None = None
    masks: np.ndarray | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Board:
    """All groups, and a sentence for each file that was left out. source: a digest of the results
    that it was built of."""

    groups: tuple[Group, ...]
    problems: tuple[str, ...] = field(default=())
    source: str = ""
