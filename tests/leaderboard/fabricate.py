"""Invented results on disk, from seeded numbers: what `evaluate` and `retest` would write."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.result import (
    RESULT_VERSION,
    RETEST_VERSION,
    write_json,
    write_samples,
)
from mnistattn.evaluation.run import versions
from mnistattn.evaluation.score import MASK_METRICS, STEPS, summarize
from mnistattn.evaluation.train import describe
from mnistattn.generators.variants import VARIANTS, Spec
from mnistattn.models.registry import MODELS

GALLERY = 6
BACKGROUNDS = {"black": "black", "distractors": "patches", "photo": "textures"}


def fabricate(
    folder: Path, model: str = "ctx", seed: int = 0, accuracy: float = 0.8,
    correctness: float | None = 0.3, n: int = 400, variant: str = "mref", *, data: int = 0,
    digits: str = "strokes", backgrounds: str | None = None, sources: dict | None = None,
    digests: dict | None = None, trained_on: dict | None = None, spec: dict | None = None,
    recipe: dict | None = None, kind: str | None = None, code: str | None = None,
    changed_options: dict | None = None, cost: dict | None = None, truth: int | None = None,
) -> Path:  # fmt: skip
    """Write a run directory that keeps all rules of admission; returns it.

    Exactly round(accuracy * n) answers are right; which, the images decide half and model and seed
    half. correctness: None for a model without attention. data: seed of the data set; what is asked
    and right depends on it and the variant alone, unless truth is another seed. sources, digests,
    spec, recipe and cost change fields; trained_on replaces the training data's digests.
    """
    folder.mkdir(parents=True)
    row, asked = MODELS.get(model), VARIANTS[variant]
    made_of = {"digits": {"source": digits, "split": "separate"},
               "backgrounds": {"source": backgrounds or BACKGROUNDS[asked.background]}}  # fmt: skip
    made_of |= sources or {}
    what = json.dumps([variant, made_of, spec, data, n], sort_keys=True)
    digests = {s: sha(f"{what} {s}") for s in ("train", "val", "test")} | (digests or {})
    changed = {"name": "fast", "epochs": 2, "queries": "fresh"} | (recipe or {})
    kind = kind or (row.kind if row else "plugged")
    changed_options = changed_options or {}
    samples = make_samples(f"{model} {changed_options} {seed}", accuracy, correctness, n, variant,
                           data if truth is None else truth)  # fmt: skip
    write_samples(folder / "samples.h5", samples)
    rng = np.random.default_rng([data, n])
    write_samples(folder / "gallery.h5", {
        "image": rng.integers(0, 256, (min(GALLERY, n), 28, 28, 3)).astype(np.uint8),
        "mask": rng.random((min(GALLERY, n), 28, 28)) < 0.1,
    })  # fmt: skip
    ratio = {"median": 1.25, "min": 1.0, "max": 2.0, "rounds": 7}
    result = {
        "format": "mnistattn-result", "result_version": RESULT_VERSION, "model": model,
        "kind": kind, "paper_name": row.paper_name if row else model, "paper": "-",
        "summary": row.summary if row else "invented", "origin": "mnistattn" if row else "x.py",
        "code": code or sha(f"code of {model}"), "options": changed_options,
        "changed_options": changed_options,
        "dataset": {
            "variant": variant, "paper_name": asked.paper_name,
            "spec": Spec(variant).as_dict() | (spec or {}), "seed": data, "sources": made_of,
            "digests": digests, "counts": {"train": 64, "val": 24, "test": n},
        },
        "trained_on": trained_on or {s: digests[s] for s in ("train", "val")},
        "recipe": describe(make_recipe(**changed)), "seed": seed,
        "epochs_trained": changed["epochs"], "best_epoch": changed["epochs"],
        "scores": summarize(samples),
        "cost": {
            "parameters": 1000, "flops_per_image": 2_000_000, "train_seconds": 60.0,
            "train_times_none": ratio, "inference_times_none": ratio, "batch_size": 32,
            "device": "CPU (1 threads)", "threads": 1,
        } | (cost or {}),
        "samples": {"file": "samples.h5", "sha256": sha(folder / "samples.h5")},
        "versions": versions(),
    }  # fmt: skip
    write_json(folder / "result.json", result)
    return folder


def fabricate_retest(
    run: Path, accuracy: float, test_seed: int = 1001, salt: str = "", n: int | None = None
) -> Path:
    """Write a retest of a run beside it; returns its JSON file."""
    raw, own = result_of(run), samples_of(run)
    samples = make_samples(
        f"{raw['model']} {raw['seed']} {test_seed} {salt}", accuracy,
        0.3 if "correctness" in own else None, n or len(own["correct"]),
        raw["dataset"]["variant"], test_seed,
    )  # fmt: skip
    samples.pop("gallery", None)
    file = run / f"result.retest-{test_seed}.json"
    write_samples(file.with_suffix(".h5"), samples)
    write_json(file, {
        "format": "mnistattn-retest", "retest_version": RETEST_VERSION,
        "of": raw["samples"]["sha256"], "model": raw["model"], "test_seed": test_seed,
        "digest": sha(f"{raw['dataset']['digests']['test']} {test_seed}"), "common_images": 0,
        "scores": summarize(samples),
        "drop": float(samples["correct"].mean() - own["correct"].mean()), "p": 0.5,
        "samples": {"file": f"{file.stem}.h5", "sha256": sha(file.with_suffix(".h5"))},
        "versions": versions(),
    })  # fmt: skip
    return file


def make_samples(
    model: str, accuracy: float, correctness: float | None, n: int, variant: str, data: int
) -> dict[str, np.ndarray]:
    """One row an image. `model`, any text, seeds what is the model's own."""
    asked = VARIANTS[variant]
    names = {"digit": (10, 5), "color": (5, 10)}[asked.asks]
    truth = np.random.default_rng([data, *variant.encode()])
    query, answer = (truth.integers(0, k, n).astype(np.uint8) for k in names)
    scale = (0.5 + 2.5 * truth.random(n) ** 2).astype(np.float32)
    hard, area = truth.random(n), truth.uniform(0.01, 0.2, n)
    own = np.random.default_rng(list(model.encode()))
    correct = np.zeros(n, bool)
    correct[np.argsort(hard + own.random(n))[: round(accuracy * n)]] = True
    other = (answer + own.integers(1, names[1], n)) % names[1]
    samples = {
        "query": query, "answer": answer, "prediction": np.where(correct, answer, other),
        "correct": correct, "scale": scale,
    }  # fmt: skip
    samples["prediction"] = samples["prediction"].astype(np.uint8)
    if correctness is not None:
        for name in (*MASK_METRICS, "correctness_layer_1", "correctness_layer_2"):
            values = area if name == "chance" else correctness + 0.1 * own.normal(size=n)
            values = np.clip(values, 0, 1) * STEPS
            samples[name] = (values.round() / STEPS).astype(np.float32)
        samples["gallery"] = own.integers(0, 256, (min(GALLERY, n), 14, 14)).astype(np.uint8)
    return samples


def sha(content: str | Path) -> str:
    """SHA-256 of a text, or of a file's bytes."""
    data = content.read_bytes() if isinstance(content, Path) else content.encode()
    return hashlib.sha256(data).hexdigest()


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def samples_of(run: Path) -> dict[str, np.ndarray]:
    with h5py.File(run / "samples.h5") as h5:
        return {name: values[()] for name, values in h5.items()}


def edit(run: Path, change: Callable[[dict], object]) -> None:
    """Change a result.json by hand, whether or not it is valid then."""
    raw = result_of(run)
    change(raw)
    (run / "result.json").write_text(json.dumps(raw))


def forge(run: Path, change: Callable[[dict], object], scores: bool = True) -> None:
    """Change the samples and make the SHA-256 right again (and the scores, if they can be made)."""
    samples = samples_of(run)
    change(samples)
    write_samples(run / "samples.h5", samples)

    def follow(raw: dict) -> None:
        raw["samples"]["sha256"] = sha(run / "samples.h5")
        if scores:
            raw["scores"] = summarize(samples)

    edit(run, follow)


def write_card(run: Path) -> None:
    """The dataset.json that a public board wants beside a result."""
    (run / "dataset.json").write_text(json.dumps(result_of(run)["dataset"]))
