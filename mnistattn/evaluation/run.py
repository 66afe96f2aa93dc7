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
from dataclasses import fields
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
from mnistattn.evaluation.recipes import Recipe, make_recipe
from mnistattn.evaluation.result import RESULT_VERSION, fits_option, write_json, write_samples
from mnistattn.evaluation.score import score_samples, summarize
from mnistattn.evaluation.step import autocast, sees_mask
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
    the options given) is the same; meanwhile no other process may write there. Raises InputError
    for a request that cannot be met, MnistattnError for a failure while running.
    """
    unknown = set(generate_options) - GENERATE_OPTIONS
    if unknown:
        raise TypeError(f"evaluate() got unexpected keyword arguments {sorted(unknown)}")
    row = find(model)
    changed = make_recipe(recipe, epochs=epochs, batch_size=batch_size, lr=lr, queries=queries)
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed {seed} is out of range: give a whole number from 0 to 2^32 - 1.")
    place = choose_device(device)
    card = _data(data, variant, generate_options, progress, say)
    tensors, note = load_tensors(Path(checkpoint)) if checkpoint else ({}, {})
    kept = note.get("identity", {})  # of a checkpoint, whose seed and options are its own
    choices = "".join(f"-{option}={value}" for option, value in sorted((options or {}).items()))
    name = f"{card.raw['variant']}-{row.name}{choices}-{recipe}-seed{kept.get('seed', seed)}"
    if checkpoint:
        name += "-checkpoint"
    run = Path(out if out is not None else Path("runs") / name)
    try:
        with ExitStack() as held:
            return _run(row, options or {}, card, changed, seed, place, run, checkpoint, tensors,
                        note, progress, say, held)  # fmt: skip
    except torch.cuda.OutOfMemoryError as error:
        raise MnistattnError(
            f"the GPU has not enough memory for {row.name} in batches of {changed.batch_size}: "
            "give a smaller --batch-size, or --device cpu."
        ) from error
    except OSError as error:
        raise MnistattnError(f"cannot write {run}: {error.strerror or error}.") from error


def _run(
    row: Model, options, card, recipe, seed, device, run, checkpoint, tensors, note, progress, say,
    held: ExitStack,
) -> dict:  # fmt: skip
    keep_freed_memory()
    kept = note.get("identity", {})
    if kept.get("model") == row.weights:
        options = kept.get("options", {}) | options
    options = choose_options(row, options)
    for option, value in options.items():  # fail before the training, not when it is written
        if not fits_option(value):
            raise InputError(f"option '{option}' of {row.name} is {value!r}, which no result can "
                             "hold: it may be a number, a word, true, false, none or a list of "
                             "whole numbers.")  # fmt: skip
    network = make_network(row, options, card, recipe, seed)
    flops = flops_per_image(network, card.spec.size)  # tries the options on its maps, too
    code = code_hash(row.load() if row.attention else type(network))
    identity = identity_of(row, options, recipe, seed, card, code)
    if checkpoint:
        load_weights(network, tensors, note, row, checkpoint)
        if row.kind == "plugged" and kept.get("code") != code:
            raise InputError(f"the code of {row.name} is not what {checkpoint} was trained with "
                             "(SHA-256): give the file as it was.")  # fmt: skip
        identity, history = note["identity"], note["history"]
        held.enter_context(_only_writer(run, say))
        claim(run, identity, row.name)
    else:
        for split in ("train", "val", "test"):  # fail before an hour of training, not after
            card.digest(split)
        held.enter_context(_only_writer(run, say))
        run.mkdir(exist_ok=True)
        identity = claim(run, identity, row.name)
        history = _trained(network, run, recipe, card, seed, identity, device, progress, row)
    recipe = Recipe(**identity["recipe"])

    test, masks, scale = load_test(card, device, sees_mask(network))
    network = network.to(device).to(memory_format=torch.channels_last)
    cost = relative_cost(network, recipe, test, card.spec.size)
    samples = score_samples(network, test, masks, scale, progress=progress)
    if "pixel_auroc" in samples and (samples["pixel_auroc"] == 0.5).all() and row.kind == "plugged":
        say(f"note: every map of {row.name} is constant, so its correctness is that of chance")
    layers, product = _gallery(network, test, masks)
    kept_samples = samples | ({"gallery": _small(product)} if layers else {})
    defaults = row.defaults()
    run.mkdir(parents=True, exist_ok=True)
    if not checkpoint:
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
        "options": options,
        "changed_options": {k: v for k, v in options.items() if defaults.get(k) != v},
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
            "device": _device_name(device), "threads": torch.get_num_threads(),
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


def _data(data, variant, generate_options, progress, say) -> Card:
    if (data is None) == (variant is None):
        raise InputError("give either a data set's directory or a variant, not both or neither.")
    if data is not None:
        return read_card(data)
    path = Path("data") / choose("variant", variant, VARIANTS)
    if not path.exists():
        say(f"{path} does not exist: generating it first")
        generate(variant, path, progress=progress, say=say, **generate_options)
    card = read_card(path)
    if card.raw["variant"] != variant:
        raise InputError(f"{path} holds {card.raw['variant']}, not {variant}: give --data.")
    return card


def choose_device(name: str) -> torch.device:
    """The torch device of --device auto, cpu or cuda. InputError if there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device '{name}': it is one of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


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
        if _complete(kept) != _complete(identity):
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


def _complete(identity: dict) -> dict:
    """An identity with all options of its model, if that is known."""
    row = MODELS.get(identity.get("model", ""))
    return identity | {"options": row.defaults() | identity.get("options", {})} if row else identity


def _trained(network, run, recipe, card, seed, identity, device, progress, row: Model):
    """Train the network, or load what the run directory already has; returns the history."""
    if (run / "model.safetensors").exists():
        tensors, note = load_tensors(run / "model.safetensors")
        load_weights(network, tensors, note, row, run / "model.safetensors")
        return note["history"]
    feed, validation = (load_feed(card, split, device, masks=sees_mask(network))
                        for split in ("train", "val"))  # fmt: skip
    network.to(device)
    title = f"{row.name} on {card.raw['variant']}"
    return train(network, recipe, feed, validation, seed, run, identity, progress, title)


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
def _gallery(network, test: Feed, masks) -> tuple[list[np.ndarray], np.ndarray]:
    """Of the first sixteen test images: the map of each layer (n, h, w), and the combined one
    (n, H, W), zero for a network without attention."""
    index = torch.arange(min(GALLERY, len(test)))
    told = {"mask": test.masks(index, test.query[index])} if sees_mask(network) else {}
    attend = getattr(network, "attend", network)
    with autocast(test.device):
        _, out = attend(test.batch(index), test.query[index].to(test.device), **told)
    maps = [a.float().cpu() for a in out["attention"]]
    size = masks.shape[1:]
    product = combine(maps, size).numpy() if maps else np.zeros((len(index), *size))
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
