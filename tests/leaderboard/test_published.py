"""The results in leaderboard/, and the pages that are made of them: admissible, and not stale."""

import json
import re
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest

from mnistattn import generate
from mnistattn.dataset.read import read_card, read_split
from mnistattn.evaluation.result import schema
from mnistattn.leaderboard.build import build
from mnistattn.leaderboard.collect import TRUTH, collect, published
from mnistattn.leaderboard.page import page
from mnistattn.leaderboard.text import render

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "leaderboard"
STALE = "is stale: run 'make board' and commit what it writes"


@pytest.fixture(scope="module")
def submissions():
    found, problems = collect([FOLDER], public=True)
    assert problems == []
    return found


@pytest.fixture(scope="module")
def board(submissions):
    return build(submissions)


def test_they_are_found_from_the_package():
    assert published() == FOLDER


def test_an_installation_has_them_too():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    shipped = dict(setup["options.data_files"])
    folders = [f.name for f in FOLDER.iterdir() if f.is_dir()]
    assert shipped == {f"share/mnistattn/leaderboard/{f}": f"leaderboard/{f}/*" for f in folders}


def test_all_may_stand_there_and_there_are_some(board):
    assert {len(group.entries) > 3 for group in board.groups} == {True}
    assert len({group.dataset["digests"]["test"] for group in board.groups}) >= 2


def test_no_pixel_of_a_photo_is_published(board):
    for group in board.groups:
        assert group.public
        assert group.dataset["sources"]["backgrounds"]["source"] in (
            "black", "patches", "gaussian", "textures",
        )  # fmt: skip


def test_the_markdown_is_not_stale(board):
    assert (ROOT / "LEADERBOARD.md").read_text() == render(board, "markdown"), STALE


def test_the_page_is_not_stale(board):
    kept = (FOLDER / "index.html").read_text()
    assert f'content="{board.source}"' in kept, STALE
    assert words(kept) == words(page(board)), STALE


def words(html: str) -> str:
    """A page without its drawings, whose bytes depend on the versions of the drawing libraries."""
    return re.sub(r"<svg.*?</svg>|data:image/[^\"')]+", "", html, flags=re.DOTALL)


def test_the_schema_is_not_stale():
    kept = json.loads((ROOT / "docs/result.schema.json").read_text())
    made = schema()
    # Words and key order may differ between versions of pydantic; what is asked for may not.
    assert kept["required"] == made["required"], STALE
    assert {k: sorted(v.get("properties", {})) for k, v in kept["$defs"].items()} == {
        k: sorted(v.get("properties", {})) for k, v in made["$defs"].items()
    }, STALE


def test_anyone_can_remake_the_test_sets(board, submissions, real_data, tmp_path):
    done = set()
    for group in board.groups:
        dataset = group.dataset
        if dataset["digests"]["test"] in done:
            continue
        done.add(dataset["digests"]["test"])
        spec = {k: v for k, v in dataset["spec"].items() if k != "variant"}
        path = generate(
            dataset["variant"], tmp_path / group.key, seed=dataset["seed"], train=0, val=0,
            test=group.n, digits=dataset["sources"]["digits"]["source"], data_root=real_data,
            progress=False, say=lambda line: None, **spec,
        )  # fmt: skip
        card = read_card(path)
        assert card.digest("test") == dataset["digests"]["test"]
        arrays = read_split(card, "test", ("query", "answer", "scale", "target"))
        arrays["scale"] = arrays["scale"][range(group.n), arrays["target"]]
        for submission in submissions:  # and all were asked, and marked, by that test set
            if submission.result["dataset"]["digests"]["test"] == card.digest("test"):
                for name in TRUTH:
                    np.testing.assert_array_equal(submission.samples[name], arrays[name])
