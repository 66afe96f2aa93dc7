"""Score a network on a split: one row of numbers for each image, and their summary."""

import math

import numpy as np
import torch
from scipy.stats import ttest_ind_from_stats
from torch import Tensor, nn
from tqdm import tqdm

from mnistattn.errors import MnistattnError
from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.metrics import (
    SCALE_EDGES,
    combine,
    correctness,
    mask_metrics,
    scale_bin,
    upsample,
    wilson,
)
from mnistattn.evaluation.step import autocast, sees_mask

# Metrics are kept in steps of 2^-16, as float32: so the file that all scores follow from is small.
STEPS = 1 << 16
MASK_METRICS = (
    "correctness", "chance", "rank_accuracy", "pointing", "topk_iou", "pixel_auroc",
    "average_precision",
)  # fmt: skip


@torch.inference_mode()
def score_samples(
    network: nn.Module, feed: Feed, masks: np.ndarray, scale: np.ndarray, batch_size: int = 100,
    progress: bool = True,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Per image: query, answer, prediction, correct, scale, and for networks with attention the
    mask metrics of the combined map and `correctness_layer_k` of each layer's.

    masks: ground truth, bool (N, H, W). scale: the target's, float32 (N,). Every array is (N,):
    uint8, bool `correct`, float32. MnistattnError for maps that are negative or not finite.
    """
    network.eval()
    attend = getattr(network, "attend", network)
    rows: dict[str, list[Tensor]] = {}
    size = masks.shape[1:]
    count = -(-len(feed) // batch_size)
    for index in tqdm(feed.in_order(batch_size), total=count, desc="score", unit="batch",
                      disable=None if progress else True, leave=False):  # fmt: skip
        mask = torch.from_numpy(masks[int(index[0]) : int(index[-1]) + 1]).to(feed.device)
        told = {"mask": mask} if sees_mask(network) else {}
        query = feed.query[index].to(feed.device)
        with autocast(feed.device):
            logits, out = attend(feed.batch(index), query, **told)
        prediction = logits.argmax(1)
        right = feed.answers[index].to(feed.device)
        row = {
            "query": query.byte(),
            "answer": feed.answer[index].byte(),
            "prediction": prediction.byte(),
            "correct": right.gather(1, prediction[:, None])[:, 0],
        }
        maps = [a.float() for a in out["attention"]]
        if maps:
            try:
                metrics = mask_metrics(combine(maps, size), mask)
            except ValueError as error:
                raise MnistattnError(f"the attention maps cannot be scored: {error}") from error
            for k, layer in enumerate(maps):
                metrics[f"correctness_layer_{k + 1}"] = correctness(upsample(layer, size), mask)
            row |= {name: (v * STEPS).round().div(STEPS).float() for name, v in metrics.items()}
        for name, values in row.items():
            rows.setdefault(name, []).append(values.cpu())
    samples = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
    samples["scale"] = scale
    return samples


def summarize(samples: dict[str, np.ndarray]) -> dict:
    """The scores of a result from its samples: everything follows from them alone."""
    correct, bins = samples["correct"], scale_bin(torch.from_numpy(samples["scale"])).numpy()
    layers = sum(name.startswith("correctness_layer_") for name in samples)
    return {
        "accuracy": _rate(correct),
        "scales": [
            {"from": SCALE_EDGES[b], "to": SCALE_EDGES[b + 1], **_rate(correct[bins == b]),
             "correctness": _mean(samples, "correctness", bins == b)}
            for b in range(len(SCALE_EDGES) - 1)
        ],
        "masks": {name: _mean(samples, name) for name in MASK_METRICS} if layers else None,
        "layers": [_mean(samples, f"correctness_layer_{k + 1}") for k in range(layers)],
    }  # fmt: skip


def same_mean(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p that scores of two independent sets of images, (n,) and (m,), have one mean
    (Welch's t-test, Biometrika 1947). Without any variance: 1 if the means are equal, else 0.

    >>> round(same_mean(np.array([0.0, 0, 1, 1]), np.array([1.0, 1, 1, 0])), 3)
    0.537
    """
    moments = [f for x in (first, second) for f in (x.mean(), x.std(ddof=1), len(x))]
    # Of the arrays themselves, scipy warns where all are equal.
    p = float(ttest_ind_from_stats(*moments, equal_var=False).pvalue)
    return float(first.mean() == second.mean()) if math.isnan(p) else p


def _rate(correct: np.ndarray) -> dict:
    """Hits of n with a 95 % Wilson interval, as shares."""
    hits, n = int(correct.sum()), len(correct)
    low, high = wilson(hits, n)
    return {"value": hits / n if n else None, "hits": hits, "n": n, "low": low, "high": high}


def _mean(samples: dict, name: str, where=slice(None)) -> dict | None:
    """Mean of a metric over the samples where it is defined, its standard error, and n."""
    if name not in samples:
        return None
    values = samples[name][where].astype(np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": None, "se": None, "n": 0}
    se = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "se": se, "n": len(values)}
