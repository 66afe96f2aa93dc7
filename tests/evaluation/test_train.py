"""Training: the recipes, the same numbers from the same seed, and going on after a kill."""

import dataclasses
import math

import pytest
import torch

from mnistattn.dataset.read import read_card
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation import train as train_module
from mnistattn.evaluation.checkpoint import load_tensors
from mnistattn.evaluation.recipes import RECIPES, make_recipe
from mnistattn.evaluation.run import load_test
from mnistattn.evaluation.score import score_samples
from mnistattn.evaluation.step import make_optimizer, training_step
from mnistattn.evaluation.train import PREVIOUS, STATE, load_state, train, validate
from mnistattn.models.network import build

FAST = make_recipe("fast", epochs=2, batch_size=16)
PAPER = make_recipe("paper", epochs=2, batch_size=16)
TIMES = ("seconds", "images_per_second")


def network(seed: int = 0, model: str = "ctx", dropout: float = 0.0):
    torch.manual_seed(seed)
    return build(model, 32, 10, 5, dropout)


def run(easy, recipe, seed=0, net=None, **options):
    """Train on 40 easy images: the network and its history, without the times."""
    net = net or network(seed, dropout=recipe.dropout)
    history = train(net, recipe, easy(40), easy(16, 1), seed, progress=False, **options)
    return net, [{k: v for k, v in e.items() if k not in TIMES} for e in history]


def same(one, two) -> bool:
    states = (n.state_dict() for n in (one, two))
    return all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def interrupted(monkeypatch, after: int):
    """Let Ctrl-C come when the validation after epoch `after` + 1 starts."""
    calls = []

    def validating(*arguments, **named):
        calls.append(0)
        if len(calls) > after:
            raise KeyboardInterrupt
        return validate(*arguments, **named)

    monkeypatch.setattr(train_module, "validate", validating)


# ------------------------------------------------------------------------------------ recipes


def test_the_recipes():
    fast, paper = RECIPES["fast"], RECIPES["paper"]
    assert (fast.optimizer, fast.schedule, fast.patience) == ("adamw", "one-cycle", 0)
    assert (fast.glorot, fast.dropout, fast.queries) == (False, 0.0, "one")
    # PAN's, as its code has it.
    expected = {"optimizer": "rmsprop", "lr": 0.003, "clip": 5.0, "batch_size": 200, "epochs": 300,
                "patience": 50, "dropout": 0.5, "glorot": True, "queries": "one",
                "weight_decay": 0.0, "schedule": "steps", "name": "paper"}  # fmt: skip
    assert dataclasses.asdict(paper) == expected
    for name, recipe in RECIPES.items():
        assert make_recipe(name) == make_recipe(name, epochs=None, lr=None) == recipe
        assert recipe.name == name
    changed = make_recipe("fast", epochs=3, queries="all")
    assert changed == dataclasses.replace(fast, epochs=3, queries="all")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("fat", {}, "unknown recipe 'fat': it is one of fast, paper"),
        ("fast", {"epochs": 0}, "epochs 0"),
        ("fast", {"epochs": -3}, "epochs -3"),
        ("fast", {"batch_size": 1}, "batch size 1"),
        ("fast", {"lr": 0.0}, "learning rate 0.0"),
        ("fast", {"lr": -1.0}, "learning rate -1.0"),
        ("fast", {"lr": math.nan}, "learning rate nan"),
        ("fast", {"queries": "some"}, "unknown queries 'some': one of one, fresh, all"),
    ],
)
def test_impossible_recipes(name, changes, words):
    with pytest.raises(InputError, match=words):
        make_recipe(name, **changes)


def test_one_cycle():
    recipe, steps = make_recipe("fast", epochs=8, lr=0.5), 10
    rates = [recipe.learning_rate(i, steps) for i in range(80)]
    assert rates[0] == pytest.approx(0.04 * 0.5)
    assert rates[20] == max(rates) == 0.5  # a quarter of the way
    assert rates[10] == pytest.approx(0.52 * 0.5)
    assert all(a < b for a, b in zip(rates[:20], rates[1:21], strict=True))
    assert all(a > b for a, b in zip(rates[20:79], rates[21:], strict=True))
    assert 0.5 * 1e-4 <= rates[79] < 0.5 * 0.01
    assert recipe.learning_rate(80, steps) == pytest.approx(0.5 * 1e-4)


def test_one_cycle_of_a_single_step():
    assert 0 < make_recipe("fast", epochs=1).learning_rate(0, 1) <= RECIPES["fast"].lr


def test_steps():
    recipe = RECIPES["paper"]
    for epoch in range(90):
        drops = 0 if epoch < 30 else 1 + (epoch - 30) // 11
        for step in (0, 6):
            rate = recipe.learning_rate(epoch * 7 + step, 7)
            assert rate == pytest.approx(0.003 / 1.5**drops)


def test_the_optimizers():
    net = network()
    adamw = make_optimizer(net, RECIPES["fast"])
    decay = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert len(decay) == len(list(net.parameters()))
    for parameter in net.parameters():
        assert decay[id(parameter)] == (0.01 if parameter.ndim > 1 else 0)
    assert isinstance(make_optimizer(net, RECIPES["paper"]), torch.optim.RMSprop)


def test_glorot_reaches_all_matrices():
    net = network()
    before = {k: v.clone() for k, v in net.named_parameters()}
    train_module._glorot(net)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            fans = torch.nn.init._calculate_fan_in_and_fan_out(parameter)
            assert not torch.equal(parameter, before[name]), name
            assert parameter.abs().max() <= math.sqrt(6 / sum(fans)), name
        else:
            assert torch.equal(parameter, before[name]), name


# ---------------------------------------------------------------- a loss, or the truth, beside


class Plain(torch.nn.Module):
    """Logits of the query, and a loss that pulls `pulled`, which no logit depends on, to 0."""

    def __init__(self, factor: float | None):
        super().__init__()
        self.table = torch.nn.Embedding(10, 5)
        self.pulled = torch.nn.Parameter(torch.ones(3))
        self.factor = factor

    def forward(self, images, query):
        out = {"attention": []}
        if self.factor is not None:
            out["loss"] = self.factor * self.pulled.square().sum()
        return self.table(query), out


def test_a_loss_of_the_networks_own_is_added_as_it_is(easy):
    feed, every = easy(20), torch.arange(20)
    batch = feed.batch(every), feed.query, feed.answer
    recipe = dataclasses.replace(FAST, clip=1e9)
    for factor in (None, 0.0, 2.0):
        torch.manual_seed(0)
        net = Plain(factor)
        expected = torch.nn.functional.cross_entropy(net.table(feed.query), feed.answer).item()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        loss, logits = training_step(net, optimizer, recipe, *batch)
        assert logits.shape == (20, 5)
        assert loss.item() == pytest.approx(expected + 3 * (factor or 0), rel=1e-6)
        # d loss / d pulled = 2 factor: a step of 0.1 to 1 - 0.2 factor.
        assert torch.allclose(net.pulled.data, torch.full((3,), 1 - 0.2 * (factor or 0)))


def test_a_loss_that_is_a_function_is_given_each_images_cross_entropy(easy):
    class Judged(Plain):
        def forward(self, images, query):
            logits, out = super().forward(images, query)
            given = self.given = []

            def loss(cross_entropy):
                given.append(cross_entropy)
                return (cross_entropy * self.pulled[0]).sum()

            return logits, out | {"loss": loss}

    feed, every = easy(20), torch.arange(20)
    recipe = dataclasses.replace(FAST, clip=1e9)
    torch.manual_seed(0)
    net = Judged(None)
    each = torch.nn.functional.cross_entropy(net.table(feed.query), feed.answer, reduction="none")
    table = net.table.weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loss, _ = training_step(net, optimizer, recipe, feed.batch(every), feed.query, feed.answer)
    assert len(net.given) == 1 and not net.given[0].requires_grad
    torch.testing.assert_close(net.given[0], each.detach())
    assert loss.item() == pytest.approx((each.mean() + each.sum()).item(), rel=1e-6)
    assert net.pulled[0].item() == pytest.approx(1 - 0.1 * each.sum().item(), rel=1e-5)

    plain = Plain(None)  # the network learns what it learns without: the function gives no gradient
    plain.table.weight.data.copy_(table)
    batch = feed.batch(every), feed.query, feed.answer
    training_step(plain, torch.optim.SGD(plain.parameters(), 0.1), recipe, *batch)
    torch.testing.assert_close(net.table.weight, plain.table.weight)


def test_the_history_has_the_whole_loss(easy):
    """And the gradient's norm is clipped with it in."""
    losses = []
    for factor in (0.0, 50.0):
        net, history = run(easy, dataclasses.replace(FAST, epochs=1, lr=1e-9), net=Plain(factor))
        losses.append(history[0]["loss"])
    assert losses[1] - losses[0] == pytest.approx(150, abs=1)


class Told(torch.nn.Module):
    """Notes what it is given."""

    sees_mask = True

    def __init__(self):
        super().__init__()
        self.table, self.given = torch.nn.Embedding(10, 5), []

    def forward(self, images, query, mask):
        self.given.append((self.training, images, query, mask))
        return self.table(query), {"attention": []}


@pytest.mark.parametrize("queries", ["one", "fresh"])
def test_masks_reach_a_network_that_sees_them(easy, queries):
    """In the training and the validation: of the images and of what is asked of each."""
    feeds = []
    for seed in (0, 1):
        feed = easy(40, seed)
        rng = torch.Generator().manual_seed(seed)
        feed.instances = torch.randint(0, 4, (40, 32, 32), generator=rng).byte()
        feed.color = torch.stack([torch.randperm(5, generator=rng)[:3] for _ in range(40)])
        feed.answer = feed.color[:, 0]
        feeds.append(feed)
    net = Told()
    recipe = dataclasses.replace(FAST, epochs=1, queries=queries)
    train(net, recipe, *feeds, 0, progress=False)
    assert [training for training, *_ in net.given] == [True] * 3 + [False]
    for training, *batch in net.given:
        feed = feeds[0 if training else 1]
        known = feed.batch(torch.arange(40)).flatten(1)
        for image, query, mask in zip(*batch, strict=True):
            (i,) = (known == image.flatten()).all(1).nonzero().flatten().tolist()
            k = feed.digit[i].tolist().index(query.item())  # `one`: 0; `fresh`: any object
            assert torch.equal(mask, feed.instances[i] == k + 1)


def test_masks_reach_no_other_network(easy):
    """Not even where the feed has them: the forward of Plain would not take one."""
    feed, validation = easy(20), easy(8, 1)
    feed.instances = validation.instances = torch.ones(20, 32, 32, dtype=torch.uint8)
    recipe = dataclasses.replace(FAST, epochs=1)
    train(Plain(None), recipe, feed, validation, 0, progress=False)
    for value in (False, None, 1, "yes"):  # what a user's network may have of that name
        net = Plain(None)
        net.sees_mask = value
        train(net, recipe, feed, validation, 0, progress=False)


# ------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize("recipe", [FAST, PAPER, make_recipe("fast", epochs=2, queries="fresh")],
                         ids=["fast", "paper", "fresh"])  # fmt: skip
def test_same_seed_same_numbers(easy, recipe):
    one, history = run(easy, recipe)
    two, again = run(easy, recipe)
    assert history == again
    assert same(one, two)
    assert [e["epoch"] for e in history] == [1, 2]


def test_another_seed_another_network(easy):
    one, history = run(easy, FAST)
    # The same initial weights: the order alone differs.
    two, other = run(easy, FAST, seed=1, net=network(0))
    assert history != other
    assert not same(one, two)


@pytest.mark.parametrize("recipe", [FAST, PAPER, make_recipe("fast", epochs=2, queries="all")],
                         ids=["fast", "paper", "all"])  # fmt: skip
def test_an_interrupted_run_goes_on_to_the_same_numbers(easy, recipe, tmp_path, monkeypatch):
    whole, history = run(easy, recipe)
    identity = {"seed": 0}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted(patched, after=1)
        run(easy, recipe, run_dir=tmp_path, identity=identity)
    assert len(load_tensors(tmp_path / STATE)[1]["history"]) == 1
    # A new process has another network, in another state, and another global generator.
    resumed, again = run(easy, recipe, net=network(5, dropout=recipe.dropout), run_dir=tmp_path,
                         identity=identity)  # fmt: skip
    assert again == history
    assert same(whole, resumed)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_state_is_passed_over_for_the_one_before(easy, damage, tmp_path, monkeypatch):
    """The epoch between them is trained again, to the same numbers."""
    recipe = make_recipe("fast", epochs=4)
    whole, history = run(easy, recipe)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted(patched, after=3)
        run(easy, recipe, run_dir=tmp_path, identity={})
    assert {p.name for p in tmp_path.iterdir()} == {STATE, PREVIOUS}
    state = tmp_path / STATE
    data = state.read_bytes()
    if damage == "gone":
        state.unlink()
    else:  # a header that is cut off; one whose length is another
        state.write_bytes(data[:100] if damage == "cut" else b"\xff" + data[1:])
    assert len(load_state(tmp_path)[1]["history"]) == 2
    resumed, again = run(easy, recipe, net=network(5), run_dir=tmp_path, identity={})
    assert again == history
    assert same(whole, resumed)
    for name in (STATE, PREVIOUS):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        load_state(tmp_path)


def test_a_finished_run_is_not_trained_again(easy, tmp_path):
    whole, history = run(easy, FAST, run_dir=tmp_path, identity={})
    again, same_history = run(easy, FAST, net=network(5), run_dir=tmp_path, identity={})
    assert same(whole, again)
    assert history == same_history


def test_the_state_of_another_run_is_not_resumed(easy, tmp_path):
    run(easy, FAST, seed=1, run_dir=tmp_path, identity={"seed": 1})
    whole, history = run(easy, FAST)
    fresh, other = run(easy, FAST, run_dir=tmp_path, identity={"seed": 0})
    assert same(whole, fresh)
    assert history == other


# --------------------------------------------------------------------------------- validation


def scores(monkeypatch, values):
    """Replace validation: gives `values` in turn, and notes the weights it was shown."""
    seen, left = [], iter(values)

    def validating(net, _, **named):
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"val_accuracy": next(left)}

    monkeypatch.setattr(train_module, "validate", validating)
    return seen


@pytest.mark.parametrize(("values", "best"), [((0.5, 0.9, 0.2), 1), ((0.5, 0.9, 0.9), 2)])
def test_the_best_epoch_is_kept(easy, monkeypatch, values, best):
    seen = scores(monkeypatch, values)
    net, history = run(easy, dataclasses.replace(FAST, epochs=3))
    assert [e["val_accuracy"] for e in history] == list(values)
    assert all(torch.equal(v, seen[best][k]) for k, v in net.state_dict().items())


def test_the_best_epoch_survives_a_resume(easy, monkeypatch, tmp_path):
    seen = scores(monkeypatch, (0.9, 0.2))
    recipe = dataclasses.replace(FAST, epochs=4)
    with pytest.raises(StopIteration):
        run(easy, recipe, run_dir=tmp_path, identity={})
    scores(monkeypatch, (0.1, 0.3))
    net, history = run(easy, recipe, run_dir=tmp_path, identity={})
    assert [e["val_accuracy"] for e in history] == [0.9, 0.2, 0.1, 0.3]
    assert all(torch.equal(v, seen[0][k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("values", "epochs"),
    [((0.5, 0.9, 0.2, 0.3, 0.95), 4), ((0.5, 0.4, 0.6, 0.4, 0.7, 0.1, 0.1), 7)],
)
def test_early_stopping(easy, monkeypatch, values, epochs):
    seen = scores(monkeypatch, values)
    recipe = dataclasses.replace(FAST, epochs=7, patience=2)
    _, history = run(easy, recipe, net=network(model="none"))
    assert len(history) == len(seen) == epochs


def test_accuracy_counts_every_right_answer(easy):
    class Says(torch.nn.Module):
        def forward(self, images, query):
            return torch.eye(5)[torch.full((len(query),), 2)], {}

    feed = easy(600)  # three batches, the last not full
    assert validate(Says(), feed) == {"val_accuracy": (feed.answer == 2).double().mean()}
    feed.answers[:, 2] = True
    assert validate(Says(), feed)["val_accuracy"] == 1


@pytest.mark.parametrize("model", ["ctx", "none"])
def test_the_correctness_of_an_epoch_is_that_of_the_scores(tiny, model):
    card = read_card(tiny)
    feed, masks, scale = load_test(card, torch.device("cpu"), masks=True)
    torch.manual_seed(0)
    net = build(model, 100, 10, 5)
    found = validate(net, feed, batch_size=17)  # 40 images: the last batch is not full
    samples = score_samples(net, feed, masks, scale, progress=False)
    assert found["val_accuracy"] == samples["correct"].mean()
    if model == "none":
        assert "val_correctness" not in found
    else:
        assert found["val_correctness"] == pytest.approx(samples["correctness"].mean(), abs=1e-5)


# ----------------------------------------------------------------------------------- learning


def test_a_diverging_loss_is_an_error(easy):
    with pytest.raises(MnistattnError, match="diverged in epoch 1: give a smaller --lr"):
        run(easy, dataclasses.replace(FAST, lr=1e30))


def test_a_nan_in_a_recurrence_is_named(easy):
    feed = easy(40)
    net = network(model="arnn")
    with torch.no_grad():
        net.attention["0"].recurrent_weight[1, 0, 0] = torch.nan
    with pytest.raises(MnistattnError, match="epoch 1.*NaN.*in recurrent_weight; give a smaller"):
        train(net, FAST, feed, easy(4), 0, progress=False)


def test_ctx_can_learn(easy):
    recipe = make_recipe("fast", epochs=12, batch_size=16)
    history = train(network(), recipe, easy(64), easy(16, 1), 0, progress=False)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["train_accuracy"] > 0.9
    assert history[-1]["val_accuracy"] > 0.9


@pytest.mark.parametrize("n", [33, 34])
def test_a_last_batch_of_one_is_left_out(easy, n):
    """BatchNorm cannot be trained on one image."""
    net = network(model="none")
    recipe = make_recipe("fast", epochs=1, batch_size=16)
    history = train(net, recipe, easy(n), easy(4), 0, progress=False)
    assert net.norms[0].num_batches_tracked == (2 if n == 33 else 3)
    assert math.isfinite(history[0]["loss"])
