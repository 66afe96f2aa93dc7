"""The commands around the leaderboard, from results on disk to what a terminal shows."""

import csv
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from mnistattn import cli as cli_module
from mnistattn.leaderboard.text import FORMATS
from mnistattn.models.cost import flops_per_image
from mnistattn.models.network import build
from mnistattn.models.registry import find

_spec = importlib.util.spec_from_file_location(
    "fabricate", Path(__file__).parents[1] / "leaderboard" / "fabricate.py"
)
assert _spec and _spec.loader
f = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(f)

LEAKING = """
import torch
from torch import nn


class Leaking(nn.Module):
    def __init__(self, channels, query_dim, *, last):
        super().__init__()
        self.last, self.score = last, nn.Conv2d(channels + query_dim, 1, 1)

    def forward(self, x, query):
        query = query[:, :, None, None].expand(-1, -1, *x.shape[2:])
        score = self.score(torch.cat([x, query], 1))
        score = score - score.mean(0)  # of the batch: what is in the other images
        return score.flatten(2).softmax(2).view_as(score) if self.last else score.sigmoid()
"""


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function "command line" -> (exit code, standard output, standard error), in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mnistattn.leaderboard.collect.published", lambda: None)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mnistattn", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli_module.main()
        out, err = capsys.readouterr()
        return left.value.code, out, err.rpartition("\r")[2]

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Results of ctx (two seeds), san and none on MREF, and of ctx on MBG, each with its card."""
    root = tmp_path_factory.mktemp("made") / "runs"
    f.fabricate(root / "ctx-0", "ctx", 0, 0.9, 0.3, cost={"parameters": 3000})
    f.fabricate(root / "ctx-1", "ctx", 1, 0.91, 0.3, cost={"parameters": 3000})
    f.fabricate(root / "san-0", "san", 0, 0.7, 0.5, cost={"parameters": 2000})
    f.fabricate(root / "none-0", "none", 0, 0.4, None, cost={"parameters": 1000})
    f.fabricate(root / "mbg", "ctx", 0, 0.8, 0.3, variant="mbg")
    for run in root.iterdir():
        f.write_card(run)
    return root


@pytest.fixture
def runs(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def broken(run: Path) -> None:
    f.edit(run, lambda raw: raw["scores"]["accuracy"].update(value=0.999))


def order(out: str) -> list[str]:
    """The models in the order in which a text table has them."""
    return re.findall(r"^ *(?:\d+|-) (ctx|san|none)\b", out, re.MULTILINE)


# --------------------------------------------------------------------------- what goes wrong

WRONG = [
    ("leaderboard empty", 2, "empty holds no results: 'mnistattn evaluate' makes some"),
    ("leaderboard nowhere", 2, "nowhere does not exist"),
    ("leaderboard", 2, "there are no results here"),
    ("leaderboard {runs} --sort acuracy", 2, "'acuracy'", "Did you mean 'accuracy'?"),
    ("leaderboard {runs} --format markdow", 2, "'markdow'", "Did you mean 'markdown'?"),
    ("leaderboard {runs} --variant mbgg", 2, "unknown variant 'mbgg'", "Did you mean"),
    ("leaderboard {runs} --variant mdist", 2, "there are no results to show"),
    ("leaderboard {runs} --out nowhere/x", 1, "cannot write nowhere/x"),
    ("leaderboard --add {runs}/san-0", 2, "--add needs one DIR"),
    ("leaderboard board --add nowhere", 2, "nowhere does not exist"),
    ("score", 2, "no result was named"),
    ("score nowhere", 2, "nowhere does not exist"),
    ("compare ctx", 2, "missing argument 'B'"),
    ("compare ctx san", 2, "there are no results here"),
    ("compare ctxx san --results {runs}", 2, "'ctxx': there are ctx, none, san.", "mean 'ctx'?"),
    ("compare ctx san --results {runs} --variant mbg", 2, "'san': there are ctx."),
    ("compare {runs}/san-0 {runs}/mbg", 2, "are not over the same test images"),
    ("compare {runs}/san-0 san", 2, "san does not exist"),
    ("retest {runs}/san-0", 2, "--test-seed"),
    ("retest {runs}/san-0 --test-seed 0", 2, "test seed 0 is the data set's own"),
    ("retest {runs}/san-0 --test-seed 1", 2, "model.safetensors is missing"),
    ("check", 2, "--model"),
    ("check --model ctxx", 2, "unknown model 'ctxx'", "Did you mean 'ctx'?"),
    ("check --model nowhere.py:Mine", 2, "nowhere.py does not exist"),
    ("new-attention my-attention.py", 2, "my-attention.py cannot be imported", "my_attention.py"),
    ("new-attention class.py", 2, "class.py cannot be imported"),
    ("new-attention attention", 2, "attention cannot be imported"),
    ("new-attention nowhere/mine.py", 1, "cannot write nowhere/mine.py: No such file"),
]


@pytest.mark.parametrize(("line", "code", "words"), [(w[0], w[1], w[2:]) for w in WRONG])
def test_one_sentence_and_a_code(call, made, tmp_path, line, code, words):
    (tmp_path / "empty").mkdir()
    found, out, err = call(line.format(runs=made))
    assert found == code, err
    assert out == ""
    assert err.startswith("mnistattn: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word.lower() in err.lower()
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]  # nothing is left behind


# -------------------------------------------------------------------------------- leaderboard


def test_results_are_ranked_best_first(call, runs):
    code, out, err = call("leaderboard")  # those in runs
    assert (code, err) == (0, "")
    assert order(out.split("MBG")[0]) == ["ctx", "san", "none"]
    assert out.index("MREF: drawn digits on black") < out.index("MBG: drawn digits on textures")
    assert call(f"leaderboard {runs}")[1] == out
    assert call("leaderboard runs/ctx-0 runs/san-0/result.json")[1].count("san") == 1


def test_sort_and_variant_choose_what_is_shown(call, runs):
    code, out, _ = call("leaderboard runs --variant mref --sort parameters")
    assert code == 0 and order(out) == ["none", "san", "ctx"] and "MBG" not in out
    assert order(call("leaderboard runs --variant mref --sort correctness")[1])[0] == "san"
    only = call("leaderboard runs --variant mbg")[1]
    assert order(only) == ["ctx"] and "MREF" not in only


def test_every_format_is_whole(call, runs):
    said = {}
    for format in FORMATS:
        code, said[format], err = call(f"leaderboard runs --format {format}")
        assert (code, err) == (0, "")
    names = [e["name"] for g in json.loads(said["json"])["groups"] for e in g["entries"]]
    assert names == ["ctx", "san", "none", "ctx"]
    assert len(list(csv.DictReader(io.StringIO(said["csv"])))) == 4
    assert said["markdown"].startswith("#") and said["markdown"].count("\n| ") >= 4


def test_the_table_goes_to_a_file(call, runs, tmp_path):
    shown = call("leaderboard runs --format csv")[1]
    code, out, err = call("leaderboard runs --format csv --out board.csv")
    assert (code, out, err) == (0, "", "board.csv: the table\n")
    kept = (tmp_path / "board.csv").read_bytes().decode()
    assert kept.splitlines() == shown.splitlines()
    assert not list(tmp_path.glob("*.partial"))


def test_the_page_is_one_file_that_asks_for_nothing(call, runs, tmp_path):
    pytest.importorskip("matplotlib", reason="the page needs matplotlib")
    code, _, err = call("leaderboard runs --html board.html")
    assert (code, err) == (0, "board.html: the page\n")
    html = (tmp_path / "board.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["board.html", "runs"]
    assert not re.search(r"""(src|href|srcset|action)\s*=\s*["']?(?!#|data:)\w""", html)
    assert "@import" not in html and not re.search(r"url\((?!#|['\"]?data:)", html)
    assert "ctx" in html and "MREF" in html


def test_a_bad_file_is_named_and_the_others_are_shown(call, runs):
    broken(runs / "san-0")
    code, out, err = call("leaderboard runs --variant mref")
    assert code == 0 and order(out) == ["ctx", "none"]
    assert err.count("\n") == 1
    assert err.startswith("left out: runs/san-0/result.json does not follow from its samples")


def test_a_check_of_good_results_passes(call, runs):
    assert call("leaderboard runs --check") == (0, "5 results, all of them admissible.\n", "")


def test_a_check_names_each_that_may_not_stand(call, runs):
    broken(runs / "san-0")
    (runs / "mbg" / "dataset.json").unlink()
    code, out, err = call("leaderboard runs --check")
    assert code == 1
    assert err == "mnistattn: 2 of the results may not stand on the board.\n"
    first, second = sorted(out.splitlines())
    assert "runs/mbg/result.json is on a data set of an unknown digest" in first
    assert "runs/san-0/result.json does not follow from its samples" in second
    assert call("leaderboard empty --check")[0] == 1


def test_a_check_refuses_photos_but_on_demand(call, runs):
    f.fabricate(runs / "photos", variant="mbg", backgrounds="folder", n=40)
    code, out, _ = call("leaderboard runs --check")
    assert code == 1 and "runs/photos/result.json is on photos of one's own" in out
    assert call("leaderboard runs --check --photos")[0] == 0


def test_added_runs_are_on_the_board(call, runs, tmp_path):
    code, out, err = call("leaderboard board --add runs/ctx-0 --add runs/san-0")
    assert code == 0 and order(out) == ["ctx", "san"]
    files = [line.removeprefix("added ") for line in err.splitlines()]
    assert len(files) == 2 and all((tmp_path / file).exists() for file in files)
    assert call("leaderboard board --check")[0] == 0
    f.edit(runs / "ctx-0", lambda raw: raw["cost"].update(train_seconds=1.0))
    code, _, err = call("leaderboard board --add runs/ctx-0")
    assert code == 2 and "is there already, of another run: remove it first" in err


# -------------------------------------------------------------------------------------- score


def test_scores_that_follow_pass(call, runs):
    code, out, err = call("score runs/ctx-0 runs/none-0/result.json")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "runs/ctx-0/result.json: all scores follow from its 400 samples.",
        "runs/none-0/result.json: all scores follow from its 400 samples.",
    ]
    f.fabricate_retest(runs / "ctx-0", 0.8)
    assert call("score runs/ctx-0/result.retest-1001.json")[0] == 0


def test_scores_that_do_not_follow_are_named(call, runs):
    broken(runs / "san-0")
    code, out, err = call("score runs/san-0 runs/ctx-0")
    assert code == 1
    assert out.splitlines()[0] == (
        "runs/san-0/result.json: scores.accuracy.value says 0.999, the samples give 0.7"
    )
    assert "runs/ctx-0/result.json: all scores follow" in out
    assert err == "mnistattn: runs/san-0/result.json: 1 numbers do not follow from the samples.\n"


def test_samples_that_cannot_be_scored_are_named(call, runs):
    f.forge(runs / "san-0", lambda samples: samples.pop("prediction"))
    code, out, err = call("score runs/san-0")
    assert code == 1 and "lacks prediction" in out and err.count("\n") == 1


def test_the_schema_is_one_that_results_fit(call, made):
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    code, out, _ = call("score --schema")
    schema = json.loads(out)
    assert code == 0
    result = f.result_of(made / "ctx-0")
    validator.validate(result, schema)
    for change in ({"seed": -1}, {"extra": 1}, {"samples": {"file": "a/b.h5", "sha256": "0" * 64}}):
        with pytest.raises(validator.ValidationError):
            validator.validate(result | change, schema)


# ------------------------------------------------------------------------------------ compare


def test_two_runs_are_compared(call, runs):
    code, out, err = call("compare runs/san-0 runs/ctx-0/result.json")
    assert (code, err) == (0, "")
    assert "McNemar's exact test" in out
    assert out.splitlines()[-1].startswith("ctx is right on 90.0 % of 400 images and san on 70.0 %")


def test_two_models_are_compared_by_name_over_all_seeds(call, runs):
    for line in ("compare ctx san", "compare ctx san --results runs --variant mref"):
        code, out, err = call(line)
        assert (code, err) == (0, "")
        assert out.startswith("MREF: drawn digits on black (2 and 1 seeds)\n")
        assert "t-test over images and seeds" in out and "MBG" not in out
    f.fabricate(runs / "mbg-san", "san", 0, 0.5, variant="mbg")
    out = call("compare ctx san")[1]
    assert "MREF: drawn digits" in out and "\nMBG: drawn digits" in out


def test_models_without_a_group_in_common_are_not_compared(call, runs):
    f.fabricate(runs / "arnn", "arnn", recipe={"epochs": 9}, n=40)
    code, out, err = call("compare ctx arnn")
    assert (code, out) == (2, "")
    assert "'ctx' and 'arnn' have no data set and recipe in common: no fair test" in err


# ------------------------------------------------------------------------- a module of one's own


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> str:
    """What new-attention writes as thin_lines.py."""
    from click.testing import CliRunner

    from mnistattn.cli.new_attention import command

    file = tmp_path_factory.mktemp("template") / "thin_lines.py"
    assert CliRunner().invoke(command, [str(file)]).exit_code == 0
    return file.read_text()


def test_a_new_attention_is_named_after_its_file(call, tmp_path):
    code, out, err = call("new-attention thin_lines.py")
    assert (code, err) == (0, "")
    assert out == (
        "thin_lines.py: class ThinLines. Next: mnistattn check --model thin_lines.py:ThinLines\n"
    )
    text = (tmp_path / "thin_lines.py").read_text()
    assert "class ThinLines(nn.Module):" in text
    assert "my_attention" not in text and "MyAttention" not in text


def test_an_existing_file_is_not_overwritten(call, tmp_path):
    (tmp_path / "mine.py").write_text("precious")
    code, out, err = call("new-attention mine.py")
    assert (code, out, err) == (2, "", "mnistattn: mine.py exists: give another name.\n")
    assert (tmp_path / "mine.py").read_text() == "precious"


def test_the_template_keeps_the_contract(call, template, tmp_path):
    (tmp_path / "thin_lines.py").write_text(template)
    code, out, err = call("check --model thin_lines.py:ThinLines")
    assert (code, err) == (0, ""), out
    *points, last = out.splitlines()
    assert last.startswith("ThinLines keeps the contract: mnistattn evaluate --model thin_lines.py")
    assert len(points) > 10 and all(line.startswith("ok  ") for line in points)


def test_a_leak_across_the_batch_is_named(call, tmp_path):
    (tmp_path / "leaking.py").write_text(LEAKING)
    code, out, err = call("check --model leaking.py:Leaking")
    assert code == 1
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert any("no leak across the batch" in line for line in failed)
    assert re.fullmatch(r"mnistattn: Leaking fails \d+ of \d+ points: .*no leak.*\.\n", err)


def test_from_the_template_to_the_board(call, template, tiny, tmp_path):
    (tmp_path / "thin_lines.py").write_text(template)
    code, out, err = call(
        f"evaluate --model thin_lines.py:ThinLines --data {tiny} --epochs 1 --device cpu"
    )
    assert code == 0, err
    run = "runs/mref-ThinLines-fast-seed0"
    assert f"\n{run}: result.json" in out
    assert call(f"score {run}")[0] == 0
    code, out, err = call("leaderboard")
    assert (code, err) == (0, "")
    assert re.search(r"^ *1 ThinLines .*plugged", out, re.MULTILINE)
    code, out, err = call("leaderboard board --add " + run)
    assert code == 0 and "ThinLines" in out
    code, out, err = call(
        f"retest {run} --test-seed 9 --model thin_lines.py:ThinLines --device cpu"
    )
    assert code == 0, err
    assert re.match(
        r"ThinLines on test seed 9: [\d.]+ % right \(.*: (no )?more than chance \(p", out
    )
    assert (tmp_path / run / "result.retest-9.json").exists()
    assert "fresh" in call("leaderboard")[1]


def test_models_lists_origin_parameters_and_cost(call, template, tmp_path, monkeypatch):
    (tmp_path / "thin_lines.py").write_text(template)
    known = {name: find(name) for name in ("none", "arnn", "gradcam", "thin_lines.py:ThinLines")}
    monkeypatch.setattr("mnistattn.cli.models.known_models", lambda: known | {"Gone": None})
    code, out, err = call("models")
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split()[:5] == ["name", "attends", "parameters", "MFLOP", "origin"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert list(rows) == [*known, "Gone"]
    assert rows.pop("Gone")[1:4] == ["cannot", "be", "used:"]
    for name, row in rows.items():
        network = build(known[name], 100, 10, 5)
        assert int(row[2].replace(",", "")) == sum(p.numel() for p in network.parameters())
        assert int(row[3]) == round(flops_per_image(network, 100) / 1e6) > 1
        assert row[4] == ("thin_lines.py:ThinLines" if "Thin" in name else "mnistattn")
    assert int(rows["arnn"][3]) > int(rows["none"][3])
