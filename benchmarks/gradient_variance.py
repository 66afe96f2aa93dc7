"""How good the three gradients of hard attention are: their bias and their variance.

    python benchmarks/gradient_variance.py --data data/mref --steps 1000
    python benchmarks/gradient_variance.py

A batch of --images is taken through the CNN once (from --data, with the network trained for --steps
batches of it before; or random features, 6 x 6, and an untrained network). The gradient is that of
the mean cross entropy with respect to the weights of the score g, features held fixed. Since only
H W positions can be sampled, the exact one of the expected loss can be counted out:

    exact = d/d theta  mean_b sum_i p_bi loss_bi

Each estimator gives --draws gradients g of the same weights and images, one sample an image each:

    bias        |mean g - exact| / |exact|
    noise       what that would be of an unbiased one with so many draws: sqrt(trace cov / draws)
                / |exact|
    cosine      of mean g and exact
    one draw    the mean cosine of a single g and exact
    length      |mean g| / |exact|
    variance    trace of the covariance of g / |mean g|^2: how many draws a step must average for
                as much signal as noise

The rows of `gumbel` are its temperatures. No entropy bonus, and a sample for every image. BatchNorm
is as in eval, so that an image's loss depends on its own sample alone.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import machine, machine_line, table, write_json
from torch import Tensor, nn

from mnistattn.dataset.read import read_card
from mnistattn.errors import MnistattnError
from mnistattn.evaluation.feed import load_feed
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.step import make_optimizer, training_step
from mnistattn.models.attention.hard import Hard
from mnistattn.models.attention.soft import positions
from mnistattn.models.network import CHANNELS, Network

BATCH = 32
# name: what makes it of a Hard with a baseline
ESTIMATORS = {
    "score, no baseline": {"estimator": "score", "constant": True},
    "score": {"estimator": "score"},
    "straight-through": {"estimator": "straight-through"},
    "gumbel 2": {"estimator": "gumbel", "temperature": 2.0},
    "gumbel 1": {"estimator": "gumbel", "temperature": 1.0},
    "gumbel 0.5": {"estimator": "gumbel", "temperature": 0.5},
    "gumbel 0.1": {"estimator": "gumbel", "temperature": 0.1},
}


class Problem:
    """Features x (B, C, H, W), queries q (B, Q), answers (B,), and the network after them."""

    def __init__(self, network: Network, attention: Hard, x: Tensor, q: Tensor, answer: Tensor):
        self.network, self.attention, self.answer = network, attention, answer
        self.x, self.q = x.detach(), q.detach()
        self.weights = list(attention.score.parameters())
        network.eval()
        attention.train()

    def losses(self, features: Tensor) -> Tensor:
        """The cross entropy of each image (B,) for what was seen of it (B, C)."""
        pooled = self.network.pooled_norm(features)
        logits = self.network.head(torch.cat([pooled, self.q], 1))
        return F.cross_entropy(logits, self.answer, reduction="none")

    def exact(self) -> Tensor:
        """The gradient of the expected loss, by counting out the positions."""
        v = positions(self.x)
        with torch.no_grad():
            each = torch.stack([self.losses(v[:, i]) for i in range(v.shape[1])], 1)
        p = torch.softmax(self.attention.score(v, self.q), 1)
        return self._gradient((p * each).sum(1).mean())

    def draw(self) -> Tensor:
        """One gradient of the attention's estimator."""
        _, own = self.attention(self.x, self.q)
        each = self.losses(own["features"].sum((2, 3)))
        loss = each.mean()
        if "loss" in own:
            loss = loss + own["loss"](each.detach())
        return self._gradient(loss)

    def _gradient(self, loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, self.weights)
        return torch.cat([grad.flatten() for grad in grads])


def compare(problem: Problem, draws: int) -> dict[str, dict[str, float]]:
    """By estimator, the measures of this file's head."""
    exact, choice = problem.exact(), problem.attention.choice
    choice.entropy = choice.expected = 0.0
    kept = choice.baseline
    found = {}
    for name, how in ESTIMATORS.items():
        choice.estimator = how["estimator"]
        choice.temperature = how.get("temperature", 1.0)
        choice.baseline = None if "constant" in how else kept
        g = torch.stack([problem.draw() for _ in range(draws)])
        found[name] = quality(g, exact)
    return found


def quality(g: Tensor, exact: Tensor) -> dict[str, float]:
    """Gradients (draws, weights) against the exact one (weights,)."""
    mean, length = g.mean(0), exact.norm()
    trace = g.var(0).sum()
    values = {
        "bias": (mean - exact).norm() / length,
        "noise": (trace / len(g)).sqrt() / length,
        "cosine": F.cosine_similarity(mean, exact, dim=0),
        "one draw": F.cosine_similarity(g, exact[None], dim=1).mean(),
        "length": mean.norm() / length,
        "variance": trace / mean.square().sum(),
    }
    return {name: float(value) for name, value in values.items()}


def random_problem(images: int) -> Problem:
    """Features as a ReLU gives them, and a network that was not trained."""
    network = Network(Hard, "last", 100, 10, 5)
    query = torch.randint(10, (images,))
    x = torch.randn(images, CHANNELS, 6, 6).relu()
    (attention,) = network.attention.values()
    return Problem(network, attention, x, network.embedding(query), torch.randint(5, (images,)))


def real_problem(data: Path, images: int, steps: int) -> tuple[Problem, float | None]:
    """Images of a data set's train split, the network trained for some steps on others of it; and
    the loss of the last quarter of those steps."""
    device = torch.device("cpu")
    card = read_card(data)
    feed = load_feed(card, "train", device, check=False)
    size = feed.images.shape[1]
    network = Network(Hard, "last", size, len(card.query_names), len(card.answer_names))
    (attention,) = network.attention.values()
    recipe = make_recipe("fast", lr=0.002, batch_size=BATCH)
    optimizer = make_optimizer(network, recipe)
    generator = torch.Generator().manual_seed(0)
    last: list[float] = []
    done = 0
    while done < steps:
        for image, query, answer in zip(
            *(part.split(BATCH) for part in feed.pairs("fresh", generator)), strict=True
        ):
            if len(image) < 2:  # BatchNorm needs two
                continue
            loss, _ = training_step(network, optimizer, recipe, feed.batch(image), query, answer)
            done += 1
            if done > 0.75 * steps:
                last.append(loss.item())
            if done >= steps:
                break
    image, query, answer = (part[:images] for part in feed.pairs("fresh", generator))
    with torch.no_grad():
        fit_norms(network, feed.batch(image), query)
        network.eval()
        x = feed.batch(image)
        for conv, norm in zip(network.convs, network.norms, strict=True):
            x = network.stage(conv, norm, x)
    problem = Problem(network, attention, x, network.embedding(query), answer)
    return problem, sum(last) / len(last) if last else None


def fit_norms(network: nn.Module, images: Tensor, query: Tensor) -> None:
    """BatchNorm's statistics are those of this batch: an untrained network has none yet."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    network.train()
    network(images, query)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a data set (default: random features)")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="(default 64)")
    parser.add_argument("--draws", type=int, default=1000, metavar="N", help="(default 1000)")
    parser.add_argument(
        "--steps", type=int, default=0, metavar="N",
        help=f"batches of {BATCH} that the network is trained for, with `score` (default 0)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    args = parser.parse_args()
    if args.images < 2 or args.draws < 2:
        parser.error("--images and --draws must be 2 or more")
    if args.steps and not args.data:
        parser.error("--steps needs --data")
    about = machine()
    print(machine_line(about))
    torch.manual_seed(args.seed)
    loss = None
    if args.data:
        try:
            problem, loss = real_problem(args.data, args.images, args.steps)
        except MnistattnError as error:
            print(error, file=sys.stderr)
            return 1
    else:
        problem = random_problem(args.images)
    with torch.no_grad():
        v = positions(problem.x)
        p = torch.softmax(problem.attention.score(v, problem.q), 1)
        entropy = float(-(p * p.clamp(min=1e-30).log()).sum(1).mean())
    trained = f"trained for {args.steps} steps" if args.steps else "untrained"
    print(f"{args.images} images of {args.data or 'random features'}, {trained}"
          + (f" (loss {loss:.3f})" if loss is not None else "")
          + f", mean entropy of p {entropy:.2f} nats of {torch.tensor(v.shape[1]).log():.2f}, "
          f"{args.draws} draws\n")  # fmt: skip
    found = compare(problem, args.draws)
    columns = list(next(iter(found.values())))
    rows = [[name, *(f"{row[c]:.3g}" for c in columns)] for name, row in found.items()]
    print(table(["estimator", *columns], rows))
    write_json(args.json, {
        "machine": about, "data": str(args.data) if args.data else None, "images": args.images,
        "draws": args.draws, "steps": args.steps, "seed": args.seed, "training_loss": loss,
        "entropy": entropy, "estimators": found,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
