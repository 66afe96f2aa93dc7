"""The attention models by name: one row each, imported when it is first built."""

from dataclasses import dataclass
from importlib import import_module

from mnistattn.errors import InputError
from mnistattn.generators.variants import closest

PLACEMENTS = ("every", "last", "nowhere")


@dataclass(frozen=True)
class Model:
    """A row of the table. attention: "module:Class" of an attention module, '' for none.

    The class takes (channels, query_dim, *, last) and maps features (B, C, H, W) and an encoded
    query (B, Q) to a map (B, 1, H, W). placement: after every pooling, the last, or nowhere.
    """

    attention: str
    placement: str
    paper_name: str
    paper: str
    summary: str

    def load(self) -> type:
        """Import and return the attention class."""
        module, _, name = self.attention.partition(":")
        return getattr(import_module(module), name)


_HERE = "mnistattn.models.attention."
_PAN = "Seo et al., BMVC 2018"
MODELS = {
    "none": Model("", "nowhere", "NONE", "-", "no attention: query and pooled features only"),
    "san": Model(_HERE + "san:SAN", "last", "SAN", "Yang et al., CVPR 2016",
                 "soft attention on the last map"),
    "noctx": Model(_HERE + "pan:NoCTX", "every", "-CTX", _PAN, "local attention, 1 x 1"),
    "ctx": Model(_HERE + "pan:CTX", "every", "CTX", _PAN, "local attention, 3 x 3 context"),
    "arnn": Model(_HERE + "arnn:ARNN", "every", "ARNN", "Khandelwal & Sigal, ICCV 2019",
                  "AttentionRNN: two diagonal LSTMs over the map"),
}  # fmt: skip


def find(name: str) -> Model:
    """The row of a model; InputError, with the nearest name, if there is none."""
    if name not in MODELS:
        raise InputError(
            f"unknown model '{name}': it is one of {', '.join(MODELS)}.{closest(name, MODELS)}"
        )
    return MODELS[name]
