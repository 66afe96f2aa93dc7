"""The metrics against slow loops, scikit-learn, Quantus and SciPy, and what they promise."""

import ast
import doctest
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mnistattn.evaluation import metrics
from mnistattn.evaluation.metrics import (
    average_precision,
    chance,
    combine,
    correctness,
    mask_metrics,
    pixel_auroc,
    pointing,
    rank_accuracy,
    scale_bin,
    topk_iou,
    upsample,
    wilson,
)

MAP_METRICS = {
    "correctness": correctness,
    "rank_accuracy": rank_accuracy,
    "topk_iou": topk_iou,
    "pointing": pointing,
    "pixel_auroc": pixel_auroc,
    "average_precision": average_precision,
}


def samples(kind: str, count: int = 24, size: tuple[int, int] = (9, 7), seed: int = 0):
    """Maps of one kind, and masks of many areas with an empty (0) and a full one (1) among them."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, *size, generator=rng) < torch.rand(count, 1, 1, generator=rng)
    mask[0], mask[1] = False, True
    mask[2] = False
    mask[2, 3, 4] = True
    maps = torch.rand(count, *size, generator=rng)
    if kind == "ties":
        maps = (maps * 4).floor()
    elif kind == "sparse":  # most pixels exactly zero, as after a sharp softmax
        maps = maps.pow(8) * (maps > 0.9)
    elif kind == "zero":
        maps = torch.zeros_like(maps)
    elif kind == "constant":
        maps = torch.full_like(maps, 0.3)
    elif kind == "mixed":
        maps[::3] = (maps[::3] * 3).floor()
        maps[4], maps[5] = 0, 7
    return maps, mask


KINDS = ("distinct", "ties", "sparse", "zero", "constant", "mixed")


# ---- slow loops, float64, one sample at a time, straight from the definitions --------------------


def slow(values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    v, g = values.astype(np.float64).ravel(), truth.ravel()
    names = ("correctness", "chance", "rank_accuracy", "topk_iou", "pointing", "pixel_auroc")
    if not g.any():
        return dict.fromkeys((*names, "average_precision"), math.nan)
    size = int(g.sum())
    total = sum(v)
    score = {"chance": size / len(g)}
    score["correctness"] = sum(v[g]) / total if total else 0.0

    threshold = sorted(v, reverse=True)[size - 1]
    sure = sum(1 for a, b in zip(v, g, strict=True) if a > threshold and b)
    above = sum(1 for a in v if a > threshold)
    tied = [bool(b) for a, b in zip(v, g, strict=True) if a == threshold]
    expected = sure + (size - above) * sum(tied) / len(tied)
    score["rank_accuracy"] = expected / size
    score["topk_iou"] = expected / (2 * size - expected)

    peaks = [i for i, a in enumerate(v) if a == max(v)]
    score["pointing"] = float(len(peaks) == 1 and g[peaks[0]])

    pairs = [(a > b) + (a == b) / 2 for a in v[g] for b in v[~g]]
    score["pixel_auroc"] = sum(pairs) / len(pairs) if pairs else math.nan
    precisions = [g[v >= a].mean() for a in v[g]]
    score["average_precision"] = sum(precisions) / size
    return score


@pytest.mark.parametrize("kind", KINDS)
def test_equal_the_slow_loops(kind):
    maps, mask = samples(kind)
    got = mask_metrics(maps, mask)
    for i in range(len(maps)):
        want = slow(maps[i].numpy(), mask[i].numpy())
        assert want.keys() == got.keys()
        for name, value in want.items():
            assert got[name][i].item() == pytest.approx(value, abs=1e-12, nan_ok=True), (name, i)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_equals_each_metric_alone(kind):
    maps, mask = samples(kind)
    together = mask_metrics(maps, mask)
    alone = {name: metric(maps, mask) for name, metric in MAP_METRICS.items()}
    alone["chance"] = chance(mask)
    assert together.keys() == alone.keys()
    for name, values in alone.items():
        assert values.shape == (len(maps),) and values.dtype == torch.float64
        torch.testing.assert_close(together[name], values, rtol=0, atol=0, equal_nan=True)


def test_rank_accuracy_is_the_mean_over_all_ways_to_break_ties():
    values = [2.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    truth = [False, True, False, True, True, False]
    size = sum(truth)
    hits = []
    for order in itertools.permutations(range(6)):
        best = sorted(order, key=lambda i: -values[i])[:size]  # sorted is stable: `order` decides
        hits.append(sum(truth[i] for i in best) / size)
    got = rank_accuracy(torch.tensor([[values]]), torch.tensor([[truth]]))
    assert got.item() == pytest.approx(sum(hits) / len(hits))


# ---- independent libraries -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scikit_learn(kind):
    sk = pytest.importorskip("sklearn.metrics")
    maps, mask = samples(kind, count=12, size=(20, 20))
    auroc, precision = pixel_auroc(maps, mask), average_precision(maps, mask)
    for i in range(2, len(maps)):
        truth, values = mask[i].flatten().numpy(), maps[i].flatten().numpy()
        assert auroc[i].item() == pytest.approx(sk.roc_auc_score(truth, values), abs=1e-12)
        want = sk.average_precision_score(truth, values)
        assert precision[i].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "oracle", "kinds"),
    [
        ("correctness", "RelevanceMassAccuracy", ("distinct", "ties", "sparse", "mixed")),
        # Quantus breaks ties by position, and takes any of several maxima for a hit.
        ("rank_accuracy", "RelevanceRankAccuracy", ("distinct",)),
        ("pointing", "PointingGame", ("distinct",)),
    ],
)
def test_equal_quantus(name, oracle, kinds):
    quantus = pytest.importorskip("quantus")
    judge = getattr(quantus, oracle)(
        abs=False, normalise=False, disable_warnings=True, display_progressbar=False
    )
    for kind in kinds:
        maps, mask = samples(kind, size=(12, 12))
        # Quantus calls an empty mask a hit; here it is undefined. A sparse map may be all zero.
        keep = mask.any(2).any(1) & maps.any(2).any(1)
        maps, mask = maps[keep], mask[keep]
        assert len(maps) > 10
        want = judge(
            model=None,
            x_batch=np.zeros((len(maps), 1, 12, 12), np.float32),
            y_batch=np.zeros(len(maps), int),
            a_batch=maps[:, None].double().numpy(),
            s_batch=mask[:, None].numpy(),
            channel_first=True,
        )
        got = MAP_METRICS[name](maps, mask)
        np.testing.assert_allclose(got.numpy(), np.array(want, float), rtol=1e-6, err_msg=kind)


def test_wilson_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for hits, n in ((0, 1), (1, 1), (3, 10), (88, 100), (9999, 10000), (0, 50)):
        for confidence in (0.5, 0.95, 0.999):
            want = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
            assert wilson(hits, n, confidence) == pytest.approx((want.low, want.high), abs=1e-12)


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40])
def test_a_factor_on_the_map_changes_nothing(kind, factor):
    maps, mask = samples(kind)
    before, after = mask_metrics(maps, mask), mask_metrics(maps * factor, mask)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-12, atol=0, equal_nan=True)


def test_the_mask_as_map_is_perfect():
    _, mask = samples("distinct")
    mask = mask[2:]
    scores = mask_metrics(mask.float(), mask)
    for name in ("correctness", "rank_accuracy", "topk_iou", "pixel_auroc", "average_precision"):
        assert torch.equal(scores[name], torch.ones(len(mask), dtype=torch.float64)), name
    # ... but points somewhere only if it is a single pixel.
    assert torch.equal(scores["pointing"], (mask.sum((1, 2)) == 1).double())


@pytest.mark.parametrize("kind", ["zero", "constant"])
def test_a_constant_map_scores_chance(kind):
    maps, mask = samples(kind)
    maps, mask = maps[2:], mask[2:]
    scores, area = mask_metrics(maps, mask), mask.double().mean((1, 2))
    close = torch.testing.assert_close
    close(scores["chance"], area)
    close(scores["correctness"], area if kind == "constant" else torch.zeros_like(area))
    close(scores["rank_accuracy"], area)
    close(scores["average_precision"], area)
    close(scores["topk_iou"], area / (2 - area))
    close(scores["pixel_auroc"], torch.full_like(area, 0.5))
    close(scores["pointing"], torch.zeros_like(area))


def test_empty_and_full_masks():
    maps, mask = samples("distinct")
    scores = mask_metrics(maps, mask)
    for name, values in scores.items():
        assert values[0].isnan(), name
        assert values[1].isnan() if name == "pixel_auroc" else values[1] == 1, name
        assert not values[2:].isnan().any(), name


def test_the_order_of_samples_and_pixels_does_not_matter():
    maps, mask = samples("mixed")
    flipped = mask_metrics(maps.flip(0, 1, 2), mask.flip(0, 1, 2))
    for name, values in mask_metrics(maps, mask).items():
        torch.testing.assert_close(flipped[name].flip(0), values, equal_nan=True)


def test_inverting_the_mask_mirrors_the_auroc():
    maps, mask = samples("ties")
    both = pixel_auroc(maps, mask) + pixel_auroc(maps, ~mask)
    torch.testing.assert_close(both[2:], torch.ones_like(both[2:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    maps, mask = samples("ties")
    want = mask_metrics(maps, mask)
    for name, values in mask_metrics(maps.to(dtype), mask).items():
        torch.testing.assert_close(values, want[name], equal_nan=True)


def test_no_samples():
    for values in mask_metrics(torch.rand(0, 5, 5), torch.zeros(0, 5, 5, dtype=bool)).values():
        assert values.shape == (0,)


def test_maps_that_need_gradients_are_fine():
    maps, mask = samples("distinct")
    for values in mask_metrics(maps.requires_grad_(), mask).values():
        assert not values.requires_grad


# ---- upsample, combine ---------------------------------------------------------------------------


def slow_bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixel centres at (i + 0.5) h / H - 0.5, the border repeated."""
    out = np.empty(size)
    (h, w), (height, width) = values.shape, size
    for i, j in np.ndindex(height, width):
        y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
        x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
        t, s = int(y), int(x)
        b, r = min(t + 1, h - 1), min(s + 1, w - 1)
        top = values[t, s] * (1 - x + s) + values[t, r] * (x - s)
        low = values[b, s] * (1 - x + s) + values[b, r] * (x - s)
        out[i, j] = top * (1 - y + t) + low * (y - t)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 7), (20, 14)])
def test_upsample_is_bilinear_between_cell_centres(shape):
    maps = torch.rand(2, 1, *shape, dtype=torch.float64)
    got = upsample(maps, (20, 14))
    assert got.shape == (2, 20, 14) and got.dtype == maps.dtype
    for i in range(2):
        np.testing.assert_allclose(got[i], slow_bilinear(maps[i, 0].numpy(), (20, 14)), atol=1e-12)


def test_combine_is_the_product_of_the_upsampled_maps():
    layers = [torch.rand(3, 1, s, s, dtype=torch.float64) for s in (20, 10, 5, 3)]
    mask = torch.rand(3, 20, 20) < 0.2
    product = np.ones((3, 20, 20))
    for layer in layers:
        product *= [slow_bilinear(one[0].numpy(), (20, 20)) for one in layer]
    got = combine(layers, (20, 20))
    assert got.shape == (3, 20, 20) and got.dtype == torch.float64
    np.testing.assert_allclose(got, product / product.max((1, 2), keepdims=True), rtol=1e-9)
    want = (product * mask.numpy()).sum((1, 2)) / product.sum((1, 2))
    np.testing.assert_allclose(correctness(got, mask), want, rtol=1e-9)


def test_combine_survives_what_float32_does_not():
    torch.manual_seed(0)
    layers = [torch.rand(2, 1, 8, 8) * 1e-20 for _ in range(4)]
    assert (layers[0] * layers[1] * layers[2] == 0).all()
    want = combine([layer.double() * 1e20 for layer in layers], (8, 8))
    torch.testing.assert_close(combine(layers, (8, 8)), want)

    # Peaks far apart: every product is tiny, and the order of the pixels must survive.
    near, far = torch.full((1, 1, 4, 4), 1e-30), torch.full((1, 1, 4, 4), 1e-30)
    near[..., 0, 0], far[..., 3, 3] = 1, 1
    far[..., 1, 1] = 2e-30
    got = combine([near, far, near, far], (4, 4))[0]
    assert got[0, 0] == got[3, 3] == 1
    assert got[1, 1] / got[0, 1] == pytest.approx(4)


def test_combine_keeps_zero_at_zero():
    maps = torch.rand(2, 1, 4, 4)
    none = maps.clone()
    none[0] = 0
    got = combine([maps, none], (8, 8))
    assert (got[0] == 0).all() and got[1].max() == 1


# ---- scale bins, intervals -----------------------------------------------------------------------


def test_scale_bins_at_and_beside_every_edge():
    scales = [0.5, 0.5001, 0.99, 1.0, 1.0001, 1.5, 1.51, 2.0, 2.001, 2.5, 2.6, 3.0]
    assert scale_bin(scales).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert scale_bin(torch.tensor([[1.5, 2.75]])).tolist() == [[1, 4]]
    assert scale_bin(0.7).dtype == torch.int64 and scale_bin(0.7).shape == ()


@pytest.mark.parametrize("scale", [0.49, 3.01, -1.0, math.nan, math.inf])
def test_scale_outside(scale):
    with pytest.raises(ValueError, match=str(scale)):
        scale_bin([1.0, scale])


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0
    zz = 1.959963984540054**2  # closed forms: z^2 / (n + z^2) and n / (n + z^2)
    assert wilson(0, 10)[1] == pytest.approx(zz / (10 + zz))
    assert wilson(10, 10)[0] == pytest.approx(10 / (10 + zz))
    low, high = wilson(885, 1000)
    assert 0.86 < low < 0.885 < high < 0.91


@pytest.mark.parametrize("wrong", [(-1, 3), (4, 3), (0, -1), (1, 2, 0.0), (1, 2, 1.0)])
def test_wilson_refuses(wrong):
    with pytest.raises(ValueError):
        wilson(*wrong)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MAP_METRICS, "mask_metrics"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, -math.inf])
def test_impossible_values(name, value):
    maps, mask = samples("distinct")
    maps[3, 2, 1] = value
    with pytest.raises(ValueError, match=f"not {value}"):
        getattr(metrics, name)(maps, mask)


@pytest.mark.parametrize(
    ("map", "mask", "message"),
    [
        (torch.rand(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=bool), r"\(2, 1, 4, 4\)"),
        (torch.rand(2, 4, 4), torch.ones(2, 4, 5, dtype=bool), r"\(2, 4, 4\).*\(2, 4, 5\)"),
        (torch.rand(2, 4, 4), torch.ones(1, 4, 4, dtype=bool), r"\(1, 4, 4\)"),
        (torch.rand(2, 4, 4), torch.ones(2, 4, 4), "float32"),
        (torch.ones(2, 4, 4, dtype=int), torch.ones(2, 4, 4, dtype=bool), "int64"),
        (torch.rand(2, 0, 4), torch.ones(2, 0, 4, dtype=bool), r"\(2, 0, 4\)"),
    ],
)
def test_wrong_shapes_and_types(map, mask, message):
    for metric in (*MAP_METRICS.values(), mask_metrics):
        with pytest.raises(ValueError, match=message):
            metric(map, mask)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [torch.rand(2, 4, 4)],
        [torch.rand(2, 3, 4, 4)],
        [torch.rand(2, 1, 9, 4)],
        [torch.rand(2, 1, 4, 4), torch.rand(1, 1, 4, 4)],
        [-torch.rand(2, 1, 4, 4)],
        [torch.ones(2, 1, 4, 4, dtype=int)],
    ],
)
def test_combine_refuses(layers):
    with pytest.raises(ValueError):
        combine(layers, (8, 8))


# ---- the file ------------------------------------------------------------------------------------


def test_doctests():
    failed, attempted = doctest.testmod(metrics)
    assert attempted >= 15 and failed == 0


def test_imports_nothing_but_torch():
    tree = ast.parse(Path(metrics.__file__).read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - {"torch"}
    assert others <= sys.stdlib_module_names


def test_a_batch_takes_well_under_a_second():
    maps, mask = torch.rand(256, 100, 100), torch.rand(256, 100, 100) < 0.03
    mask_metrics(maps[:2], mask[:2])
    start = time.process_time()
    mask_metrics(maps, mask)
    # About 0.4 s of one core; the bound only catches a loop over samples or pixels.
    assert time.process_time() - start < 3
