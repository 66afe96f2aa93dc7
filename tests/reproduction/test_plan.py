"""The experiments as cells of a sweep: what is made, what is kept, what is refused, how long."""

import importlib.util
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mnistattn.cli.sweep import command as sweep_command
from mnistattn.cli.sweep import parse_models
from mnistattn.dataset.read import read_card
from mnistattn.errors import InputError
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.sweep import SweepError
from mnistattn.reproduction import plan as module
from mnistattn.reproduction.plan import (
    Expected,
    Request,
    cells,
    check,
    duration,
    expect,
    in_words,
    make_data,
    run,
    step_seconds,
)
from mnistattn.reproduction.report import report
from mnistattn.reproduction.tables import DATA, QUICK, TABLES, Table, chosen

_spec = importlib.util.spec_from_file_location("invent", Path(__file__).with_name("invent.py"))
assert _spec and _spec.loader
i = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(i)

COUNTS = (14, 3, 4)
STROKES = {"digits": "strokes", "backgrounds": "textures"}
READINGS = ["mref", "mdist", "mdist-gaussian", "mbg", "mbg-all"]


def quiet(line: str) -> None:
    pass


def tree(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def request_for(*names: str, data: Path = Path("data"), out: Path = Path("runs"), **more):
    given = {"counts": COUNTS, "sources": STROKES, "seeds": (0,)} | more
    return Request(chosen(names), data, out, **given)


def only(table: str, *data: str) -> Table:
    """A table with other data sets."""
    return replace(TABLES[table], data=data)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The data sets of Table 1 and of the readings, a few images each."""
    home = tmp_path_factory.mktemp("sets")
    make_data(request_for("table1", "readings", data=home / "data"), quiet, False)
    return home / "data"


@pytest.fixture(autouse=True)
def uncounted(monkeypatch):
    """Operations, which a plan counts to try a model on its maps, are not counted here."""
    monkeypatch.setattr("mnistattn.models.cost.flops_per_image", lambda *_: 1)


@pytest.fixture
def timed(monkeypatch) -> list:
    """Every step takes half a second; what was asked for."""
    asked = []
    monkeypatch.setattr(module, "step_seconds", lambda *given: asked.append(given) or 0.5)
    return asked


# ------------------------------------------------------------------------------- what is asked for


def test_each_model_once_on_each_data_set():
    asked = request_for("all").experiments()
    assert set(asked) == set(DATA)
    assert asked["mbg"] == list(TABLES["table1"].models)  # of three tables
    assert asked["mbg-all"] == [("ctx", {}), ("arnn", {})]
    assert [name for name, _ in asked["mbg-up"]] == ["none", "arnn", "brnn", "brnn"]
    assert list(request_for("table3", "multi").experiments()) == ["mbg-up", "mbg-multi"]
    assert [row.name for row in request_for("table2").rows()] == ["mbg", "mbg-balanced"]


def test_a_quick_look_is_at_the_tables_quick_data_sets():
    quick = request_for("all", quick=True)
    assert {t.name: t.data for t in quick.shown()} == {n: t.quick for n, t in TABLES.items()}
    assert [t.data for t in request_for("all").shown()] == [t.data for t in TABLES.values()]
    assert set(quick.experiments()) == {n for t in TABLES.values() for n in t.quick}


def test_the_recipe_of_a_data_set():
    plain = request_for("readings", changes={"epochs": None, "batch_size": 8, "lr": None})
    assert plain.recipe_of(DATA["mbg"]) == make_recipe("fast", batch_size=8)
    assert plain.recipe_of(DATA["mbg-all"]) == make_recipe("fast", batch_size=8, queries="all")
    paper = request_for("readings", recipe="paper")
    assert paper.recipe_of(DATA["mbg"]) == make_recipe("paper")
    quick = request_for("readings", quick=True, changes={"epochs": 5})
    changed = {k: v for k, v in QUICK.items() if k != "recipe"} | {"epochs": 5}
    assert quick.recipe_of(DATA["mbg"]) == make_recipe("fast", **changed)
    # What is asked is what makes this reading: a quick look keeps it.
    assert quick.recipe_of(DATA["mbg-all"]) == make_recipe("fast", **changed | {"queries": "all"})
    for wrong in ({"epochs": 0}, {"batch_size": 1}, {"lr": -1.0}):
        with pytest.raises(InputError, match="are impossible"):
            request_for("multi", changes=wrong).recipe_of(DATA["mbg-multi"])


# ----------------------------------------------------------------------------------- the data sets


def test_data_sets_that_are_missing_are_made(home):
    assert sorted(p.name for p in home.iterdir()) == sorted(READINGS)
    for name in READINGS:
        card, row = read_card(home / name), DATA[name]
        assert card.raw["spec"] == row.spec and card.raw["seed"] == 0
        assert card.raw["sources"]["digits"]["source"] == "strokes"
        train = 2 if name == "mbg-all" else 14  # a seventh: as many pairs
        wanted = {"train": train, "val": 3, "test": 4}
        assert {split: entry["count"] for split, entry in card.splits.items()} == wanted
    tests = [read_card(home / name).digest("test") for name in READINGS]
    assert tests[3] == tests[4] and len(set(tests)) == 4  # one test set for both readings


def test_data_sets_that_are_there_are_kept(home):
    before = tree(home)
    make_data(request_for("table1", "readings", data=home), quiet, False)
    loose = {"digits": "auto", "backgrounds": "textures"}
    make_data(request_for("readings", data=home, sources=loose), quiet, False)
    make_data(request_for("readings", data=home, sources=None), quiet, False)
    assert tree(home) == before


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """An MBG of COUNTS on four photos."""
    root = tmp_path_factory.mktemp("photos")
    for k, folder in enumerate(("train", "val", "test")):
        (root / "here" / folder).mkdir(parents=True)
        picture = Image.linear_gradient("L").rotate(40 * k).convert("RGB")
        picture.save(root / "here" / folder / "a.png")
    shutil.copytree(root / "here", root / "there")
    Image.radial_gradient("L").convert("RGB").save(root / "there/test/a.png")
    sources = {"digits": "strokes", "backgrounds": str(root / "here")}
    one = request_for("readings", data=root / "data", sources=sources)
    make_data(one, quiet, False)
    make_data(one, quiet, False)
    return root


REFUSED = [
    ("mref", "mdist", {}),
    ("mdist", "mdist-gaussian", {}),
    ("mdist-gaussian", "mdist", {}),
    ("mbg", "mbg-balanced", {}),
    ("mbg", "mbg-all", {}),  # of as many images
    ("mbg-all", "mbg", {}),
    ("mbg", "mbg", {"counts": (14, 3, 5)}),
    ("mbg", "mbg", {"counts": (14, 2, 4)}),
    ("mbg", "mbg", {"counts": (15, 3, 4)}),
    ("mbg-all", "mbg-all", {"counts": (28, 3, 4)}),
    ("mbg", "mbg", {"sources": STROKES | {"digits": "mnist"}}),
    ("mbg", "mbg", {"sources": STROKES | {"backgrounds": "sun397"}}),
    ("mbg", "mbg", {"sources": STROKES | {"backgrounds": "photos"}}),
]


@pytest.mark.parametrize(("there", "name", "more"), REFUSED, ids=str)
def test_a_folder_of_another_data_set_is_refused(home, tmp_path, timed, there, name, more):
    shutil.copytree(home / there, tmp_path / name)
    before = tree(tmp_path)
    asked = replace(request_for("multi", data=tmp_path, **more), tables=[only("multi", name)])
    for act in (lambda: make_data(asked, quiet, False), lambda: expect(asked, "cpu")):
        with pytest.raises(InputError, match=f"{tmp_path / name} .*give another --data"):
            act()
    assert tree(tmp_path) == before


def test_data_sets_of_another_seed_are_refused(home, tmp_path, timed):
    """But for the seed that is asked for: then it is the data set."""
    shutil.copytree(home / "mbg", tmp_path / "mbg")
    card = json.loads((tmp_path / "mbg/dataset.json").read_text())
    (tmp_path / "mbg/dataset.json").write_text(json.dumps(card | {"seed": 7}))
    asked = replace(request_for("readings", data=tmp_path), tables=[only("readings", "mbg")])
    words = f"{tmp_path / 'mbg'} was made with seed 7, not 0: give --data-seed 7, or another --data"
    for act in (check, lambda r: make_data(r, quiet, False), lambda r: expect(r, "cpu"), cells):
        with pytest.raises(InputError, match=words):
            act(asked)
        act(replace(asked, data_seed=7))


def test_data_sets_are_made_with_the_seed(tmp_path):
    asked = request_for("multi", data=tmp_path, data_seed=5, counts=(2, 2, 2))
    make_data(asked, quiet, False)
    make_data(asked, quiet, False)
    assert read_card(tmp_path / "mbg-multi").raw["seed"] == 5


def test_digits_of_one_pool_are_refused(home, tmp_path):
    shutil.copytree(home / "mref", tmp_path / "mref")
    card = json.loads((tmp_path / "mref/dataset.json").read_text())
    card["sources"]["digits"]["split"] = "pooled"
    (tmp_path / "mref/dataset.json").write_text(json.dumps(card))
    asked = replace(request_for("table1", data=tmp_path), tables=[only("table1", "mref")])
    with pytest.raises(InputError, match="has digits of one pool in all splits: give another"):
        make_data(asked, quiet, False)


def test_photos_are_no_textures(photos):
    with pytest.raises(InputError, match="has other backgrounds than 'textures'"):
        make_data(request_for("readings", data=photos / "data"), quiet, False)


def test_other_photos_are_other_backgrounds(photos):
    for other in (str(photos / "there"), "sun397"):
        sources = {"digits": "strokes", "backgrounds": other}
        with pytest.raises(InputError, match="has other backgrounds than"):
            make_data(request_for("readings", data=photos / "data", sources=sources), quiet, False)


def test_what_is_no_data_set_is_refused(tmp_path, timed):
    (tmp_path / "mbg-multi").mkdir()
    (tmp_path / "mbg-multi" / "notes.txt").touch()
    for act in (lambda r: make_data(r, quiet, False), lambda r: expect(r, "cpu")):
        with pytest.raises(InputError, match="is no data set"):
            act(request_for("multi", data=tmp_path))


# --------------------------------------------------------------------------------------- the cells


def test_cells(home, tmp_path):
    asked = request_for("table1", "readings", data=home, out=tmp_path / "runs", seeds=(1, 0))
    found = cells(asked)
    assert len(found) == 2 * (4 * 7 + 2)
    assert [cell.seed for cell in found] == [0] * 30 + [1] * 30
    assert len({cell.name for cell in found}) == len({cell.run for cell in found}) == 60
    for cell in found:
        name = cell.data.name
        assert cell.data == (home / name).absolute()
        assert cell.run.parent == tmp_path / "runs" / name
        variant = DATA[name].variant
        assert cell.name == f"{name}/{variant}-{cell.model}-fast-seed{cell.seed}"
        assert cell.run.name == cell.name.partition("/")[2]
        assert cell.recipe["queries"] == ("all" if name == "mbg-all" else None)
        assert cell.state == "to do"
    by_data = {name: [c.model for c in found if c.data.name == name and c.seed == 0]
               for name in READINGS}  # fmt: skip
    assert by_data["mdist-gaussian"] == by_data["mbg"] == [n for n, _ in TABLES["table1"].models]
    assert by_data["mbg-all"] == ["ctx", "arnn"]
    assert not list(tmp_path.iterdir())


def test_cells_of_a_quick_look(home, tmp_path):
    asked = request_for("readings", data=home, out=tmp_path, quick=True, changes={"lr": 0.1})
    recipes = {cell.data.name: cell.recipe for cell in cells(asked)}
    wanted = QUICK | {"lr": 0.1}
    assert recipes == {"mbg": wanted, "mbg-all": wanted | {"queries": "all"}}


def test_cells_need_their_data(tmp_path):
    with pytest.raises(InputError, match="is no data set"):
        cells(request_for("multi", data=tmp_path))


def test_run(home, tmp_path, monkeypatch):
    """All cells go to the engine with its options; samples are counted on mbg-multi alone."""
    said, looked = [], []

    def engine(todo, **options):
        said.append(([cell.name for cell in todo], options))
        return [{"run": str(cell.run)} for cell in todo]

    monkeypatch.setattr(module, "run_cells", engine)
    monkeypatch.setattr(module, "coverage_of_run", lambda run, data, **options: looked.append(
        (run, data, options)))  # fmt: skip
    shutil.copytree(home, tmp_path / "data")
    asked = request_for("readings", "multi", data=tmp_path / "data", out=tmp_path / "runs",
                        seeds=(0, 2))  # fmt: skip
    make_data(asked, quiet, False)
    todo = cells(asked)
    found = run(todo, device="cpu", say=quiet, progress=False, workers=3)
    assert [result["run"] for result in found] == [str(cell.run) for cell in todo]
    ((names, options),) = said
    assert options == {"device": "cpu", "say": quiet, "progress": False, "workers": 3}
    assert [n.rpartition("seed")[2] for n in names] == ["0"] * 6 + ["2"] * 6
    runs = tmp_path / "runs" / "mbg-multi"
    assert [(r, d.name) for r, d, _ in looked] == [
        (runs / f"mbg-multi-{model}-fast-seed{seed}", "mbg-multi")
        for seed in (0, 2) for model in ("arnn", "arnn-sampled")
    ]  # fmt: skip
    assert all(options["device"] == "cpu" for *_, options in looked)
    assert read_card(tmp_path / "data/mbg-multi").splits["train"]["count"] == 14


def test_a_run_that_fails_hides_no_samples(home, tmp_path, monkeypatch):
    """What the others' samples cover is counted nevertheless."""
    shutil.copytree(home, tmp_path / "data")
    asked = request_for("multi", data=tmp_path / "data", out=tmp_path / "runs")
    looked = []

    def engine(todo, **options):
        good, bad = todo
        good.run.mkdir(parents=True)
        (good.run / "result.json").write_text("{}")
        raise SweepError("1 of 2 runs failed.", [{"run": str(good.run)}, None])

    monkeypatch.setattr(module, "run_cells", engine)
    monkeypatch.setattr(module, "coverage_of_run", lambda run, *_, **__: looked.append(run))
    make_data(asked, quiet, False)
    with pytest.raises(SweepError):
        run(cells(asked), device="cpu", say=quiet, progress=False)
    assert [run.name for run in looked] == ["mbg-multi-arnn-fast-seed0"]


def test_a_quick_look_stands_in_nobodys_way(home, tmp_path):
    """Its runs are others than the full ones, so they need folders of their own."""
    runs = [
        {cell.run for cell in cells(request_for("readings", data=home, out=tmp_path, quick=quick))}
        for quick in (True, False)
    ]
    assert len(runs[0]) == len(runs[1]) == 4 and not runs[0] & runs[1]


@pytest.mark.parametrize("table", ["table3", "readings"])
def test_printed_lines_have_the_same_folders(home, tmp_path, table):
    """A sweep by a report's line, and `reproduce`, find each other's runs."""
    asked = request_for(table, data=tmp_path / "data", out=Path("runs/reproduce"))
    if table == "readings":
        shutil.copytree(home, tmp_path / "data")
    make_data(asked, quiet, False)
    for name, models in asked.experiments().items():
        for model, options in models:
            changed = {"changed_options": options} if options else {}
            i.invent(tmp_path / "results", name, model, 0, 0.5, None, **changed)
    text = report(asked.tables, i.collected(tmp_path / "results"))
    found = set()
    for name, lines in i.commands(text).items():
        for line in lines:
            if " sweep " in line:
                given = sweep_command.make_context("sweep", shlex.split(line)[2:]).params
                found |= {cell.run for cell in module.plan(
                    parse_models(given["models"]), [tmp_path / "data" / name], [0],
                    recipe=given["recipe"], queries=given["queries"], out=given["out"],
                )}  # fmt: skip
    assert found == {cell.run for cell in cells(asked)}


# ------------------------------------------------------------------------------------ how long


def test_expected_without_data(tmp_path, timed):
    full = (30_000, 10_000, 10_000)
    asked = request_for("readings", "table3", data=tmp_path / "a", out=tmp_path / "b",
                        counts=full, seeds=(0, 1, 2))  # fmt: skip
    found = {(e.data, e.model, str(e.options)): e for e in expect(asked, "cpu")}
    assert not list(tmp_path.iterdir())
    assert len(found) == 8 and {e.left for e in found.values()} == {3}
    assert found["mbg", "ctx", "{}"].seconds == 0.5 * 12 * 938  # 30,000 in batches of 32
    assert found["mbg-all", "ctx", "{}"].seconds == 0.5 * 12 * 938  # 4286 times 7
    # Each model is timed once a size: not again for the second reading.
    assert [(model, options, size) for model, options, size, *_ in timed] == [
        ("none", {}, 224), ("arnn", {}, 224), ("brnn", {"block": 3}, 224),
        ("brnn", {}, 224), ("ctx", {}, 100), ("arnn", {}, 100),
    ]  # fmt: skip
    quick = expect(request_for("multi", quick=True, counts=full, data=tmp_path), "cpu")
    assert [e.seconds for e in quick] == [0.5 * 2 * 1875] * 2


def test_expected_leaves_out_what_is_done(home, tmp_path, timed, monkeypatch):
    from mnistattn.reproduction.plan import plan

    def mostly(models, data, seeds, **options):
        return [
            cell.__class__(**vars(cell) | {"state": "done"})
            if cell.model == "ctx" or cell.seed == 0 else cell
            for cell in plan(models, data, seeds, **options)
        ]  # fmt: skip

    monkeypatch.setattr(module, "plan", mostly)
    (tmp_path / "data").mkdir()
    shutil.copytree(home / "mbg", tmp_path / "data/mbg")  # the other reading is missing
    asked = request_for("readings", data=tmp_path / "data", out=tmp_path / "runs", seeds=(0, 1, 2))
    assert [(e.data, e.model, e.left) for e in expect(asked, "cpu")] == [
        ("mbg", "ctx", 0), ("mbg", "arnn", 2), ("mbg-all", "ctx", 3), ("mbg-all", "arnn", 3),
    ]  # fmt: skip
    # What has no run left is not timed.
    assert [e.seconds for e in expect(asked, "cpu")] == [0, *[0.5 * 12] * 3]


@pytest.mark.parametrize("model", ["ctx", "arnn-sampled"])
def test_timing_a_step_leaves_torch_alone(model):
    """Random numbers after it are those that would have come; so weights do not depend on it."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for recipe in (make_recipe("fast", batch_size=4), make_recipe("paper", batch_size=4)):
        assert 0 < step_seconds(model, {}, 100, recipe, torch.device("cpu")) < 60
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (0.2, "0 s"), (40, "40 s"), (59.4, "59 s"), (60, "1 min"), (89, "1 min"),
     (12 * 60, "12 min"), (3540, "59 min"), (3599, "1 h 00 min"), (3900, "1 h 05 min"),
     (100 * 3600, "100 h 00 min"), (59.7, "1 min")],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_estimate_in_words():
    rows = [Expected("mbg-up", "brnn", {"block": 3}, 2, 1800.0), Expected("mref", "san", {}, 0, 90)]
    text = in_words(rows, False)
    lines = [line.split("  ") for line in text.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines[:3]] == [
        ["data set", "model", "runs left", "a run", "all of them"],
        ["mbg-up", "brnn block=3", "2", "30 min", "1 h 00 min"],
        ["mref", "san", "0", "2 min", "0 s"],
    ]  # fmt: skip
    assert text.splitlines()[-1].startswith("about 1 h 00 min of training on this machine")
    assert in_words(rows, True).splitlines()[-1].startswith("at most 1 h 00 min of training")
