"""Reports of invented results: the numbers beside the paper's, what is left out, and commands that
make again what is shown."""

import importlib.util
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from mnistattn.cli.generate import command as generate_command
from mnistattn.cli.sweep import command as sweep_command
from mnistattn.cli.sweep import parse_models, parse_seeds
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.train import describe
from mnistattn.leaderboard.board import Estimate
from mnistattn.leaderboard.collect import add
from mnistattn.models.registry import choose_options
from mnistattn.reproduction.report import (
    data_of,
    difference,
    label,
    markdown,
    report,
    rows_of,
    spread,
    tally,
)
from mnistattn.reproduction.tables import DATA, TABLES, chosen

_spec = importlib.util.spec_from_file_location("invent", Path(__file__).with_name("invent.py"))
assert _spec and _spec.loader
i = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(i)

HEAD = ["model", "data and recipe", "seeds", "accuracy, % (95 % interval)", "paper", "difference",
        "correctness (95 % interval)", "paper", "difference", "train", "on"]  # fmt: skip
MULTI = TABLES["multi"].title


def reported(root: Path, *names: str) -> str:
    return report(chosen(names), i.collected(root))


def row_of(rows, model: str) -> list[str]:
    (found,) = (row for row in rows if row[0] == model)
    return found


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """MREF, MBG and its reading: some of the models, with one to three seeds, one or two recipes,
    photos and textures."""
    root = tmp_path_factory.mktemp("several")
    for seed, mean in enumerate((0.82, 0.84, 0.86)):
        i.invent(root, "mref", "san", seed, mean, cost={"train_seconds": 60.0 * (seed + 1)})
        i.invent(root, "mbg", "ctx", seed, mean - 0.1, 0.4, n=400)
    i.invent(root, "mref", "noctx", 3, 0.9)
    i.invent(root, "mref", "noctx", 3, 0.97, recipe={"epochs": 40, "lr": 0.001})
    i.invent(root, "mref", "arnn", 0, 0.5, 0.2)
    i.invent(root, "mbg", "ctx", 0, 0.6, 0.2, n=400, backgrounds="textures")
    i.invent(root, "mbg", "arnn", 0, 0.9, 0.5, n=400)
    i.invent(root, "mbg-all", "ctx", 0, 0.7, 0.1)
    return root


@pytest.fixture(scope="module")
def text(several) -> str:
    return reported(several, "table1", "table2", "readings")


# ---------------------------------------------------------------------------------- what is shown


def test_a_mean_over_seeds_beside_the_paper(several, text):
    (rows,) = i.parts(text)[TABLES["table1"].title, "mref"]
    assert rows[0] == HEAD
    san = row_of(rows, "SAN")
    # (82 + 84 + 86) / 3, their sample deviation, and 84.00 - 83.42; the median of 1, 2, 3 minutes.
    assert san[1] == "MNIST digits on black; fast, 12 epochs, queries one" and san[2] == "3"
    assert san[3].startswith("84.00 +- 2.00 (") and san[4:6] == ["83.42", "+0.58"]
    runs = [s.samples["correctness"].astype(np.float64).mean()
            for s in i.collected(several)
            if (s.result["model"], s.result["dataset"]["variant"]) == ("san", "mref")]  # fmt: skip
    assert san[6].startswith(f"{np.mean(runs):.3f} +- {np.std(runs, ddof=1):.3f} (")
    assert san[7:] == ["-", "-", "2 min", "CPU (1 threads)"]
    for cell, value in ((san[3], 84.0), (san[6], float(np.mean(runs)))):
        low, high = map(float, cell.partition("(")[2].rstrip(")").split(" .. "))
        assert low < value < high
    arnn = row_of(rows, "ARNN")
    assert arnn[3].startswith("50.00 (") and arnn[4:6] == ["?", "-"]  # one seed has no deviation


def test_seeds_trained_on_different_hardware_say_so(tmp_path):
    for seed, precision in enumerate([None, "bfloat16", "bfloat16", "float32"]):
        file = i.invent(tmp_path, "mref", "ctx", seed) / "result.json"
        raw = json.loads(file.read_text())
        raw["cost"]["precision"] = precision
        file.write_text(json.dumps(raw))
    (rows,) = i.parts(reported(tmp_path, "table1"))[TABLES["table1"].title, "mref"]
    assert row_of(rows, "CTX")[-1] == (
        "CPU (1 threads); CPU (1 threads), bfloat16; CPU (1 threads), float32"
    )


def test_each_recipe_has_a_row(text):
    (rows,) = i.parts(text)[TABLES["table1"].title, "mref"]
    found = {row[1].partition("; ")[2]: (row[3].split()[0], row[5]) for row in rows
             if row[0] == "-CTX"}  # fmt: skip
    assert found == {
        "fast, 12 epochs, queries one": ("90.00", "-5.69"),
        "fast, 40 epochs, queries one, lr 0.001": ("97.00", "+1.31"),
    }


def test_correctness_beside_the_paper(text):
    rows, _ = i.parts(text)[TABLES["table2"].title, "mbg"]
    (arnn,) = (row for row in rows if row[0] == "ARNN")
    assert arnn[4:6] == ["85.84", "+4.16"] and arnn[7] == "0.42"
    mean = float(arnn[6].split()[0])
    assert mean == pytest.approx(0.5, abs=0.03)
    assert float(arnn[8]) == pytest.approx(mean - 0.42, abs=0.0011) and arnn[8][0] == "+"


def test_scales_are_those_of_the_samples(several, text):
    """By hand: the mean over seeds of the share of right answers, of targets of each range."""
    runs = [s.samples for s in i.collected(several)
            if s.result["model"] == "ctx" and s.result["recipe"]["queries"] == "one"
            and s.result["dataset"]["sources"]["backgrounds"]["source"] == "sun397"]  # fmt: skip
    assert len(runs) == 3
    scale = runs[0]["scale"]
    wanted = []
    for k, paper in enumerate((77.39, 87.13, 84.96, 75.59, 63.72)):
        inside = (scale > 0.5 + 0.5 * k) & (scale <= 1 + 0.5 * k)
        assert inside.sum() > 5
        mean = np.mean([run["correct"][inside].mean() for run in runs])
        wanted.append(f"{100 * mean:.2f} / {paper:.2f}")
    _, rows = i.parts(text)[TABLES["table2"].title, "mbg"]
    assert rows[0][2:] == ["total", "0.5-1", "1-1.5", "1.5-2", "2-2.5", "2.5-3"]
    assert wanted in [row[3:] for row in rows if row[0] == "CTX"]
    assert [row[2] for row in rows if row[0] == "CTX"] == ["74.00 / 79.00", "60.00 / 79.00"]
    assert [cell.partition(" / ")[2] for cell in row_of(rows, "ARNN")[2:]] == [
        "85.84", "84.45", "91.40", "?", "?", "?",
    ]  # fmt: skip


def test_a_range_of_scales_without_images(tmp_path):
    run = i.invent(tmp_path, "mbg", "ctx", n=40)
    i.f.forge(run, lambda s: s.update(scale=np.full(40, 1.2, "f4")))
    _, rows = i.parts(reported(tmp_path, "table2"))[TABLES["table2"].title, "mbg"]
    assert row_of(rows, "CTX")[3:] == [
        "- / 77.39", "50.00 / 87.13", "- / 84.96", "- / 75.59", "- / 63.72",
    ]  # fmt: skip


def test_models_without_results_were_not_run(text):
    (rows,) = i.parts(text)[TABLES["table1"].title, "mref"]
    assert row_of(rows, "ARNN_ind") == ["ARNN_ind", "not run", "-", "-", "?", *"-----", "-"]
    names = [row[0] for row in rows[1:]]
    order = ["SAN", "-CTX", "CTX", "ARNN~_ind", "ARNN_ind", "ARNN~", "ARNN"]
    assert list(dict.fromkeys(names)) == order and names.count("-CTX") == 2
    (rows,) = i.parts(text)[TABLES["table1"].title, "mdist"]
    assert {row[1] for row in rows[1:]} == {"not run"}


def test_photos_and_textures_have_rows_of_their_own(text):
    """In every table: nobody may take the one for the other."""
    for table in ("table1", "table2", "readings"):
        for rows in i.parts(text)[TABLES[table].title, "mbg"]:
            ctx = [row for row in rows if row[0] == "CTX"]
            assert len(ctx) == 2
            assert ctx[0][1] != ctx[1][1], (table, rows[0])
    first = i.parts(text)[TABLES["table2"].title, "mbg"][0]
    found = {row[1].partition(";")[0]: row[2] for row in first if row[0] == "CTX"}
    assert found == {"MNIST digits on photos": "3", "MNIST digits on textures": "1"}


def test_a_model_without_attention(tmp_path):
    i.invent(tmp_path, "mbg-up", "none", 0, 0.95, None)
    i.invent(tmp_path, "mbg-up", "brnn", 0, 0.5, changed_options={"block": 3})
    i.invent(tmp_path, "mbg-up", "brnn", 0, 0.6)
    rows, _ = i.parts(reported(tmp_path, "table3"))[TABLES["table3"].title, "mbg-up"]
    none = row_of(rows, "NONE")
    assert none[4:9] == ["91.43", "+3.57", "-", "-", "-"]
    assert row_of(rows, "BRNN, block 3")[3].startswith("50.00 (")
    assert row_of(rows, "BRNN, block 2")[3].startswith("60.00 (")
    assert row_of(rows, "BRNN, block 2")[4:6] == ["92.68", "-32.68"]


def test_results_that_are_of_no_table_are_not_shown(tmp_path):
    """Of weights from other data, of other data, of other options, of other models."""
    other = {"train": "7" * 64, "val": "8" * 64}
    i.invent(tmp_path, "mref", "san", 0, 0.91, trained_on=other)
    i.invent(tmp_path, "mref", "ctx", 0, 0.92, spec={"size": 48})
    i.invent(tmp_path, "mref", "ctx", 0, 0.93, recipe={"queries": "all"})
    i.invent(tmp_path, "mref", "arnn", 0, 0.94, changed_options={"hidden": 8})
    i.invent(tmp_path, "mref", "oracle", 0, 0.95)
    i.invent(tmp_path, "mref", "Mine", 0, 0.96)
    i.invent(tmp_path, "mref", "noctx", 0, 0.5, digests={"train": "9" * 64})  # of its own data
    text = reported(tmp_path, "all")
    shown = [row for rows in i.parts(text).values() for one in rows for row in one[1:]
             if row[1] != "not run"]  # fmt: skip
    assert [row[0] for row in shown] == ["-CTX"]
    assert ", **0 are reached or passed**, 1 are not, " in text
    kept = rows_of(i.collected(tmp_path))
    assert sum(len(rows) for rows in kept.values()) == 2  # with other options, too


@pytest.mark.parametrize("name", [name for table in TABLES.values() for name in table.data])
def test_a_result_is_found_on_its_data_set(tmp_path, name):
    run = i.invent(tmp_path, name, "ctx")
    assert data_of(i.f.result_of(run)) == name


def test_a_recipe_of_another_version_does_no_harm(tmp_path):
    """`--results` may be anybody's: a recipe's name is free in a result."""
    i.invent(tmp_path, "mref", "ctx", 0, 0.5)
    run = i.invent(tmp_path, "mref", "ctx", 1, 0.7, recipe={"epochs": 3})
    i.f.edit(run, lambda raw: raw["recipe"].update(name="slow"))
    (rows,) = i.parts(reported(tmp_path, "table1"))[TABLES["table1"].title, "mref"]
    assert [row[3].split()[0] for row in rows if row[0] == "CTX"] == ["50.00", "70.00"]


# ----------------------------------------------------------------------------------- how they count


def first_line(root: Path, *names: str) -> str:
    return tally(chosen(names), rows_of(i.collected(root))).splitlines()[0]


def test_a_mean_counts_and_the_best_recipe(tmp_path):
    """-CTX 40.15 / 0.20, CTX 66.37 / 0.24, ARNN 72.77 / 0.39."""
    i.invent(tmp_path, "mbg-inv", "noctx", 0, 0.30, 0.4)
    i.invent(tmp_path, "mbg-inv", "noctx", 0, 0.50, 0.1, recipe={"epochs": 2})
    for seed, mean in enumerate((0.60, 0.70, 0.80)):  # the worst is below, the mean is not
        i.invent(tmp_path, "mbg-inv", "ctx", seed, mean, 0.1)
    text = reported(tmp_path, "inverse")
    assert text.startswith("Of 6 confirmed numbers of the paper, **3 are reached or passed**, "
                           "1 are not, 2 were not run")  # fmt: skip
    (line,) = (line for line in text.splitlines() if line.startswith("- "))
    assert line.startswith("- CTX on mbg-inv, correctness: 0.") and line.endswith("(paper 0.24)")
    # As a part of all tables, it counts the same.
    assert "**3 are reached or passed**, 1 are not, " in first_line(tmp_path, "all")


def test_a_model_without_attention_has_no_correctness_to_count(tmp_path):
    i.invent(tmp_path, "mbg-inv", "ctx", 0, 0.9, None)
    assert "**1 are reached or passed**, 0 are not, 5 were not run" in first_line(
        tmp_path, "inverse"
    )


@pytest.mark.parametrize(
    ("table", "data", "model", "accuracy", "n"),
    [("inverse", "mbg-inv", "noctx", 0.4015, 2000), ("inverse", "mbg-inv", "ctx", 0.6637, 10_000),
     ("inverse", "mbg-inv", "arnn", 0.7277, 10_000), ("table3", "mbg-up", "brnn", 0.9268, 2500),
     ("table1", "mref", "san", 0.8342, 5000)],
)  # fmt: skip
def test_what_equals_the_paper_has_reached_it(tmp_path, table, data, model, accuracy, n):
    i.invent(tmp_path, data, model, 0, accuracy, 0.05, n)
    text = reported(tmp_path, table)
    assert "+0.00" in text
    wrong = [line for line in text.splitlines() if line.startswith("- ") and "accuracy %:" in line]
    assert not wrong


def test_what_is_below_is_said_once(text):
    """By the best of the rows: CTX's 74.00 on photos, not its 60.00 on textures."""
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert "- CTX on mbg, accuracy %: 74.00 (paper 79.00)" in lines
    assert len(lines) == len(set(lines))
    assert not [line for line in lines if "mbg-all" in line or "SAN" in line]


# ------------------------------------------------------------------------------------ the commands


def options_of(line: str) -> dict:
    """What click makes of a line's words."""
    program, name, *words = shlex.split(line)
    assert program == "mnistattn"
    command = {"generate": generate_command, "sweep": sweep_command}[name]
    return command.make_context(name, words).params


def lines_of(root: Path, data: str, *names: str) -> list[str]:
    return i.commands(reported(root, *names))[data]


def checked_generate(line: str, dataset: dict) -> dict:
    """The options of a line, which make this data set."""
    found = options_of(line)
    assert found["variant"] == dataset["variant"] and found["seed"] == dataset["seed"]
    assert {split: found[split] for split in dataset["counts"]} == dataset["counts"]
    for option in ("distractors", "placement"):
        assert found[option] == dataset["spec"][option]
    digits, under = dataset["sources"]["digits"], dataset["sources"]["backgrounds"]["source"]
    assert (found["digits"], found["digit_split"]) == (digits["source"], digits["split"])
    if dataset["variant"].startswith("mbg"):
        assert found["backgrounds"] == ("PHOTOS" if under == "folder" else under)
    return found


def checked_sweep(line: str, results: list[dict]) -> dict:
    """The options of a line, which make these results, and no other."""
    found = options_of(line)
    changes = {k: found[k] for k in ("epochs", "batch_size", "lr", "queries")}
    recipe = describe(make_recipe(found["recipe"], **changes))
    cells = [(model, json.dumps(choose_options(model, options)), seed)
             for model, options in parse_models(found["models"])
             for seed in parse_seeds(found["seeds"])]  # fmt: skip
    assert {json.dumps(r["recipe"]) for r in results} == {json.dumps(recipe)}
    assert sorted(cells) == sorted(
        (r["model"], json.dumps(choose_options(r["model"], r["options"])), r["seed"])
        for r in results
    )
    return found


@pytest.mark.parametrize("name", [n for n in DATA if n != "mbg-all"])
def test_the_lines_of_a_data_set(tmp_path, name):
    table = next(t for t in TABLES.values() if name in t.data)
    runs = [i.invent(tmp_path, name, model, seed, changed_options=options if "3" in str(options)
                     else None, data=7)
            for model, options in table.models[:3] for seed in (0, 2)]  # fmt: skip
    digest, make, sweep = lines_of(tmp_path, name, table.name)
    results = [i.f.result_of(run) for run in runs]
    assert digest == f"# test digest {results[0]['dataset']['digests']['test'][:16]}"
    made = checked_generate(make, results[0]["dataset"])
    swept = checked_sweep(sweep, results)
    assert swept["data"] == (made["out"],) == (f"data/reproduce/{name}",)
    assert swept["out"] == f"runs/reproduce/{name}"


def test_the_lines_of_all_queries(tmp_path):
    run = i.invent(tmp_path, "mbg-all", "ctx", recipe={"batch_size": 8, "lr": 0.01})
    _, make, sweep = lines_of(tmp_path, "mbg-all", "readings")
    checked_generate(make, i.f.result_of(run)["dataset"])
    assert checked_sweep(sweep, [i.f.result_of(run)])["queries"] == "all"


def test_full_counts_and_photos_of_ones_own(tmp_path):
    run = i.invent(tmp_path, "mbg", "ctx", backgrounds="folder")
    full = {"train": 30_000, "val": 10_000, "test": 10_000}
    i.f.edit(run, lambda raw: raw["dataset"].update(counts=full))
    _, make, _ = lines_of(tmp_path, "mbg", "table1")
    assert make == ("mnistattn generate --variant mbg --out data/reproduce/mbg --digits mnist "
                    "--backgrounds PHOTOS")  # fmt: skip


def test_digits_that_are_pooled(tmp_path):
    pooled = {"digits": {"source": "mnist", "split": "pooled"}}
    run = i.invent(tmp_path, "mref", "ctx", sources=pooled)
    _, make, _ = lines_of(tmp_path, "mref", "table1")
    checked_generate(make, i.f.result_of(run)["dataset"])


@pytest.mark.parametrize("lr", [0.002, 0.00123456789, 1e-7, 2.0])
def test_a_learning_rate_is_kept_whole(tmp_path, lr):
    run = i.invent(tmp_path, "mref", "ctx", recipe={"lr": lr})
    *_, sweep = lines_of(tmp_path, "mref", "table1")
    checked_sweep(sweep, [i.f.result_of(run)])


def test_rows_of_several_recipes_and_seeds(several, text):
    digest, make, *sweeps = i.commands(text)["mref"]
    groups: dict[tuple, list[dict]] = {}
    for s in i.collected(several):
        if s.result["dataset"]["variant"] == "mref":
            groups.setdefault((s.result["model"], str(s.result["recipe"])), []).append(s.result)
    checked_generate(make, groups.popitem()[1][0]["dataset"])
    assert len(sweeps) == 4 and len({line for line in sweeps}) == 4
    wanted = {("san", "0,1,2", None), ("noctx", "3", None), ("noctx", "3", 40), ("arnn", "0", None)}
    found = [options_of(line) for line in sweeps]
    assert {(o["models"][0], o["seeds"], o["epochs"]) for o in found} == wanted


def test_two_data_sets_of_one_table(tmp_path):
    """Photos and textures, with the same model, recipe and seed: each has lines of its own, and
    folders of its own."""
    runs = [i.invent(tmp_path, "mbg", "ctx", 0, 0.5, backgrounds=under, data=k)
            for k, under in enumerate(("sun397", "textures"))]  # fmt: skip
    lines = [line for line in lines_of(tmp_path, "mbg", "table1") if not line.startswith("#")]
    makes = [options_of(line) for line in lines if " generate " in line]
    assert {(o["backgrounds"], o["seed"]) for o in makes} == {("sun397", 0), ("textures", 1)}
    for line in lines:
        if " sweep " in line:
            checked_sweep(line, [i.f.result_of(runs[0])])  # no model twice
    sweeps = [options_of(line) for line in lines if " sweep " in line]
    assert len({o["out"] for o in makes}) == 2
    assert sorted(o["data"] for o in sweeps) == sorted((o["out"],) for o in makes)


def test_two_training_sets_with_one_test_set(tmp_path):
    """The test images of a seed are the same, however many there are to train on."""
    runs = [i.invent(tmp_path, "mref", "ctx", k, 0.5 + 0.2 * k,
                     digests={"test": "7" * 64, "train": f"{k}" * 64}) for k in (0, 1)]  # fmt: skip
    for k, run in enumerate(runs):
        i.f.edit(run, lambda raw, k=k: raw["dataset"]["counts"].update(train=1000 * (k + 1)))
    lines = lines_of(tmp_path, "mref", "table1")
    found = {options_of(line)["train"] for line in lines if " generate " in line}
    assert found == {1000, 2000}


# --------------------------------------------------------------------------- what samples cover


def mean(value: float, se: float | None = 0.1) -> dict:
    return {"value": value, "se": se, "n": 40}


def coverage_of(run: Path, **more) -> dict:
    """A coverage.json beside an invented run."""
    raw = i.f.result_of(run)
    content = {
        "format": "mnistattn-coverage", "coverage_version": 1, "model": raw["model"],
        "weights": "1" * 64, "variant": raw["dataset"]["variant"],
        "digest": raw["dataset"]["digests"]["test"], "samples": 20, "seed": 0, "spread": 1.0,
        "coverage": {
            "samples": 20, "images": 40, "right": mean(3.0), "covered": mean(1.25, 0.05),
            "share": mean(0.4321), "pointing": mean(0.25), "chance": mean(0.125),
            "mass": mean(0.3), "answers": mean(1.5), "accuracy": mean(0.5),
        },
    } | more  # fmt: skip
    (run / "coverage.json").write_text(json.dumps(content))
    return content


COVERED = ["20", "1.250 +- 0.098", "43.2 %", "0.125", "25.0 %", "1.500"]


def test_coverage(tmp_path):
    for seed in (1, 0):
        coverage_of(i.invent(tmp_path, "mbg-multi", "arnn-sampled", seed))
    i.invent(tmp_path, "mbg-multi", "arnn", 0)
    rows, covered = i.parts(reported(tmp_path, "multi"))[MULTI, "mbg-multi"]
    assert row_of(rows, "ARNN~")[2] == "2" and row_of(rows, "ARNN")[2] == "1"
    assert covered[0][:4] == ["model", "seed", "right digits an image", "samples"]
    assert covered[1:] == [["ARNN~", str(seed), "3.000", *COVERED] for seed in (0, 1)]


def test_coverage_of_a_board(tmp_path):
    run = i.invent(tmp_path / "runs", "mbg-multi", "arnn-sampled", 0, backgrounds="textures")
    coverage_of(run)
    add(run, tmp_path / "board")
    rows, covered = i.parts(reported(tmp_path / "board", "multi"))[MULTI, "mbg-multi"]
    assert covered[1:] == [["ARNN~", "0", "3.000", *COVERED]]


@pytest.mark.parametrize("content", ["", "{", "[]"[:1], None])
def test_without_coverage(tmp_path, content):
    run = i.invent(tmp_path, "mbg-multi", "arnn")
    if content is not None:
        (run / "coverage.json").write_text(content)
    assert len(i.parts(reported(tmp_path, "multi"))[MULTI, "mbg-multi"]) == 1


def test_coverage_of_one_image_has_no_error(tmp_path):
    run = i.invent(tmp_path, "mbg-multi", "arnn")
    made = coverage_of(run)["coverage"]
    lone = {k: v | {"se": None} if isinstance(v, dict) else v for k, v in made.items()}
    coverage_of(run, coverage=lone | {"images": 1})
    _, covered = i.parts(reported(tmp_path, "multi"))[MULTI, "mbg-multi"]
    assert covered[1][4].split() == ["1.250"]


def test_coverage_on_other_images_is_not_shown(tmp_path):
    """`coverage_of_run` may be given another data set than the run's."""
    run = i.invent(tmp_path, "mbg-multi", "arnn")
    coverage_of(run, digest="5" * 64)
    assert len(i.parts(reported(tmp_path, "multi"))[MULTI, "mbg-multi"]) == 1


# ------------------------------------------------------------------------------------------- words


def test_numbers_in_words():
    assert spread(None, 100, 2) == difference(None, 1.0, 1, 2) == "-"
    one = Estimate(0.84219, 0.8, 0.88)
    assert spread(one, 100, 2) == "84.22 (80.0 .. 88.0)"
    assert spread(Estimate(0.25, 0.2, 0.3, 0.0123), 1, 3) == "0.250 +- 0.012 (0.200 .. 0.300)"
    assert spread(Estimate(0.25, 0.2, 0.3, 0.0123), 100, 2) == "25.00 +- 1.23 (20.0 .. 30.0)"
    assert difference(one, None, 100, 2) == "-"
    assert difference(one, 84.0, 100, 2) == "+0.22" and difference(one, 85.0, 100, 2) == "-0.78"


def test_models_as_the_paper_calls_them():
    assert label("arnn-ind-sampled", {}) == "ARNN~_ind"
    assert label("brnn", {"block": 3}) == "BRNN, block 3"


def test_a_table_is_aligned():
    lines = markdown([["a", "long head"], ["x | y", "1"]]).splitlines()
    assert lines == ["| a      | long head |", "| ------ | --------- |", "| x \\| y | 1         |"]
