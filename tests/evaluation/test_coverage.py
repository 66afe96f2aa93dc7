"""Coverage of the right digits by samples: plain loops, networks whose samples are known, a run."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnistattn import evaluate, generate
from mnistattn.dataset.read import read_card
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation import coverage as module
from mnistattn.evaluation.coverage import (
    coverage,
    coverage_of_run,
    covered,
    has_samples,
    largest_share,
)
from mnistattn.evaluation.feed import Feed, load_feed
from mnistattn.evaluation.picture import RIGHT, WRONG, _legend_width, heat, samples_picture
from mnistattn.leaderboard.collect import collect
from mnistattn.models.network import build

SIDE = 32
CPU = torch.device("cpu")


# ------------------------------------------------------------------------- the pure functions


def loops(maps, instances, right) -> tuple[list, list]:
    """covered and largest_share, pixel by pixel."""
    found, shares = [], []
    for map_row, scene, answers in zip(maps.tolist(), instances.tolist(), right.tolist()):  # noqa: B905
        pixels = [(y, x) for y in range(len(scene)) for x in range(len(scene[0]))]
        pointed = set()
        for one in map_row:
            top = max(one[y][x] for y, x in pixels)
            places = [(y, x) for y, x in pixels if one[y][x] == top]
            if len(places) == 1:
                pointed.add(scene[places[0][0]][places[0][1]])
        found.append([is_right and k + 1 in pointed for k, is_right in enumerate(answers)])
        row = []
        for k, is_right in enumerate(answers):
            inside = [(y, x) for y, x in pixels if scene[y][x] == k + 1]
            best = math.nan
            if is_right and inside:
                totals = [sum(one[y][x] for y, x in pixels) for one in map_row]
                best = max(sum(one[y][x] for y, x in inside) / total if total else 0.0
                           for one, total in zip(map_row, totals))  # fmt: skip  # noqa: B905
            row.append(best)
        shares.append(row)
    return found, shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_against_plain_loops(seed, dtype):
    """Few grey levels, so that maxima tie often; objects without pixels; images without a right
    digit; constant maps."""
    rng = np.random.default_rng(seed)
    n, samples, objects = 40, int(rng.integers(1, 6)), int(rng.integers(1, 5))
    height, width = rng.integers(1, 6, 2)
    levels = int(rng.choice([2, 4, 50]))
    maps = torch.from_numpy(rng.integers(0, levels, (n, samples, height, width))).to(dtype)
    maps[3], maps[4, 0] = 0, 7.5
    instances = torch.from_numpy(
        rng.integers(0, objects + 2, (n, height, width), dtype=np.uint8)  # one more than there are
    )
    right = torch.from_numpy(rng.random((n, objects)) < 0.5)
    right[5] = False
    found, shares = loops(maps, instances, right)
    assert covered(maps, instances, right).tolist() == found
    expected = torch.tensor(shares, dtype=torch.float64)
    torch.testing.assert_close(
        largest_share(maps, instances, right), expected, rtol=1e-12, atol=0, equal_nan=True
    )
    assert right.any() and not right.all()


def test_a_tie_points_nowhere_even_inside_one_digit():
    instances = torch.tensor([[[1, 1, 2, 0]]], dtype=torch.uint8)
    right = torch.tensor([[True, True]])
    for values, expected in (
        ([3.0, 3.0, 0.0, 0.0], [False, False]),
        ([3.0, 2.0, 0.0, 0.0], [True, False]),
        ([0.0, 0.0, 3.0, 3.0], [False, False]),
        ([0.0, 0.0, 0.0, 3.0], [False, False]),
        ([2.0, 2.0, 2.0, 2.0], [False, False]),
        ([0.0, 0.0, 0.0, 0.0], [False, False]),
    ):
        assert covered(torch.tensor([[[values]]]), instances, right).tolist() == [expected]


def test_no_images_and_no_objects():
    none = torch.zeros(0, 3, 4, 4)
    empty = covered(none, torch.zeros(0, 4, 4, dtype=torch.uint8), torch.zeros(0, 2).bool())
    assert empty.shape == (0, 2) and empty.dtype == torch.bool
    maps, instances = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)
    assert covered(maps, instances, torch.zeros(2, 0).bool()).shape == (2, 0)


def test_what_does_not_fit_is_refused():
    good = {
        "maps": torch.rand(2, 3, 4, 5),
        "instances": torch.ones(2, 4, 5, dtype=torch.uint8),
        "right": torch.ones(2, 1, dtype=torch.bool),
    }
    for change, words in (
        ({"maps": torch.rand(2, 4, 5)}, "maps must be"),
        ({"maps": torch.rand(2, 0, 4, 5)}, "K > 0"),
        ({"maps": -good["maps"]}, ">= 0"),
        ({"maps": good["maps"] * math.nan}, "finite"),
        ({"maps": good["maps"].long()}, "floats"),
        ({"instances": good["instances"].long()}, "instances must be"),
        ({"instances": good["instances"][:, :3]}, "instances must be"),
        ({"right": good["right"][:1]}, "right must be"),
        ({"right": good["right"].long()}, "right must be"),
    ):
        for function in (covered, largest_share):
            with pytest.raises(ValueError, match=words):
                function(**(good | change))


# ------------------------------------------------------------------- networks that are known


@pytest.fixture(scope="module")
def scenes() -> Feed:
    """23 images of five objects, 2 to 4 of them the queried digit, each in a colour of its own;
    digit 0 is the one that is asked for, in the others' order at random. Each object is 6 pixels
    wide and 1 to 3 high."""
    rng = np.random.default_rng(0)
    n, objects = 23, 5
    digit = torch.zeros(n, objects, dtype=torch.int64)
    color = torch.zeros(n, objects, dtype=torch.int64)
    instances = torch.zeros(n, SIDE, SIDE, dtype=torch.uint8)
    answers = torch.zeros(n, 5, dtype=torch.bool)
    for i in range(n):
        copies = 2 + i % 3
        row = np.array([0] * copies + [1, 2, 3][: objects - copies])
        digit[i] = torch.from_numpy(rng.permutation(row))
        color[i] = torch.from_numpy(rng.permutation(5))
        answers[i, color[i, digit[i] == 0]] = True
        for k in range(objects):
            instances[i, 6 * k : 6 * k + 1 + k % 3, 4:10] = k + 1
    images = torch.from_numpy(rng.integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8))
    query = torch.zeros(n, dtype=torch.int64)
    return Feed(images, digit, color, query, answers.long().argmax(1), answers, False, CPU,
                instances)  # fmt: skip


class Points(torch.nn.Module):
    """Sample k of image i points at object `chosen(i, k)` (None: at the background), and says its
    colour (or the class `silent`)."""

    has_samples = True

    def __init__(self, feed: Feed, chosen, silent: int = 0):
        super().__init__()
        self.feed, self.chosen, self.silent, self.at = feed, chosen, silent, 0
        self.batches: list[int] = []

    def forward(self, images, query, samples=1):
        first, self.at = self.at, self.at + len(images)
        self.batches.append(len(images))
        logits = torch.zeros(len(images), samples, 5)
        # The product of two layers has its peak where both have one; each alone has two.
        near, far = torch.full((2, len(images), samples, SIDE, SIDE), 0.1)
        for i in range(len(images)):
            for k in range(samples):
                objects = self.chosen(first + i, k)
                y, x = (6 * objects, 5) if objects is not None else (31, 20)
                near[i, k, y, x] = far[i, k, y, x] = 1
                near[i, k, 31, k] = far[i, k, 31, 31 - k] = 1
                said = self.silent if objects is None else int(self.feed.color[first + i, objects])
                logits[i, k, said] = 1
        # A layer of one value, smaller than the image, changes nothing.
        even = torch.full((len(images), samples, 2, 2), 0.25)
        return logits, {"attention": [even, near, far]}


def rights(feed: Feed, i: int) -> list[int]:
    return (feed.digit[i] == feed.query[i]).nonzero()[:, 0].tolist()


def wrongs(feed: Feed, i: int) -> list[int]:
    return (feed.digit[i] != feed.query[i]).nonzero()[:, 0].tolist()


def values(made: dict) -> dict[str, float]:
    return {name: v["value"] for name, v in made.items() if isinstance(v, dict)}


def test_samples_that_find_every_right_digit(scenes):
    def chosen(i, k):
        return rights(scenes, i)[k % len(rights(scenes, i))]

    made = coverage(Points(scenes, chosen), scenes, samples=5, progress=False)
    counts = [len(rights(scenes, i)) for i in range(len(scenes))]
    found = values(made)
    assert (made["samples"], made["images"]) == (5, 23)
    assert found["right"] == found["covered"] == found["answers"] == np.mean(counts)
    assert found["share"] == found["pointing"] == found["accuracy"] == 1
    assert made["covered"]["se"] == pytest.approx(np.std(counts, ddof=1) / math.sqrt(23))
    assert made["covered"]["n"] == 23 and made["share"]["se"] == 0
    # One pixel of 1, two of 0.1 and 1021 of 0.01.
    inside = [[(1 + 0.01 * (6 * (1 + k % 3) - 1)) / (1.2 + 0.01 * 1021) for k in rights(scenes, i)]
              for i in range(23)]  # fmt: skip
    assert found["mass"] == pytest.approx(np.mean([np.mean(row) for row in inside]), rel=1e-6)
    json.dumps(made, allow_nan=False)


def test_samples_that_agree_cover_one(scenes):
    made = coverage(Points(scenes, lambda i, k: rights(scenes, i)[0]), scenes, 5, progress=False)
    found = values(made)
    assert found["covered"] == found["pointing"] == found["answers"] == found["accuracy"] == 1
    shares = [1 / len(rights(scenes, i)) for i in range(len(scenes))]
    assert found["share"] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("where", ["background", "wrong digits"])
def test_samples_that_find_none(scenes, where):
    def chosen(i, k):
        left = wrongs(scenes, i) if where == "wrong digits" else []
        return left[k % len(left)] if left else None

    wrong = next(c for c in range(5) if not scenes.answers[:, c].all())
    network = Points(scenes, chosen, silent=wrong)
    found = values(coverage(network, scenes, 5, progress=False))
    assert found["covered"] == found["share"] == found["pointing"] == 0
    if where == "background":
        expected = scenes.answers[:, wrong].double().mean().item()
        assert found["answers"] == found["accuracy"] == pytest.approx(expected)
        assert 0 < expected < 1
    else:
        assert found["answers"] == found["accuracy"] == 0


def test_some_of_the_samples(scenes):
    """Sample 0 points at a right digit, 1 and 2 at the next one, 3 at nothing."""

    def chosen(i, k):
        return [rights(scenes, i)[0], *[rights(scenes, i)[1]] * 2, None][k]

    found = values(coverage(Points(scenes, chosen), scenes, 4, progress=False))
    assert found["covered"] == 2 and found["pointing"] == 0.75
    # What sample 3 says, class 0, may be right, too.
    known, heard, true = scenes.answers, [], []
    for i in range(23):
        said = [
            int(scenes.color[i, o]) if o is not None else 0 for o in map(chosen, [i] * 4, range(4))
        ]
        heard.append(len({c for c in said if known[i, c]}))
        true.append(np.mean([bool(known[i, c]) for c in said]))
    assert found["answers"] == pytest.approx(np.mean(heard))
    assert found["accuracy"] == pytest.approx(np.mean(true))


def test_an_image_without_a_right_digit_has_no_share(scenes):
    """It covers none, and is left out of the means of what is then not defined."""
    query = scenes.query.clone()
    query[7] = 9
    made = coverage(
        Points(scenes, lambda i, k: rights(scenes, i)[0]),
        dataclasses.replace(scenes, query=query),
        progress=False,
    )
    counted = {name: v["n"] for name, v in made.items() if isinstance(v, dict)}
    assert {name for name, n in counted.items() if n == 22} == {"share", "pointing", "mass"}
    assert made["covered"]["value"] == pytest.approx(22 / 23) and made["pointing"]["value"] == 1


def test_chance_is_that_of_random_pixels(scenes):
    """Against the formula, and against samples that do point at random pixels."""
    areas = [[6 * (1 + k % 3) / SIDE**2 for k in rights(scenes, i)] for i in range(23)]
    expected = np.mean([sum(1 - (1 - a) ** 100 for a in row) for row in areas])

    class Random(torch.nn.Module):
        has_samples = True

        def forward(self, images, query, samples):
            n = len(images) * samples
            maps = torch.zeros(n, SIDE**2)
            maps[torch.arange(n), torch.randint(SIDE**2, (n,))] = 1
            logits = torch.zeros(len(images), samples, 5)
            return logits, {"attention": [maps.view(len(images), samples, SIDE, SIDE)]}

    made = coverage(Random(), scenes, 100, progress=False)
    assert made["chance"]["value"] == pytest.approx(expected)
    assert abs(made["covered"]["value"] - expected) < 4 * made["covered"]["se"]
    assert made["chance"]["value"] > 1


def test_batches_hold_so_many_passes(scenes, monkeypatch):
    """Their number changes nothing where nothing is drawn."""

    def chosen(i, k):
        return (i + 2 * k) % 5

    whole = Points(scenes, chosen)
    expected = coverage(whole, scenes, 4, progress=False)
    assert whole.batches == [23]
    monkeypatch.setattr(module, "PASSES", 21)
    parts = Points(scenes, chosen).train()
    found = values(coverage(parts, scenes, 4, progress=False))
    assert parts.batches == [5, 5, 5, 5, 3] and not parts.training
    assert found == pytest.approx(values(expected), rel=1e-12)


class One(torch.nn.Module):
    """A deterministic network: one map, at the first right digit; `attend` has it, not forward."""

    def __init__(self, feed: Feed):
        super().__init__()
        self.points = Points(feed, lambda i, k: rights(feed, i)[0])

    def attend(self, images, query):
        logits, out = self.points(images, query)
        return logits[:, 0], out


def test_a_deterministic_network_has_one_map(scenes):
    made = coverage(One(scenes), scenes, samples=20, progress=False)
    assert made["samples"] == 1
    found = values(made)
    assert found["covered"] == found["pointing"] == found["answers"] == 1
    assert found["chance"] == pytest.approx(sum(
        6 * (1 + k % 3) / SIDE**2 for i in range(23) for k in rights(scenes, i)) / 23)  # fmt: skip


def test_one_right_digit_and_queries_for_colours(scenes):
    """As in mbg-inv: the query is a colour that occurs once."""
    index = torch.arange(23)
    asked = dataclasses.replace(
        scenes, query=scenes.color[:, 1], answers=torch.nn.functional.one_hot(
            scenes.digit[:, 1], 10).bool(), asks_color=True)  # fmt: skip
    made = coverage(Points(scenes, lambda i, k: [1, 2][(i + k) % 2]), asked, 1, progress=False)
    found = values(made)
    assert found["right"] == 1
    assert found["covered"] == found["share"] == found["pointing"] == pytest.approx(12 / 23)
    assert made["covered"]["n"] == len(index)


def test_the_mask_is_given_to_a_network_that_sees_it(scenes):
    class Told(One):
        sees_mask = True

        def attend(self, images, query, mask):
            logits, _ = super().attend(images, query)
            return logits, {"attention": [mask[:, None].float()]}

    found = values(coverage(Told(scenes), scenes, progress=False))
    areas = [[1 + k % 3 for k in rights(scenes, i)] for i in range(23)]
    shares = [np.mean(row) / sum(row) for row in areas]
    assert found["covered"] == 0  # the maximum is shared
    assert found["mass"] == pytest.approx(np.mean(shares), rel=1e-6)


# ------------------------------------------------------------------------ networks that draw


@pytest.fixture(scope="module")
def sampled() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("arnn-sampled", SIDE, 10, 5, hidden=2, context=4)


def test_a_seed_gives_the_same_samples_and_another_does_not(sampled, scenes):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = coverage(sampled, scenes, 10, seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are used up
    torch.manual_seed(6)
    assert coverage(sampled, scenes, 10, seed=1, progress=False) == first
    other = coverage(sampled, scenes, 10, seed=2, progress=False)
    assert other["mass"] != first["mass"]
    assert other["right"] == first["right"] and other["chance"] == first["chance"]


def test_batches_have_their_own_samples(sampled, scenes):
    """Equal images in two batches get different ones, and no batch hangs on those before it."""
    index = torch.zeros(20, dtype=torch.long)
    same = dataclasses.replace(scenes, **{
        name: getattr(scenes, name)[index]
        for name in ("images", "digit", "color", "query", "answer", "answers", "instances")
    })  # fmt: skip
    with torch.inference_mode():
        first, second = list(module._batches(sampled, same, 20, seed=0))
        assert len(first.said) == len(second.said) == 10
        maps = torch.cat([first.maps, second.maps]).flatten(0, 1)
        assert len(maps.flatten(1).unique(dim=0)) == 400
        (alone,) = list(module._batches(sampled, dataclasses.replace(same, query=same.query[:10]),
                                        20, seed=0))  # fmt: skip
    assert torch.equal(alone.maps, first.maps)


def test_without_a_spread_all_samples_are_the_mean(sampled, scenes):
    still = build("arnn-sampled", SIDE, 10, 5, hidden=2, context=4, spread=0)
    still.load_state_dict(sampled.state_dict())
    found = values(coverage(still, scenes, 7, progress=False))
    assert found["covered"] == pytest.approx(found["pointing"])
    mean = sampled.eval()
    one = values(coverage(Mean(mean), scenes, progress=False))
    assert found["covered"] == one["covered"] and found["accuracy"] == pytest.approx(
        one["accuracy"]
    )
    assert found["mass"] == pytest.approx(one["mass"], rel=1e-5)
    spread = values(coverage(sampled, scenes, 7, progress=False))
    assert spread["mass"] != pytest.approx(one["mass"], rel=1e-3)


class Mean(torch.nn.Module):
    """A sampled network, asked for its mean."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images, query):
        return self.network(images, query)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("arnn-sampled", True), ("arnn-ind", True), ("arnn-ind-sampled", True), ("arnn", False),
     ("ctx", False), ("none", False), ("gradcam", False)],
)  # fmt: skip
def test_which_networks_have_samples(name, expected):
    assert has_samples(build(name, SIDE, 10, 5)) is expected


# ---------------------------------------------------------------------------- what is refused


def test_networks_and_feeds_that_have_no_coverage(scenes):
    network = Points(scenes, lambda i, k: 0)
    with pytest.raises(InputError, match="without attention"):
        coverage(build("none", SIDE, 10, 5), scenes, progress=False)
    with pytest.raises(ValueError, match="masks=True"):
        coverage(network, dataclasses.replace(scenes, instances=None), progress=False)
    with pytest.raises(InputError, match="without images"):
        coverage(network, dataclasses.replace(scenes, query=scenes.query[:0]), progress=False)
    for samples in (0, -1, 201):
        with pytest.raises(InputError, match=f"{samples} samples are impossible"):
            coverage(network, scenes, samples, progress=False)
    for seed in (-1, 1 << 32):
        with pytest.raises(InputError, match=f"seed {seed} is out of range"):
            coverage(network, scenes, 2, seed, progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_a_map_that_is_none_is_one_sentence(scenes, value):
    class Bad(Points):
        def forward(self, images, query, samples):
            logits, out = super().forward(images, query, samples)
            out["attention"][1][-1, -1, 3, 3] = value
            return logits, out

    with pytest.raises(MnistattnError, match=r"^the attention maps cannot be scored: [^\n]+$"):
        coverage(Bad(scenes, lambda i, k: 0), scenes, 3, progress=False)


# ------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def multi(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "multi"
    return generate("mbg-multi", out, seed=2, train=16, val=4, test=24, digits="strokes", size=48,
                    max_scale=0.75, max_objects=6, backgrounds="textures", workers=1,
                    progress=False)  # fmt: skip


def trained(model: str, data: Path, out: Path, **options) -> Path:
    evaluate(model, data, epochs=1, batch_size=8, device="cpu", out=out, progress=False,
             say=lambda line: None, options=options)  # fmt: skip
    return out


@pytest.fixture(scope="module")
def done(multi, tmp_path_factory) -> Path:
    """A finished run of arnn-sampled. Copy it, never change it."""
    out = tmp_path_factory.mktemp("runs") / "sampled"
    return trained("arnn-sampled", multi, out, hidden=2, context=4)


@pytest.fixture(scope="module")
def made(done, multi, tmp_path_factory) -> tuple[Path, dict]:
    """The run with its coverage, and what coverage_of_run returned."""
    run = Path(shutil.copytree(done, tmp_path_factory.mktemp("made") / "sampled"))
    return run, quiet(run, multi)


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def quiet(run: Path, data, samples: int = 20, **options) -> dict:
    return coverage_of_run(run, data, samples, **({"device": "cpu", "progress": False} | options))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_two_files_are_added_and_no_other_is_touched(done, made, multi):
    run, content = made
    before, after = files(done), files(run)
    assert set(after) - set(before) == {"coverage.json", "samples.png"}
    assert all(after[name] == data for name, data in before.items())
    kept = json.loads(after["coverage.json"])
    assert kept | {"file": str(run / "coverage.json")} == content
    assert kept["weights"] == hashlib.sha256(before["model.safetensors"]).hexdigest()
    assert kept["digest"] == read_card(multi).digest("test")
    assert (kept["format"], kept["model"]) == ("mnistattn-coverage", "arnn-sampled")
    assert (kept["samples"], kept["seed"], kept["spread"]) == (20, 0, 1.0)
    assert kept["coverage"]["images"] == 24 and 2 <= kept["coverage"]["right"]["value"] <= 4
    assert collect([run])[1] == []  # the board does not stumble over it


def test_the_numbers_are_those_of_the_networks_own_weights(made, multi):
    from safetensors.torch import load_file

    network = build("arnn-sampled", 48, 10, 5, hidden=2, context=4)
    network.load_state_dict(load_file(made[0] / "model.safetensors"))
    network.to(memory_format=torch.channels_last)  # as runs are: other kernels round otherwise
    feed = load_feed(read_card(multi), "test", CPU, masks=True)
    assert coverage(network, feed, 20, progress=False) == made[1]["coverage"]
    # The test set's own digits, counted from its arrays.
    digit, query = feed.digit.tolist(), feed.query.tolist()
    counts = [row.count(q) for row, q in zip(digit, query, strict=True)]
    assert made[1]["coverage"]["right"]["value"] == np.mean(counts)


def test_the_picture_shows_the_first_images_with_their_first_samples(made, multi, monkeypatch):
    """Its maps are those that were counted."""
    seen = {}

    def spy(images, masks, maps, captions, answers, correct, **options):
        seen.update(images=images, masks=masks, maps=maps, captions=captions, answers=answers,
                    correct=correct)  # fmt: skip
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(module, "samples_picture", spy)
    network = build("arnn-sampled", 48, 10, 5, hidden=2, context=4)
    card = read_card(multi)
    feed = load_feed(card, "test", CPU, masks=True)
    module._picture(network, feed, card, 60, 3, "title")  # 3 images a batch: 8 of three batches
    with torch.inference_mode():
        parts = list(module._batches(network, feed, 60, 3))[:3]
    assert np.array_equal(seen["maps"], torch.cat([p.maps for p in parts])[:8].numpy())
    assert np.array_equal(seen["images"], feed.images[:8].numpy())
    right = feed.digit[:8] == feed.query[:8, None]
    for i in range(8):
        objects = [k + 1 for k in range(right.shape[1]) if right[i, k]]
        assert np.array_equal(seen["masks"][i], np.isin(feed.instances[i].numpy(), objects))
        names = [card.answer_names[a] for a in feed.answers[i].nonzero()[:, 0]]
        assert seen["captions"][i] == f"{int(feed.query[i])} -> {' or '.join(names)}"
        assert seen["correct"][i] == [said in names for said in seen["answers"][i]]
    # The real one: image, six samples and the mean in eight rows.
    with Image.open(made[0] / "samples.png") as picture:
        assert picture.size == (2 * 24 + 8 * (96 + 6) - 6 + 24, 24 + 40 + 36 + 8 * 152 + 24 + 20)


def refuse(*arguments, **options):
    raise AssertionError("it is there already")


def test_what_is_there_is_not_computed_again(run, made, multi, monkeypatch):
    monkeypatch.setattr(module, "coverage", refuse)
    expected = made[1] | {"file": str(run / "coverage.json")}
    assert quiet(run, multi) == expected
    assert quiet(run / "result.json", read_card(multi), spread=1) == expected


def damage_json(run: Path) -> None:
    (run / "coverage.json").write_text('{"format": "mnistattn-coverage"')


def other_weights(run: Path) -> None:
    content = json.loads((run / "coverage.json").read_text())
    (run / "coverage.json").write_text(json.dumps(content | {"weights": "0" * 64}))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda run: None, {"samples": 3}),
        (lambda run: None, {"seed": 1}),
        (lambda run: None, {"spread": 4.0}),
        (damage_json, {}),
        (lambda run: (run / "coverage.json").write_text("[]"), {}),
        (other_weights, {}),
        (lambda run: (run / "samples.png").unlink(), {}),
    ],
    ids=["samples", "seed", "spread", "damaged", "a list", "weights", "picture"],
)
def test_what_does_not_fit_is_computed_again(run, made, multi, change, options):
    change(run)
    again = quiet(run, multi, **options)
    assert json.loads((run / "coverage.json").read_text()) | {"file": again["file"]} == again
    assert all(again[name] == value for name, value in options.items())
    assert (run / "samples.png").exists()
    if options:
        assert again["coverage"]["mass"] != made[1]["coverage"]["mass"]
    else:
        assert again["coverage"] == made[1]["coverage"]


def test_other_data_and_a_deterministic_model(tiny, tmp_path):
    """MREF, where one digit is right, and a network of one map."""
    run = trained("ctx", tiny, tmp_path / "ctx")
    content = quiet(run, tiny)
    found = content["coverage"]
    assert (content["samples"], found["samples"], content["spread"]) == (20, 1, None)
    assert found["right"] == {"value": 1.0, "se": 0.0, "n": 40}
    assert found["covered"] == found["pointing"] == found["share"]
    # The run's own scores say the same of the same maps.
    scores = json.loads((run / "result.json").read_text())["scores"]
    assert found["covered"]["value"] == pytest.approx(scores["masks"]["pointing"]["value"])
    assert found["mass"]["value"] == pytest.approx(
        scores["masks"]["correctness"]["value"], abs=2**-16
    )
    assert found["accuracy"]["value"] == scores["accuracy"]["value"]
    with pytest.raises(InputError, match="has no option 'spread'"):
        quiet(run, tiny, spread=2.0)
    with Image.open(run / "samples.png") as picture:
        assert picture.width == 2 * 24 + _legend_width("right digits")  # wider than two tiles


def edit(run: Path, **change) -> None:
    raw = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(raw | change))


REFUSED = {
    "no weights": (lambda run: (run / "model.safetensors").unlink(), {},
                   "model.safetensors is missing"),
    "other weights": (lambda run: (run / "model.safetensors").write_text("text"), {}, "is damaged"),
    "no result": (lambda run: (run / "result.json").unlink(), {}, "does not exist"),
    "another model": (lambda run: None, {"model": "ctx"}, "no option"),
    "unknown model": (lambda run: edit(run, model="ctxx"), {}, "unknown model 'ctxx'"),
    "no data": (lambda run: None, {"data": "nowhere"}, "nowhere is no data set"),
    "no device": (lambda run: None, {"device": "tpu"}, "unknown device 'tpu'"),
    "samples": (lambda run: None, {"samples": 0}, "0 samples are impossible"),
    "seed": (lambda run: None, {"seed": -1}, "seed -1 is out of range"),
    "spread": (lambda run: None, {"spread": -1.0}, "spread"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_sentence_and_nothing_written(done, multi, tmp_path, name):
    change, options, words = REFUSED[name]
    run = Path(shutil.copytree(done, tmp_path / "run"))
    change(run)
    before = files(run)
    with pytest.raises(InputError, match=words) as caught:
        quiet(run, **({"data": multi} | options))
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"
    assert files(run) == before


def test_data_of_other_queries_does_not_fit(done, tmp_path):
    data = generate("mbg-inv", tmp_path / "inv", train=0, val=0, test=4, digits="strokes",
                    size=48, max_scale=1.0, workers=1, progress=False)  # fmt: skip
    with pytest.raises(InputError, match="does not fit"):
        quiet(done, data)


def test_a_full_disk_leaves_what_was_there(run, multi, monkeypatch):
    before = files(run)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(MnistattnError, match="cannot write .*: No space left on device"):
        quiet(run, multi, 2)
    assert files(run) == before


# ------------------------------------------------------------------------------- the picture


def sheet(count=3, samples=8, side=100):
    """Black images; sample k of image i looks at row 10 + k, column 20 + 5 i."""
    maps = np.zeros((count, samples, side, side))
    for i in range(count):
        for k in range(samples):
            maps[i, k, 10 + k, 20 + 5 * i] = 10.0 ** (k - 20)
    return {
        "images": np.zeros((count, side, side, 3), np.uint8),
        "masks": np.zeros((count, side, side), bool),
        "maps": maps,
        "captions": [f"{i} -> red or green" for i in range(count)],
        "answers": [["red"] * samples for _ in range(count)],
        "correct": [[k == 1 for k in range(samples)] for _ in range(count)],
        "title": "ARNN~ on MBG^multi",
    }


def tiles(picture: Image.Image, i: int, column: int, side: int = 100):
    """Where image i's tile in a column is shown, and the line below it."""
    y = 24 + 40 + 12 + 24 + i * (side + 56) + 24
    x = 24 + 12 + column * (side + 6)
    pixels = np.asarray(picture)
    return pixels[y : y + side, x : x + side], pixels[y + side : y + side + 24, x : x + side]


def colours(pixels) -> set:
    return set(map(tuple, pixels.reshape(-1, 3).tolist()))


def test_maps_land_where_they_should():
    data = sheet()
    picture = samples_picture(**data)
    assert picture.size == (2 * 24 + 8 * 106 - 6 + 24, 24 + 40 + 36 + 3 * 156 + 24 + 20)
    brightest = tuple((0.9 * heat(np.ones(1))[0]).astype(np.uint8))
    for i in range(3):
        assert not tiles(picture, i, 0)[0].any()
        for k in range(6):
            shown = tiles(picture, i, 1 + k)[0]
            assert np.argwhere(shown.any(2)).tolist() == [[10 + k, 20 + 5 * i]]
            assert tuple(shown[10 + k, 20 + 5 * i]) == brightest
        # The mean is of all eight, each of the same weight however small its values are.
        shown = tiles(picture, i, 7)[0]
        expected = [[10 + k, 20 + 5 * i] for k in range(8)]
        assert np.argwhere(shown.any(2)).tolist() == expected
        assert colours(shown[10:18, 20 + 5 * i]) == {brightest}


def test_the_mean_is_of_distributions():
    """A map spread over four pixels gives each a quarter of what a map of one pixel gives it."""
    data = sheet(count=1, samples=2)
    data["maps"][:] = 0
    data["maps"][0, 0, 50, 50] = 3
    data["maps"][0, 1, 70:72, 70:72] = 100
    shown = tiles(samples_picture(**data), 0, 3)[0]
    expected = 0.9 * np.sqrt(0.25) * heat(np.full(1, 0.25))[0]
    assert np.abs(shown[70, 71] - expected).max() < 1
    assert np.argwhere(shown.any(2)).tolist()[0] == [50, 50]


def test_answers_are_green_or_red_below_their_maps():
    picture = samples_picture(**sheet())
    for i in range(3):
        for k in range(6):
            below = colours(tiles(picture, i, 1 + k)[1])
            assert (RIGHT in below, WRONG in below) == (k == 1, k != 1)
        for column in (0, 7):
            assert not colours(tiles(picture, i, column)[1]) & {RIGHT, WRONG}


def test_right_digits_are_outlined_on_every_map_and_the_image_is_shown():
    data = sheet(count=2)
    rng = np.random.default_rng(0)
    data["images"] = rng.integers(0, 256, data["images"].shape, dtype=np.uint8)
    data["masks"][0, 40:60, 40:60] = True
    plain = samples_picture(**(data | {"masks": np.zeros_like(data["masks"])}))
    picture = samples_picture(**data)
    for i in range(2):
        assert np.array_equal(tiles(picture, i, 0)[0], data["images"][i])
        for column in range(1, 8):
            changed = tiles(picture, i, column)[0] != tiles(plain, i, column)[0]
            places = np.argwhere(changed.any(2))
            assert bool(len(places)) == (i == 0)
            if i == 0:
                assert places.min() == 39 and places.max() == 60
                assert not changed[40:60, 40:60].any()


def test_one_map_has_no_mean_and_more_than_six_samples_fit():
    one = samples_picture(**sheet(samples=1))
    narrow = 2 * 24 + _legend_width("right digits")
    assert one.width == narrow
    assert np.argwhere(tiles(one, 1, 1)[0].any(2)).tolist() == [[10, 25]]
    assert colours(tiles(one, 1, 2)[0]) == {(255, 255, 255)}  # the panel
    cyan = np.argwhere((np.asarray(one)[-44:] == (0, 229, 255)).all(2))
    assert len(cyan) and cyan[:, 1].max() < one.width - 90  # the legend's last words fit
    assert samples_picture(**sheet(), shown=20).width == 2 * 24 + 10 * 106 - 6 + 24
    three = samples_picture(**sheet(), shown=1)  # image, mean and one sample
    assert three.width == max(narrow, 2 * 24 + 3 * 106 - 6 + 24)


def test_pictures_that_do_not_fit_are_refused():
    data = sheet(count=2, samples=3)
    for change, words in (
        ({"maps": data["maps"][0]}, "maps must be"),
        ({"maps": data["maps"][:1]}, "maps must be"),
        ({"maps": data["maps"][:, :0]}, "K and shown > 0"),
        ({"maps": data["maps"][..., :50]}, "maps must be"),
        ({"maps": -1 - data["maps"]}, "finite values >= 0"),
        ({"shown": 0}, "shown > 0"),
        ({"captions": ["one"]}, "1 captions for 2"),
        ({"answers": data["answers"][:1]}, "1 answers for 2"),
        ({"correct": data["correct"] * 2}, "4 correct for 2"),
        ({"answers": [["red"] * 3, ["red"] * 2]}, "3 values an image"),
        ({"correct": [[True] * 3, [True] * 4]}, "3 values an image"),
    ):
        with pytest.raises(ValueError, match=words):
            samples_picture(**(data | change))
