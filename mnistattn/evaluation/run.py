"""Evaluate a model on a data set: train it (or load a checkpoint), score it, write a run directory.

result.json        scores, data set and digests, recipe, seed, cost, versions
model.safetensors  the weights of the best validation epoch
samples.h5         one row a test image: prediction, scale, every metric
curve.json         the history, an entry an epoch
picture.png        sixteen test images with query, answer, masks and attention maps
"""

import inspect
import json
import os
import platform
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch

from mnistattn.dataset.read import Card, answer_masks, read_card, read_split
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation.checkpoint import load_tensors, save_tensors
from mnistattn.evaluation.feed import load_feed
from mnistattn.evaluation.metrics import combine
from mnistattn.evaluation.picture import attention_picture
from mnistattn.evaluation.recipes import Recipe, make_recipe
from mnistattn.evaluation.score import score_samples, summarize
from mnistattn.evaluation.train import STATE, autocast, describe, train
from mnistattn.generators.variants import VARIANTS, Spec, choose
from mnistattn.models.cost import flops_per_image
from mnistattn.models.network import build
from mnistattn.models.registry import MODELS, choose_options, find
from mnistattn.process import keep_freed_memory

RESULT_VERSION = 1
PICTURED = 16
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
    the options given) is the same. Raises InputError for a request that cannot be met,
    MnistattnError for a failure while running.
    """
    unknown = set(generate_options) - GENERATE_OPTIONS
    if unknown:
        raise TypeError(f"evaluate() got unexpected keyword arguments {sorted(unknown)}")
    find(model)
    changed = make_recipe(recipe, epochs=epochs, batch_size=batch_size, lr=lr, queries=queries)
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed {seed} is out of range: give a whole number from 0 to 2^32 - 1.")
    place = _device(device)
    card = _data(data, variant, generate_options, progress, say)
    choices = "".join(f"-{option}={value}" for option, value in sorted((options or {}).items()))
    name = f"{card.raw['variant']}-{model}{choices}-{recipe}-seed{seed}"
    if checkpoint:
        name += "-checkpoint"
    run = Path(out if out is not None else Path("runs") / name)
    try:
        return _run(model, options or {}, card, changed, seed, place, run, checkpoint, progress)
    except OSError as error:
        raise MnistattnError(f"cannot write {run}: {error.strerror or error}.") from error


def _run(model, options, card, recipe, seed, device, run, checkpoint, progress) -> dict:
    keep_freed_memory()
    tensors, note = load_tensors(Path(checkpoint)) if checkpoint else ({}, {})
    kept = note.get("identity", {})  # of a checkpoint, whose options are its own
    if kept.get("model") == model:
        options = kept.get("options", {}) | options
    options = choose_options(model, options)
    network, flops = _network(model, options, card, recipe, seed)
    identity = {
        "model": model, "options": options, "recipe": describe(recipe), "seed": seed,
        "data": {split: card.splits.get(split, {}).get("digest") for split in ("train", "val")},
    }  # fmt: skip
    if checkpoint:
        _load(network, tensors, note, model, checkpoint)
        identity, history = note["identity"], note["history"]
        _claim(run, identity)
        recipe_used = identity["recipe"]
        test = load_feed(card, "test", device)
    else:
        for split in ("train", "val", "test"):  # fail before an hour of training, not after
            card.digest(split)
        run.mkdir(parents=True, exist_ok=True)
        identity = _claim(run, identity)
        history = _trained(network, run, recipe, card, seed, identity, device, progress, model)
        recipe_used = describe(recipe)
        test = load_feed(card, "test", device)
    network = network.to(device, memory_format=torch.channels_last)

    arrays = read_split(card, "test", _truth(card))
    masks = answer_masks(arrays)
    scale = arrays["scale"][np.arange(len(masks)), arrays["target"]]
    samples = score_samples(network, test, masks, scale, progress=progress)
    result = {
        "format": "mnistattn-result", "result_version": RESULT_VERSION, "model": model,
        "paper_name": find(model).paper_name, "options": options,
        "dataset": {
            "variant": card.raw["variant"], "paper_name": card.raw["paper_name"],
            "spec": card.raw["spec"], "seed": card.raw["seed"], "sources": card.raw["sources"],
            "digests": {split: entry["digest"] for split, entry in card.splits.items()},
        },
        "trained_on": identity["data"], "recipe": recipe_used, "seed": identity["seed"],
        "epochs_trained": len(history),
        "best_epoch": max(history, key=lambda e: (e["val_accuracy"], e["epoch"]))["epoch"],
        "scores": summarize(samples),
        "cost": {
            "parameters": sum(p.numel() for p in network.parameters()),
            "flops_per_image": flops,
            "train_seconds": sum(e["seconds"] for e in history),
            "device": _device_name(device), "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("mnistattn", "torch", "numpy")}
        | {"python": platform.python_version()},
    }  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    weights = network.state_dict()
    if not checkpoint:
        save_tensors(run / "model.safetensors", weights,
                     {"identity": identity, "history": history})  # fmt: skip
    _whole(run / "samples.h5", lambda file: _write_samples(file, samples))
    _whole(run / "curve.json", lambda file: file.write_text(json.dumps(history, indent=1) + "\n"))
    picture = _picture(network, test, card, masks, samples, model)
    _whole(run / "picture.png", lambda file: picture.save(file, "PNG"))
    _whole(run / "result.json", lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))
    (run / STATE).unlink(missing_ok=True)
    return result | {"run": str(run)}


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


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device '{name}': it is one of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def _network(model: str, options: dict, card: Card, recipe: Recipe, seed: int):
    """The network, and the FLOPs of an image, whose count also tries the options on its maps."""
    torch.manual_seed(seed)
    size = card.spec.size
    queries, answers = len(card.query_names), len(card.answer_names)
    network = build(model, size, queries, answers, recipe.dropout, **options)
    return network.to(memory_format=torch.channels_last), flops_per_image(network, size)


def _claim(run: Path, identity: dict) -> dict:
    """Refuse a run directory that holds something else, so that no result is lost.

    Returns the identity as the directory has it. It may lack options that the model did not have
    when the run was made: they had what is their default now.
    """
    identity = json.loads(json.dumps(identity))
    for file in (run / "model.safetensors", run / STATE):
        if not file.exists():
            continue
        kept = load_tensors(file)[1].get("identity", {})
        if _complete(kept) != _complete(identity):
            raise InputError(
                f"{run} holds a run of another model, data set, recipe or seed: give another --out."
            )
        identity = kept
    return identity


def _complete(identity: dict) -> dict:
    """An identity with all options of its model, if that is known."""
    row = MODELS.get(identity.get("model", ""))
    return identity | {"options": row.defaults() | identity.get("options", {})} if row else identity


def _trained(network, run, recipe, card, seed, identity, device, progress, model) -> list[dict]:
    """Train the network, or load what the run directory already has; returns the history."""
    if (run / "model.safetensors").exists():
        tensors, note = load_tensors(run / "model.safetensors")
        _load(network, tensors, note, model, run / "model.safetensors")
        return note["history"]
    feed, validation = load_feed(card, "train", device), load_feed(card, "val", device)
    network.to(device)
    title = f"{model} on {card.raw['variant']}"
    return train(network, recipe, feed, validation, seed, run, identity, progress, title)


def _load(network, tensors, note, model: str, file) -> None:
    if any(name.startswith("last.") for name in tensors):
        raise InputError(
            f"checkpoint {file} is the state of an unfinished training: run that again instead."
        )
    kept = note.get("identity", {}).get("model")
    if kept != model:
        raise InputError(f"checkpoint {file} is of model {kept}, not {model}: give --model {kept}.")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"checkpoint {file} does not fit: it was trained for another image size, or other "
            "queries or answers, or with other options."
        ) from error


def _truth(card: Card) -> list[str]:
    names = ["instances", "digit", "scale", "target", "query"]
    return names + (["answers"] if card.spec.row.repeats else [])


def _whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it when it is whole."""
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        write(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_samples(file: Path, samples: dict[str, np.ndarray]) -> None:
    with h5py.File(file, "w") as h5:
        for name, values in samples.items():
            h5[name] = values


@torch.inference_mode()
def _picture(network, test, card: Card, masks, samples, model: str):
    """The first sixteen test images with what the model attends to and answers."""
    n = min(PICTURED, len(test))
    index = torch.arange(n)
    images = test.batch(index)
    with autocast(test.device):
        _, out = network(images, test.query[index].to(test.device))
    maps = [a.float().cpu() for a in out["attention"]]
    product = combine(maps, masks.shape[1:]).numpy() if maps else np.zeros(masks[:n].shape)
    names = card.answer_names
    captions = [
        f"{card.query_names[samples['query'][i]]} -> {names[samples['answer'][i]]}, "
        f"said {names[samples['prediction'][i]]}"
        for i in range(n)
    ]
    return attention_picture(
        test.images[:n].cpu().numpy(), masks[:n], [a[:, 0].numpy() for a in maps], product,
        captions, [bool(c) for c in samples["correct"][:n]],
        f"{find(model).paper_name} on {card.raw['paper_name']}",
    )  # fmt: skip
