"""How well the built-in digits stand in for MNIST: a small CNN trained on `strokes` glyphs alone
reads the MNIST test set.

    python benchmarks/strokes_to_mnist.py --data-root data

MNIST is used for the final count only. Training augments lightly: shifts of up to 2 pixels and a
random contrast.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torchvision.datasets import MNIST

from mnistattn.generators.digits.strokes import stroke_glyphs


def small_cnn() -> nn.Sequential:
    """A CNN of 29 thousand weights."""

    def block(channels_in: int, channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 9, 10),
    )


def as_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).float().div(255).unsqueeze(1)


def augmented(batch: torch.Tensor) -> torch.Tensor:
    """Shift each image by up to 2 pixels and change its contrast (gamma)."""
    n = len(batch)
    dy, dx = torch.randint(0, 5, (2, n, 1))
    rows = (dy + torch.arange(28))[:, None, :, None]
    columns = (dx + torch.arange(28))[:, None, None, :]
    padded = functional.pad(batch, (2, 2, 2, 2))
    shifted = padded[torch.arange(n)[:, None, None, None], 0, rows, columns]
    return shifted ** torch.empty(n, 1, 1, 1).uniform_(0.6, 1.5)


def train(images: np.ndarray, labels: np.ndarray, epochs: int) -> nn.Module:
    x, y = as_input(images), torch.from_numpy(labels).long()
    model = small_cnn()
    batch = 128
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            loss = functional.cross_entropy(model(augmented(x[chosen])), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / (len(x) // batch):.4f}", flush=True)
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-root", default="data", help="folder that holds MNIST/raw")
    parser.add_argument("--seed", type=int, default=0, help="of the glyphs and of the training")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--count", type=int, default=20000, help="glyphs to train on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    try:
        mnist = MNIST(args.data_root, train=False, download=False)
    except RuntimeError:
        print(f"error: no MNIST in {args.data_root}/MNIST/raw; see --data-root", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    stroke_glyphs(args.seed, "train", 1)  # compiles
    start = time.perf_counter()
    images, labels = stroke_glyphs(args.seed, "train", args.count)
    microseconds = (time.perf_counter() - start) / args.count * 1e6
    model = train(images, labels, args.epochs)

    with torch.no_grad():
        guesses = torch.cat(
            [model(part).argmax(1) for part in as_input(mnist.data.numpy()).split(1000)]
        )
    confusion = torch.zeros(10, 10, dtype=torch.long)
    confusion.index_put_((mnist.targets, guesses), torch.tensor(1), accumulate=True)
    result = {
        "seed": args.seed,
        "epochs": args.epochs,
        "count": args.count,
        "accuracy": confusion.diag().sum().item() / len(guesses),
        "per_class": (confusion.diag() / confusion.sum(1)).tolist(),
        "confusion": confusion.tolist(),
        "microseconds_per_glyph": microseconds,
    }
    print(f"{microseconds:.1f} microseconds a glyph")
    print("MNIST digit (rows) read as (columns):")
    for digit, row in enumerate(result["confusion"]):
        print(digit, *(f"{n:5d}" for n in row), f"  {100 * result['per_class'][digit]:.2f} %")
    print(f"accuracy on MNIST test: {100 * result['accuracy']:.2f} %")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
