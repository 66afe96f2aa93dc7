"""Files that lie beside a result, and are none: histories, and what samples cover."""

import importlib.util
from pathlib import Path

import pytest

from mnistattn.leaderboard.collect import COMPANIONS, add, collect, companion

_spec = importlib.util.spec_from_file_location("invent", Path(__file__).with_name("invent.py"))
assert _spec and _spec.loader
i = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(i)

TEXT = {"curve": '[{"epoch": 1}]\n', "coverage": '{"format": "mnistattn-coverage"}\n'}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a retest and both companions."""
    made = i.invent(tmp_path / "runs", "mref", "arnn", 3, changed_options={"spread": 0.5})
    i.f.fabricate_retest(made, 0.4)
    for kind, text in TEXT.items():
        (made / f"{kind}.json").write_text(text)
    return made


def test_names():
    assert set(COMPANIONS) == set(TEXT)
    assert companion(Path("a/result.json"), "curve") == Path("a/curve.json")
    assert companion(Path("b/arnn-spread=0.5-1f-seed3.json"), "coverage") == Path(
        "b/arnn-spread=0.5-1f-seed3.coverage.json"
    )


def test_they_go_with_their_result(run, tmp_path):
    target = add(run, tmp_path / "board")
    assert target.name.startswith("arnn-spread=0.5-") and target.name.endswith("-seed3.json")
    for kind, text in TEXT.items():
        assert target.with_name(f"{target.stem}.{kind}.json").read_text() == text
    before = sorted(p.name for p in target.parent.iterdir())
    assert len(before) == 2 + 2 * 2 + 2  # the card, the gallery; result, retest; companions
    (run / "curve.json").write_text("[]")
    assert add(run, tmp_path / "board") == target  # again: what is new, is there
    assert sorted(p.name for p in target.parent.iterdir()) == before
    assert companion(target, "curve").read_text() == "[]"
    # From a board to another one.
    other = add(target, tmp_path / "other")
    assert sorted(p.name for p in other.parent.iterdir()) == before
    assert companion(other, "coverage").read_text() == TEXT["coverage"]


def test_two_results_keep_theirs_apart(run, tmp_path):
    second = i.invent(tmp_path / "runs", "mref", "arnn", 4)
    (second / "curve.json").write_text("[4]")
    one, two = (add(path, tmp_path / "board") for path in (run, second))
    assert one.parent == two.parent
    assert companion(one, "curve").read_text() == TEXT["curve"]
    assert companion(two, "curve").read_text() == "[4]"
    assert not companion(two, "coverage").exists()


@pytest.mark.parametrize("content", [None, "{", '{"format": "mnistattn-result"}', "[{}]"])
def test_they_are_no_results(run, tmp_path, content):
    """Not even if they are damaged, or say to be one."""
    target = add(run, tmp_path / "board")
    for file in (run / "result.json", target):
        for kind in COMPANIONS:
            if content is not None:
                companion(file, kind).write_text(content)
    for folder in (run.parent, tmp_path / "board"):
        found, problems = collect([folder], public=folder.name == "board")
        assert not problems and len(found) == 1 and len(found[0].retests) == 1
    found, problems = collect([tmp_path])  # the same result twice
    assert not problems and len(found) == 1
