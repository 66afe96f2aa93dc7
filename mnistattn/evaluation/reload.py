"""A finished run's network again, from its directory alone."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mnistattn.dataset.read import Card
from mnistattn.errors import InputError
from mnistattn.evaluation.checkpoint import load_tensors
from mnistattn.evaluation.recipes import Recipe
from mnistattn.evaluation.result import read_result
from mnistattn.evaluation.run import load_weights, make_network
from mnistattn.generators.variants import Spec
from mnistattn.models.plugin import code_hash
from mnistattn.models.registry import Model, find


@dataclass(frozen=True)
class Run:
    """A run directory. file: its result.json; raw: what is in that; row: the model; checkpoint: its
    model.safetensors."""

    file: Path
    raw: dict
    row: Model
    checkpoint: Path

    @property
    def card(self) -> Card:
        """What the result says of its data set, as a card: all of it but splits to read."""
        dataset = self.raw["dataset"]
        return Card(self.file.parent, Spec(**dataset["spec"]), dataset | {"splits": {}})

    def network(self, device: torch.device, card: Card | None = None, **options) -> nn.Module:
        """The trained network, on the device, in evaluation mode. card: of the data set that it is
        to look at, if not its own; options: other values of the attention's. InputError if the
        weights are damaged or do not fit."""
        recipe, options = Recipe(**self.raw["recipe"]), self.raw["options"] | options
        network = make_network(self.row, options, card or self.card, recipe, self.raw["seed"])
        load_weights(network, *load_tensors(self.checkpoint), self.row, self.checkpoint)
        return network.to(device).eval()


def load_run(run: str | Path, model: str | None = None) -> Run:
    """A run, given its directory (or its result.json). model: where a plugged model is
    (FILE.py:CLASS), if not under its own name. InputError for a retest, for a result without
    weights, and for a plugged model whose code has changed."""
    file, raw = read_result(run)
    if raw["format"] != "mnistattn-result":
        raise InputError(f"{file} is a retest: give the run that it is of.")
    checkpoint = file.with_name("model.safetensors")
    if not checkpoint.exists():
        raise InputError(f"{checkpoint} is missing: give a run directory with its weights.")
    row = find(model or raw["model"])
    if row.kind == "plugged" and code_hash(row.load()) != raw["code"]:
        raise InputError(f"the code of {row.name} is not what {file} was made with (SHA-256).")
    return Run(file, raw, row, checkpoint)
