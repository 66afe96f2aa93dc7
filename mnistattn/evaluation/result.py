"""A result on disk: one JSON file, whose JSON Schema is published, and its per-sample file.

The schema is docs/result.schema.json, written by `mnistattn score --schema`. All numbers of
`scores` follow from the per-sample file (score.summarize); `mnistattn score` computes them again.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mnistattn.errors import InputError
from mnistattn.evaluation.score import summarize

RESULT_VERSION = 2
RETEST_VERSION = 1
TOLERANCE = 1e-9  # of a number computed again: the order of a sum may differ between machines

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Option = bool | int | float | str | list[int] | None


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Rate(_Section):
    """Hits of n with a 95 % Wilson interval; null where n is 0."""

    value: Share | None
    hits: Count
    n: Count
    low: Share
    high: Share


class Mean(_Section):
    """Mean over the samples where a metric is defined, its standard error, and their number."""

    value: Share | None
    se: float | None
    n: Count


class ScaleBin(Rate):
    """The targets of one range of scales (relative to 28 pixels)."""

    from_: Annotated[float, Field(alias="from")]
    to: float
    correctness: Mean | None


class Scores(_Section):
    """What evaluation/score.py's `summarize` makes of the per-sample file; metrics.py defines it.
    masks and layers: null and empty for a model without attention."""

    accuracy: Rate
    scales: list[ScaleBin]
    masks: dict[str, Mean] | None
    layers: list[Mean]


class Dataset(_Section):
    """The data set that was tested on: all that is needed to make it again, and its digests."""

    variant: str
    paper_name: str
    spec: dict[str, str | int | float]
    seed: int
    sources: dict[str, Any]
    digests: dict[str, Digest]
    counts: dict[str, Count]


class Recipe(_Section):
    """All that decides a training beside model, data and seed (evaluation/recipes.py)."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    schedule: str
    clip: float
    weight_decay: float
    dropout: float
    glorot: bool
    patience: int
    queries: str


class Ratio(_Section):
    """Time as a multiple of `none`'s, measured in turns in the same process."""

    median: Annotated[float, Field(gt=0)]
    min: Annotated[float, Field(gt=0)]
    max: Annotated[float, Field(gt=0)]
    rounds: Annotated[int, Field(ge=1)]


class Cost(_Section):
    """parameters of the whole network; flops_per_image of a forward pass (convolutions and matrix
    products); train_seconds where it was trained; the ratios where it was scored; precision: the
    dtype of convolutions where it was scored (None: an older result, which does not say)."""

    parameters: Count
    flops_per_image: Count
    train_seconds: float
    train_times_none: Ratio
    inference_times_none: Ratio
    batch_size: int
    device: str
    threads: int
    precision: Literal["bfloat16", "float32"] | None = None


class Samples(_Section):
    """The per-sample file, beside the JSON file: its name and SHA-256."""

    file: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]+\.h5$")]
    sha256: Digest


class Result(_Section):
    """A trained model's scores on a test split. `code` is the SHA-256 of the file that defines the
    attention; changed_options are those of `options` that are not the model's defaults."""

    format: Literal["mnistattn-result"]
    result_version: Literal[2]
    model: str
    kind: Literal["model", "control", "post-hoc", "plugged"]
    paper_name: str
    paper: str
    summary: str
    origin: str
    code: str
    options: dict[str, Option]
    changed_options: dict[str, Option]
    dataset: Dataset
    trained_on: dict[str, Digest | None]
    recipe: Recipe
    seed: Seed
    epochs_trained: Count
    best_epoch: Count
    scores: Scores
    cost: Cost
    samples: Samples
    versions: dict[str, str]


class Retest(_Section):
    """The same checkpoint on a test split of another seed. `of` is the SHA-256 of the result's own
    per-sample file; common_images: how many images of the two test splits are equal (0)."""

    format: Literal["mnistattn-retest"]
    retest_version: Literal[1]
    of: Digest
    model: str
    test_seed: int
    digest: Digest
    common_images: Literal[0]
    scores: Scores
    drop: float
    p: Share
    samples: Samples
    versions: dict[str, str]


_KINDS: dict[str, tuple[type[_Section], str, int]] = {
    "mnistattn-result": (Result, "result_version", RESULT_VERSION),
    "mnistattn-retest": (Retest, "retest_version", RETEST_VERSION),
}


def schema() -> dict:
    """The JSON Schema of a result."""
    return Result.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def fits_option(value: object) -> bool:
    """Whether a result can hold this value of an option."""
    try:
        kept = json.loads(json.dumps(value, allow_nan=False))
        TypeAdapter(Option, config=ConfigDict(strict=True)).validate_python(kept)
    except (TypeError, ValueError):  # a ValidationError is one
        return False
    return True


def check_result(raw: dict) -> dict:
    """raw, if it is a result (or retest) of this schema; ValueError, with one sentence, if not."""
    if not isinstance(raw, dict) or str(raw.get("format")) not in _KINDS:
        raise ValueError("is no result of mnistattn's.")
    model, field, version = _KINDS[raw["format"]]
    found = raw.get(field)
    if found != version:
        age = "an older" if isinstance(found, int) and found < version else "another"
        raise ValueError(
            f"has {age} schema ({found}; this mnistattn reads {version}): score its checkpoint "
            "again with 'mnistattn evaluate --checkpoint'."
        )
    try:
        model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"does not fit the schema at '{place}': {first['msg']}.") from error
    return raw


def read_result(path: str | Path) -> tuple[Path, dict]:
    """The file and content of a result, given its JSON file or its run directory. InputError."""
    path = Path(path)
    file = path / "result.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{file} does not exist: give a result.json or a run directory."
        ) from error
    except (ValueError, OSError) as error:
        raise InputError(f"{file} is damaged: it is no whole JSON file.") from error
    try:
        return file, check_result(raw)
    except ValueError as error:
        raise InputError(f"{file} {error}") from error


def write_json(file: Path, content: dict) -> None:
    """Check a result against the schema and write it."""
    check_result(json.loads(json.dumps(content)))
    file.write_text(json.dumps(content, indent=1) + "\n")


def write_samples(file: Path, samples: dict[str, np.ndarray]) -> None:
    """Write a per-sample file: one HDF5 data set a name, compressed."""
    with h5py.File(file, "w", libver="v110") as h5:
        for name, values in samples.items():
            h5.create_dataset(name, data=values, compression="gzip", compression_opts=9,
                              shuffle=True, track_times=False)  # fmt: skip


def read_samples(file: Path, raw: dict) -> dict[str, np.ndarray]:
    """The per-sample file of a result that lies in `file`; InputError if it is not whole."""
    path = file.with_name(raw["samples"]["file"])
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != raw["samples"]["sha256"]:
            raise InputError(f"{path} is not the per-sample file that {file} was made of: its "
                             "SHA-256 differs.")  # fmt: skip
        with h5py.File(path, "r") as h5:
            return {name: h5[name][()] for name in h5}
    except FileNotFoundError as error:
        raise InputError(f"{path}, the per-sample file of {file}, is missing.") from error
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or no HDF5 file.") from error


def differences(scores: dict, samples: dict[str, np.ndarray], one_answer: bool) -> list[str]:
    """A sentence for each number of `scores` that does not follow from the samples.

    one_answer: each image has one right answer (not so in mbg-multi), which `correct` must follow.
    """
    try:
        again = json.loads(json.dumps(summarize(samples)))
        wrong = samples["correct"] != (samples["prediction"] == samples["answer"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        return [f"the per-sample file cannot be scored: {error}"]
    found = [
        f"{place} says {kept}, the samples give {made}"
        for place, kept, made in _pairs(scores, again, "scores")
        if not _same(kept, made)
    ]
    if one_answer and wrong.any():
        found.append(f"{int(wrong.sum())} samples are marked against their own answer")
    return found


def _same(kept, made) -> bool:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (kept, made))
    return (
        math.isclose(kept, made, rel_tol=TOLERANCE, abs_tol=TOLERANCE) if numbers else kept == made
    )


def _pairs(kept, made, place: str) -> Iterator[tuple[str, object, object]]:
    """All leaves of two trees, by their place."""
    if isinstance(kept, dict) and isinstance(made, dict):
        for key in sorted({*kept, *made}):
            yield from _pairs(kept.get(key), made.get(key), f"{place}.{key}")
    elif isinstance(kept, list) and isinstance(made, list) and len(kept) == len(made):
        for i, (a, b) in enumerate(zip(kept, made, strict=True)):
            yield from _pairs(a, b, f"{place}[{i}]")
    else:
        yield place, kept, made
