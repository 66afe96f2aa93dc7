"""Steps one by one and from a graph: the same training. Without a GPU the graph is imitated: what
is captured is run again at each replay, on the same tensors."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mnistattn.errors import MnistattnWarning
from mnistattn.evaluation import step
from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.step import (
    WARM_UPS,
    CapturedSteps,
    Steps,
    make_optimizer,
    make_steps,
    may_be_captured,
)
from mnistattn.evaluation.train import train
from mnistattn.models.network import build

GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="there is no GPU here")
RECIPE = make_recipe("fast", epochs=2, batch_size=8, lr=0.01)


def on_the_gpu(feed: Feed) -> Feed:
    tensors = {k: v.cuda() for k, v in vars(feed).items() if isinstance(v, torch.Tensor)}
    return Feed(**tensors, asks_color=feed.asks_color, device=torch.device("cuda", 0))


class Replayed(CapturedSteps):
    """As on a GPU, but what a graph would launch is called."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.replays = 0
        for group in self.optimizer.param_groups:  # as make_optimizer does for a GPU
            group["lr"] = torch.tensor(group["lr"])

    def _capture(self) -> None:
        self.graph = SimpleNamespace(replay=self._replay)

    def _replay(self) -> None:
        self.replays += 1
        self._next()


@pytest.fixture
def no_streams(monkeypatch):
    """CUDA's streams, where there is no CUDA. In float32 on every processor: in bf16 the rounding
    that both ways differ in would be as large as what is looked for."""
    monkeypatch.setattr(step, "autocast", lambda device: nullcontext())
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def network(name: str = "ctx", **options) -> nn.Module:
    torch.manual_seed(0)
    return build(name, 32, 10, 5, **options).train()


def run(kind, feed: Feed, net: nn.Module, recipe=RECIPE, epochs: int = 2) -> tuple[Steps, list]:
    """Some epochs, each with its own order and rates; (total, hits, loss) after each."""
    steps = kind(net, make_optimizer(net, recipe), recipe, feed)
    noted = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(epoch)
        asked = torch.stack(feed.pairs("one", generator))
        count = -(-asked.shape[1] // recipe.batch_size)
        steps.start(asked, [0.003 * (epoch + 1) / (i + 1) for i in range(count)])
        for i in range(count):
            steps.run(i)
        noted.append((steps.total.item(), steps.hits.item(), steps.loss.item()))
    return steps, noted


def close(found: list, expected: list) -> bool:
    return all(one == pytest.approx(other, rel=1e-3)
               for one, other in zip(found, expected, strict=True))  # fmt: skip


@pytest.mark.parametrize("n", [48, 53])
@pytest.mark.parametrize("recipe", ["fast", "paper"])
def test_a_graph_takes_the_same_steps(easy, no_streams, n, recipe) -> None:
    """Of 48 images: six full batches; of 53, one more that is not full. Equal but for rounding (a
    rate that is a tensor is float32), so the rates, the batches and their order are the same."""
    made = make_recipe(recipe, batch_size=8, lr=0.01)
    feed, one, other = easy(n), network(), network()
    _, expected = run(Steps, feed, one, made)
    steps, found = run(Replayed, feed, other, made)
    assert close(found, expected) and not close(expected[:1], expected[1:])
    assert steps.replays == 2 * 6 - WARM_UPS
    # By what they say: a bias before a softmax has no gradient but rounding, which Adam enlarges.
    index = torch.arange(n)
    with torch.no_grad():
        said = [net.eval()(feed.batch(index), feed.query)[0] for net in (one, other)]
    torch.testing.assert_close(*said, rtol=1e-2, atol=1e-2)


def test_an_epoch_of_another_length_is_captured_anew(easy, no_streams) -> None:
    feed, net = easy(48), network()
    steps = Replayed(net, make_optimizer(net, RECIPE), RECIPE, feed)
    asked = torch.stack(feed.pairs("one", torch.Generator().manual_seed(0)))
    for n in (48, 32, 48):
        steps.start(asked[:, :n], [0.01] * (n // 8))
        for i in range(n // 8):
            steps.run(i)
    assert steps.replays == 3 + 4 + 6
    assert steps.asked.shape == (3, 48)


def test_what_cannot_be_captured_is_launched_one_by_one(easy, no_streams, monkeypatch) -> None:
    """With one line that says why; and no step is lost or taken twice."""

    class Refusing:
        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def __exit__(self, *_) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: Refusing())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    feed, one, other = easy(48), network(), network()
    _, expected = run(Steps, feed, one)

    class Tensors(CapturedSteps):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"])

    with pytest.warns(MnistattnWarning, match="kernel by kernel: operation not .* capturing$"):
        _, found = run(Tensors, feed, other)
    assert close(found, expected)


def test_the_users_python_is_run_at_every_step(easy) -> None:
    """A graph would freeze what it counts and decides; a module may say that there is nothing."""

    class Mine(nn.Module):
        pass

    class Safe(Mine):
        cuda_graph = True

    net = network()
    assert may_be_captured(net)
    net.mine = Mine()
    assert not may_be_captured(net)
    net.mine = Safe()
    assert may_be_captured(net)
    assert type(make_steps(net, make_optimizer(net, RECIPE), RECIPE, easy(8))) is Steps  # on a CPU


# ------------------------------------------------------------------------------------- on a GPU


@on_gpu
@pytest.mark.parametrize("name", ["none", "ctx", "san", "arnn", "brnn", "arnn-sampled"])
def test_every_model_is_captured_and_learns_the_same(name, easy) -> None:
    feed = on_the_gpu(easy(203))
    nets = [network(name).cuda().to(memory_format=torch.channels_last) for _ in range(2)]
    nets[1].load_state_dict(copy.deepcopy(nets[0].state_dict()))
    _, expected = run(Steps, feed, nets[0], epochs=3)
    steps, found = run(CapturedSteps, feed, nets[1], epochs=3)
    assert steps.graph is not None
    for one, other in zip(found, expected, strict=True):
        if name == "arnn-sampled":  # other random numbers
            assert abs(one[0] - other[0]) < 0.2 * other[0]
        else:
            assert one == pytest.approx(other, rel=2e-2, abs=3)


@on_gpu
def test_a_module_that_waits_for_the_gpu_is_not_captured(easy) -> None:
    class Waiting(nn.Module):
        cuda_graph = True

        def forward(self, x):
            return x * float(x.mean() > -1)

    net = network().cuda()
    net.head = nn.Sequential(*net.head, Waiting())
    feed = on_the_gpu(easy(48))
    with pytest.warns(MnistattnWarning, match="cannot be captured"):
        _, found = run(CapturedSteps, feed, net)
    assert found[1][1] > 0


@on_gpu
def test_training_on_a_gpu_is_as_good_as_on_a_cpu(easy) -> None:
    accuracies = []
    for feeds in ([easy(400), easy(100, 1)], [on_the_gpu(easy(400)), on_the_gpu(easy(100, 1))]):
        net = network().to(feeds[0].device)
        history = train(net, RECIPE, *feeds, seed=0, progress=False)
        accuracies.append(history[-1]["val_accuracy"])
    assert min(accuracies) > 0.9


def test_the_rate_of_a_gpu_is_a_tensor(monkeypatch) -> None:
    """It changes while a graph reads it; on a CPU it is a number."""
    net = network()
    assert make_optimizer(net, RECIPE).param_groups[0]["lr"] == 0.01
    if GPU:
        rate = make_optimizer(net.cuda(), RECIPE).param_groups[1]["lr"]
        assert rate.is_cuda and rate.item() == pytest.approx(0.01)


def test_bf16_is_for_gpus_that_have_it(monkeypatch) -> None:
    for capability, kind in (((8, 0), torch.autocast), ((7, 5), nullcontext)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        if GPU or capability < (8, 0):
            assert type(step.autocast(torch.device("cuda"))) is kind
