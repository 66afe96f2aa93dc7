"""Evaluate a model on a data set: train it (or load a checkpoint), score it, write a run directory.

result.json        scores, data set and digests, recipe, seed, cost, versions; see result.py
model.safetensors  the weights of the best validation epoch
samples.h5         one row a test image: prediction, scale, every metric; the gallery's maps
gallery.h5         sixteen test images and their masks, the same for every model
curve.json         the history, an entry an epoch
picture.png        the gallery with query, answer, masks and attention maps
"""

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mnistattn.dataset.lock import only_writer
from mnistattn.dataset.read import Card, answer_masks, read_card, read_split
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation.checkpoint import load_tensors, save_tensors
from mnistattn.evaluation.cost import relative_cost
from mnistattn.evaluation.feed import Feed, load_feed
from mnistattn.evaluation.metrics import combine
from mnistattn.evaluation.picture import attention_picture
from mnistattn.evaluation.ranks import Ranks, check_batch, launched, leave, together
from mnistattn.evaluation.recipes import Recipe, make_recipe
from mnistattn.evaluation.result import RESULT_VERSION, fits_option, write_json, write_samples
from mnistattn.evaluation.score import score_samples, summarize
from mnistattn.evaluation.step import autocast, precision, sees_mask
from mnistattn.evaluation.train import PREVIOUS, STATE, describe, load_state, train
from mnistattn.generators.variants import VARIANTS, Spec, choose
from mnistattn.models.cost import flops_per_image
from mnistattn.models.network import build
from mnistattn.models.plugin import code_hash
from mnistattn.models.registry import MODELS, Model, choose_options, find
from mnistattn.process import keep_freed_memory

GALLERY = 16  # images
GALLERY_SIDE = 56  # pixels at most, of the maps that are kept of them
LIBRARIES = ("mnistattn", "torch", "torchvision", "numpy", "numba", "h5py")
GENERATE_OPTIONS = set(inspect.signature(generate).parameters) | {f.name for f in fields(Spec)}


def evaluate(
    model: str, data: str | Path | None = None, variant: str | None = None, *,
    recipe: str = "fast", epochs: int | None = None, batch_size: int | None = None,
    lr: float | None = None, queries: str | None = None, seed: int = 0, device: str = "auto",
    out: str | Path | None = None, checkpoint: str | Path | None = None, progress: bool = True,
    say: Callable[[str], None] = print, options: dict | None = None, **generate_options,
) -> dict:  # fmt: skip
    """Train and score a model; returns the result, with "run" the directory it was written to.

    data: a data set's directory. variant: instead, the data set data/VARIANT, which is made first
    where it is missing (generate_options go to `generate`). epochs, batch_size, lr, queries change
    the recipe. options: of the attention, by name (`mnistattn models --options` lists them).
    checkpoint: a model.safetensors that is scored without training. A run that was interrupted goes
    on where it was, if its directory `out` (default runs/VARIANT-MODEL-OPTIONS-RECIPE-seedS, with
    the options given) is the same; meanwhile no other process may write there. Processes that
    torchrun has started share the training; the first of them alone scores and writes, and the
    others return {}. Raises InputError for a request that cannot be met, MnistattnError for a
    failure while running.
    """
    unknown = set(generate_options) - GENERATE_OPTIONS
    if unknown:
        raise TypeError(f"evaluate() got unexpected keyword arguments {sorted(unknown)}")
    row = find(model)
    changed = make_recipe(recipe, epochs=epochs, batch_size=batch_size, lr=lr, queries=queries)
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed {seed} is out of range: give a whole number from 0 to 2^32 - 1.")
    ranks = launched()
    place = choose_device(device, ranks.local if ranks.size > 1 else None)
    check_batch(ranks, changed.batch_size)
    if not ranks.first:
        progress, say = False, _say_nothing
    with together(ranks, place), ExitStack() as held:
        card = _data(data, variant, generate_options, progress, say, ranks)
        kept = load_tensors(Path(checkpoint)) if checkpoint else None
        run = (
            Path(out)
            if out is not None
            else Path("runs") / _name(row, card, options or {}, recipe, seed, kept)
        )
        job = _Job(row, options or {}, card, changed, seed, place, run, checkpoint, kept, ranks,
                   progress, say)  # fmt: skip
        try:
            network, identity, history = _fit(job, held)
            return _write(job, network, identity, history) if ranks.first else {}
        except torch.cuda.OutOfMemoryError as error:
            raise MnistattnError(
                f"the GPU has not enough memory for {row.name} in batches of {changed.batch_size}: "
                "give a smaller --batch-size, or --device cpu."
            ) from error
        except OSError as error:
            raise MnistattnError(f"cannot write {run}: {error.strerror or error}.") from error


@dataclass
class _Job:
    """What `evaluate` was asked for. kept: the tensors and the note of the checkpoint's file."""

    row: Model
    options: dict
    card: Card
    recipe: Recipe
    seed: int
    device: torch.device
    run: Path
    checkpoint: str | Path | None
    kept: tuple[dict, dict] | None
    ranks: Ranks
    progress: bool
    say: Callable[[str], None]


def _name(row: Model, card: Card, options: dict, recipe: str, seed: int, kept) -> str:
    """A run's name: VARIANT-MODEL-OPTIONS-RECIPE-seedS, a checkpoint's with the seed it has."""
    choices = "".join(f"-{option}={value}" for option, value in sorted(options.items()))
    if kept:
        seed = kept[1].get("identity", {}).get("seed", seed)
    name = f"{card.raw['variant']}-{row.name}{choices}-{recipe}-seed{seed}"
    return f"{name}-checkpoint" if kept else name


def _fit(job: _Job, held: ExitStack) -> tuple[nn.Module, dict, list[dict]]:
    """The trained network, its identity and its history. The run directory is this process's, of
    all ranks the first's, as long as `held` holds."""
    keep_freed_memory()
    row, card, ranks = job.row, job.card, job.ranks
    if job.kept and job.kept[1].get("identity", {}).get("model") == row.weights:
        job.options = job.kept[1]["identity"].get("options", {}) | job.options
    job.options = choose_options(row, job.options)
    for option, value in job.options.items():  # fail before the training, not when it is written
        if not fits_option(value):
            raise InputError(f"option '{option}' of {row.name} is {value!r}, which no result can "
                             "hold: it may be a number, a word, true, false, none or a list of "
                             "whole numbers.")  # fmt: skip
    network = make_network(row, job.options, card, job.recipe, job.seed)
    flops_per_image(network, card.spec.size)  # tries the options on its maps, too
    code = code_hash(row.load() if row.attention else type(network))
    identity = identity_of(row, job.options, job.recipe, job.seed, card, code)
    if job.kept:
        tensors, note = job.kept
        load_weights(network, tensors, note, row, job.checkpoint)
        if row.kind == "plugged" and note.get("identity", {}).get("code") != code:
            raise InputError(f"the code of {row.name} is not what {job.checkpoint} was trained "
                             "with (SHA-256): give the file as it was.")  # fmt: skip
        if ranks.first:
            held.enter_context(_only_writer(job.run, job.say))
            claim(job.run, identity, row.name)
        return network, note["identity"], note["history"]
    for split in ("train", "val", "test"):  # fail before an hour of training, not after
        card.digest(split)
    ours = identity
    if ranks.first:
        held.enter_context(_only_writer(job.run, job.say))
        job.run.mkdir(exist_ok=True)
        identity = claim(job.run, identity, row.name)
    identity = ranks.note(identity)
    if not _same(identity, ours):
        raise InputError(f"process {ranks.rank} of {ranks.size} has another data set, version or "
                         "request than the first: give all of them the same.")  # fmt: skip
    return network, identity, _trained(job, network, identity)


def _write(job: _Job, network: nn.Module, identity: dict, history: list[dict]) -> dict:
    """Score the trained network and write the run directory; returns the result."""
    row, card, device, run = job.row, job.card, job.device, job.run
    recipe = Recipe(**identity["recipe"])
    flops = flops_per_image(network, card.spec.size)
    code = code_hash(row.load() if row.attention else type(network))
    test, masks, scale = load_test(card, device, sees_mask(network))
    network = network.to(device).to(memory_format=torch.channels_last)
    cost = relative_cost(network, recipe, test, card.spec.size)
    samples = score_samples(network, test, masks, scale, progress=job.progress)
    if "pixel_auroc" in samples and (samples["pixel_auroc"] == 0.5).all() and row.kind == "plugged":
        job.say(f"note: every map of {row.name} is constant, so its correctness is that of chance")
    layers, product = gallery_maps(network, test)
    kept_samples = samples | ({"gallery": _small(product)} if layers else {})
    defaults = row.defaults()
    run.mkdir(parents=True, exist_ok=True)
    if not job.kept:
        note = {"identity": identity, "history": history}
        save_tensors(run / "model.safetensors", network.state_dict(), note)
    whole(run / "samples.h5", lambda file: write_samples(file, kept_samples))
    n = len(product)
    whole(run / "gallery.h5", lambda file: write_samples(
        file, {"image": test.images[:n].cpu().numpy(), "mask": masks[:n]}))  # fmt: skip
    whole(run / "curve.json", lambda file: file.write_text(json.dumps(history, indent=1) + "\n"))
    picture = _picture(test, card, masks, samples, layers, product, row.paper_name)
    whole(run / "picture.png", lambda file: picture.save(file, "PNG"))
    result = {
        "format": "mnistattn-result", "result_version": RESULT_VERSION, "model": row.name,
        "kind": row.kind, "paper_name": row.paper_name, "paper": row.paper,
        "summary": row.summary, "origin": _origin(row), "code": code,
        "options": job.options,
        "changed_options": {k: v for k, v in job.options.items() if defaults.get(k) != v},
        "dataset": {
            "variant": card.raw["variant"], "paper_name": card.raw["paper_name"],
            "spec": card.raw["spec"], "seed": card.raw["seed"], "sources": card.raw["sources"],
            "digests": {split: entry["digest"] for split, entry in card.splits.items()},
            "counts": {split: entry["count"] for split, entry in card.splits.items()},
        },
        "trained_on": identity["data"], "recipe": identity["recipe"], "seed": identity["seed"],
        "epochs_trained": len(history),
        "best_epoch": max(history, key=lambda e: (e["val_accuracy"], e["epoch"]))["epoch"],
        "scores": summarize(samples),
        "cost": {
            "parameters": sum(p.numel() for p in network.parameters()),
            "flops_per_image": flops,
            "train_seconds": sum(e["seconds"] for e in history), **cost,
            "batch_size": recipe.batch_size,
            "device": _device_name(device, job.ranks), "threads": torch.get_num_threads(),
            "precision": str(precision(device)).removeprefix("torch."),
        },
        "samples": {
            "file": "samples.h5",
            "sha256": hashlib.sha256((run / "samples.h5").read_bytes()).hexdigest(),
        },
        "versions": versions(),
    }  # fmt: skip
    whole(run / "result.json", lambda file: write_json(file, result))
    for name in (PREVIOUS, STATE):
        (run / name).unlink(missing_ok=True)
    return result | {"run": str(run)}


def _say_nothing(_: str) -> None:
    """What all ranks but the first say."""


def _only_writer(run: Path, say):
    """The lock on a run directory, whose parents are made if they are not there."""
    if not run.parent.exists():
        run.parent.mkdir(parents=True, exist_ok=True)
    return only_writer(run, say)


def versions() -> dict[str, str]:
    """The versions of all that a score may depend on."""
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def load_test(card: Card, device: torch.device, masks: bool) -> tuple[Feed, np.ndarray, np.ndarray]:
    """The test split: its feed (masks: for a network that needs them), the ground truth bool
    (N, H, W), and the scale of each target, float32 (N,)."""
    test = load_feed(card, "test", device, masks=masks)
    names = ["instances", "digit", "scale", "target", "query"]
    arrays = read_split(card, "test", names + (["answers"] if card.spec.row.repeats else []))
    truth = answer_masks(arrays)
    return test, truth, arrays["scale"][np.arange(len(truth)), arrays["target"]]


def _data(data, variant, generate_options, progress, say, ranks: Ranks) -> Card:
    if (data is None) == (variant is None):
        raise InputError("give either a data set's directory or a variant, not both or neither.")
    if data is not None:
        return read_card(data)
    path = Path("data") / choose("variant", variant, VARIANTS)
    if ranks.first and not path.exists():
        say(f"{path} does not exist: generating it first")
        generate(variant, path, progress=progress, say=say, **generate_options)
    ranks.note(None)  # the others wait until it is there
    card = read_card(path)
    if card.raw["variant"] != variant:
        raise InputError(f"{path} holds {card.raw['variant']}, not {variant}: give --data.")
    return card


def choose_device(name: str, number: int | None = None) -> torch.device:
    """The torch device of --device auto, cpu or cuda; of several GPUs, the one with this number.
    InputError if there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device '{name}': it is one of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: use --device cpu.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if number is None:
        return torch.device("cuda")
    if number >= torch.cuda.device_count():
        raise InputError(f"there are {torch.cuda.device_count()} GPUs here, too few for process "
                         f"{number + 1} of this machine: give torchrun fewer.")  # fmt: skip
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _device_name(device: torch.device, ranks: Ranks) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU ({torch.get_num_threads()} threads)"
    return name if ranks.size == 1 else f"{ranks.size} x {name}"


def make_network(row: Model, options: dict, card: Card, recipe: Recipe, seed: int) -> nn.Module:
    """The untrained network of a model for a data set. A plugged one is held against the contract
    (MnistattnError), so that it fails before an hour of training, not after."""
    torch.manual_seed(seed)
    size = card.spec.size
    queries, answers = len(card.query_names), len(card.answer_names)
    network = build(row, size, queries, answers, recipe.dropout, **options)
    if row.kind == "plugged":
        from mnistattn.models.check import first_look

        state = torch.get_rng_state()
        first_look(network, row, size, queries, answers)
        torch.set_rng_state(state)
    return network.to(memory_format=torch.channels_last)


def _origin(row: Model) -> str:
    """Where a model comes from, without the folders of this machine."""
    if row.kind != "plugged" or ".py" not in row.origin:
        return row.origin
    return row.origin.replace("\\", "/").rpartition("/")[2]


def identity_of(
    row: Model, options: dict, recipe: Recipe, seed: int, card: Card, code: str
) -> dict:
    """All that the weights of a run depend on. code: code_hash of the model."""
    return {
        "model": row.weights, "options": options, "recipe": describe(recipe), "seed": seed,
        "data": {split: card.splits.get(split, {}).get("digest") for split in ("train", "val")},
    } | ({"code": code} if row.kind == "plugged" else {})  # fmt: skip


def claim(run: Path, identity: dict, name: str) -> dict:
    """Refuse a run directory that holds something else, so that no result is lost.

    Returns the identity as the directory has it. It may lack options that the model did not have
    when the run was made: they had what is their default now.
    """
    identity = json.loads(json.dumps(identity))
    model = run / "model.safetensors"
    for found in (load_tensors(model) if model.exists() else None, load_state(run)):
        if found is None:
            continue
        kept = found[1].get("identity", {})
        if not _same(kept, identity):
            raise InputError(
                f"{run} holds a run of another model, data set, recipe or seed: give another --out."
            )
        identity = kept
    try:  # models that share weights, as none and gradcam, do not share a result
        kept_name = json.loads((run / "result.json").read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        kept_name = name
    if kept_name != name:
        raise InputError(f"{run} holds a run of another model: give another --out.")
    return identity


def _same(first: dict, second: dict) -> bool:
    """Whether two identities are of one run; what options one of them lacks are the defaults."""
    first, second = json.loads(json.dumps([first, second]))
    rows = [MODELS.get(identity.get("model", "")) for identity in (first, second)]
    for identity, row in zip((first, second), rows, strict=True):
        if row:
            identity["options"] = row.defaults() | identity.get("options", {})
    return first == second


def _trained(job: _Job, network: nn.Module, identity: dict) -> list[dict]:
    """Train the network, or load what the run directory already has; returns the history."""
    row, card, ranks, run = job.row, job.card, job.ranks, job.run
    file = run / "model.safetensors"
    if ranks.note(ranks.first and file.exists()):
        if not ranks.first:
            return []
        tensors, note = load_tensors(file)
        load_weights(network, tensors, note, row, file)
        leave(ranks)
        return note["history"]
    feed = load_feed(card, "train", job.device, masks=sees_mask(network))
    validation = load_feed(card, "val", job.device, masks=True)
    network.to(job.device)
    title = f"{row.name} on {card.raw['variant']}"
    history = train(network, job.recipe, feed, validation, job.seed, run, identity, job.progress,
                    title, ranks)  # fmt: skip
    leave(ranks)  # the first is to score and to write, which needs nobody
    return history


def load_weights(network: nn.Module, tensors: dict, note: dict, row: Model, file) -> None:
    """Put a checkpoint's weights into a network; InputError if they are another model's."""
    if any(name.startswith("last.") for name in tensors):
        raise InputError(
            f"checkpoint {file} is the state of an unfinished training: run that again instead."
        )
    kept = note.get("identity", {}).get("model")
    if kept != row.weights:
        raise InputError(
            f"checkpoint {file} is of model {kept}, not {row.weights}: give --model {kept}."
        )
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"checkpoint {file} does not fit: it was trained for another image size, or other "
            "queries or answers, or with other options."
        ) from error


def whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it when it is whole."""
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        write(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@torch.inference_mode()
def gallery_maps(network: nn.Module, test: Feed) -> tuple[list[np.ndarray], np.ndarray]:
    """Of the first sixteen test images: the map of each layer (n, h, w), and the combined one
    (n, H, W), zero for a network without attention."""
    height, width = test.images.shape[1:3]
    index = torch.arange(min(GALLERY, len(test)))
    told = {"mask": test.masks(index, test.query[index])} if sees_mask(network) else {}
    attend = getattr(network, "attend", network)
    with autocast(test.device):
        _, out = attend(test.batch(index), test.query[index].to(test.device), **told)
    maps = [a.float().cpu() for a in out["attention"]]
    product = np.zeros((len(index), height, width))
    if maps:
        product = combine(maps, (height, width)).numpy()
    return [a[:, 0].numpy() for a in maps], product


def _small(maps: np.ndarray) -> np.ndarray:
    """Combined maps (n, H, W), each divided by its maximum, as uint8 of GALLERY_SIDE pixels at
    most: what a board shows."""
    side = min(GALLERY_SIDE, maps.shape[1])
    small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(maps)[:, None], side)[:, 0]
    peak = small.amax((1, 2), keepdim=True)
    return (255 * small / peak.clamp(min=1e-300)).round().byte().numpy()


def _picture(test: Feed, card: Card, masks, samples, layers, product, name: str):
    """The gallery with what the model attends to and answers."""
    n, names = len(product), card.answer_names
    captions = [
        f"{card.query_names[samples['query'][i]]} -> {names[samples['answer'][i]]}, "
        f"said {names[samples['prediction'][i]]}"
        for i in range(n)
    ]
    return attention_picture(
        test.images[:n].cpu().numpy(), masks[:n], layers, product, captions,
        [bool(c) for c in samples["correct"][:n]], f"{name} on {card.raw['paper_name']}",
    )  # fmt: skip
