"""The controls: attention that looks at nothing, and attention that is told the mask."""

import itertools

import numpy as np
import pytest
import torch

from mnistattn.errors import InputError
from mnistattn.evaluation.metrics import chance, combine, correctness, pixel_auroc
from mnistattn.models.attention.controls import Center, Oracle, Random, Uniform
from mnistattn.models.network import build
from mnistattn.models.registry import find

BLIND = [Uniform, Center, Random]
SHAPES = [(50, 50), (25, 25), (12, 12), (6, 6), (7, 7), (5, 8), (1, 1)]
either_layer = pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])


def draw(kind: type, shape=(6, 6), last=False, batch=2, dtype=torch.float32, **options):
    """The maps (B, H, W) of random features and queries."""
    x, query = torch.randn(batch, 32, *shape, dtype=dtype), torch.randn(batch, 32, dtype=dtype)
    a = kind(32, 32, last=last, **options)(x, query)
    assert a.shape == (batch, 1, *shape) and a.dtype == dtype
    return a[:, 0]


def rectangles(batch: int, size: int, seed: int = 0) -> torch.Tensor:
    """A mask each, of any place and size."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(batch, size, size, dtype=torch.bool)
    for each in mask:
        (top, bottom), (left, right) = (np.sort(rng.choice(size + 1, 2, False)) for _ in range(2))
        each[top:bottom, left:right] = True
    return mask


# ----------------------------------------------------------------------------- all four of them


@pytest.mark.parametrize("name", ["uniform", "center", "random", "oracle"])
def test_a_control_has_nothing_to_learn_or_to_save(name):
    bare = build("none", 100, 10, 5)
    network = build(name, 100, 10, 5)
    assert not list(network.attention.parameters())
    assert network.state_dict().keys() == bare.state_dict().keys()
    assert find(name).kind == "control"


@either_layer
@pytest.mark.parametrize("kind", BLIND)
def test_blind_controls_look_at_nothing(kind, last):
    torch.manual_seed(0)
    for shape in SHAPES:
        first, second = draw(kind, shape, last, 4), draw(kind, shape, last, 1)
        assert torch.equal(first, second.expand_as(first))


@either_layer
@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blind_controls_are_gates_and_sum_to_1_in_the_last_layer(kind, last, dtype):
    for shape in SHAPES:
        a = draw(kind, shape, last, dtype=dtype)
        assert ((a >= 0) & (a <= 1)).all() and torch.isfinite(a).all()
        if last:
            sums = a.double().sum((1, 2))
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=0.02)
        elif shape[0] * shape[1] > 30:
            assert (a.amax((1, 2)) > 0.8).all()


@either_layer
@pytest.mark.parametrize("kind", BLIND)
def test_a_control_is_the_same_map_in_any_layer_but_for_its_sum(kind, last):
    inner, outer = draw(kind, (6, 9)), draw(kind, (6, 9), True)
    torch.testing.assert_close(inner / inner.sum((1, 2), keepdim=True), outer)


# ------------------------------------------------------------------------------------- uniform


@pytest.mark.parametrize("size", [100, 224])
def test_correctness_of_uniform_is_the_area_of_the_mask(size):
    mask = rectangles(6, size)
    torch.manual_seed(0)
    network = build("uniform", size, 10, 5).eval()
    with torch.no_grad():
        maps = network(torch.rand(6, 3, size, size), torch.arange(6))[1]["attention"]
    product = combine(maps, (size, size))
    area = mask.double().mean((1, 2))
    torch.testing.assert_close(correctness(product, mask), area, rtol=1e-9, atol=0)
    torch.testing.assert_close(chance(mask), area, rtol=1e-12, atol=0)
    torch.testing.assert_close(pixel_auroc(product, mask), torch.full((6,), 0.5).double())


# -------------------------------------------------------------------------------------- center


@either_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_center_peaks_at_the_middle_and_is_symmetric(shape, last):
    (a,) = draw(Center, shape, last, batch=1, dtype=torch.float64)
    for turned in (a.flip(0), a.flip(1), a.flip(0, 1)):
        torch.testing.assert_close(a, turned, rtol=1e-6, atol=0)
    if shape[0] == shape[1]:
        torch.testing.assert_close(a, a.T, rtol=1e-6, atol=0)
    middles = [{(n - 1) // 2, n // 2} for n in shape]  # one row or column, or two
    peak = {tuple(p) for p in (a > a.max() * (1 - 1e-6)).nonzero().tolist()}
    assert peak == set(itertools.product(*middles))
    for line in (a[shape[0] // 2], a[:, shape[1] // 2]):  # falls towards the border
        assert (line[len(line) // 2 :].diff() < 0).all()


def test_center_is_as_wide_as_it_says():
    """A share of the image's side, whatever the map's size: sigma by the moments of a fine map."""
    for width, side in itertools.product((0.05, 0.1), (50, 112)):
        (a,) = draw(Center, (side, 2 * side), True, batch=1, dtype=torch.float64, width=width)
        for weights, n in ((a.sum(1), side), (a.sum(0), 2 * side)):
            at = (torch.arange(n) + 0.5) / n
            assert (weights * at).sum().item() == pytest.approx(0.5, abs=1e-6)
            sigma = (weights * (at - 0.5) ** 2).sum().sqrt().item()
            assert sigma == pytest.approx(width, rel=0.01)


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf"), "wide", True])
def test_an_impossible_width_is_refused(width):
    with pytest.raises(InputError, match=f"width {width} is impossible"):
        build("center", 100, 10, 5, width=width)


# -------------------------------------------------------------------------------------- random


def test_random_maps_differ_by_seed_and_by_size():
    maps = {
        (seed, shape): draw(Random, shape, map_seed=seed)[0]
        for seed in range(3)
        for shape in [(12, 12), (6, 6), (5, 8), (8, 5)]
    }
    for (seed, shape), a in maps.items():
        assert torch.equal(a, draw(Random, shape, map_seed=seed)[0])
        assert len(a.unique()) == a.numel()
    # Nor is one the beginning or the transpose of another.
    starts = [tuple(a.flatten()[:4].tolist()) for a in maps.values()]
    assert len(set(starts)) == len(maps)
    assert not torch.equal(maps[0, (5, 8)], maps[0, (8, 5)].T)


def test_random_maps_leave_the_global_random_numbers_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a = Random(32, 32, last=False)(torch.ones(2, 32, 12, 12), torch.ones(2, 32))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(a, Random(32, 32, last=False)(torch.ones(2, 32, 12, 12), torch.ones(2, 32)))


def test_random_maps_are_uniform_in_0_to_1():
    values = torch.cat([draw(Random, (50, 50), map_seed=s)[0].flatten() for s in range(8)])
    sorted_values, n = values.sort().values, len(values)
    gap = (sorted_values - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert gap < 2 / n**0.5  # Kolmogorov: above in 1 of 1500 sets of numbers


@pytest.mark.parametrize("seed", [-1, float("nan"), "zero", True])
def test_an_impossible_seed_is_refused(seed):
    with pytest.raises(InputError, match=f"map_seed {seed} is impossible"):
        build("random", 100, 10, 5, map_seed=seed)


# -------------------------------------------------------------------------------------- oracle


def told(mask: torch.Tensor, shape, last=False, dtype=torch.float64) -> torch.Tensor:
    x, query = torch.randn(len(mask), 32, *shape, dtype=dtype), torch.randn(len(mask), 32)
    a = Oracle(32, 32, last=last)(x, query, mask)
    assert a.shape == (len(mask), 1, *shape) and a.dtype == dtype
    return a[:, 0]


@pytest.mark.parametrize(
    ("size", "side"), [(100, 50), (100, 25), (224, 112), (224, 56), (224, 14), (224, 7), (12, 6)]
)
def test_the_oracle_is_the_covered_share_of_each_cell(size, side):
    mask = rectangles(4, size, side)
    block = size // side
    expected = torch.tensor(
        [
            [
                [
                    sum(m[i * block + p][j * block + q] for p in range(block) for q in range(block))
                    / block**2
                    for j in range(side)
                ]
                for i in range(side)
            ]
            for m in mask.tolist()
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(told(mask, (side, side)), expected)
    shares = expected / expected.sum((1, 2), keepdim=True)
    torch.testing.assert_close(told(mask, (side, side), last=True), shares)


@pytest.mark.parametrize("side", [12, 6])
def test_the_oracle_at_sizes_that_do_not_divide_stays_where_the_mask_is(side):
    mask = rectangles(8, 100)
    a = told(mask, (side, side))
    assert ((a >= 0) & (a <= 1)).all()
    for m, cells in zip(mask, a, strict=True):
        for i, j in itertools.product(range(side), repeat=2):
            # The pixels that a cell touches: those of its share of the side, rounded outwards.
            rows, columns = (slice(k * 100 // side, -(-(k + 1) * 100 // side)) for k in (i, j))
            assert cells[i, j].item() == pytest.approx(m[rows, columns].double().mean().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_last_map_of_the_oracle_sums_to_1_and_is_uniform_where_there_is_no_mask(dtype):
    mask = rectangles(5, 100)
    mask[1] = False
    mask[3] = False
    mask[3, 41, 57] = True  # a single pixel
    a = told(mask, (6, 6), True, dtype)
    rough = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        a.double().sum((1, 2)), torch.ones(5).double(), rtol=rough, atol=rough
    )
    torch.testing.assert_close(a[1], torch.full((6, 6), 1 / 36, dtype=dtype))
    assert (a[3] > 0).sum() == 1 and a[3].argmax() == 2 * 6 + 3
    inner = told(mask, (6, 6), False, dtype)
    assert (inner[1] == 0).all()


def test_the_oracle_scores_far_above_uniform_and_its_own_mask_above_another():
    mask = torch.zeros(3, 100, 100, dtype=torch.bool)
    mask[0, 10:40, 20:50] = mask[1, 55:90, 60:80] = mask[2, 30:58, 5:33] = True
    network = build("oracle", 100, 10, 5).eval()
    with torch.no_grad():
        maps = network(torch.rand(3, 3, 100, 100), torch.arange(3), mask=mask)[1]["attention"]
    product = combine(maps, (100, 100))
    assert (correctness(product, mask) > 0.85).all()
    assert (correctness(product, mask.roll(1, 0)) < 0.2).all()
    assert (pixel_auroc(product, mask) > 0.98).all()
