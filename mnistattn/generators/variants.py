"""The table of data sets, and the spec that a scene is a function of. Everything else reads these.

Sources: PAN (Seo et al., BMVC 2018) and its code for MREF, MDIST, MBG; AttentionRNN (Khandelwal &
Sigal, ICCV 2019) for MBG^inv, the 224-pixel set, several right answers, and Gaussian distractors.
"""

import dataclasses
import difflib
from dataclasses import dataclass

from mnistattn.errors import InputError

COLORS = ("red", "green", "blue", "yellow", "white")
PALETTE = ((0x92, 0x10, 0x10), (0x10, 0xA6, 0x51), (0x10, 0x62, 0xC0), (0xFF, 0xF1, 0x4E),
           (0xE0, 0xE0, 0xE0))  # fmt: skip  # one line a row of the original's table
DIGITS = tuple(str(d) for d in range(10))
SPLITS = ("train", "val", "test")
COUNTS = {"train": 30_000, "val": 10_000, "test": 10_000}
PLACEMENTS = ("paper", "balanced")
DISTRACTORS = ("patches", "gaussian")
DIGIT_SPLITS = ("separate", "pooled")

GLYPH_SIZE = 28
MAX_TRIES = 10_000  # of placing one digit, before the scene starts again
MAX_RESTARTS = 1_000


@dataclass(frozen=True)
class Variant:
    """One row of the table: what is drawn, and what is asked."""

    paper_name: str
    summary: str
    size: int = 100
    background: str = "black"  # black, distractors or photo
    asks: str = "digit"  # the query's kind; the answer is the other of digit and color
    repeats: bool = False  # the queried digit appears in two to four colours, each of them right
    clutter: bool = False  # crops of coloured digits, as MDIST's, over the background
    objects: tuple[int, int] = (5, 9)  # from and to, if a spec does not say


VARIANTS = {
    "mref": Variant("MREF", "digits on black; digit -> colour"),
    "mdist": Variant("MDIST", "digits among distractors; digit -> colour",
                     background="distractors"),
    "mbg": Variant("MBG", "digits on photos; digit -> colour", background="photo"),
    "mbg-inv": Variant("MBG^inv", "digits on photos; colour -> digit", background="photo",
                       asks="color"),
    "mbg-up": Variant("MBG^up", "MBG on 224 pixels, digits no larger; digit -> colour",
                      size=224, background="photo"),
    "mbg-multi": Variant("MBG^multi", "the queried digit in 2 to 4 colours; digit -> any of them",
                         background="photo", repeats=True),
    "mbg-hard": Variant("MBG^hard", "8 to 10 digits on photos with crops of digits; "
                        "digit -> colour", background="photo", clutter=True, objects=(8, 10)),
}  # fmt: skip


def closest(word: str, words) -> str:
    """' Did you mean X?' for an error message, or ''."""
    near = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def choose(what: str, value: str, words) -> str:
    """value if it is one of words, else an InputError that names the near miss."""
    if value not in words:
        raise InputError(
            f"unknown {what} '{value}': it is one of {', '.join(words)}.{closest(value, words)}"
        )
    return value


@dataclass(frozen=True)
class Spec:
    """All that a scene's pixels depend on, beside seed, split, index and the sources' content.

    A size of 0 and no number of objects stand for the variant's own and are replaced by it at once.
    Scales are relative to a 28-pixel digit and kept in steps of 1/1024, so that integers hold them.
    Raises InputError if no scene could be drawn from it.
    """

    variant: str
    distractors: str = "patches"
    placement: str = "paper"
    size: int = 0  # canvas height and width in pixels
    min_scale: float = 0.5
    max_scale: float = 3.0
    min_objects: int = None  # type: ignore[assignment]
    max_objects: int = None  # type: ignore[assignment]

    def __post_init__(self):
        row = VARIANTS[choose("variant", self.variant, VARIANTS)]
        choose("kind of distractors", self.distractors, DISTRACTORS)
        choose("placement", self.placement, PLACEMENTS)
        if self.size == 0:
            object.__setattr__(self, "size", row.size)
        for name, value in zip(("min_objects", "max_objects"), row.objects, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not 28 <= self.size <= 1024:
            raise InputError(f"size {self.size} is out of range: a canvas has 28 to 1024 pixels.")
        if not 1 / 8 <= self.min_scale <= self.max_scale <= 8:
            raise InputError(
                f"scales {self.min_scale} to {self.max_scale} are impossible: give "
                "0.125 <= min_scale <= max_scale <= 8."
            )
        if int(GLYPH_SIZE * self.max_scale) > self.size:
            raise InputError(
                f"a digit of scale {self.max_scale} has {int(GLYPH_SIZE * self.max_scale)} pixels "
                f"and does not fit the canvas of {self.size}: give a smaller max_scale."
            )
        least = 5 if row.repeats else 1
        if not least <= self.min_objects <= self.max_objects <= 10:
            raise InputError(
                f"{self.min_objects} to {self.max_objects} objects are impossible for "
                f"{self.variant}: digits are distinct, so give {least} <= min_objects <= "
                "max_objects <= 10."
            )

    @property
    def row(self) -> Variant:
        """The variant's row of the table."""
        return VARIANTS[self.variant]

    @property
    def background(self) -> str:
        """What is under the digits: black, patches, gaussian or photo."""
        return self.distractors if self.row.background == "distractors" else self.row.background

    def as_dict(self) -> dict:
        """The spec as plain JSON values; `Spec(**spec.as_dict())` gives it back."""
        return dataclasses.asdict(self)
