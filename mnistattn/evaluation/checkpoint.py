"""Weights and training state on disk: safetensors, written whole or not at all, never pickled."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mnistattn.errors import InputError


def save_tensors(path: Path, tensors: dict[str, Tensor], note: dict) -> None:
    """Write tensors and a JSON note into one safetensors file, atomically."""
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file(whole, str(partial), metadata={"mnistattn": json.dumps(note)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the note of a file that `save_tensors` wrote; InputError if it is not one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            note = json.loads((file.metadata() or {})["mnistattn"])
            return {name: file.get_tensor(name) for name in file.keys()}, note  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {path} does not exist.") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"checkpoint {path} is damaged or not one of mnistattn's.") from error


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
