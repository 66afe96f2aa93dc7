"""Training recipes: one row each, all that decides a training beside model, data and seed."""

import dataclasses
import math
from dataclasses import dataclass

from mnistattn.errors import InputError

QUERIES = ("one", "fresh", "all")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    queries: `one` fixed query an image, as the papers say; `fresh`, a random one of the image's
    digits at each visit; `all`, every digit of every image in each epoch, as PAN's code.
    patience: epochs without a better validation accuracy before stopping (0: never).
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    optimizer: str  # adamw or rmsprop
    schedule: str  # one-cycle, or steps: lr / 1.5 every 11 epochs after epoch 30
    clip: float  # gradient norm
    weight_decay: float = 0.0
    dropout: float = 0.0  # before the head
    glorot: bool = False  # uniform initialisation of all weights
    patience: int = 0
    queries: str = "one"

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate at a step, counted from 0: a pure function, so a run can be resumed."""
        if self.schedule == "steps":
            return self.lr / 1.5 ** max(0, (step // steps_per_epoch - 30) // 11 + 1)
        total = max(1, self.epochs * steps_per_epoch)
        warm = 0.25 * total
        if step < warm:
            return self.lr * (0.04 + 0.96 * (1 - math.cos(math.pi * step / warm)) / 2)
        done = min(1.0, (step - warm) / (total - warm))
        return self.lr * max(1e-4, (1 + math.cos(math.pi * done)) / 2)


RECIPES = {
    "fast": Recipe("fast", epochs=12, batch_size=32, lr=0.003, optimizer="adamw",
                   schedule="one-cycle", clip=1.0, weight_decay=0.01),
    "paper": Recipe("paper", epochs=300, batch_size=200, lr=0.003, optimizer="rmsprop",
                    schedule="steps", clip=5.0, dropout=0.5, glorot=True, patience=50),
}  # fmt: skip


def make_recipe(name: str, **changes) -> Recipe:
    """A recipe by name with some fields changed (None: left alone). InputError if one is wrong."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe '{name}': it is one of {', '.join(RECIPES)}.")
    given = {field: value for field, value in changes.items() if value is not None}
    recipe = dataclasses.replace(RECIPES[name], **given)
    if recipe.epochs < 1 or recipe.batch_size < 2 or not recipe.lr > 0:
        raise InputError(
            f"epochs {recipe.epochs}, batch size {recipe.batch_size}, learning rate {recipe.lr} "
            "are impossible: give at least 1 epoch, 2 images a batch and a rate above 0."
        )
    if recipe.queries not in QUERIES:
        raise InputError(f"unknown queries '{recipe.queries}': one of {', '.join(QUERIES)}.")
    return recipe
