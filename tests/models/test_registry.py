"""Models that are plugged in, by decorator, entry point or file; and names that clash."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mnistattn
from mnistattn.errors import InputError
from mnistattn.models import registry
from mnistattn.models.network import Network, build
from mnistattn.models.registry import MODELS, choose_options, find, known_models, register

SOURCE = '''
import torch
from torch import nn


class Mine(nn.Module):
    """A gate of a test.

    More about it.
    """

    def __init__(self, channels, query_dim, *, last, scale=2.0):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, x, query):
        return torch.sigmoid(self.score(x))
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """A registry that no other test sees, without entry points, in a folder of its own."""
    modules = set(sys.modules)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(registry, "entry_points", lambda group: ())
    monkeypatch.chdir(tmp_path)
    registry._points.cache_clear()
    yield
    registry._points.cache_clear()
    for name in set(sys.modules) - modules:
        if name.startswith("mnistattn_plugin_") or "_of_a_test" in name:
            del sys.modules[name]


@pytest.fixture
def install(monkeypatch, tmp_path):
    """A function of a distribution's name, its entry points {name: "module:Class"} and its modules
    {name: text}, that puts it on sys.path as an installed package would be."""

    def put(name: str, points: dict, modules: dict, group: str = registry.GROUP) -> Path:
        site = tmp_path / f"site-{name}"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {value}" for key, value in points.items()]
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(lines) + "\n")
        for module, text in modules.items():
            (site / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        monkeypatch.setattr(registry, "entry_points", importlib.metadata.entry_points)
        registry._points.cache_clear()
        return site

    return put


def new_class(source: str = SOURCE, module: str = "notebook_of_a_test") -> type:
    """Mine, defined anew, as by running a notebook's cell again."""
    names = {"__name__": module}
    exec(source, names)
    return names["Mine"]


def refused(name: str) -> str:
    with pytest.raises(InputError) as caught:
        find(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def others_work(*hidden: str) -> None:
    for name in MODELS.keys() - set(hidden):
        assert find(name) is MODELS[name]
        assert known_models()[name] is MODELS[name]


# ---------------------------------------------------------------------------------- the decorator


def test_a_registered_class_is_found_and_built():
    cls = new_class()
    assert register("mine")(cls) is cls
    row = find("mine")
    assert (row.name, row.kind, row.placement, row.load()) == ("mine", "plugged", "every", cls)
    assert (row.summary, row.paper) == ("A gate of a test.", "-")
    assert "notebook_of_a_test" in row.origin
    assert known_models() == {**MODELS, "mine": row}
    assert choose_options("mine", {"scale": 3}) == {"scale": 3}
    network = build("mine", 100, 10, 5, scale=1.0)
    assert isinstance(network, Network)
    assert [type(a) for a in network.attention.values()] == [cls] * 4
    with pytest.raises(InputError, match="model mine has no option 'scal'.*Did you mean 'scale'"):
        build("mine", 100, 10, 5, scal=1.0)


def test_register_is_a_name_of_the_package():
    @mnistattn.register("mine")
    class Mine(nn.Module):
        paper = "Me, 2026"
        summary = "one line"
        placement = (25, 6)

        def forward(self, x, query):
            return x.mean(1, True)

    assert find("mine").load() is Mine
    row = find("mine")
    assert (row.paper, row.summary, row.placement) == ("Me, 2026", "one line", (25, 6))


def test_a_class_without_a_docstring_has_an_empty_summary():
    register("mine")(new_class(SOURCE.replace('"""', "'''").replace("'''A gate", "x = '''A gate")))
    assert find("mine").summary == ""


@pytest.mark.parametrize("name", ["ctx", "none", "oracle", "gradcam"])
def test_a_name_of_the_package_is_taken(name):
    with pytest.raises(InputError, match=f"'{name}' is taken by a model of the package"):
        register(name)(new_class())
    assert find(name) is MODELS[name] and not registry._REGISTERED


def test_a_registered_name_is_taken_by_any_other_class():
    first = register("mine")(new_class())
    for other in (
        new_class(module="another_of_a_test"),
        new_class(SOURCE + "\n\nclass Other(Mine):\n    pass\n\n\nMine = Other\n"),
    ):
        with pytest.raises(InputError, match="'mine' is taken by a model registered or installed"):
            register("mine")(other)
        assert find("mine").load() is first
        register("theirs")(other)
        assert find("theirs").load() is other
        del registry._REGISTERED["theirs"]


def test_the_same_class_defined_again_replaces_it():
    register("mine")(new_class())
    second = register("mine")(new_class(SOURCE.replace("scale=2.0", "width=5")))
    assert find("mine").load() is second and find("mine").defaults() == {"width": 5}
    assert list(registry._REGISTERED) == ["mine"]


@pytest.mark.parametrize("thing", [int, len, nn.Linear(1, 1), type("Bare", (nn.Module,), {})])
def test_what_is_no_module_class_is_not_registered(thing):
    with pytest.raises(InputError, match="'mine' (is no class|has no forward)"):
        register("mine")(thing)
    assert not registry._REGISTERED


def test_a_wrong_name_is_told_the_nearest_registered_one():
    register("peripheral")(new_class())
    said = refused("periferal")
    assert said.startswith("unknown model 'periferal': it is one of none, san,")
    assert ", peripheral, or FILE.py:CLASS" in said
    assert said.endswith("Did you mean 'peripheral'?")


@pytest.mark.parametrize(
    "placement", ["everywhere", "nowhere", "", 25, (), ("25",), (25, 6.0), ["every"], None]
)
def test_an_impossible_placement_is_refused(placement):
    cls = new_class()
    cls.placement = placement
    with pytest.raises(InputError, match="placement .* is impossible: it is 'every', 'first', "):
        register("mine")(cls)
    assert not registry._REGISTERED


@pytest.mark.parametrize("placement", ["every", "last", "whole", (25, 6), [25]])
def test_a_possible_placement_is_kept(placement):
    cls = new_class()
    cls.placement = placement
    register("mine")(cls)
    assert find("mine").placement == (tuple(placement) if placement == [25] else placement)


# ------------------------------------------------------------------------------ file and module


def test_a_class_of_a_file_is_a_row():
    Path("mine.py").write_text(SOURCE)
    for name in ("mine.py", "mine.py:Mine"):
        row = find(name)
        assert (row.name, row.kind, row.origin) == ("Mine", "plugged", name)
    torch.manual_seed(0)
    logits, out = build("mine.py", 100, 10, 5)(torch.rand(2, 3, 100, 100), torch.arange(2))
    assert logits.shape == (2, 5) and len(out["attention"]) == 4
    assert "Mine" not in known_models()


def test_a_class_of_a_module_is_a_row():
    Path("module_of_a_test.py").write_text(SOURCE)
    assert find("module_of_a_test:Mine").name == "Mine"


def test_a_file_that_registers_its_class_is_known_by_that_name():
    Path("mine.py").write_text(
        SOURCE.replace("\n\nclass", "\nimport mnistattn\n\n\n@mnistattn.register('gate')\nclass")
    )
    for name in ("mine.py", "mine.py:Mine", "mine.py"):  # loaded three times
        assert find(name).name == "gate"
        assert find(name) is find("gate")


@pytest.mark.parametrize("name", ["center", "none", "gradcam"])
def test_a_class_with_the_name_of_a_model_of_the_package_is_refused(name):
    Path("file_of_a_test.py").write_text(SOURCE.replace("Mine", name))
    for reference in ("file_of_a_test.py", f"file_of_a_test.py:{name}", f"file_of_a_test:{name}"):
        said = refused(reference)
        assert said == f"{reference} has the name of a model of the package: rename the class."
    assert find(name) is MODELS[name]


# --------------------------------------------------------------------------------- entry points


def test_an_entry_point_is_found_and_built(install):
    install("gates", {"gate": "gates_of_a_test:Mine"}, {"gates_of_a_test": SOURCE})
    row = find("gate")
    assert (row.name, row.kind, row.origin) == ("gate", "plugged", "entry point of gates")
    assert row.load() is sys.modules["gates_of_a_test"].Mine
    network = build("gate", 100, 10, 5)
    assert [type(a) for a in network.attention.values()] == [row.load()] * 4
    assert known_models()["gate"] == row
    others_work()


def test_an_entry_point_is_not_imported_before_it_is_asked_for(install):
    install("gates", {"gate": "gates_of_a_test:Mine"}, {"gates_of_a_test": SOURCE})
    find("ctx")
    register("mine")(new_class())
    find("mine")
    said = refused("gat")
    assert said.endswith("Did you mean 'gate'?") and ", gate, or FILE.py" in said
    assert "gates_of_a_test" not in sys.modules
    find("gate")
    assert "gates_of_a_test" in sys.modules


def test_entry_points_of_other_groups_are_none_of_ours(install):
    install("gates", {"gate": "gates_of_a_test:Mine"}, {"gates_of_a_test": SOURCE}, "console")
    assert "unknown model 'gate'" in refused("gate")
    assert known_models() == MODELS


def test_an_entry_point_with_the_name_of_a_model_of_the_package_hides_nothing(install):
    points = {"ctx": "gates_of_a_test:Mine", "gate": "gates_of_a_test:Mine"}
    install("gates", points, {"gates_of_a_test": SOURCE})
    said = refused("ctx")
    assert said.startswith("the name 'ctx' is taken twice: gates_of_a_test:Mine, an entry point")
    assert find("gate").name == "gate"
    assert known_models()["ctx"] is MODELS["ctx"]
    others_work("ctx")


def test_an_entry_point_with_a_registered_name_hides_nothing(install):
    register("gate")(new_class())
    install("gates", {"gate": "gates_of_a_test:Mine"}, {"gates_of_a_test": SOURCE})
    assert "the name 'gate' is taken twice: gates_of_a_test:Mine" in refused("gate")
    assert known_models()["gate"] is registry._REGISTERED["gate"]
    others_work()


def test_an_installed_name_cannot_be_registered(install):
    install("gates", {"gate": "gates_of_a_test:Mine"}, {"gates_of_a_test": SOURCE})
    with pytest.raises(InputError, match="'gate' is taken by a model registered or installed"):
        register("gate")(new_class())
    assert find("gate").origin == "entry point of gates"


def test_two_distributions_with_one_name_are_both_named(install):
    install("gates", {"gate": "gates_of_a_test:Mine"}, {"gates_of_a_test": SOURCE})
    install(
        "doors",
        {"gate": "doors_of_a_test:Mine", "door": "doors_of_a_test:Mine"},
        {"doors_of_a_test": SOURCE},
    )
    said = refused("gate")
    assert said.startswith("the name 'gate' is taken twice, by ") and said.endswith(
        "uninstall one."
    )
    assert "gates_of_a_test:Mine of gates" in said and "doors_of_a_test:Mine of doors" in said
    assert "gates_of_a_test" not in sys.modules
    assert find("door").name == "door"
    assert known_models()["gate"] is None
    others_work()


@pytest.mark.parametrize(
    ("value", "text", "said"),
    [
        ("gates_of_a_test:Mine", "\nraise RuntimeError('no GPU')\n", "line 2, .*no GPU"),
        ("gates_of_a_test:Mine", "x = (\n", "SyntaxError"),
        ("gates_of_a_test:Mien", SOURCE, "no class 'Mien'.*Did you mean 'Mine'"),
        ("gates_of_a_test:torch", SOURCE, "no class of torch.nn.Module"),
        ("gone_of_a_test:Mine", SOURCE, "no module 'gone_of_a_test'"),
        ("gates_of_a_test:Mine", SOURCE + "    placement = 3\n", "placement 3 is impossible"),
        ("gates_of_a_test:Mine", "import sys\nsys.exit()\n", "SystemExit"),
    ],
)
def test_a_broken_entry_point_is_none_and_the_others_work(install, value, text, said):
    install("gates", {"gate": value}, {"gates_of_a_test": text})
    install("doors", {"door": "doors_of_a_test:Mine"}, {"doors_of_a_test": SOURCE})
    rows = known_models()
    assert rows["gate"] is None and rows["door"].name == "door"
    with pytest.raises(InputError, match=said):
        find("gate")
    others_work()
