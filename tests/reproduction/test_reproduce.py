"""`mnistattn reproduce` from its words to its files, on a few images; and what it refuses."""

import contextlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mnistattn import cli as cli_module
from mnistattn.cli import COMMANDS
from mnistattn.dataset.read import read_card
from mnistattn.errors import MnistattnError
from mnistattn.leaderboard.collect import collect
from mnistattn.reproduction.layers import layers
from mnistattn.reproduction.report import report, rows_of
from mnistattn.reproduction.tables import TABLES, chosen

_spec = importlib.util.spec_from_file_location("invent", Path(__file__).with_name("invent.py"))
assert _spec and _spec.loader
i = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(i)

SMALL = ("--digits strokes --train 32 --val 8 --test 12 --epochs 1 --batch-size 16 --seeds 0 "
         "--device cpu --workers 0")  # fmt: skip
FEW = "--digits strokes --train 8 --val 4 --test 4 --seeds 0 --device cpu --workers 0"
NAMES = [f"mbg-multi-{model}-fast-seed0" for model in ("arnn", "arnn-sampled")]


def call(line: str, folder: Path) -> tuple[int, str, str]:
    """A command line, as the console script has it -> (exit code, standard output, error)."""
    out, err = io.StringIO(), io.StringIO()
    before, arguments = os.getcwd(), sys.argv
    try:
        os.chdir(folder)
        sys.argv = ["mnistattn", *shlex.split(line)]
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            cli_module.main()
    finally:
        os.chdir(before)
        sys.argv = arguments
    return left.value.code, out.getvalue(), err.getvalue()


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_mtime_ns, p.stat().st_ino)
            for p in root.rglob("*") if p.is_file()}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quicker():
    """One thread, as all is small; and operations, which takes longest, are not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        for module in ("models.cost", "evaluation.run"):
            patched.setattr(f"mnistattn.{module}.flops_per_image", lambda *_: 1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_round, quicker) -> tuple[Path, str, str]:
    """The folder in which Figure 6a was made, and what was said. Read it, never change it."""
    home = tmp_path_factory.mktemp("made")
    code, out, err = call(f"reproduce multi {SMALL}", home)
    assert code == 0, err
    return home, out, err


@pytest.fixture
def timed(monkeypatch) -> list:
    """No step is timed: each takes a second."""
    asked = []
    monkeypatch.setattr(
        "mnistattn.reproduction.plan.step_seconds", lambda *given: asked.append(given) or 1.0
    )
    return asked


def runs_of(home: Path) -> dict:
    return {name: json.loads((home / "runs/reproduce/mbg-multi" / name / "result.json").read_text())
            for name in NAMES}  # fmt: skip


# ---------------------------------------------------------------------------------- what it makes


def test_it_is_a_command():
    assert "reproduce" in COMMANDS


def test_its_files(made):
    home, out, err = made
    assert sorted(p.name for p in (home / "data/reproduce").iterdir()) == ["mbg-multi"]
    assert sorted(p.name for p in (home / "runs/reproduce/mbg-multi").iterdir()) == NAMES
    names = {p.name for p in (home / "runs/reproduce").iterdir()}
    assert names == {"mbg-multi", "reproduction.md", "curves-mbg-multi.png"}
    written = (home / "runs/reproduce/reproduction.md").read_text()
    assert out.rstrip() in written
    assert written.endswith("\n![Learning curves on mbg-multi](curves-mbg-multi.png)\n")
    with Image.open(home / "runs/reproduce/curves-mbg-multi.png") as picture:
        picture.load()
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    for name in NAMES:
        files = {p.name for p in (home / "runs/reproduce/mbg-multi" / name).iterdir()}
        assert files >= {"result.json", "curve.json", "coverage.json", "samples.png"}
    assert "Traceback" not in err
    assert "of training on this machine" in err and "\nwritten: " in err


def test_its_tables(made):
    home, out, _ = made
    rows, covered = i.parts(out)[TABLES["multi"].title, "mbg-multi"]
    assert [row[0] for row in rows[1:]] == [row[0] for row in covered[1:]] == ["ARNN", "ARNN~"]
    for row, line, (name, result) in zip(rows[1:], covered[1:], runs_of(home).items(),
                                         strict=True):  # fmt: skip
        scores = result["scores"]
        assert row[1] == ("drawn digits on textures; fast, 1 epoch, queries one, batch size 16")
        assert row[2] == "1" and row[4:6] == ["-", "-"]
        assert row[3].startswith(f"{100 * scores['accuracy']['value']:.2f} (")
        assert row[6].startswith(f"{scores['masks']['correctness']['value']:.3f} (")
        file = home / "runs/reproduce/mbg-multi" / name / "coverage.json"
        counted = json.loads(file.read_text())["coverage"]
        assert line[3] == str(counted["samples"]) == {"ARNN": "1", "ARNN~": "20"}[row[0]]
        assert line[2] == f"{counted['right']['value']:.3f}"
        assert line[4].startswith(f"{counted['covered']['value']:.3f} +- ")
    assert rows[1][1:] != rows[2][1:]


def test_the_printed_lines_make_the_same(made, tmp_path):
    """The data set by its digests; and its runs are those that a sweep takes for done."""
    home, out, _ = made
    digest, make, sweep = i.commands(out)["mbg-multi"]
    code, _, err = call(make.removeprefix("mnistattn "), tmp_path)
    assert code == 0, err
    new, old = (read_card(p / "data/reproduce/mbg-multi") for p in (tmp_path, home))
    assert {s: e["digest"] for s, e in new.splits.items()} == {
        s: e["digest"] for s, e in old.splits.items()
    }
    assert digest == f"# test digest {new.digest('test')[:16]}"
    code, out, err = call(f"{sweep.removeprefix('mnistattn ')} --dry-run", tmp_path)
    assert code == 0 and out.endswith("2 runs, 0 of them done\n"), err
    shutil.copytree(home / "runs", tmp_path / "runs")
    code, out, err = call(f"{sweep.removeprefix('mnistattn ')} --dry-run", tmp_path)
    assert code == 0 and out.endswith("2 runs, 2 of them done\n"), err


def test_again_does_nothing(made, tmp_path, timed):
    home, first, _ = made
    shutil.copytree(home, tmp_path / "x")
    before = tree(tmp_path / "x")
    code, out, err = call(f"reproduce multi {SMALL}", tmp_path / "x")
    assert code == 0 and "2 of 2 runs are there already" in err
    assert out == first
    after = tree(tmp_path / "x")
    changed = {name for name in before if before[name] != after[name]}
    assert after.keys() == before.keys()
    assert changed <= {f"runs/reproduce/{n}" for n in ("reproduction.md", "curves-mbg-multi.png")}


def test_a_dry_run_of_what_is_there(made, timed):
    home, *_ = made
    before = tree(home)
    code, out, err = call(f"reproduce multi {SMALL} --dry-run", home)
    assert (code, err) == (0, "") and tree(home) == before
    rows = [line.split("  ") for line in out.splitlines()[1:3]]
    assert [[c.strip() for c in row if c.strip()] for row in rows] == [
        ["mbg-multi", "arnn", "0", "0 s", "0 s"], ["mbg-multi", "arnn-sampled", "0", "0 s", "0 s"],
    ]  # fmt: skip
    assert "about 0 s of training" in out
    code, out, _ = call(f"reproduce multi {SMALL} --seeds 0-2 --dry-run", home)
    assert "about 8 s of training" in out and tree(home) == before


@pytest.mark.parametrize("table", ["table1", "all", "all --quick", "table3 --recipe paper"])
def test_a_dry_run_of_nothing(tmp_path, timed, table):
    code, out, err = call(f"reproduce {table} --dry-run", tmp_path)
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    assert out.startswith("data set ") and len(timed) > 1
    # The paper's recipe stops when nothing gets better.
    assert ("\nat most " in out) == ("paper" in table) and ("\nabout " in out) != ("paper" in table)


def test_the_report_alone(made, tmp_path, timed):
    home, first, _ = made
    before = tree(home)
    code, out, err = call(f"reproduce multi table1 --report-only --results {home}/runs", tmp_path)
    assert code == 0, err
    assert tree(home) == before and timed == []
    assert {p.name for p in (tmp_path / "runs/reproduce").iterdir()} == {
        "reproduction.md", "curves-mbg-multi.png",
    }  # fmt: skip
    assert not (tmp_path / "data").exists()
    found, wanted = i.parts(out), i.parts(first)
    multi = TABLES["multi"].title, "mbg-multi"
    assert found[multi] == wanted[multi]
    assert len(found) == 1 + len(TABLES["table1"].data)
    assert out.startswith(report(chosen(["table1", "multi"]), collect([home])[0]))


def test_a_folder_of_results_that_is_missing_is_said(made, tmp_path):
    """A slip in --results must not look like a model that was not run."""
    home, *_ = made
    code, _, err = call(
        f"reproduce multi --report-only --results {home}/runs --results {home}/rnus", tmp_path
    )
    assert "rnus" in err, (code, err)


def test_without_matplotlib(made, tmp_path, monkeypatch):
    home, first, _ = made
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = call(f"reproduce multi --report-only --results {home}/runs", tmp_path)
    assert code == 0 and "no learning curves: pip install 'mnistattn[board]'" in err
    assert out.rstrip() == first.partition("![")[0].rstrip()
    assert [p.name for p in (tmp_path / "runs/reproduce").iterdir()] == ["reproduction.md"]


def test_results_that_are_damaged_are_said(made, tmp_path):
    home, *_ = made
    shutil.copytree(home / "runs", tmp_path / "runs")
    file = tmp_path / "runs/reproduce/mbg-multi" / NAMES[0] / "samples.h5"
    file.write_bytes(file.read_bytes()[:-1])
    code, out, err = call("reproduce multi --report-only", tmp_path)
    assert code == 0 and "left out: " in err and NAMES[0] in err
    rows = i.parts(out)[TABLES["multi"].title, "mbg-multi"][0]
    assert [row[1] == "not run" for row in rows[1:]] == [True, False]


def test_a_run_that_fails_hides_no_other(made, tmp_path, monkeypatch, timed):
    home, first, _ = made
    shutil.copytree(home, tmp_path / "x")

    def fail(*_, **__):
        raise MnistattnError("so it is.")

    monkeypatch.setattr("mnistattn.evaluation.run.evaluate", fail)
    code, out, err = call(f"reproduce multi {SMALL} --seeds 0-1", tmp_path / "x")
    assert code == 1 and err.count("\nmnistattn: 2 of 4 runs failed: ") == 1
    assert i.parts(out) == i.parts(first)
    assert err.rstrip().splitlines()[-1].startswith("mnistattn: 2 of 4 runs failed")
    # And where there is nothing to show, nothing is shown.
    code, out, err = call(f"reproduce multi {FEW}", tmp_path)
    assert (code, out) == (1, "") and "mnistattn: 2 of 2 runs failed: " in err


def test_what_stops_early_takes_so_long_at_most(tmp_path, monkeypatch, timed):
    def fail(*_, **__):
        raise MnistattnError("so it is.")

    monkeypatch.setattr("mnistattn.evaluation.run.evaluate", fail)
    _, _, err = call(f"reproduce multi {FEW} --recipe paper --batch-size 4", tmp_path)
    assert "\nat most 20 min of training" in err  # 2 runs of 300 epochs of 2 steps
    assert "\nabout " not in err


def test_data_of_another_request(made, timed):
    home, *_ = made
    before = tree(home)
    for more in ("--train 31", "--digits mnist", "--backgrounds ."):
        code, out, err = call(f"reproduce multi {SMALL} {more}", home)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith("mnistattn: data/reproduce/mbg-multi ")
        assert "give another --data" in err
    assert tree(home) == before


def test_data_of_another_seed(made, tmp_path, timed):
    home, *_ = made
    before = tree(home)
    code, out, err = call(f"reproduce multi {SMALL} --data-seed 3", home)
    assert (code, out) == (2, "") and tree(home) == before
    assert err == ("mnistattn: data/reproduce/mbg-multi was made with seed 0, not 3: give "
                   "--data-seed 0, or another --data.\n")  # fmt: skip
    code, _, err = call(f"reproduce multi {SMALL} --data-seed 0 --dry-run", home)
    assert code == 0, err


# --------------------------------------------------------------------------------------- Figure 6b


@pytest.fixture(scope="module")
def inverse(tmp_path_factory, one_round, quicker) -> tuple[Path, str]:
    """The folder in which the inverse task was made, and what was said. Read it, change nothing."""
    home = tmp_path_factory.mktemp("inverse")
    code, _, err = call(f"reproduce inverse {FEW} --epochs 1 --batch-size 4", home)
    assert code == 0, err
    return home, err


def test_the_layers_of_the_inverse_task_are_side_by_side(inverse):
    home, err = inverse
    files = {p.name for p in (home / "runs/reproduce").iterdir()}
    assert files == {"mbg-inv", "reproduction.md", "curves-mbg-inv.png", "layers-mbg-inv.png"}
    assert "layers-mbg-inv.png" in err.splitlines()[-1]
    written = (home / "runs/reproduce/reproduction.md").read_text()
    assert written.endswith("\n![Maps of all layers on mbg-inv](layers-mbg-inv.png)\n")
    with Image.open(home / "runs/reproduce/layers-mbg-inv.png") as picture:
        picture.load()
        # An image, and four layers of each of three models.
        assert picture.size == (2 * 24 + 124 + 3 * (6 + 442), 24 + 40 + 62 + 4 * 132 + 44)


def test_the_layers_of_what_was_run(inverse, tmp_path):
    """From runs alone; of two recipes each has its panel; of two test sets, its picture; and runs
    without weights are left out."""
    home, _ = inverse
    runs = tmp_path / "runs"
    shutil.copytree(home / "runs/reproduce/mbg-inv", runs)
    found = rows_of(collect([runs])[0])["mbg-inv"]
    assert list(layers("mbg-inv", found)) == ["layers-mbg-inv.png"]
    changed = runs / "mbg-inv-arnn-fast-seed0" / "result.json"
    raw = json.loads(changed.read_text())
    raw["recipe"]["lr"] = 0.5
    shutil.copytree(changed.parent, runs / "other-recipe")
    (runs / "other-recipe/result.json").write_text(json.dumps(raw))
    (runs / "mbg-inv-noctx-fast-seed0/model.safetensors").unlink()
    asked = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mnistattn.reproduction.layers.layers_of_runs", lambda runs, **options: (
            asked.append((runs, options)) or Image.new("RGB", (1, 1))))  # fmt: skip
        layers("mbg-inv", rows_of(collect([runs])[0])["mbg-inv"], "cpu")
        ((files, options),) = asked
        assert options["device"] == "cpu"
        words = "fast, 1 epoch, queries one, batch size 4"
        assert options["names"][0] == "CTX" and files[0].parent.name == "mbg-inv-ctx-fast-seed0"
        assert set(options["names"][1:]) == {f"ARNN ({words})", f"ARNN ({words}, lr 0.5)"}
        raw["dataset"]["digests"]["test"] = "0" * 64
        (runs / "other-recipe/result.json").write_text(json.dumps(raw))
        asked.clear()
        made = layers("mbg-inv", rows_of(collect([runs])[0])["mbg-inv"])
    assert sorted(options["names"] for _, options in asked) == [["ARNN"], ["CTX", "ARNN"]]
    assert len(made) == 2 and all(len(name) == len("layers-mbg-inv-12345678.png") for name in made)
    assert not layers("mbg-inv", [])


def test_weights_that_are_damaged_cost_no_table(inverse, tmp_path):
    home, _ = inverse
    shutil.copytree(home / "runs", tmp_path / "runs")
    file = tmp_path / "runs/reproduce/mbg-inv/mbg-inv-arnn-fast-seed0/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "runs/reproduce/layers-mbg-inv.png").unlink()
    code, out, err = call("reproduce inverse --report-only", tmp_path)
    assert code == 0 and "| ARNN" in out and "Traceback" not in err
    assert "no picture of layers: checkpoint " in err and "is damaged" in err
    assert not (tmp_path / "runs/reproduce/layers-mbg-inv.png").exists()


# --------------------------------------------------------------------------------- what it refuses

WRONG = [
    ("", "TABLE"),
    ("tabel1", "unknown table 'tabel1'", "Did you mean 'table1'?"),
    ("table1 invers", "unknown table 'invers'", "Did you mean 'inverse'?"),
    ("table1 --quik", "--quik", "--quick"),
    ("multi --quick --recipe paper", "--quick has a recipe of its own"),
    ("multi --dry-run --report-only", "give one of them"),
    ("multi --report-only", "there are no results yet"),
    ("multi --seeds one", "is no list of seeds"),
    ("multi --seeds 0,0", "asked for twice"),
    ("multi --data-seed -1", "data seed -1 is out of range"),
    ("multi --train -5", "-5 images in train are too few"),
    ("multi --test -1", "-1 images in test are too few"),
    ("multi --train 0", "train"),
    ("multi --val 0", "val"),
    ("multi --test 0", "test"),
    ("readings --train 0", "train"),
    ("multi --train many", "'many' is not a valid integer"),
    ("multi --digits stroke", "'stroke'", "Did you mean 'strokes'?"),
    ("multi --backgrounds txtures", "backgrounds 'txtures' is neither"),
    ("table1 --backgrounds txtures", "backgrounds 'txtures' is neither"),
    ("multi --recipe fats", "unknown recipe 'fats'"),
    ("multi --epochs 0", "epochs 0"),
    ("multi --batch-size 1", "batch size 1"),
    ("multi --lr nan", "learning rate nan"),
    ("multi --device tpu", "'tpu'"),
    ("multi --workers -1", "-1 workers are impossible"),
    ("multi --per-gpu 0", "0 runs a GPU are impossible"),
    ("multi --engine dusk --workers 1", "dusk"),
    ("multi --scheduler tcp://x:1", "leave --workers out"),
]


@pytest.mark.parametrize(
    ("line", "words"), [pytest.param(w[0], w[1:], id=w[0] or "no table") for w in WRONG]
)
def test_a_wrong_request_makes_nothing(tmp_path, timed, line, words):
    """One sentence, and no data set of 50,000 images before it."""
    table, _, more = line.partition(" ")
    given = f"reproduce {table} {FEW} --epochs 1 --batch-size 4 {more}"
    code, out, err = call(given, tmp_path)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and "Traceback" not in err
    assert last.startswith("mnistattn: ") and all(word in last for word in words), err
    assert err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_a_quick_look_may_name_its_recipe(tmp_path, timed):
    assert call("reproduce all --quick --recipe fast --dry-run", tmp_path)[0] == 0


def test_a_result_of_a_plugged_model_is_no_stumbling_block(tmp_path):
    run = i.invent(tmp_path / "more", "mref", "Mine")
    entry = {"epoch": 1, "seconds": 1.0, "val_accuracy": 0.5}
    (run / "curve.json").write_text(json.dumps([entry]))
    i.invent(tmp_path / "more", "mref", "ctx")
    code, out, err = call("reproduce table1 --report-only --results more", tmp_path)
    assert code == 0, err
    assert "50.00 (" in out and "Mine" not in out
