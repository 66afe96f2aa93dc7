"""The training feed: images as they are on disk, and which queries an epoch asks."""

import numpy as np
import pytest
import torch

from mnistattn.dataset.read import answer_masks, read_card, read_split
from mnistattn.errors import InputError
from mnistattn.evaluation.feed import Feed, load_feed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def feed(tiny) -> Feed:
    return load_feed(read_card(tiny), "train", CPU)


def inverse() -> Feed:
    """Colour -> digit, by hand: a colour that occurs once is marked with *.

    0*1*2* | 0 0 1* | 3 3 2* 0* | 4 4 4 1* (padded to four objects)
    """
    color = torch.tensor([[0, 1, 2, -1], [0, 0, 1, -1], [3, 3, 2, 0], [4, 4, 4, 1]])
    digit = torch.tensor([[7, 8, 9, -1], [1, 2, 3, -1], [4, 5, 6, 7], [0, 9, 8, 2]])
    query, answer = torch.tensor([1, 1, 0, 1]), torch.tensor([8, 3, 7, 2])
    answers = torch.nn.functional.one_hot(answer, 10).bool()
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    return Feed(images, digit, color, query, answer, answers, True, CPU)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def colors_of(feed: Feed) -> list[dict[int, int]]:
    """Per image: what each digit's colour is."""
    pairs = zip(feed.digit.tolist(), feed.color.tolist(), strict=True)
    return [{d: c for d, c in zip(*row, strict=True) if d >= 0} for row in pairs]


# ------------------------------------------------------------------------------------ images


def test_a_batch_is_the_images_over_255(feed, tiny):
    arrays = read_split(read_card(tiny), "train")
    index = torch.tensor([5, 0, 63, 5])
    batch = feed.batch(index)
    expected = arrays["image"][index.numpy()].transpose(0, 3, 1, 2).astype(np.float32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.numpy(), expected * np.float32(1 / 255))
    # A product with 1 / 255 is the quotient but for the last bit.
    np.testing.assert_array_max_ulp(batch.numpy(), expected / np.float32(255), maxulp=1)


def test_the_ends_of_the_range_are_exact():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    none = torch.zeros(1, 1, dtype=torch.int64)
    feed = Feed(ramp, none, none, none[0], none[0], none.bool(), False, CPU)
    batch = feed.batch(torch.tensor([0]))[0, 0].flatten()
    assert batch[0] == 0 and batch[255] == 1
    assert (batch.diff() > 0).all()


def test_a_batch_changes_nothing(feed):
    before = feed.images.clone()
    feed.batch(torch.arange(8)).zero_()
    assert torch.equal(feed.images, before)


def test_loading_keeps_every_array(feed, tiny):
    arrays = read_split(read_card(tiny), "train")
    assert len(feed) == 64
    for name in ("digit", "color", "query", "answer"):
        assert getattr(feed, name).dtype == torch.int64
        assert np.array_equal(getattr(feed, name).numpy(), arrays[name].astype(np.int64))
    assert torch.equal(feed.images, torch.from_numpy(arrays["image"]))
    assert not feed.asks_color
    assert torch.equal(feed.answers.sum(1), torch.ones(64, dtype=torch.int64))
    assert feed.answers[torch.arange(64), feed.answer].all()


def test_an_unknown_split(tiny):
    with pytest.raises(InputError, match="Did you mean 'train'"):
        load_feed(read_card(tiny), "trian", CPU)


# ------------------------------------------------------------------------------------ queries


def test_one_asks_each_image_its_own_query(feed):
    image, query, answer = feed.pairs("one", generator())
    assert torch.equal(image.sort().values, torch.arange(64))
    assert not torch.equal(image, torch.arange(64))  # in random order
    assert torch.equal(query, feed.query[image])
    assert torch.equal(answer, feed.answer[image])


def test_fresh_asks_each_image_once_about_one_of_its_digits(feed):
    colors = colors_of(feed)
    seen = set()
    for epoch in range(5):
        image, query, answer = feed.pairs("fresh", generator(epoch))
        assert torch.equal(image.sort().values, torch.arange(64))
        triples = zip(image.tolist(), query.tolist(), answer.tolist(), strict=True)
        for i, q, a in triples:
            assert colors[i][q] == a
        seen |= set(zip(image.tolist(), query.tolist(), strict=True))
    assert len(seen) > 2 * 64  # other digits in other epochs


def test_fresh_finds_every_digit_equally_often():
    found = torch.zeros(4, 10)
    for epoch in range(400):
        image, _, answer = inverse().pairs("fresh", generator(epoch))
        found[image, answer] += 1
    assert found[0].nonzero().flatten().tolist() == [7, 8, 9]
    assert (found[0, 7:] > 90).all()  # 133 expected, with a deviation of 9
    assert (found[2, 6:8] > 150).all()


def test_all_asks_everything_once(feed):
    image, query, answer = feed.pairs("all", generator())
    triples = list(zip(image.tolist(), query.tolist(), answer.tolist(), strict=True))
    expected = {(i, d, c) for i, row in enumerate(colors_of(feed)) for d, c in row.items()}
    assert len(triples) == len(expected)
    assert set(triples) == expected
    assert image.tolist() != sorted(image.tolist())


@pytest.mark.parametrize("queries", ["one", "fresh", "all"])
def test_pairs_follow_from_the_generator(feed, queries):
    same = [feed.pairs(queries, generator(7)) for _ in range(2)]
    assert all(map(torch.equal, *same))
    other = feed.pairs(queries, generator(8))
    assert not torch.equal(same[0][0], other[0])


def test_a_colour_is_asked_for_only_if_it_occurs_once():
    feed = inverse()
    image, query, answer = feed.pairs("all", generator())
    triples = set(zip(image.tolist(), query.tolist(), answer.tolist(), strict=True))
    assert triples == {(0, 0, 7), (0, 1, 8), (0, 2, 9), (1, 1, 3), (2, 2, 6), (2, 0, 7), (3, 1, 2)}
    for epoch in range(20):
        fresh = feed.pairs("fresh", generator(epoch))
        assert set(zip(*(t.tolist() for t in fresh), strict=True)) <= triples
    image, query, answer = feed.pairs("one", generator())
    assert torch.equal(query, feed.query[image]) and torch.equal(answer, feed.answer[image])


# -------------------------------------------------------------------------------------- masks


@pytest.fixture(scope="module", params=["mref", "mbg-inv", "mbg-multi"])
def asked(request, tiny, tmp_path_factory) -> tuple[Feed, dict[str, np.ndarray]]:
    """A test split with its masks kept, and its arrays."""
    from mnistattn import generate

    data = tiny
    if request.param != "mref":
        data = generate(request.param, tmp_path_factory.mktemp("asked") / "set", train=1, val=1,
                        test=12, digits="strokes", progress=False)  # fmt: skip
    card = read_card(data)
    return load_feed(card, "test", CPU, masks=True), read_split(card, "test")


def test_the_mask_of_any_query_is_found_by_a_loop(asked):
    """All digits (or colours) of all images, also those that are not there."""
    feed, arrays = asked
    what = arrays["color" if feed.asks_color else "digit"]
    classes = 5 if feed.asks_color else 10
    image, query = torch.cartesian_prod(torch.arange(12), torch.arange(classes)).T
    order = torch.randperm(len(image), generator=generator())
    image, query = image[order], query[order]
    masks = feed.masks(image, query)
    assert (masks.dtype, masks.shape) == (torch.bool, (len(image), 100, 100))
    seen = set()
    for i, q, mask in zip(image.tolist(), query.tolist(), masks.numpy(), strict=True):
        expected = np.zeros((100, 100), bool)
        objects = [k for k, value in enumerate(what[i]) if value == q]
        for k in objects:
            expected |= arrays["instances"][i] == k + 1
        assert np.array_equal(mask, expected), (i, q)
        seen.add(min(len(objects), 2))
    assert {0, 1} <= seen
    if feed.asks_color or "answers" in arrays:
        assert 2 in seen  # a colour that several objects have, a digit in several colours


def test_the_mask_of_an_images_own_query_is_the_truth_it_is_scored_by(asked):
    feed, arrays = asked
    every = torch.arange(len(feed))
    truth = answer_masks(arrays)
    assert truth.any((1, 2)).all()
    assert np.array_equal(feed.masks(every, feed.query).numpy(), truth)
    turned = every.flip(0)
    assert np.array_equal(feed.masks(turned, feed.query[turned]).numpy(), truth[::-1])


def test_masks_by_hand():
    """Background and padding are never asked for, whatever the numbers are."""
    feed = inverse()
    feed.instances = torch.zeros(4, 8, 8, dtype=torch.uint8)
    feed.instances[:, 0, :4] = torch.arange(1, 5)  # the k-th object's pixel is (0, k)
    masks = feed.masks(torch.tensor([3, 1, 0, 2]), torch.tensor([4, 0, 1, 4]))
    assert not masks[:, 1:].any() and not masks[:, 0, 4:].any()
    assert masks[:, 0, :4].int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0] * 4]


def test_instances_are_kept_only_if_asked_for(feed, tiny):
    assert feed.instances is None
    kept = load_feed(read_card(tiny), "train", CPU, masks=True).instances
    assert kept.dtype == torch.uint8
    assert np.array_equal(kept.numpy(), read_split(read_card(tiny), "train")["instances"])
