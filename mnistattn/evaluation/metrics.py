"""How well an attention map finds the queried digit: pure functions on tensors.

A **map** is a (B, H, W) floating tensor of finite values >= 0, not necessarily normalised: no
metric changes when a sample's map is multiplied by a positive number. A **mask** is a (B, H, W)
bool tensor, true on the pixels of the queried digit. Each metric returns a (B,) float64 tensor,
one value a sample, on the device of the map (which must know float64: move maps off "mps" first).
Wrong shapes, negative values, NaN and infinity raise ValueError.

What the odd cases get:

| metric            | range  | empty mask | full mask | constant map (a = mask area) | source |
|-------------------|--------|------------|-----------|------------------------------|--------|
| correctness       | [0, 1] | NaN        | 1         | a; all zero: 0               | [1]    |
| chance            | (0, 1] | NaN        | 1         | (takes no map)               |        |
| rank_accuracy     | [0, 1] | NaN        | 1         | a                            | [2]    |
| topk_iou          | [0, 1] | NaN        | 1         | a / (2 - a)                  |        |
| pointing          | 0 or 1 | NaN        | 1         | 0                            | [3]    |
| pixel_auroc       | [0, 1] | NaN        | NaN       | 0.5                          | [4]    |
| average_precision | (0, 1] | NaN        | 1         | a                            |        |

Without a mask there is nothing to find, so the score is undefined rather than bad: average over
samples with `torch.nanmean`. A map that is zero everywhere counts as a constant map except in
`correctness`, where it has no mass to put inside the mask and gets 0 (also under a full mask).

[1] Liu, Mao, Sha, Yuille: Attention correctness in neural image captioning. AAAI 2017.
[2] Arras, Osman, Samek: CLEVR-XAI, a benchmark for the ground truth evaluation of neural network
    explanations. Information Fusion 2022. (Its relevance mass accuracy is [1] for maps >= 0.)
[3] Zhang, Lin, Brandt, Shen, Sclaroff: Top-down neural attention by excitation backprop. ECCV
    2016. (It allows a tolerance of 15 pixels around the object; here there is none.)
[4] Mann, Whitney: On a test of whether one of two random variables is stochastically larger than
    the other. Annals of Mathematical Statistics 1947.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# The edges of the five scale bins of Tables 2 and 3 of Khandelwal and Sigal (ICCV 2019).
SCALE_EDGES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


# ---- from a model's maps to one map an image -----------------------------------------------------


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge maps (B, 1, h, w), any float, to the image: (B, H, W), `size` = (H, W), same dtype.

    Bilinear, `align_corners=False`: the value sits in the middle of its cell. The paper
    (Khandelwal and Sigal, ICCV 2019) does not say how it interpolates; this is our choice.
    Raises ValueError if `maps` has another shape, no float dtype, or is larger than `size`.

    >>> upsample(torch.tensor([[[[0.0, 1.0]]]]), (1, 4))
    tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    if maps.dim() != 4 or maps.shape[1] != 1 or not maps.is_floating_point():
        raise ValueError(f"maps to upsample must be (B, 1, h, w) floats, not {_kind(maps)}.")
    if maps.shape[2] > size[0] or maps.shape[3] > size[1]:
        raise ValueError(f"Cannot upsample maps of shape {tuple(maps.shape)} to {tuple(size)}.")
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def combine(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """One map out of those of several layers: upsample each, multiply them pixel by pixel.

    `maps`: at least one (B, 1, h, w) float tensor >= 0, h and w may differ between layers.
    Returns (B, H, W) float64 in [0, 1] with **maximum 1** in each sample, not sum 1 (the metrics do
    not care; `correctness` normalises). A sample of which a layer is zero everywhere, or whose
    layers have no pixel in common, is zero everywhere.
    Source: the paper's "attention correctness" over four layers (Khandelwal and Sigal, ICCV 2019).

    Four softmax maps over 100 x 100 pixels multiply to about 1e-16, and to far less away from the
    peaks. So each factor and each product is divided by its maximum, which cancels in every
    metric, and the products are float64: a pixel becomes 0 only at 1e-308 of the strongest one.

    >>> combine([torch.tensor([[[[1e-30, 3e-30]]]]), torch.tensor([[[[2e-30, 1e-30]]]])], (1, 2))
    tensor([[[0.6667, 1.0000]]], dtype=torch.float64)
    """
    if len(maps) == 0:
        raise ValueError("combine needs the map of at least one layer, not an empty list.")
    product = None
    for layer in maps:
        _check_values(layer)
        factor = _peak_one(upsample(layer.detach().double(), size))
        if product is not None and product.shape != factor.shape:
            raise ValueError(f"The layers' batches differ: {len(product)} and {len(factor)} maps.")
        product = factor if product is None else _peak_one(product * factor)
    assert product is not None
    return product


# ---- metrics -------------------------------------------------------------------------------------


def correctness(map: Tensor, mask: Tensor) -> Tensor:
    """Share of the map's mass inside the mask, "attention correctness" [1]. (B, H, W) -> (B,).

    In [0, 1]; 1 = all attention on the digit. All-zero map: 0. Empty mask: NaN. Ties play no role.
    Equals the relevance mass accuracy of [2], as maps are >= 0.

    >>> mask = torch.tensor([[[True, False], [False, False]]])
    >>> correctness(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), mask)
    tensor([0.7500], dtype=torch.float64)
    """
    values, truth = _flat(map, mask)
    # Divided by the peak so that no sum of float64 maps overflows or loses subnormal values.
    values = _peak_one(values.double())
    total = values.sum(1)
    share = (values * truth).sum(1) / torch.where(total > 0, total, 1)
    # The two sums round differently: without the clamp, 1 could become 1.0000000000000002.
    return _defined(share.clamp(0, 1), truth.any(1))


def chance(mask: Tensor) -> Tensor:
    """Area of the mask over that of the image: what uniform attention scores. (B, H, W) -> (B,).

    In (0, 1]. Empty mask: NaN, as in `correctness`, so that the means are over the same samples.

    >>> chance(torch.tensor([[[True, False], [False, False]]]))
    tensor([0.2500], dtype=torch.float64)
    """
    _check_mask(mask)
    truth = mask.flatten(1)
    return _defined(truth.double().mean(1), truth.any(1))


def rank_accuracy(map: Tensor, mask: Tensor) -> Tensor:
    """Share of the K strongest pixels that lie in the mask of K pixels [2]. (B, H, W) -> (B,).

    In [0, 1]. Pixels that tie at the K-th value: the expected value over a random choice among
    them, so a constant (or all-zero) map scores the mask's area. Empty mask: NaN.

    >>> mask = torch.tensor([[[True, True], [False, False]]])
    >>> rank_accuracy(torch.tensor([[[3.0, 1.0], [1.0, 0.0]]]), mask)  # 1 sure hit + 1 of 2 tied
    tensor([0.7500], dtype=torch.float64)
    """
    return _rank_accuracy(_rank(map, mask))


def topk_iou(map: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union of the K strongest pixels with the mask of K. (B, H, W) -> (B,).

    In [0, 1]. As both sets have K pixels, IoU = I / (2 K - I), with I = K * `rank_accuracy`; pixels
    that tie at the K-th value enter through that expected I (which is not the expected IoU, but is
    exact without ties). Empty mask: NaN.

    >>> mask = torch.tensor([[[True, True], [False, False]]])
    >>> topk_iou(torch.tensor([[[3.0, 1.0], [2.0, 0.0]]]), mask)
    tensor([0.3333], dtype=torch.float64)
    """
    return _topk_iou(_rank(map, mask))


def pointing(map: Tensor, mask: Tensor) -> Tensor:
    """1 if the strongest pixel lies in the mask, else 0: pointing game [3]. (B, H, W) -> (B,).

    No tolerance. A maximum that several pixels share points nowhere and is 0, even if all of them
    lie in the mask; so is a constant or all-zero map. Empty mask: NaN.

    >>> mask = torch.tensor([[[True, True], [False, False]]])
    >>> pointing(torch.tensor([[[0.0, 2.0], [1.0, 0.0]]]), mask)
    tensor([1.], dtype=torch.float64)
    >>> pointing(torch.tensor([[[2.0, 2.0], [1.0, 0.0]]]), mask)
    tensor([0.], dtype=torch.float64)
    """
    values, truth = _flat(map, mask)
    peaks = values == values.amax(1, keepdim=True)
    hit = (peaks.sum(1) == 1) & (peaks & truth).any(1)
    return _defined(hit.double(), truth.any(1))


def pixel_auroc(map: Tensor, mask: Tensor) -> Tensor:
    """Chance that a pixel of the mask is stronger than one outside it [4]. (B, H, W) -> (B,).

    The area under the pixels' ROC curve, in [0, 1]; ties count half (Mann-Whitney's U with middle
    ranks), so a constant (or all-zero) map scores 0.5. Empty or full mask: NaN.

    >>> mask = torch.tensor([[[True, True], [False, False]]])
    >>> pixel_auroc(torch.tensor([[[3.0, 1.0], [1.0, 0.0]]]), mask)  # 3 of 4 pairs + half of 1
    tensor([0.8750], dtype=torch.float64)
    """
    return _pixel_auroc(_rank(map, mask))


def average_precision(map: Tensor, mask: Tensor) -> Tensor:
    """Mean, over the mask's pixels, of the precision at their strength. (B, H, W) -> (B,).

    In (0, 1]: the step-wise area under the pixels' precision-recall curve (not interpolated). Tied
    pixels enter together: a constant (or all-zero) map scores the mask's area. Empty mask: NaN.

    >>> mask = torch.tensor([[[True, True], [False, False]]])
    >>> average_precision(torch.tensor([[[3.0, 1.0], [2.0, 0.0]]]), mask)  # (1/1 + 2/3) / 2
    tensor([0.8333], dtype=torch.float64)
    """
    return _average_precision(_rank(map, mask))


def mask_metrics(map: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """All metrics above by name, each (B,) float64, with a single sort of the pixels.

    >>> scores = mask_metrics(torch.rand(2, 8, 8), torch.rand(2, 8, 8) < 0.5)
    >>> list(scores)  # doctest: +NORMALIZE_WHITESPACE
    ['correctness', 'chance', 'rank_accuracy', 'topk_iou', 'pointing', 'pixel_auroc',
     'average_precision']
    """
    ranking = _rank(map, mask)
    return {
        "correctness": correctness(map, mask),
        "chance": chance(mask),
        "rank_accuracy": _rank_accuracy(ranking),
        "topk_iou": _topk_iou(ranking),
        "pointing": pointing(map, mask),
        "pixel_auroc": _pixel_auroc(ranking),
        "average_precision": _average_precision(ranking),
    }


# ---- about a set of samples ----------------------------------------------------------------------


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval (low, high) of a share, such as an accuracy, of `hits` out of `n`.

    Wilson's score interval (Journal of the American Statistical Association 1927), without
    continuity correction; inside [0, 1]. n = 0 says nothing: (0, 1). Raises ValueError unless
    0 <= hits <= n and 0 < confidence < 1.

    >>> [round(bound, 4) for bound in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if not 0 <= hits <= n:
        raise ValueError(f"hits must lie between 0 and n, not {hits} with n = {n}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
    if n == 0:
        return 0.0, 1.0
    quantile = torch.tensor(confidence, dtype=torch.float64).erfinv().item()
    zz = 2 * quantile**2  # z squared; P(|N(0, 1)| < z) = erf(z / sqrt 2) = confidence
    share = hits / n
    centre = share + zz / (2 * n)
    margin = math.sqrt(zz * (share * (1 - share) / n + zz / (4 * n**2)))
    # At the ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if hits == 0 else (centre - margin) / (1 + zz / n)
    high = 1.0 if hits == n else (centre + margin) / (1 + zz / n)
    return low, high


def scale_bin(scale: Tensor | Sequence[float] | float) -> Tensor:
    """Bin 0..4 (int64, shape of `scale`) of digits drawn at `scale` times 28 pixels.

    The bins are (0.5, 1], (1, 1.5], ... (2.5, 3]; 0.5 itself is in bin 0. Raises ValueError for a
    scale outside [0.5, 3], or NaN.

    >>> scale_bin([0.5, 1.0, 1.01, 3.0])
    tensor([0, 0, 1, 4])
    """
    scales = torch.as_tensor(scale, dtype=torch.float64)
    outside = ~((scales >= SCALE_EDGES[0]) & (scales <= SCALE_EDGES[-1]))
    if outside.any():
        low, high = SCALE_EDGES[0], SCALE_EDGES[-1]
        raise ValueError(f"scale must lie in [{low}, {high}], not {scales[outside][0].item()}.")
    edges = torch.tensor(SCALE_EDGES[1:-1], dtype=torch.float64, device=scales.device)
    return torch.bucketize(scales, edges)


# ---- inside --------------------------------------------------------------------------------------


class _Ranking(NamedTuple):
    """The pixels of each sample, strongest first, N = H W; a run is a group of equal values."""

    truth: Tensor  # (B, N) bool: is the pixel in the mask?
    found: Tensor  # (B, N) int64: how many pixels of the mask lie at or before this place
    first: Tensor  # (B, N) int64: place of the first pixel of this one's run
    last: Tensor  # (B, N) int64: place of the last


def _rank(map: Tensor, mask: Tensor) -> _Ranking:
    values, truth = _flat(map, mask)
    values, order = values.sort(dim=1, descending=True)
    truth = truth.gather(1, order)
    count = values.shape[1]
    place = torch.arange(count, device=values.device).expand_as(values)
    edge = torch.ones_like(truth)
    edge[:, 1:] = values[:, 1:] != values[:, :-1]
    first = torch.where(edge, place, 0).cummax(1).values
    edge = edge.roll(-1, 1)  # now true on the last pixel of each run (edge[:, 0] was true)
    last = torch.where(edge, place, count).flip(1).cummin(1).values.flip(1)
    return _Ranking(truth, truth.cumsum(1), first, last)


def _expected_hits(ranking: _Ranking) -> tuple[Tensor, Tensor]:
    """(B,) int64 mask size K and (B,) float64 expected hits among the K strongest pixels."""
    size = ranking.found[:, -1]
    kth = (size - 1).clamp(min=0)[:, None]
    first, last = ranking.first.gather(1, kth), ranking.last.gather(1, kth)
    # Everything before the run of the K-th pixel is chosen; from the run, K - first pixels are.
    sure = ranking.found.gather(1, first) - ranking.truth.gather(1, first).long()
    tied = ranking.found.gather(1, last) - sure
    hits = sure + (size[:, None] - first) * tied / (last - first + 1).double()
    return size, hits[:, 0]


def _rank_accuracy(ranking: _Ranking) -> Tensor:
    size, hits = _expected_hits(ranking)
    return hits / size  # 0 / 0 is the NaN of the empty mask


def _topk_iou(ranking: _Ranking) -> Tensor:
    size, hits = _expected_hits(ranking)
    return hits / (2 * size - hits)


def _pixel_auroc(ranking: _Ranking) -> Tensor:
    inside = ranking.found[:, -1]
    outside = ranking.truth.shape[1] - inside
    # Twice the middle place of each mask pixel counts, also twice, the pixels before it: those
    # outside the mask that beat it, and the mask's own, which sum to inside (inside - 1) in all.
    # In integers, and exact: (HW)^2 stays below 2^63 for any image that fits into memory.
    places = ((ranking.first + ranking.last) * ranking.truth).sum(1)
    beaten = places - inside * (inside - 1)
    return 1 - beaten.double() / (2 * inside * outside)


def _average_precision(ranking: _Ranking) -> Tensor:
    precision = ranking.found.gather(1, ranking.last) / (ranking.last + 1).double()
    return (precision * ranking.truth).sum(1) / ranking.found[:, -1]


def _peak_one(maps: Tensor) -> Tensor:
    """Each (H, W) or (N,) sample over its maximum; zero stays zero."""
    peak = maps.flatten(1).amax(1).view(-1, *[1] * (maps.dim() - 1))
    return maps / torch.where(peak > 0, peak, 1)


def _defined(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill(~where, math.nan)


def _flat(map: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Checked and flattened to (B, N)."""
    if map.dim() != 3:
        raise ValueError(f"map must be (B, H, W) floats, not {_kind(map)}.")
    _check_mask(mask)
    if map.shape != mask.shape:
        raise ValueError(f"map {tuple(map.shape)} and mask {tuple(mask.shape)} differ in shape.")
    _check_values(map)
    return map.detach().flatten(1), mask.flatten(1)


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 3 or mask.dtype != torch.bool or 0 in mask.shape[1:]:
        raise ValueError(f"mask must be (B, H, W) bool with H, W > 0, not {_kind(mask)}.")


def _check_values(map: Tensor) -> None:
    if not map.is_floating_point():
        raise ValueError(f"map must hold floats, not {_kind(map)}.")
    if map.numel():
        low, high = (bound.item() for bound in map.detach().aminmax())
        if not (low >= 0 and high < math.inf):  # false for NaN, too
            bad = low if not low >= 0 else high
            raise ValueError(f"map must hold finite values >= 0, not {bad}.")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
