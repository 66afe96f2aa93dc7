"""The attention models by name: one row each, imported when it is first built."""

import inspect
from dataclasses import dataclass, field
from importlib import import_module

from mnistattn.errors import InputError
from mnistattn.generators.variants import closest

PLACEMENTS = ("every", "last", "nowhere")


@dataclass(frozen=True)
class Model:
    """A row of the table. attention: "module:Class" of an attention module, '' for none.

    The class takes (channels, query_dim, *, last, and its options) and maps features (B, C, H, W)
    and an encoded query (B, Q) to a map (B, 1, H, W). placement: after every pooling, the last, or
    nowhere. options: those of the class that make this model, where they are not its defaults.
    """

    attention: str
    placement: str
    paper_name: str
    paper: str
    summary: str
    options: dict = field(default_factory=dict)

    def load(self) -> type:
        """Import and return the attention class."""
        module, _, name = self.attention.partition(":")
        return getattr(import_module(module), name)

    def defaults(self) -> dict:
        """The options that can be set, by name, with their values in this model."""
        if not self.attention:
            return {}
        parameters = inspect.signature(self.load()).parameters.values()
        known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        known.pop("last", None)
        return known | self.options


_HERE = "mnistattn.models.attention."
_ARNN = "Khandelwal & Sigal, ICCV 2019"
_PAN = "Seo et al., BMVC 2018"
MODELS = {
    "none": Model("", "nowhere", "NONE", "-", "no attention: query and pooled features only"),
    "san": Model(_HERE + "san:SAN", "last", "SAN", "Yang et al., CVPR 2016",
                 "soft attention on the last map"),
    "noctx": Model(_HERE + "pan:NoCTX", "every", "-CTX", _PAN, "local attention, 1 x 1"),
    "ctx": Model(_HERE + "pan:CTX", "every", "CTX", _PAN, "local attention, 3 x 3 context"),
    "arnn": Model(_HERE + "arnn:ARNN", "every", "ARNN", _ARNN,
                  "AttentionRNN: two diagonal LSTMs over the map"),
    "arnn-sampled": Model(_HERE + "arnn:ARNN", "every", "ARNN~", _ARNN,
                          "attention drawn from N(mu, sigma)", {"sampled": True}),
    "arnn-ind": Model(_HERE + "arnn:ARNN", "every", "ARNN_ind", _ARNN,
                      "product of the two LSTMs' Gaussians", {"independent": True}),
    "arnn-ind-sampled": Model(_HERE + "arnn:ARNN", "every", "ARNN~_ind", _ARNN, "both of these",
                              {"sampled": True, "independent": True}),
    "brnn": Model(_HERE + "arnn:ARNN", "every", "BRNN", _ARNN,
                  "AttentionRNN on blocks of 2 x 2 (block=3: of 3 x 3)", {"block": 2}),
}  # fmt: skip


def find(name: str) -> Model:
    """The row of a model; InputError, with the nearest name, if there is none."""
    if name not in MODELS:
        raise InputError(
            f"unknown model '{name}': it is one of {', '.join(MODELS)}.{closest(name, MODELS)}"
        )
    return MODELS[name]


def choose_options(name: str, given: dict) -> dict:
    """All options of a model, `given` among them; InputError for one that it does not have."""
    known = find(name).defaults()
    for option in given:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise InputError(
                f"model {name} has no option '{option}': {takes}.{closest(option, known)}"
            )
    return known | given
