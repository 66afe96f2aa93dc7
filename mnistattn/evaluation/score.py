"""Score a network on a split: one row of numbers for each image, and their summary."""

import math

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

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
from mnistattn.evaluation.train import autocast

MASK_METRICS = (
    "correctness", "chance", "rank_accuracy", "pointing", "topk_iou", "pixel_auroc",
    "average_precision",
)  # fmt: skip


@torch.inference_mode()
def score_samples(
    network: nn.Module, feed: Feed, masks: np.ndarray, scale: np.ndarray, batch_size: int = 100,
    progress: bool = True,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Per image: query, answer, prediction, correct, scale, scale_bin, and for networks with
    attention the mask metrics of the combined map and `correctness_layer_k` of each layer's.

    masks: ground truth, bool (N, H, W). scale: the target's, float32 (N,). Every array is (N,).
    """
    network.eval()
    rows: dict[str, list[np.ndarray]] = {}
    size = masks.shape[1:]
    for start in tqdm(range(0, len(feed), batch_size), desc="score", unit="batch",
                      disable=None if progress else True, leave=False):  # fmt: skip
        index = torch.arange(start, min(start + batch_size, len(feed)))
        with autocast(feed.device):
            logits, out = network(feed.batch(index), feed.query[index].to(feed.device))
        prediction = logits.argmax(1).cpu()
        row = {
            "query": feed.query[index],
            "answer": feed.answer[index],
            "prediction": prediction,
            "correct": feed.answers[index, prediction],
        }
        maps = [a.float().cpu() for a in out["attention"]]
        if maps:
            mask = torch.from_numpy(masks[index.numpy()])
            row |= mask_metrics(combine(maps, size), mask)
            for k, layer in enumerate(maps):
                row[f"correctness_layer_{k + 1}"] = correctness(upsample(layer, size), mask)
        for name, values in row.items():
            rows.setdefault(name, []).append(np.asarray(values))
    samples = {name: np.concatenate(parts) for name, parts in rows.items()}
    samples["scale"] = scale
    samples["scale_bin"] = scale_bin(torch.from_numpy(scale)).numpy()
    return samples


def summarize(samples: dict[str, np.ndarray]) -> dict:
    """The scores of a result from its samples: everything follows from them alone."""
    correct, bins = samples["correct"], samples["scale_bin"]
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


def _rate(correct: np.ndarray) -> dict:
    """Hits of n with a 95 % Wilson interval, as shares."""
    hits, n = int(correct.sum()), len(correct)
    low, high = wilson(hits, n)
    return {"value": hits / n if n else None, "hits": hits, "n": n, "low": low, "high": high}


def _mean(samples: dict, name: str, where=slice(None)) -> dict | None:
    """Mean of a metric over the samples where it is defined, its standard error, and n."""
    if name not in samples:
        return None
    values = samples[name][where]
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": None, "se": None, "n": 0}
    se = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "se": se, "n": len(values)}
