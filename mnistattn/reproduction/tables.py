"""What the paper's tables (Khandelwal & Sigal, ICCV 2019), and one of ours, are made of: models on
data sets."""

from dataclasses import dataclass, field
from typing import Any

from mnistattn.generators.variants import Spec, choose
from mnistattn.models.registry import MODELS

OBJECTS = 7  # digits an image, on average


@dataclass(frozen=True)
class Data:
    """A data set of the paper, or a reading of it. name: of its folder; options: of `generate`;
    queries: of the recipe, if it decides them; beside: the variant whose printed numbers are its
    own ('' if the paper has none)."""

    name: str
    variant: str
    words: str
    options: dict[str, Any] = field(default_factory=dict)
    queries: str | None = None
    beside: str = ""

    def train_images(self, train: int) -> int:
        """Images of the training split, where the others have `train`: as many pairs."""
        return max(2, round(train / OBJECTS)) if self.queries == "all" else train

    @property
    def spec(self) -> dict:
        """What a result's data section says of it."""
        return Spec(self.variant, **self.options).as_dict()


DATA = {
    row.name: row
    for row in (
        Data("mref", "mref", "digits on black", beside="mref"),
        Data("mdist", "mdist", "crops of digits as distractors, as PAN's code has them",
             beside="mdist"),
        Data("mdist-gaussian", "mdist", "Gaussian noise as distractors, as the paper has it",
             {"distractors": "gaussian"}, beside="mdist"),
        Data("mbg", "mbg", "one query an image, as the papers say", beside="mbg"),
        Data("mbg-all", "mbg", "a seventh of the images and all of their queries, as PAN's code",
             queries="all", beside="mbg"),
        Data("mbg-balanced", "mbg", "scales that are asked for uniform over their range",
             {"placement": "balanced"}),
        Data("mbg-up", "mbg-up", "224 pixels", beside="mbg-up"),
        Data("mbg-inv", "mbg-inv", "colour -> digit", beside="mbg-inv"),
        Data("mbg-multi", "mbg-multi", "the queried digit in two to four colours"),
        Data("mbg-hard", "mbg-hard",
             "ours: more digits, among crops of digits"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of the paper. models: names, each with options. by_scale: whether it has the five
    scale bins. quick: the data sets of a quick look at it (see QUICK). layers: whether the maps of
    the models' layers are shown side by side."""

    name: str
    title: str
    models: tuple[tuple[str, dict], ...]
    data: tuple[str, ...]
    by_scale: bool = False
    quick: tuple[str, ...] = ()
    layers: bool = False


_SEVEN = tuple((name, dict[str, Any]()) for name in (
    "san", "noctx", "ctx", "arnn-ind-sampled", "arnn-ind", "arnn-sampled", "arnn",
))  # fmt: skip
TABLES = {
    row.name: row
    for row in (
        Table("table1", "Table 1: accuracy", _SEVEN, ("mref", "mdist", "mdist-gaussian", "mbg"),
              quick=("mref", "mdist")),
        Table("table2", "Table 2: correctness, and accuracy by scale", _SEVEN,
              ("mbg", "mbg-balanced"), by_scale=True, quick=("mref",)),
        Table("table3", "Table 3: 224 pixels",
              (("none", {}), ("arnn", {}), ("brnn", {"block": 3}), ("brnn", {})),
              ("mbg-up",), by_scale=True, quick=("mbg-up",)),
        Table("inverse", "Section 4.1: the inverse task, colour -> digit",
              (("noctx", {}), ("ctx", {}), ("arnn", {})), ("mbg-inv",), quick=("mbg-inv",),
              layers=True),
        Table("multi", "Figure 6a: what samples of the attention cover",
              (("arnn", {}), ("arnn-sampled", {})), ("mbg-multi",), quick=("mbg-multi",)),
        Table("readings", "Two readings of the training set", (("ctx", {}), ("arnn", {})),
              ("mbg", "mbg-all"), quick=("mbg", "mbg-all")),
        Table("hard", "A harder track of ours, with nothing of the paper's beside it",
              (("none", {}), ("san", {}), ("noctx", {}), ("ctx", {}), ("arnn", {}), ("scan", {}),
               ("scan", {"gate_bias": -2, "focus": 0.03})),
              ("mbg-hard",), by_scale=True, quick=("mbg-hard",)),
    )
}  # fmt: skip

# Two short epochs with a fresh query at each visit: on MREF and MDIST the models come out in the
# paper's order (docs/reproduction.md); on the others nobody has looked.
QUICK = {"recipe": "fast", "epochs": 2, "batch_size": 16, "lr": 0.002, "queries": "fresh"}


def chosen(names) -> list[Table]:
    """The tables of these names, `all` for all of them, each once. InputError for another name."""
    wanted = [choose("table", name, ("all", *TABLES)) for name in names]
    return [row for name, row in TABLES.items() if name in wanted or "all" in wanted]


def papers_models() -> list[str]:
    """The models of all tables, in the order of the package's."""
    there = {name for table in TABLES.values() for name, _ in table.models}
    return [name for name in MODELS if name in there]
