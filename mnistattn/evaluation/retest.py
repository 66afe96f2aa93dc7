"""A fresh test set for a result: the same spec and sources, another seed, the saved checkpoint.

A test split that everybody tunes on wears out; this one nobody has seen. The original test split is
drawn again too: so it is sure that the sources are those of the result (its digest), and that no
image of the fresh one occurs in it.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mnistattn.dataset.read import Card, read_card, read_split
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation.reload import load_run
from mnistattn.evaluation.result import (
    RETEST_VERSION,
    read_result,
    read_samples,
    write_json,
    write_samples,
)
from mnistattn.evaluation.run import choose_device, load_test, versions, whole
from mnistattn.evaluation.score import same_mean, score_samples, summarize
from mnistattn.evaluation.step import sees_mask


def retest(
    result: str | Path, test_seed: int, *, model: str | None = None,
    data_root: str | Path = "data", backgrounds: str | None = None, device: str = "auto",
    workers: int | None = None, progress: bool = True, say: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Score a run's checkpoint on a test split of another seed; returns what was written.

    result: a run directory (or its result.json) with model.safetensors beside it. model: where a
    plugged model is (FILE.py:CLASS), if not under its own name. data_root, backgrounds: where MNIST
    and the photos are now. Writes result.retest-SEED.json and .h5 beside the result. Raises
    InputError for a request that cannot be met.
    """
    _, raw = read_result(result)
    if test_seed == raw.get("dataset", {}).get("seed"):  # whether it has weights or not
        raise InputError(f"test seed {test_seed} is the data set's own: give another.")
    run = load_run(result, model)
    file, dataset = run.file, raw["dataset"]
    samples = read_samples(file, raw)
    place = choose_device(device)

    target = file.with_name(f"{file.stem}.retest-{test_seed}.json")
    n = raw["scores"]["accuracy"]["n"]
    try:
        with tempfile.TemporaryDirectory(prefix=".retest-", dir=file.parent) as folder:
            made = {}
            for seed in (dataset["seed"], test_seed):
                made[seed] = read_card(
                    _split(raw, n, seed, Path(folder), data_root, backgrounds, workers, progress)
                )
            original, fresh = made[dataset["seed"]], made[test_seed]
            if original.digest("test") != dataset["digests"]["test"]:
                raise InputError(
                    f"the sources at hand do not give the test split of {file} again (digest): "
                    "give the --data-root and --backgrounds that it was made of."
                )
            common = common_images(original, fresh)
            if common:
                raise MnistattnError(f"{common} images of the fresh test set occur in the old one.")
            say(f"a fresh test set: {n} images of seed {test_seed}, none of them in that of seed "
                f"{dataset['seed']}")  # fmt: skip
            network = run.network(place, fresh)
            test, masks, scale = load_test(fresh, place, sees_mask(network))
            again = score_samples(network, test, masks, scale, progress=progress)
            digest = fresh.digest("test")
        stem = target.with_suffix(".h5")
        whole(stem, lambda partial: write_samples(partial, again))
        scores = summarize(again)
        here, there = (s["correct"].astype(np.float64) for s in (samples, again))
        content = {
            "format": "mnistattn-retest", "retest_version": RETEST_VERSION,
            "of": raw["samples"]["sha256"], "model": raw["model"], "test_seed": test_seed,
            "digest": digest, "common_images": common, "scores": scores,
            "drop": float(there.mean() - here.mean()), "p": same_mean(here, there),
            "samples": {"file": stem.name, "sha256": hashlib.sha256(stem.read_bytes()).hexdigest()},
            "versions": versions(),
        }  # fmt: skip
        whole(target, lambda partial: write_json(partial, json.loads(json.dumps(content))))
    except OSError as error:
        raise MnistattnError(f"cannot write {target}: {error.strerror or error}.") from error
    return content | {"file": str(target)}


def common_images(first: Card, second: Card) -> int:
    """How many test images of one data set occur in another, byte for byte."""
    hashes = [
        {hashlib.sha256(image).digest() for image in read_split(card, "test", ("image",))["image"]}
        for card in (first, second)
    ]
    return len(hashes[0] & hashes[1])


def _split(raw, n: int, seed: int, folder: Path, data_root, backgrounds, workers, progress) -> Path:
    """The test split of a result's spec and sources, of a seed."""
    dataset = raw["dataset"]
    digits, under = dataset["sources"]["digits"], dataset["sources"]["backgrounds"]
    spec = {k: v for k, v in dataset["spec"].items() if k != "variant"}
    return generate(
        dataset["variant"], folder / f"seed{seed}", seed=seed, train=0, val=0, test=n,
        digits=digits["source"], digit_split=digits["split"], data_root=data_root,
        backgrounds=backgrounds or under.get("path") or _named(under["source"]),
        workers=workers, progress=progress, say=lambda line: None, **spec,
    )  # fmt: skip


def _named(source: str) -> str:
    """What --backgrounds is for a variant that is not on photos: nothing that matters."""
    return source if source in ("textures", "sun397") else "textures"
