"""Each format of a board is read back and compared with what it was made of."""

import csv
import dataclasses
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest

from mnistattn.errors import InputError
from mnistattn.leaderboard.board import Board
from mnistattn.leaderboard.text import FORMATS, SORTS, render

_spec = importlib.util.spec_from_file_location(
    "example_board", Path(__file__).with_name("example_board.py")
)
assert _spec and _spec.loader
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def board() -> Board:
    return example.example_board(size=40, gallery=2)


def first_words(text: str) -> list[str]:
    """The names of the first group's rows, in order, in the text format."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if re.match("-+ -", line)) + 1
    names = []
    for line in lines[start:]:
        found = re.match(
            r" *(?:\d+|-) (.+?) +(?:\[\d\] +)*(?:model|plugged|control|post-hoc) ", line
        )
        if not found:
            break
        names.append(found[1])
    return names


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Tables as lists of rows of cells, with the escapes undone; the rule is left out."""
    tables: list[list[list[str]]] = []
    before = ""
    for line in text.split("\n"):
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            cells = [re.sub(r"\\(.)", r"\1", c) for c in cells]
            for entity, letter in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
                cells = [c.replace(entity, letter) for c in cells]
            if not re.fullmatch(r":?---:?", cells[0]):
                tables[-1].append(cells)
        before = line
    return tables


def test_csv_holds_every_number(board):
    rows = list(csv.DictReader(io.StringIO(render(board, "csv"))))
    entries = [(group, entry) for group in board.groups for entry in group.entries]
    assert len(rows) == len(entries)
    for row, (group, entry) in zip(rows, entries, strict=True):
        assert row["name"] == entry.name and row["group"] == group.key
        assert row["digest"] == group.dataset["digests"]["test"]
        assert float(row["accuracy"]) == entry.accuracy.value
        assert float(row["accuracy_low"]) == entry.accuracy.low
        assert int(row["rank_accuracy"]) == entry.rank["accuracy"]
        assert int(row["parameters"]) == entry.parameters
        assert int(row["seeds"]) == len(entry.seeds)
        assert float(row["train_cost"]) == entry.train_cost
        for i, bin in enumerate(entry.bins, start=1):
            assert float(row[f"bin{i}_accuracy"]) == bin.accuracy.value
            assert int(row[f"bin{i}_n"]) == bin.n
        if entry.correctness is None:
            assert row["correctness"] == row["correctness_high"] == ""
        else:
            assert float(row["correctness"]) == entry.correctness.value
        if entry.retest:
            assert float(row["retest_drop"]) == entry.retest.drop
            assert row["retest_flagged"] == ("yes" if entry.retest.flagged else "no")


def test_json_is_everything_but_the_arrays(board):
    whole = json.loads(render(board, "json"))
    assert whole["source"] == board.source and whole["problems"] == list(board.problems)
    for shown, group in zip(whole["groups"], board.groups, strict=True):
        assert shown["dataset"] == group.dataset
        assert set(shown) == {f.name for f in dataclasses.fields(group)} - {"images", "masks"}
        for dictionary, entry in zip(shown["entries"], group.entries, strict=True):
            assert "maps" not in dictionary
            assert dictionary["accuracy"] == dataclasses.asdict(entry.accuracy)
            assert dictionary["bins"] == [dataclasses.asdict(b) for b in entry.bins]
            assert dictionary["answers"] == list(entry.answers)


def test_json_has_no_nan(board):
    group = board.groups[1]
    entry = dataclasses.replace(group.entries[0], train_cost=float("nan"))
    odd = Board((dataclasses.replace(group, entries=(entry,)),))
    assert json.loads(render(odd, "json"))["groups"][0]["entries"][0]["train_cost"] is None
    assert " - " in render(odd, "text").split("\n")[8]


def test_markdown_rows(board):
    tables = markdown_tables(render(board, "markdown"))
    assert len(tables) == 4  # a table and its scales, for two groups
    head, *rows = tables[0]
    assert {len(row) for row in rows} == {len(head)} == {14}
    for row, entry in zip(rows, board.groups[0].entries, strict=True):
        assert row[1].split(" [")[0] == entry.name
        assert row[4].startswith(f"{100 * entry.accuracy.value:.2f}")
        assert int(row[8].replace(",", "")) == entry.parameters
    for row, entry in zip(tables[1][1:], board.groups[0].entries, strict=True):
        assert row[1].split(",")[0] == f"{100 * entry.bins[0].accuracy.value:.2f}"
        assert len(row) == 6


def test_markdown_shows_names_as_they_are(board):
    group = board.groups[1]
    name = "a|b <script> [x](http://y) *z* `q`\nnew"
    odd = Board((dataclasses.replace(
        group, entries=(dataclasses.replace(group.entries[0], name=name),)),))  # fmt: skip
    text = render(odd, "markdown")
    assert "<script>" not in text and "[x](" not in text
    assert markdown_tables(text)[0][1][1] == name.replace("\n", " ")


def test_text_table(board):
    text = render(board)
    assert first_words(text) == [entry.name for entry in board.groups[0].entries]
    assert "10,000 test images, digest a3a3a3a3a3a3a3a3;" in text
    assert "photos of one's own: not remakeable" in text
    assert text.count("not to the end") == 1  # two entries share the mark
    assert re.search(r"^\[1\] trained with 12 epochs", text, re.MULTILINE)
    assert "-2.31!" in text and "!: the accuracy on a fresh test set" in text
    assert "left out:\n  runs/broken/result.json" in text
    assert "Holm-corrected at 5 %; ties share a rank" in text
    ctx = next(line for line in text.split("\n") if " ctx " in line)
    assert "90.39 +-0.28 89.4..91.4" in ctx and "0.382 0.378..0.386" in ctx
    assert "79.00 0.31" in ctx
    assert max(map(len, text.split("\n"))) <= 128


@pytest.mark.parametrize("sort", SORTS)
def test_sorting(board, sort):
    shown = json.loads(render(board, "json", sort))["groups"][0]["entries"]
    value = {
        "accuracy": lambda e: -e["accuracy"]["value"],
        "correctness": lambda e: -e["correctness"]["value"] if e["correctness"] else 9,
        "parameters": lambda e: e["parameters"],
        "flops": lambda e: e["flops"],
        "train-cost": lambda e: e["train_cost"],
        "inference-cost": lambda e: e["inference_cost"],
        "name": lambda e: e["name"].casefold(),
    }[sort]
    assert [value(e) for e in shown] == sorted(value(e) for e in shown)
    assert len(shown) == len(board.groups[0].entries)
    if sort == "correctness":  # the entry without one is last, and the rank is that of correctness
        assert shown[-1]["name"] == "none"
        rows = markdown_tables(render(board, "markdown", sort))[0][1:]
        assert rows[-1][0] == "-" and rows[2][:2] == ["3", "Mine <b>& [1]"]


def test_one_entry_alone(board):
    alone = Board(board.groups[1:])
    text = render(alone)
    assert first_words(text) == ["ctx"] and "correctness" not in text
    assert len(markdown_tables(render(alone, "markdown"))[0]) == 2


def test_empty_board():
    empty = Board((), ("x.json: no result.",))
    assert "no results" in render(empty) and "x.json" in render(empty)
    assert "no results" in render(empty, "markdown")
    assert json.loads(render(empty, "json"))["groups"] == []
    assert list(csv.DictReader(io.StringIO(render(empty, "csv")))) == []


def test_wrong_words(board):
    with pytest.raises(InputError, match="accuracy, correctness, parameters, flops"):
        render(board, sort="acuracy")
    with pytest.raises(InputError, match="text, markdown, csv, json"):
        render(board, "html")


@pytest.mark.parametrize("format", FORMATS)
def test_same_input_same_text(board, format):
    assert render(board, format) == render(board, format)
