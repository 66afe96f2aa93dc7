"""Scores of a network whose answers and maps are known, against plain loops."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from mnistattn.dataset.read import answer_masks, read_card, read_split
from mnistattn.errors import MnistattnError
from mnistattn.evaluation.feed import Feed, load_feed
from mnistattn.evaluation.score import MASK_METRICS, score_samples, summarize

EDGES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
N = 40
STEP = 2.0**-16  # metrics are kept as multiples of it


class Known(torch.nn.Module):
    """Says what it was given, image after image."""

    def __init__(self, prediction: torch.Tensor, *layers: torch.Tensor):
        super().__init__()
        self.logits, self.layers, self.at = torch.eye(5)[prediction], layers, 0

    def forward(self, images, query):
        part = slice(self.at, self.at + len(images))
        self.at += len(images)
        return self.logits[part], {"attention": [layer[part] for layer in self.layers]}


@pytest.fixture(scope="module")
def test_set(tiny) -> tuple[Feed, np.ndarray, np.ndarray]:
    """The test split, its masks, and scales all over the range (small ones are too common)."""
    card = read_card(tiny)
    masks = answer_masks(read_split(card, "test"))
    scale = np.random.default_rng(0).uniform(0.5, 3, N).astype(np.float32)
    scale[:3] = 0.5, 1.0, 3.0  # ends belong to the bin below, 0.5 to the first
    return load_feed(card, "test", torch.device("cpu")), masks, scale


@pytest.fixture(scope="module")
def said() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 5, N))


def score(test_set, prediction, *layers, **options) -> dict[str, np.ndarray]:
    network = Known(prediction, *layers).train()
    samples = score_samples(network, *test_set, progress=False, **options)
    assert not network.training
    return samples


def uniform(size: int) -> torch.Tensor:
    return torch.full((N, 1, size, size), 1 / size**2)


def oracle(masks, size: int) -> torch.Tensor:
    return adaptive_avg_pool2d(torch.from_numpy(masks)[:, None].float(), size)


def test_accuracy_and_bins_by_hand(test_set, said):
    feed, _, scale = test_set
    samples = score(test_set, said, uniform(50))
    hits = [int(p == a) for p, a in zip(said.tolist(), feed.answer.tolist(), strict=True)]
    scores = summarize(samples)
    assert scores["accuracy"]["hits"] == sum(hits)
    assert scores["accuracy"]["n"] == N
    assert scores["accuracy"]["value"] == sum(hits) / N
    assert 0 < scores["accuracy"]["low"] < sum(hits) / N < scores["accuracy"]["high"] < 1
    counted = 0
    for k, row in enumerate(scores["scales"]):
        low, high = EDGES[k], EDGES[k + 1]
        where = [i for i, s in enumerate(scale) if low < s <= high or (k == 0 and s == 0.5)]
        assert (row["from"], row["to"], row["n"]) == (low, high, len(where))
        assert row["hits"] == sum(hits[i] for i in where)
        expected = np.mean([samples["correctness"][i] for i in where])
        assert row["correctness"]["value"] == pytest.approx(expected)
        assert row["correctness"]["n"] == len(where)
        counted += row["n"]
    assert counted == N


def test_rows_are_those_of_the_images(test_set, said):
    feed, masks, scale = test_set
    samples = score(test_set, said, uniform(50), batch_size=7)  # the last batch is not full
    assert {len(values) for values in samples.values()} == {N}
    assert np.array_equal(samples["prediction"], said.numpy())
    assert np.array_equal(samples["query"], feed.query.numpy())
    assert np.array_equal(samples["answer"], feed.answer.numpy())
    assert np.array_equal(samples["correct"], (said == feed.answer).numpy())
    assert np.array_equal(samples["scale"], scale)
    np.testing.assert_allclose(samples["chance"], masks.mean((1, 2)), rtol=0, atol=STEP / 2)
    whole = score(test_set, said, uniform(50))
    for name, values in whole.items():
        assert np.array_equal(values, samples[name]), name


def test_columns_are_small_and_metrics_are_steps(test_set, said):
    samples = score(test_set, said, oracle(test_set[1], 25))
    for name, values in samples.items():
        if name == "correct":
            assert values.dtype == bool
        elif name in ("query", "answer", "prediction"):
            assert values.dtype == np.uint8, name
        else:
            assert values.dtype == np.float32, name
    for name in (*MASK_METRICS, "correctness_layer_1"):
        steps = samples[name].astype(np.float64) / STEP
        assert np.array_equal(steps, np.round(steps)), name


def test_the_mask_is_given_to_a_network_that_sees_it_and_to_no_other(test_set, said):
    """Each batch gets its own images' masks."""
    masks, given = test_set[1], []

    class Told(Known):
        sees_mask = True

        def forward(self, images, query, mask):
            given.append(mask)
            return super().forward(images, query)

    samples = score_samples(Told(said), *test_set, batch_size=7, progress=False)
    assert torch.equal(torch.cat(given), torch.from_numpy(masks))
    untold = score(test_set, said)  # its forward would not take one
    assert all(np.array_equal(samples[name], untold[name]) for name in untold)


def test_maps_made_for_scoring_are_those_of_attend(test_set, said):
    """A post-hoc network's forward gives no maps; its `attend` does."""

    class Explained(Known):
        def attend(self, images, query):
            logits, _ = self(images, query)
            return logits, {"attention": [torch.full((len(images), 1, 5, 5), 0.5)]}

    samples = score_samples(Explained(said), *test_set, progress=False)
    assert (samples["pixel_auroc"] == 0.5).all()
    assert np.array_equal(samples["prediction"], said.numpy())


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1])
def test_a_map_that_is_none_is_one_sentence(test_set, said, value):
    bad = uniform(6)
    bad[33, 0, 2, 2] = value
    with pytest.raises(MnistattnError, match=r"^the attention maps cannot be scored: [^\n]+$"):
        score(test_set, said, uniform(50), bad)


def test_uniform_attention_scores_chance(test_set, said):
    masks = summarize(score(test_set, said, uniform(50), uniform(6)))["masks"]
    for name in ("correctness", "rank_accuracy", "average_precision"):
        assert masks[name]["value"] == pytest.approx(masks["chance"]["value"], rel=1e-6)
    assert masks["pixel_auroc"]["value"] == pytest.approx(0.5)
    assert masks["pointing"]["value"] == 0


def test_an_oracle_is_near_one(test_set, said):
    masks = test_set[1]
    perfect = summarize(score(test_set, said, oracle(masks, 100)))["masks"]
    for name in set(MASK_METRICS) - {"chance", "pointing"}:
        assert perfect[name]["value"] == pytest.approx(1), name
    coarse = summarize(score(test_set, said, oracle(masks, 50), oracle(masks, 25)))
    assert coarse["masks"]["correctness"]["value"] > 0.7
    assert coarse["masks"]["pixel_auroc"]["value"] > 0.99
    # The product of both layers is sharper than either.
    assert coarse["layers"][1]["value"] < coarse["layers"][0]["value"]
    assert coarse["layers"][0]["value"] < coarse["masks"]["correctness"]["value"]


def test_correctness_of_a_random_map_by_hand(test_set, said):
    masks = test_set[1]
    torch.manual_seed(0)
    first, second = torch.rand(N, 1, 100, 100), torch.rand(N, 1, 100, 100)  # no enlargement
    samples = score(test_set, said, first, second)
    for i in range(0, N, 9):
        for name, map in (
            ("correctness", first[i, 0].double() * second[i, 0].double()),
            ("correctness_layer_1", first[i, 0].double()),
            ("correctness_layer_2", second[i, 0].double()),
        ):
            share = (map.numpy() * masks[i]).sum() / map.sum().item()
            assert samples[name][i] == pytest.approx(share, rel=0, abs=0.5001 * STEP)


def test_no_attention_no_mask_scores(test_set, said):
    samples = score(test_set, said)
    assert set(samples) == {"query", "answer", "prediction", "correct", "scale"}
    scores = summarize(samples)
    assert scores["masks"] is None
    assert scores["layers"] == []
    assert all(row["correctness"] is None for row in scores["scales"])
    assert scores["accuracy"]["n"] == N


def test_the_summary_follows_from_the_samples(test_set, said):
    samples = score(test_set, said, oracle(test_set[1], 50))
    scores = summarize(samples)
    values = samples["correctness"].astype(np.float64)
    mean = scores["masks"]["correctness"]
    assert mean["value"] == pytest.approx(values.mean())
    assert mean["se"] == pytest.approx(values.std(ddof=1) / np.sqrt(N))
    assert mean["n"] == N
    # An empty mask has no score: it is left out of the means, not of the accuracy.
    samples["correctness"] = values.copy()
    samples["correctness"][3] = np.nan
    mean = summarize(samples)["masks"]["correctness"]
    assert mean["n"] == N - 1
    assert mean["value"] == pytest.approx(np.delete(values, 3).mean())
    assert summarize(samples)["accuracy"] == scores["accuracy"]


def test_a_bin_without_images(test_set, said):
    feed, masks, _ = test_set
    small = np.full(N, 0.7, np.float32)
    scores = summarize(score((feed, masks, small), said, uniform(50)))
    assert scores["scales"][0]["n"] == N
    for row in scores["scales"][1:]:
        assert row["value"] is None
        assert (row["n"], row["hits"]) == (0, 0)
        assert row["correctness"] == {"value": None, "se": None, "n": 0}


def test_several_right_answers(test_set):
    """MBG^multi: any colour of the queried digit is right, not the noted one alone."""
    feed, masks, scale = test_set
    right = feed.answers.clone()
    another = (feed.answer + 1) % 5
    right[torch.arange(0, N, 2), another[::2]] = True
    several = dataclasses.replace(feed, answers=right)
    samples = score((several, masks, scale), another)
    assert np.array_equal(samples["correct"], np.arange(N) % 2 == 0)
    assert summarize(samples)["accuracy"]["value"] == 0.5
    assert score((several, masks, scale), feed.answer)["correct"].all()
