"""Soft and hard attention over positions and items, against loops and enumerated expectations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention.hard import ESTIMATORS, Choice, Hard, gumbel_like
from mnistattn.models.attention.item import ItemHard, ItemSoft, grid, paint, pool
from mnistattn.models.attention.soft import Soft

MAPS = [(1, 1), (1, 4), (5, 1), (2, 2), (3, 5), (6, 6), (7, 7), (9, 4)]
CPU, DOUBLE = torch.device("cpu"), torch.float64

every_class = pytest.mark.parametrize("kind", [Soft, Hard, ItemSoft, ItemHard])
hard_class = pytest.mark.parametrize("kind", [Hard, ItemHard])
every_map = pytest.mark.parametrize("size", MAPS, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_model(kind: type, channels: int = 3, **options) -> nn.Module:
    """A float64 module all of whose parameters are random and of a size that shows; a hard one
    samples for all images."""
    sampled = {"expected": 0.0} if issubclass(kind, (Hard, ItemHard)) else {}
    model = kind(channels, 2, last=True, **{"hidden": 4} | sampled | options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))  # few dead ReLUs and flat tanhs
    return model


def inputs(size: tuple[int, int], batch: int = 2, channels: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.rand(batch, channels, *size, dtype=DOUBLE)
    return x, torch.randn(batch, 2, dtype=DOUBLE)


def g(model: nn.Module, v: Tensor, q: Tensor, offset: Tensor | float = 0.0) -> float:
    """The score of one vector for one query, written out."""
    s = model.score
    first = (s.features.weight @ v + s.query.weight @ q + s.query.bias + offset).clamp(min=0)
    return float(s.score.weight[0] @ torch.tanh(s.hidden.weight @ first + s.hidden.bias))


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s - max(scores)) for s in scores]
    return [power / sum(powers) for power in powers]


def squares(height: int, width: int, sides: int) -> list[tuple[int, range, range]]:
    """(side asked for, rows, columns) of each box, in the order of the items, by another way than
    item.py's: all starts at which a step of half a side arrives, and the last that fits."""
    found, seen = [], set()
    for side in range(1, sides + 1):
        h, w = min(side, height), min(side, width)
        if (h, w) in seen:
            continue
        seen.add((h, w))
        starts = [
            sorted({s for s in range(length - of + 1) if s % max(1, of // 2) == 0} | {length - of})
            for length, of in ((height, h), (width, w))
        ]
        for top, left in itertools.product(*starts):
            found.append((side, range(top, top + h), range(left, left + w)))
    return found


# ------------------------------------------------------------------------------- positions, soft


@every_map
def test_soft_is_the_softmax_of_the_score_of_each_position(size):
    model = random_model(Soft)
    x, q = inputs(size)
    with torch.no_grad():
        a = model(x, q)
        for b in range(2):
            cells = list(itertools.product(*map(range, size)))
            wanted = softmax([g(model, x[b, :, i, j], q[b]) for i, j in cells])
            for (i, j), value in zip(cells, wanted, strict=True):
                assert float(a[b, 0, i, j]) == pytest.approx(value, rel=1e-10)


# ------------------------------------------------------------------------------- items


@every_map
def test_items_are_the_means_of_boxes(size):
    x, _ = inputs(size)
    v = pool(x, grid(*size, 4, CPU, DOUBLE))
    wanted = [
        x[:, :, r.start : r.stop, c.start : c.stop].mean((2, 3)) for _, r, c in squares(*size, 4)
    ]
    torch.testing.assert_close(v, torch.stack(wanted, 1))


@every_map
def test_boxes_of_each_side_cover_every_cell(size):
    for boxes in grid(*size, 4, CPU, DOUBLE):
        assert (boxes.rows.sum(0) > 0).all() and (boxes.columns.sum(0) > 0).all()


def test_boxes_that_are_the_same_once_clipped_are_one():
    assert [len(b) for b in grid(1, 1, 4, CPU, DOUBLE)] == [1]
    assert [b.side for b in grid(2, 3, 5, CPU, DOUBLE)] == [1, 2, 3]
    assert sum(map(len, grid(6, 6, 4, CPU, DOUBLE))) == 36 + 25 + 16 + 4


@every_map
def test_item_soft_is_the_weighted_sum_of_items(size):
    """sum_k w_k v_k, box by box, is what the painted map gives."""
    model = random_model(ItemSoft)
    x, q = inputs(size)
    with torch.no_grad():
        output = (x * model(x, q)).sum((2, 3))
        for b in range(2):
            boxes = squares(*size, 4)
            v = [x[b][:, r][:, :, c].mean((1, 2)) for _, r, c in boxes]
            offsets = [model.side[side - 1] for side, _, _ in boxes]
            w = softmax([g(model, u, q[b], o) for u, o in zip(v, offsets, strict=True)])
            wanted = sum(weight * vector for weight, vector in zip(w, v, strict=True))
            torch.testing.assert_close(output[b], wanted)


@every_map
def test_painting_and_pooling_are_transposed(size):
    """<paint(w), x> = <w, pool(x)> for any w, and a painted map holds as much as its weights."""
    boxes = grid(*size, 4, CPU, DOUBLE)
    x = torch.randn(3, 1, *size, dtype=DOUBLE)
    w = torch.rand(3, sum(map(len, boxes)), dtype=DOUBLE)
    a = paint(w, boxes)
    torch.testing.assert_close((a * x).sum((1, 2, 3)), (w * pool(x, boxes)[..., 0]).sum(1))
    torch.testing.assert_close(a.sum((1, 2, 3)), w.sum(1))


def test_items_of_one_cell_are_positions():
    items, positions = random_model(ItemSoft, sides=1), random_model(Soft)
    items.side.data.zero_()
    positions.score.load_state_dict(items.score.state_dict())
    x, q = inputs((4, 5))
    torch.testing.assert_close(items(x, q), positions(x, q))


def test_item_soft_can_prefer_a_size():
    """The side's vector alone decides where all features are the same."""
    model = random_model(ItemSoft, sides=3)
    x, q = torch.ones(1, 3, 6, 6, dtype=DOUBLE), torch.ones(1, 2, dtype=DOUBLE)
    with torch.no_grad():
        score = model.items(x, q)[2][0]
    of_sides = score.split([36, 25, 16])
    assert all(float(part.max() - part.min()) < 1e-12 for part in of_sides)
    assert len({round(float(part[0]), 6) for part in of_sides}) == 3


def test_boxes_made_in_inference_mode_serve_a_gradient():
    grid.cache_clear()
    model, (x, q) = random_model(ItemSoft), inputs((6, 6))
    with torch.inference_mode():
        model(x, q)
    x.requires_grad_()
    (x * model(x, q)).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


# ------------------------------------------------------------------------------- estimators


def expected_loss(features: Tensor) -> Tensor:
    """A loss of each image (B,) that is not linear in its summed features (B, C)."""
    return (features.square() + torch.sin(3 * features)).sum(1)


def items_of(model: nn.Module, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """p (B, N) and the vectors (B, N, C) of a hard model."""
    if isinstance(model, ItemHard):
        _, v, score = model.items(x, q)
    else:
        v = x.flatten(2).transpose(1, 2)
        score = model.score(v, q)
    return torch.softmax(score, 1), v


def exact_gradient(model: nn.Module, x: Tensor, q: Tensor) -> list[Tensor]:
    """Of the mean over images of sum_i p_i loss(v_i), every position counted out."""
    p, v = items_of(model, x, q)
    each = torch.stack([expected_loss(v[:, i]) for i in range(v.shape[1])], 1)
    return list(torch.autograd.grad((p * each).sum(1).mean(), scored(model)))


def scored(model: nn.Module) -> list[nn.Parameter]:
    """What decides p: all but the baseline."""
    return [p for name, p in model.named_parameters() if not name.startswith("choice.")]


def force(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """From now on item `index` is sampled, in all images."""

    def noise(score: Tensor) -> Tensor:
        return 1e6 * F.one_hot(torch.tensor([index]), score.shape[1]).to(score).expand_as(score)

    monkeypatch.setattr("mnistattn.models.attention.hard.gumbel_like", noise)


def total_loss(model: nn.Module, x: Tensor, q: Tensor) -> Tensor:
    """What the trainer takes the gradient of."""
    _, own = model(x, q)
    each = expected_loss(own["features"].sum((2, 3)))
    loss = own.get("loss", 0.0)
    return each.mean() + (loss(each.detach()) if callable(loss) else loss)


@hard_class
@pytest.mark.parametrize("baseline", [True, False])
def test_the_score_function_s_mean_is_the_exact_gradient(monkeypatch, kind, baseline):
    """Every sample of one image, each weighted with its probability. The baseline changes
    the single gradients and not their mean."""
    model = random_model(kind, baseline=baseline, entropy=0.0)
    x, q = inputs((2, 2), batch=1)
    x *= 3
    p, v = items_of(model, x, q)
    wanted = exact_gradient(model, x, q)
    mean = [torch.zeros_like(w) for w in wanted]
    for i in range(v.shape[1]):
        force(monkeypatch, i)
        single = torch.autograd.grad(total_loss(model, x, q), scored(model))
        for m, s in zip(mean, single, strict=True):
            m += p[0, i].detach() * s
    assert max(float(w.abs().max()) for w in wanted) > 0.001
    for m, w in zip(mean, wanted, strict=True):
        torch.testing.assert_close(m, w, rtol=1e-8, atol=1e-10)


def test_baseline_lowers_the_variance_once_it_is_fitted(monkeypatch):
    """With the reward's mean as baseline the spread of the single gradients is smaller than with
    none: the advantage is what is multiplied, not the reward."""
    x, q = inputs((2, 3), batch=1)
    model = random_model(Hard, entropy=0.0)
    p, v = (t.detach() for t in items_of(model, x, q))
    each = expected_loss(v[0]) + 5
    spread = {}
    for b in (0.0, -float((p[0] * each).sum())):
        monkeypatch.setattr(Choice, "expect", lambda self, p, v, query, b=b: torch.full((1,), b))
        squared = 0.0
        for i in range(6):
            force(monkeypatch, i)
            _, own = model(x, q)
            grad = torch.autograd.grad(own["loss"](each[i : i + 1]), scored(model))
            squared += float(p[0, i]) * float(sum(s.square().sum() for s in grad))
        spread[b] = squared
    assert max(spread) == 0.0 and min(spread.values()) < 0.5 * spread[0.0]


def test_baseline_and_policy_have_gradients_of_their_own():
    """The log-probability's part gives the baseline none, the squared error the score none."""
    model = random_model(Hard, entropy=0.0)
    x, q = inputs((3, 3), batch=4)
    x.requires_grad_(), q.requires_grad_()
    each = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=DOUBLE)
    theirs = list(model.choice.parameters())
    for parameter in scored(model):
        parameter.requires_grad_(False)
    v = x.flatten(2).transpose(1, 2)
    p = torch.softmax(model.score(v, q), 1)
    b = model.choice.expect(p, v, q)
    given = torch.autograd.grad(b.sum(), [x, q], allow_unused=True, retain_graph=True)
    assert given == (None, None)
    error = torch.autograd.grad(F.mse_loss(b, -each), theirs)
    x, q = x.detach(), q.detach()
    _, own = model(x, q)  # whatever it sampled
    whole = torch.autograd.grad(own["loss"](each), theirs)
    for a, e in zip(whole, error, strict=True):
        torch.testing.assert_close(a, e)


@hard_class
def test_straight_through_has_the_backward_of_soft(kind):
    """For a loss linear in the features, d loss / d weights does not depend on the sample: the
    gradient of the score is then soft's exactly."""
    model = random_model(kind, estimator="straight-through", entropy=0.0)
    x, q = inputs((3, 4))
    direction = torch.randn(2, 3, dtype=DOUBLE)
    _, own = model(x, q)
    hard = torch.autograd.grad((own["features"].sum((2, 3)) * direction).sum(), scored(model))
    p, v = items_of(model, x, q)
    soft = torch.autograd.grad((torch.einsum("bn,bnc->bc", p, v) * direction).sum(), scored(model))
    for a, b in zip(hard, soft, strict=True):
        torch.testing.assert_close(a, b)


def test_gumbel_s_backward_is_that_of_the_relaxation():
    """torch.nn.functional.gumbel_softmax draws the same noise: the same sample and gradient."""
    model = random_model(Hard, estimator="gumbel", temperature=0.7, entropy=0.0)
    x, q = inputs((3, 4))
    direction = torch.randn(2, 12, dtype=DOUBLE)
    score = torch.randn(2, 12, dtype=DOUBLE, requires_grad=True)
    for seed in range(5):
        torch.manual_seed(seed)
        _, ours, loss = model.choice.train()(score, x.flatten(2).transpose(1, 2), q)
        torch.manual_seed(seed)
        theirs = F.gumbel_softmax(score, tau=0.7, hard=True)
        torch.testing.assert_close(ours, theirs)
        assert loss is None
        grads = (torch.autograd.grad((w * direction).sum(), score)[0] for w in (ours, theirs))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_samples_have_the_softmax_s_frequencies(estimator):
    """Pearson's chi-square with 5 degrees of freedom: above 20.5 once in a thousand seeds."""
    choice = Choice(3, 2, 4, estimator, 0.5, True, 0.0, 0.0)
    score = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0, -0.5]])
    n = 20_000
    _, weights, _ = choice(score.expand(n, -1), torch.rand(n, 6, 3), torch.rand(n, 2))
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    wanted = n * torch.softmax(score[0], 0)
    assert float(((weights.sum(0) - wanted).square() / wanted).sum()) < 20.5


@hard_class
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_features_are_those_of_one_item_and_the_map_says_where(kind, estimator):
    """Their sum is one item's vector: a sampled one in training, the most probable in eval."""
    model = random_model(kind, estimator=estimator)
    x, q = inputs((4, 5), batch=6)
    with torch.no_grad():
        p, v = items_of(model, x, q)
        seen = set()
        for _ in range(20):
            seen |= {chosen(model(x, q), v, b) for b in range(6)}
        assert len({k for _, k in seen}) > 6
        model.eval()
        first, again = model(x, q), model(x, q)
    assert torch.equal(first[1]["features"], again[1]["features"])
    assert torch.equal(first[0], again[0]) and set(first[1]) == {"features"}
    assert [chosen(first, v, b)[1] for b in range(6)] == p.argmax(1).tolist()
    soft = p.view(6, 1, 4, 5) if kind is Hard else paint(p, grid(4, 5, 4, CPU, DOUBLE))
    torch.testing.assert_close(first[0], soft)


def chosen(output: tuple[Tensor, dict], v: Tensor, image: int) -> tuple[int, int]:
    """(image, item): the one whose vector the features of an image sum to."""
    vector = output[1]["features"][image].sum((1, 2))
    distance = (v[image] - vector).abs().amax(1)
    assert float(distance.min()) < 1e-12
    return image, int(distance.argmin())


@hard_class
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_sample_does_not_depend_on_other_images(kind, estimator):
    model = random_model(kind, estimator=estimator, expected=0.5)
    x, q = inputs((4, 4), batch=5)
    other = torch.cat([x[:1], torch.rand_like(x[1:])])
    outputs = []
    for features in (x, other):
        torch.manual_seed(3)
        outputs.append(model(features, q)[1]["features"])
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.equal(outputs[0][1:], outputs[1][1:])


@hard_class
def test_expected_gives_the_mean_to_its_share_of_images(kind):
    model = random_model(kind, expected=0.3, entropy=0.0)
    x, q = (t.repeat_interleave(1000, 0) for t in inputs((2, 3), batch=1))
    p, v = items_of(model, x, q)
    a, own = model(x, q)
    mean = torch.einsum("bn,bnc->bc", p, v)
    share = (own["features"].sum((2, 3)) - mean).abs().amax(1) < 1e-9
    assert 0.25 < float(share.double().mean()) < 0.35
    # Where nothing was sampled nothing is rewarded.
    model = random_model(kind, expected=1.0, entropy=0.0)
    loss = model(x, q)[1]["loss"](torch.rand(1000, dtype=DOUBLE))
    grads = torch.autograd.grad(loss, scored(model))
    assert all(float(grad.abs().max()) == 0 for grad in grads)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_entropy_bonus_flattens(estimator):
    """Its part of the loss alone: -entropy * H(p)."""
    score = torch.randn(3, 7, dtype=DOUBLE, requires_grad=True)
    p = torch.softmax(score, 1)
    h = torch.distributions.Categorical(p).entropy().mean()
    grads = []
    for entropy in (0.0, 0.2):
        torch.manual_seed(1)
        choice = Choice(3, 2, 4, estimator, 1.0, False, entropy, 0.0)
        _, weights, loss = choice(score, torch.zeros(3, 7, 3), torch.zeros(3, 2))
        loss = loss(torch.ones(3, dtype=DOUBLE)) if callable(loss) else loss
        total = (weights * torch.arange(7)).sum() + (0.0 if loss is None else loss)
        grads.append(torch.autograd.grad(total, score)[0])
    wanted = torch.autograd.grad(-0.2 * h, score)[0]
    torch.testing.assert_close(grads[1] - grads[0], wanted)


# ------------------------------------------------------------------------------- all of them


@every_class
@every_map
def test_maps_sum_to_one(kind, size):
    model = kind(3, 2, last=True)
    x, q = (t.float() for t in inputs(size))
    for training in (True, False):
        output = model.train(training)(x, q)
        a = output[0] if isinstance(output, tuple) else output
        assert a.shape == (2, 1, *size) and (a >= 0).all()
        torch.testing.assert_close(a.sum((1, 2, 3)), torch.ones(2))


@every_class
def test_finite_at_extremes(kind):
    """Scores of thousands and features that are all zero."""
    model = kind(3, 2, last=True)
    model.score.score.weight.data.mul_(1e4)
    x = torch.cat([torch.zeros(1, 3, 6, 6), 1e3 * torch.rand(1, 3, 6, 6)]).requires_grad_()
    output = model(x, torch.randn(2, 2))
    a, own = output if isinstance(output, tuple) else (output, {})
    loss = own.get("features", x * a).square().mean()
    if "loss" in own:
        loss = loss + own["loss"](torch.tensor([0.1, 50.0]))
    loss.backward()
    assert torch.isfinite(a).all() and torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in [x, *model.parameters()])


@every_class
def test_bfloat16_keeps_the_sum(kind):
    model = kind(32, 32, last=True)
    x = torch.rand(3, 32, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        for features in (x, x.bfloat16()):
            output = model(features, torch.randn(3, 32))
            a = output[0] if isinstance(output, tuple) else output
            torch.testing.assert_close(a.sum((1, 2, 3)), torch.ones(3))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@hard_class
def test_every_parameter_gets_a_gradient(kind, estimator):
    model = random_model(kind, estimator=estimator)
    total_loss(model, *inputs((6, 6), batch=8)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (Soft, {"hidden": 0}, "hidden 0 is impossible: give a whole number from 1."),
        (ItemSoft, {"sides": 1.5}, "sides 1.5 is impossible: give a whole number from 1."),
        (ItemHard, {"sides": 0}, "sides 0 is impossible: give a whole number from 1."),
        (Hard, {"estimator": "st"}, "unknown estimator 'st': it is one of score, straight-thr"),
        (Hard, {"temperature": 0}, "temperature 0 is impossible: give a number from 0.01."),
        (Hard, {"entropy": -1}, "entropy -1 is impossible: give a number from 0."),
        (Hard, {"expected": 1.1}, "expected 1.1 is impossible: give a share from 0 to 1."),
        (ItemHard, {"baseline": 1}, "baseline 1 is impossible: give true or false."),
    ],
)
def test_impossible_options(kind, options, sentence):
    with pytest.raises(InputError) as error:
        kind(3, 2, last=True, **options)
    assert str(error.value).startswith(sentence)


def test_gumbel_noise_is_finite_and_standard():
    noise = gumbel_like(torch.zeros(100_000, 2))
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
