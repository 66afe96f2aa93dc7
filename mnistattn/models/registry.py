"""The models by name: one row each, imported when it is first built. And those that users plug in:
by @register, by an entry point (group "mnistattn.attention"), by FILE.py:CLASS or MODULE:CLASS."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from mnistattn.errors import InputError
from mnistattn.generators.variants import closest

PLACEMENTS = ("every", "first", "last", "nowhere", "whole")
KINDS = ("model", "control", "post-hoc", "plugged")
GROUP = "mnistattn.attention"


@dataclass(frozen=True)
class Model:
    """A row of the table. attention: "module:Class" of an attention module (see contract.py), or
    the class itself, '' for none.

    placement: after "every" pooling, the "first", the "last", "nowhere", or the sizes of the maps;
    of a "whole" network, `attention` is the network. options: those of the class that make this
    model, where they are not its defaults. explain: "module:Class" of the network for maps that
    are made of a trained `none` afterwards (its weights are none's).
    """

    name: str
    attention: str | type
    placement: str | tuple[int, ...]
    paper_name: str
    paper: str
    summary: str
    options: dict = field(default_factory=dict)
    kind: str = "model"
    explain: str = ""
    origin: str = "mnistattn"

    def load(self) -> type:
        """Import and return the attention class."""
        return load(self.attention) if isinstance(self.attention, str) else self.attention

    def defaults(self) -> dict:
        """The options that can be set, by name, with their values in this model."""
        if not self.attention:
            return {}
        parameters = list(inspect.signature(self.load()).parameters.values())
        given = 3 if self.placement == "whole" else 2  # (size, queries, answers), (channels, query)
        known = {p.name: p.default for p in parameters[given:] if p.default is not p.empty}
        known.pop("last", None)
        return known | self.options

    @property
    def weights(self) -> str:
        """The model whose weights this one's are: itself, or `none`."""
        return "none" if self.explain else self.name


def load(reference: str) -> type:
    """Import "module:Class" of this package or an entry point's."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


_HERE = "mnistattn.models.attention."
_ARNN = "Khandelwal & Sigal, ICCV 2019"
_PAN = "Seo et al., BMVC 2018"
_ROWS = (
    Model("none", "", "nowhere", "NONE", "-", "no attention: query and pooled features only"),
    Model("san", _HERE + "san:SAN", "last", "SAN", "Yang et al., CVPR 2016",
          "soft attention on the last map"),
    Model("noctx", _HERE + "pan:NoCTX", "every", "-CTX", _PAN, "local attention, 1 x 1"),
    Model("ctx", _HERE + "pan:CTX", "every", "CTX", _PAN, "local attention, 3 x 3 context"),
    Model("arnn", _HERE + "arnn:ARNN", "every", "ARNN", _ARNN,
          "AttentionRNN: two diagonal LSTMs over the map"),
    Model("arnn-sampled", _HERE + "arnn:ARNN", "every", "ARNN~", _ARNN,
          "attention drawn from N(mu, sigma)", {"sampled": True}),
    Model("arnn-ind", _HERE + "arnn:ARNN", "every", "ARNN_ind", _ARNN,
          "product of the two LSTMs' Gaussians", {"independent": True}),
    Model("arnn-ind-sampled", _HERE + "arnn:ARNN", "every", "ARNN~_ind", _ARNN, "both of these",
          {"sampled": True, "independent": True}),
    Model("brnn", _HERE + "arnn:ARNN", "every", "BRNN", _ARNN,
          "AttentionRNN on blocks of 2 x 2 (block=3: of 3 x 3)", {"block": 2}),
    Model("scan", _HERE + "scan:Scan", "every", "SCAN", "-",
          "ours: gated linear recurrences along rows, then columns"),
    Model("soft", _HERE + "soft:Soft", "last", "SOFT", "Xu et al., ICML 2015",
          "location-wise soft attention, a two-layer score"),
    Model("hard", _HERE + "hard:Hard", "last", "HARD", "Xu et al., ICML 2015",
          "location-wise hard attention: one sampled position"),
    Model("item-soft", _HERE + "item:ItemSoft", "last", "ITEM-SOFT", "Anderson et al., CVPR 2018",
          "item-wise soft attention over a grid of boxes"),
    Model("item-hard", _HERE + "item:ItemHard", "last", "ITEM-HARD", "Wang & Tax, arXiv 2016",
          "item-wise hard attention: one sampled box of a grid"),
    Model("gaussian", _HERE + "gaussian:Gaussian", "every", "GAUSSIAN", "Gregor et al., ICML 2015",
          "DRAW's window of Gaussians as a gate"),
    Model("gaussian-glimpse", _HERE + "gaussian:GaussianGlimpse", "first", "GAUSSIAN-GLIMPSE",
          "Gregor et al., ICML 2015", "DRAW's window of Gaussians, which zooms"),
    Model("stn", _HERE + "stn:STN", "first", "STN", "Jaderberg et al., NIPS 2015",
          "spatial transformer: features seen through an affine window"),
    Model("ram", _HERE + "ram:RAM", "whole", "RAM", "Mnih et al., NIPS 2014",
          "recurrent glimpses at several scales, by policy gradient"),
    Model("cbam", _HERE + "cbam:CBAM", "every", "CBAM", "Woo et al., ECCV 2018",
          "a gate over channels, then one over positions"),
    Model("cbam-arnn", _HERE + "cbam:CBAMARNN", "every", "CBAM+ARNN", _ARNN,
          "CBAM with AttentionRNN as its spatial gate"),
    Model("residual", _HERE + "residual:Residual", "every", "RESIDUAL", "Wang et al., CVPR 2017",
          "a mask from an hourglass; features times 1 + mask"),
    Model("self", _HERE + "self_attention:SelfAttention", "last", "SELF",
          "Vaswani et al., NeurIPS 2017",
          "self-attention of the last map and the query; the map is roll-out"),
    Model("uniform", _HERE + "controls:Uniform", "every", "uniform", "-",
          "control: the same attention everywhere", kind="control"),
    Model("center", _HERE + "controls:Center", "every", "center", "-",
          "control: a Gaussian at the middle of the image", kind="control"),
    Model("random", _HERE + "controls:Random", "every", "random", "-",
          "control: maps drawn once, the same for all images", kind="control"),
    Model("oracle", _HERE + "controls:Oracle", "every", "oracle", "-",
          "control: the true mask, at each map's resolution", kind="control"),
    Model("gradcam", "", "nowhere", "Grad-CAM", "Selvaraju et al., ICCV 2017",
          "after training: Grad-CAM of none", kind="post-hoc",
          explain="mnistattn.models.posthoc:GradCAM"),
    Model("input-gradient", "", "nowhere", "input gradient", "Simonyan et al., ICLR workshop 2014",
          "after training: |d answer / d pixel| of none", kind="post-hoc",
          explain="mnistattn.models.posthoc:InputGradient"),
)  # fmt: skip
MODELS = {row.name: row for row in _ROWS}
_REGISTERED: dict[str, Model] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: the attention (or whole model) is known as `name` in this process.

    InputError if the name is taken. Defining the same class again, as a notebook does, replaces it.
    """

    def enter(cls: type) -> type:
        from mnistattn.models.plugin import check_class

        check_class(cls, f"'{name}'")
        kept = _REGISTERED.get(name)
        again = kept is not None and _place(kept.load()) == _place(cls)
        if name in MODELS or name in _points() or (kept and not again):
            taken = "of the package" if name in MODELS else "registered or installed"
            raise InputError(f"the name '{name}' is taken by a model {taken}: choose another.")
        _REGISTERED[name] = _plugged(name, cls, f"registered by {cls.__module__}")
        return cls

    return enter


def find(name: str | Model) -> Model:
    """The row of a model, by name or reference; InputError, with the nearest name, if none."""
    if isinstance(name, Model):
        return name
    points = _points()
    for rows in (MODELS, _REGISTERED):
        if name in rows and name in points:
            raise InputError(f"the name '{name}' is taken twice: {points[name][0].value}, an entry "
                             "point, would hide another model; rename it there.")  # fmt: skip
        if name in rows:
            return rows[name]
    if name in points:
        if len(points[name]) > 1:
            places = " and ".join(f"{p.value} of {_owner(p)}" for p in points[name])
            raise InputError(f"the name '{name}' is taken twice, by {places}: uninstall one.")
        from mnistattn.models.plugin import load_class

        point = points[name][0]
        return _plugged(name, load_class(point.value), f"entry point of {_owner(point)}")
    if ":" in name or name.endswith(".py"):
        from mnistattn.models.plugin import load_class

        cls = load_class(name)
        known = next((row for row in _REGISTERED.values() if row.attention is cls), None)
        if cls.__name__ in MODELS:
            raise InputError(f"{name} has the name of a model of the package: rename the class.")
        return known or _plugged(cls.__name__, cls, name)
    known_names = [*MODELS, *_REGISTERED, *points]
    raise InputError(
        f"unknown model '{name}': it is one of {', '.join(known_names)}, or FILE.py:CLASS."
        f"{closest(name, known_names)}"
    )


def known_models() -> dict[str, Model | None]:
    """All models by name: the package's, those registered, those of entry points (None for one
    that cannot be loaded)."""
    rows: dict[str, Model | None] = {**MODELS, **_REGISTERED}
    for name in _points():
        try:
            rows[name] = find(name)
        except InputError:
            rows.setdefault(name, None)
    return rows


def choose_options(name: str | Model, given: dict) -> dict:
    """All options of a model, `given` among them; InputError for one that it does not have."""
    row = find(name)
    known = row.defaults()
    for option in given:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise InputError(
                f"model {row.name} has no option '{option}': {takes}.{closest(option, known)}"
            )
    return known | given


def _plugged(name: str, cls: type, origin: str) -> Model:
    """The row of a user's class, by its attributes (see contract.py)."""
    placement = getattr(cls, "placement", "every")
    sizes = isinstance(placement, (tuple, list)) and placement
    words = [word for word in PLACEMENTS if word != "nowhere"]
    if not (sizes and all(isinstance(s, int) for s in sizes)) and placement not in words:
        raise InputError(f"{origin}: placement {placement!r} is impossible: it is 'every', "
                         "'first', 'last', 'whole', or sizes of maps, as (25, 6).")  # fmt: skip
    lines = (inspect.getdoc(cls) or "").splitlines() if cls.__doc__ else []
    summary = getattr(cls, "summary", lines[0] if lines else "")
    return Model(
        name, cls, tuple(sizes) if sizes else placement, name, getattr(cls, "paper", "-"),
        str(summary), kind="plugged", origin=origin,
    )  # fmt: skip


@cache
def _points() -> dict[str, list]:
    """Entry points by name, none of them loaded."""
    found: dict[str, list] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _owner(point) -> str:
    return point.dist.name if point.dist else "an unknown package"


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
