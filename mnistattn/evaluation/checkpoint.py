"""Weights and training state on disk: safetensors, written whole or not at all, never pickled."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mnistattn.errors import InputError


def save_tensors(path: Path, tensors: dict[str, Tensor], note: dict) -> None:
    """Write tensors and a JSON note into one safetensors file, atomically, with a digest."""
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    text = json.dumps(note)
    try:
        # One entry: safetensors orders several by chance, and equal files are to have equal bytes.
        # Not save_file, which writes under a name of its own, that a kill would leave for ever.
        data = save(whole, metadata={"mnistattn": f"{_digest(whole, text)}\n{text}"})
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the note of a file that `save_tensors` wrote; InputError if it is not one, or
    not as it was written."""
    try:
        with safe_open(str(path), framework="pt") as file:
            digest, _, text = (file.metadata() or {})["mnistattn"].rpartition("\n")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # Files from before there was a digest have the note alone.
            if digest and digest != _digest(tensors, text):
                raise ValueError("a bit was flipped")
            return tensors, json.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {path} does not exist.") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"checkpoint {path} is damaged or not one of mnistattn's.") from error


def _digest(tensors: dict[str, Tensor], note: str) -> str:
    """SHA-256 of the note and of all tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(note.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors."""
    return {
        f"optimizer.{i}.{key}": torch.as_tensor(value)
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    saved = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            saved["state"].setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(saved)
