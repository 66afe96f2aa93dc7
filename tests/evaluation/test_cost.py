"""Costs as multiples of none's: measured in turns, and without a trace in the network."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mnistattn.evaluation import cost
from mnistattn.evaluation import step as step_module
from mnistattn.evaluation.cost import relative_cost
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.models.network import build
from mnistattn.models.registry import Model

RECIPE = make_recipe("fast", batch_size=16)
NAMES = {"train_times_none", "inference_times_none"}


class Slow(nn.Module):
    """Takes its time, and draws random numbers while training."""

    def __init__(self, channels, query_dim, *, last):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, x, query):
        time.sleep(0.1)
        noise = torch.rand(len(x), 1, 1, 1) if self.training else 1
        return torch.sigmoid(self.score(x)) * noise


SLOW = Model("slow", Slow, "last", "slow", "-", "", kind="plugged")


def network(model="ctx", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return build(model, 32, 10, 5, dropout)


def whole(ratios: dict) -> None:
    assert set(ratios) == NAMES
    for ratio in ratios.values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["rounds"] == cost.ROUNDS


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nothing_is_changed(easy, training):
    """Weights, statistics, gradients, modes, and the state of torch are as they were."""
    net = network(SLOW, dropout=0.5).train(training)
    net.norms[0].train(not training)  # a mode of its own
    feed = easy(20)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    images, random = feed.images.clone(), torch.get_rng_state()
    relative_cost(net, dataclasses.replace(RECIPE, dropout=0.5), feed, 32)
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.training is training
    assert net.norms[0].training is not training
    assert torch.equal(feed.images, images)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), random)


def test_none_costs_as_much_as_itself(easy, monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 7)
    ratios = relative_cost(network("none"), RECIPE, easy(40), 32)
    whole(ratios)
    for ratio in ratios.values():
        assert 0.3 < ratio["median"] < 3


def test_a_slow_attention_costs_more(easy, monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 3)
    ratios = relative_cost(network(SLOW), RECIPE, easy(40), 32)
    whole(ratios)
    for ratio in ratios.values():
        assert ratio["median"] > 2


@pytest.mark.parametrize("model", ["none", "ctx", "arnn-sampled", "uniform", "oracle", "gradcam",
                                   "input-gradient"])  # fmt: skip
@pytest.mark.parametrize("images", [1, 20])
def test_every_kind_of_network_has_a_cost(easy, model, images):
    """Also on a single image, though BatchNorm cannot be trained on one."""
    feed = dataclasses.replace(
        easy(images), instances=torch.ones(images, 32, 32, dtype=torch.uint8)
    )
    whole(relative_cost(network(model), RECIPE, feed, 32))


def test_maps_made_afterwards_cost_time_to_answer_alone(easy, monkeypatch):
    """An answer of gradcam has a backward pass; its training is none's."""
    monkeypatch.setattr(cost, "ROUNDS", 7)
    ratios = relative_cost(network("input-gradient"), RECIPE, easy(40), 32)
    assert ratios["inference_times_none"]["median"] > 1.3
    assert 0.3 < ratios["train_times_none"]["median"] < 3


def test_both_take_their_turns_in_each_round(easy, monkeypatch):
    """One round to warm up, then as many as are said; neither network is always the second."""
    monkeypatch.setattr(cost, "ROUNDS", 4)
    steps, real = [], step_module.training_step

    def step(net, *rest):
        steps.append(len(net.attention) > 0)
        return real(net, *rest)

    monkeypatch.setattr(step_module, "training_step", step)
    ratios = relative_cost(network("ctx"), RECIPE, easy(20), 32)
    assert [ratio["rounds"] for ratio in ratios.values()] == [4, 4]
    rounds = list(zip(steps[::2], steps[1::2], strict=True))
    assert len(rounds) == 5
    assert all(set(turns) == {True, False} for turns in rounds)
    assert {turns[0] for turns in rounds[1:]} == {True, False}


def test_the_ratios_of_known_times(monkeypatch):
    """The first round warms up and does not count."""
    monkeypatch.setattr(cost, "ROUNDS", 3)
    now = [0.0]
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    left = {0: iter([900.0, 8.0, 3.0, 30.0]), 1: iter([1.0, 2.0, 1.0, 5.0])}

    def run(i: int, turn: int) -> None:
        now[0] += next(left[i])

    ratios = cost._in_turns(run, torch.device("cpu"), 1)
    assert ratios == {"median": 4.0, "min": 3.0, "max": 6.0, "rounds": 3}


def test_the_timed_batch(easy, monkeypatch):
    """The recipe's, but 32 images at most; both networks are shown the same."""
    shown = []
    real = step_module.training_step

    def step(net, *rest):
        shown.append(rest[2])
        return real(net, *rest)

    monkeypatch.setattr(step_module, "training_step", step)
    for size, n in ((16, 16), (200, 32)):
        shown.clear()
        relative_cost(network("none"), make_recipe("fast", batch_size=size), easy(40), 32)
        assert {len(images) for images in shown} == {n}
        assert all(torch.equal(images, shown[0]) for images in shown)
