"""AttentionRNN and its variants against the paper's equations, written out pixel by pixel."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mnistattn.errors import InputError
from mnistattn.models.attention.arnn import ARNN
from mnistattn.models.attention.context import UNetContext
from mnistattn.models.attention.focus import lit

MAPS = [(1, 1), (1, 4), (4, 1), (2, 2), (3, 5), (5, 4), (3, 6)]
FAMILY = {
    "arnn": {},
    "sampled": {"sampled": True},
    "independent": {"independent": True},
    "both": {"sampled": True, "independent": True},
    "brnn": {"block": 2},
    "brnn-sampled": {"block": 2, "sampled": True},
    "unet": {"context_kind": "unet"},
    "local": {"local": True},
}
VARIANTS = FAMILY | {
    "sampled-exp": {"sampled": True, "sigma": "exp", "spread": 2},
    "independent-exp": {"independent": True, "sigma": "exp", "spread": 0.5},
    "context-1": {"context_size": 1},
    "context-5": {"context_size": 5, "hidden": 5},
    "unet-5": {"context_kind": "unet", "context_size": 5, "sampled": True},
    "local-both": {"local": True, "sampled": True, "independent": True},
    "softmax": {"last": True},
    "softmax-both": {"last": True, "sampled": True, "independent": True},
    "softmax-sharp": {"last": True, "sharpness": 3, "independent": True, "local": True},
    "sharp-but-no-softmax": {"sharpness": 3},
    "softmax-brnn-3": {"last": True, "block": 3, "sampled": True},
    "softmax-local-brnn": {"last": True, "block": 2, "local": True, "context_kind": "unet"},
    "gate": {"last": True, "last_map": "gate"},
    "gate-brnn-3": {"last": True, "last_map": "gate", "block": 3, "independent": True},
}
K = 3

family = pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
either_layer = pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])
sampling, with_sigma = (
    pytest.mark.parametrize("name", [n for n, o in FAMILY.items() if kinds & o.keys()])
    for kinds in ({"sampled"}, {"sampled", "independent"})
)


def random_model(last: bool = False, **options) -> ARNN:
    """A float64 module all of whose parameters, biases too, are random and of a size that shows."""
    model = ARNN(3, 2, last=last, **{"hidden": 3, "context": 4} | options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def random_inputs(*shape: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, *shape, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(batch, 2, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The normal numbers drawn by torch.randn_like, in order."""
    drawn: list[Tensor] = []

    def randn_like(v: Tensor) -> Tensor:
        drawn.append(torch.randn(v.shape, dtype=v.dtype))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", randn_like)
    return drawn


# ------------------------------------------------------------------------------- the equations


def grid(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(itertools.product(range(shape[-2]), range(shape[-1])))


def conv(image: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, before: int = 0):
    """A convolution, output by output; what lies outside the image is zero."""
    m, n = image.shape[1:]
    rows, columns = -(-m // stride), -(-n // stride)
    cells = []
    for i, j in grid((rows, columns)):
        total = image.new_zeros(len(weight)) if bias is None else bias
        for di, dj in grid(weight.shape):
            p, q = i * stride + di - before, j * stride + dj - before
            if 0 <= p < m and 0 <= q < n:
                total = total + weight[:, :, di, dj] @ image[:, p, q]
        cells.append(total)
    return torch.stack(cells, 1).view(-1, rows, columns)


def unet(context: UNetContext, image: Tensor) -> Tensor:
    """Convolution and ReLU at full, half and quarter size, added up from below."""
    levels = []
    for layer in context.down:
        if levels:
            m, n = image.shape[1:]
            pooled = [
                image[:, i : i + 2, j : j + 2].amax((1, 2))
                for i, j in itertools.product(range(0, m, 2), range(0, n, 2))
            ]
            image = torch.stack(pooled, 1).view(-1, (m + 1) // 2, (n + 1) // 2)
        size = layer.weight.shape[-1]
        image = conv(image, layer.weight, layer.bias, before=size // 2).clamp(min=0)
        levels.append(image)
    for level in reversed(levels[:-1]):
        m, n = level.shape[1:]
        image = level + image[:, torch.arange(m) // 2][:, :, torch.arange(n) // 2]
    return conv(image, context.top.weight, None)


def lstm(cells: dict, k_x: Tensor, k_h: Tensor, bias: Tensor) -> dict:
    """h of one direction: cells in raster order, h and c zero outside."""
    t = len(bias) // 4
    k_left, k_up = k_h.split(t)
    zero = bias.new_zeros(t)
    h, c = {}, {}
    for i, j in sorted(cells):
        a = cells[i, j] @ k_x + bias
        a = a + h.get((i, j - 1), zero) @ k_left + h.get((i - 1, j), zero) @ k_up
        o, f, g_in, g = a[:t], a[t : 2 * t], a[2 * t : 3 * t], a[3 * t :]
        c[i, j] = torch.sigmoid(f) * c.get((i, j - 1), zero) + torch.sigmoid(g_in) * torch.tanh(g)
        h[i, j] = torch.sigmoid(o) * torch.tanh(c[i, j])
    return h


def by_the_equations(model: ARNN, options: dict, x: Tensor, query: Tensor):
    """mu and sigma (None without one), (B, 1, h, w), for one image at a time; nothing shared with
    the module but its parameters."""

    def positive(s: Tensor) -> Tensor:
        return (s.exp() if options.get("sigma") == "exp" else torch.log1p(s.exp())) + 0.001

    def image_and_query(image: Tensor, q: Tensor) -> Tensor:
        if options.get("block", 1) > 1:
            image = conv(image, model.down.weight, model.down.bias, stride=options["block"])
        if options.get("context_kind") == "unet":
            context = unet(model.context, image)
        else:
            size = options.get("context_size", 3)
            context = conv(image, model.context.weight, None, before=size // 2)
        n = context.shape[2]
        cells = {(i, j): torch.cat((context[:, i, j], q)) for i, j in grid(context.shape)}
        mirrored = {(i, n - 1 - j): cell for (i, j), cell in cells.items()}
        h_l, h_r = (
            lstm(v, model.input_weight[s], model.recurrent_weight[s], model.input_bias[s])
            for s, v in enumerate((cells, mirrored))
        )
        out = []
        for i, j in cells:
            mu_l, s_l = model.left.weight @ h_l[i, j] + model.left.bias
            mu_r, s_r = model.right.bias
            if i:
                mu_r, s_r = model.right.weight @ h_r[i - 1, n - 1 - j] + model.right.bias
            sigma_l, sigma_r = positive(s_l), positive(s_r)
            local = x.new_zeros(())
            if options.get("local"):
                e = context[:, i, j] + model.local_query.weight @ q + model.local_query.bias
                local = model.local_score.weight[0] @ e.clamp(min=0)
            if options.get("independent"):
                variance = 1 / (1 / sigma_l**2 + 1 / sigma_r**2)
                mu = variance * (mu_l / sigma_l**2 + mu_r / sigma_r**2)
                out.append(torch.stack((mu + local, variance.sqrt())))
                continue
            v = model.combine.weight @ torch.stack((mu_l, sigma_l, mu_r, sigma_r))
            if model.combine.bias is not None:
                v = v + model.combine.bias
            sigma = [positive(v[1])] if options.get("sampled") else []
            out.append(torch.stack([v[0] + local, *sigma]))
        return torch.stack(out, 1).view(-1, *context.shape[1:])

    out = torch.stack([image_and_query(*each) for each in zip(x, query, strict=True)])
    return out[:, :1], out[:, 1:] if out.shape[1] == 2 else None


def finished(model: ARNN, options: dict, score: Tensor, shape: tuple[int, int]) -> Tensor:
    """Blocks back to pixels, and the activation."""
    g = options.get("block", 1)
    if g > 1:
        pixels = [
            score[:, :, i // g, j // g] * model.up.weight[0, 0, i % g, j % g]
            for i, j in grid(shape)
        ]
        score = torch.stack(pixels, -1).unflatten(2, shape)
    if options.get("last") and options.get("last_map") != "gate":
        score = options.get("sharpness", 1) * score
        return score.exp() / score.exp().sum((2, 3), keepdim=True)
    return 1 / (1 + (-score).exp())


@pytest.mark.parametrize(
    ("name", "shape"),
    [(n, s) for n, o in VARIANTS.items() for s in MAPS if o.get("block", 1) <= min(s)],
    ids=str,
)
def test_values_and_gradients_follow_the_equations(
    name: str, shape: tuple[int, int], noise: list[Tensor]
) -> None:
    """Of the mean, of a sample in training, and of K samples at once."""
    torch.manual_seed(0)
    options = VARIANTS[name]
    model = random_model(**options)
    x, query = random_inputs(*shape)
    mu, sigma = by_the_equations(model, options, x, query)
    found, expected = [], []
    for training, samples in ((False, None), (True, None), (False, K), (True, K)):
        if samples and sigma is None:
            continue
        noise.clear()
        found.append(model.train(training)(x, query, samples=samples))
        score = mu
        if samples or (training and options.get("sampled")):
            (eps,) = noise
            assert eps.shape == (2, samples or 1, *mu.shape[2:])
            score = mu + (options.get("spread", 1) if samples else 1) * sigma * eps
        assert bool(noise) == (score is not mu)
        expected.append(finished(model, options, score, shape))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    names = ["x", "query", *(name for name, _ in model.named_parameters())]
    inputs = [x, query, *model.parameters()]
    weights = [torch.randn(v.shape, dtype=v.dtype) for v in expected]
    gradients = torch.autograd.grad(found, inputs, weights, materialize_grads=True)
    references = torch.autograd.grad(expected, inputs, weights, materialize_grads=True)
    for name, one, other in zip(names, gradients, references, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-9, atol=1e-11, msg=lambda s, n=name: f"{n}: {s}"
        )


@either_layer
@family
def test_gradcheck(options: dict, last: bool) -> None:
    """With respect to the inputs and every parameter, in training."""
    torch.manual_seed(1)
    model = random_model(last, **options, hidden=1, context=2)
    x, query = random_inputs(3, 2, batch=1)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(x: Tensor, query: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(2)
        return torch.func.functional_call(
            model, dict(zip(names, parameters, strict=True)), (x, query)
        )

    assert torch.autograd.gradcheck(run, (x, query, *parameters))


# ----------------------------------------------------------------------------------- gaussians


def of_biases(left: tuple[float, float], right: tuple[float, float], **options) -> ARNN:
    """An independent model in which h says nothing: (mu, sigma before it is made positive)."""
    model = random_model(independent=True, **options)
    with torch.no_grad():
        for side, (mu, s) in ((model.left, left), (model.right, right)):
            side.weight.zero_()
            side.bias.copy_(torch.tensor([mu, s]))
    return model


@pytest.mark.parametrize("sigma", ["softplus", "exp"])
@pytest.mark.parametrize(
    ("left", "right"),
    [((0.5, 0.0), (-1.0, 0.0)), ((2.0, -1.0), (-1.0, 1.0)), ((0.0, 1.5), (3.0, -3.0))],
)
def test_product_of_gaussians_on_a_grid(left, right, sigma):
    model = of_biases(left, right, sigma=sigma)
    mu, std = (v.detach().numpy() for v in model.gaussian(*random_inputs(2, 3)))
    z = np.linspace(-30, 30, 600_001)
    log = 0.0
    for mean, s in (left, right):
        width = 0.001 + (math.exp(s) if sigma == "exp" else math.log1p(math.exp(s)))
        log = log - (z - mean) ** 2 / (2 * width**2)
    density = np.exp(log - log.max())
    density /= density.sum()
    mean = (z * density).sum()
    np.testing.assert_allclose(mu, mean, atol=1e-7)
    np.testing.assert_allclose(std, math.sqrt(((z - mean) ** 2 * density).sum()), rtol=1e-6)


@pytest.mark.parametrize("sigma", ["softplus", "exp"])
@pytest.mark.parametrize("size", [-200.0, 200.0])
def test_extreme_sigmas_stay_finite(size, sigma):
    """In float32, forward and backward; the more certain of the two decides."""
    torch.manual_seed(3)
    for both in ((size, size), (size, -size)):
        model = of_biases((1.0, both[0]), (2.0, both[1]), sigma=sigma).float()
        x, query = (v.float() for v in random_inputs(2, 3))
        mu, std = model.gaussian(x, query)
        expected = 1.5 if both[0] == both[1] else 1.0 if size < 0 else 2.0
        torch.testing.assert_close(mu, torch.full_like(mu, expected), rtol=1e-4, atol=0)
        assert std.isfinite().all() and (std > 0.0007).all()
        model(x, query).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("spread", [1, 3.0])
@pytest.mark.parametrize("name", ["sampled", "independent", "both"])
def test_distribution_of_the_samples(name: str, spread: float) -> None:
    """Before the activation: mean mu, standard deviation spread * sigma, positions independent."""
    torch.manual_seed(4)
    count = 40_000
    model = random_model(**FAMILY[name], spread=spread)
    with torch.no_grad():
        x, query = random_inputs(2, 2)
        mu, sigma = model.gaussian(x, query)
        scores = torch.logit(model(x, query, samples=count))
    sure = 5 / math.sqrt(count)
    assert ((scores.mean(1, keepdim=True) - mu).abs() < sure * spread * sigma).all()
    assert ((scores.std(1, keepdim=True) / (spread * sigma) - 1).abs() < sure).all()
    correlation = torch.corrcoef(((scores - mu) / sigma).transpose(0, 1).flatten(1).T)
    assert ((correlation - torch.eye(8)).abs() < sure).all()
    shape = ((scores - mu) / (spread * sigma)).pow(4).mean(1)
    assert ((shape - 3).abs() < 25 * sure).all()  # the fourth moment of a Gaussian


@either_layer
@sampling
def test_samples_in_training_and_the_mean_in_eval(name: str, last: bool) -> None:
    torch.manual_seed(5)
    model = random_model(last, **FAMILY[name])
    x, query = random_inputs(4, 5)

    def seeded(seed: int, samples: int | None = None) -> Tensor:
        torch.manual_seed(seed)
        return model(x, query, samples=samples)

    assert torch.equal(seeded(0), seeded(0))
    assert not torch.equal(seeded(0), seeded(1)) and not torch.equal(model(x, query), seeded(0))
    maps = seeded(0, K)
    assert torch.equal(maps, seeded(0, K)) and not torch.equal(maps, seeded(1, K))
    model.eval()
    assert torch.equal(seeded(0), seeded(1)) and torch.equal(model(x, query), seeded(0))
    mu, _ = model.gaussian(x, query)
    expected = finished(model, FAMILY[name] | {"last": last}, mu, (4, 5))
    torch.testing.assert_close(seeded(0), expected)


@either_layer
@with_sigma
def test_k_samples(name: str, last: bool) -> None:
    torch.manual_seed(6)
    model = random_model(last, **FAMILY[name])
    x, query = random_inputs(4, 5)
    for training, count in itertools.product((True, False), (1, 2, K)):
        maps = model.train(training)(x, query, samples=count)
        assert maps.shape == (2, count, 4, 5) and (maps > 0).all() and (maps < 1).all()
        for one, other in itertools.combinations(maps.unbind(1), 2):
            assert (one != other).any()
        if last:
            torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, count).double())
    for count in (0, -1):
        with pytest.raises(ValueError, match=str(count)):
            model(x, query, samples=count)
    still = random_model(last, **FAMILY[name], spread=0)
    still.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        still(x, query, samples=K), model.eval()(x, query).expand(-1, K, -1, -1)
    )


@pytest.mark.parametrize("name", ["arnn", "brnn", "unet", "local"])
def test_a_model_without_sigma_gives_no_samples(name: str) -> None:
    model = random_model(**FAMILY[name])
    with pytest.raises(ValueError, match="samples"):
        model(*random_inputs(4, 5), samples=K)


# ---------------------------------------------------------------------------------- visibility


def dilated(positions: Tensor, size: int) -> Tensor:
    """The neighbourhoods of K^c around the positions."""
    return torch.nn.functional.max_pool2d(positions[None].float(), size, 1, size // 2)[0] > 0


@pytest.mark.parametrize(
    ("halves", "options"),
    [
        ("left", {}),
        ("right", {}),
        ("both", {}),
        ("left", {"sampled": True}),
        ("right", {"sampled": True}),
        ("both", {"independent": True}),
        ("both", {"context_size": 1}),
        ("both", {"context_size": 5}),
        ("both", {"block": 2}),
        ("both", {"block": 3, "independent": True}),
        ("right", {"block": 2, "context_size": 1}),
        ("both", {"local": True}),
    ],
    ids=str,
)
def test_attention_sees_exactly_the_allowed_positions(halves: str, options: dict) -> None:
    torch.manual_seed(7)
    m, n = 6, 7
    model = random_model(**options)
    with torch.no_grad():  # f_comb reads (mu_l, sigma_l, mu_r, sigma_r)
        if halves == "left":
            model.combine.weight[:, 2:] = 0
        elif halves == "right":
            model.combine.weight[:, :2] = 0
    x, query = random_inputs(m, n, batch=1)
    g = options.get("block", 1)
    for values in model.gaussian(x, query):
        if values is None:
            continue
        assert values.shape == (1, 1, -(-m // g), -(-n // g))
        for i, j in grid(values.shape):
            (gradient,) = torch.autograd.grad(values[0, 0, i, j], x, retain_graph=True)
            allowed = torch.zeros(values.shape[2:], dtype=torch.bool)
            if halves != "right":
                allowed[: i + 1, : j + 1] = True
            if halves != "left":
                allowed[:i, j:] = True
            allowed = dilated(allowed, options.get("context_size", 3))
            allowed = allowed.repeat_interleave(g, 0).repeat_interleave(g, 1)[:m, :n]
            assert torch.equal((gradient[0] != 0).any(0), allowed), (i, j)


@pytest.mark.parametrize("name", ["arnn", "sampled", "independent", "both"])
def test_perturbation_leaves_the_past_alone(name: str) -> None:
    """The same by values: a changed pixel changes nothing whose quadrants lack it, to the bit."""
    torch.manual_seed(8)
    model = random_model(**FAMILY[name]).eval()
    x, query = (v.detach() for v in random_inputs(6, 6, batch=1))
    before = model(x, query)[0, 0]
    x[0, :, 3, 3] += 1
    changed = model(x, query)[0, 0] != before
    expected = torch.zeros(6, 6, dtype=torch.bool)
    for p, q in itertools.product((2, 3, 4), repeat=2):  # where X^c changes
        expected[p:, q:] = True  # the left LSTM's readers
        expected[p + 1 :, : q + 1] = True  # the right LSTM's, a row further down
    assert torch.equal(changed, expected)


@either_layer
@family
def test_no_leak_across_the_batch(options: dict, last: bool) -> None:
    torch.manual_seed(9)
    model = random_model(last, **options).eval()
    x, query = random_inputs(4, 5, batch=3)
    samples = K if model.has_samples else None
    maps = model(x, query, samples=samples)
    means = model(x, query)
    weights = torch.randn(maps.shape[1:]).double()
    for b in range(3):
        gradients = torch.autograd.grad((maps[b] * weights).sum(), (x, query), retain_graph=True)
        for gradient in gradients:
            touched = gradient.flatten(1).ne(0).any(1)
            assert touched.tolist() == [k == b for k in range(3)]
        torch.testing.assert_close(model(x[b : b + 1], query[b : b + 1]), means[b : b + 1])


# ------------------------------------------------------------------------------- as torch goes


@either_layer
@family
def test_no_grad_gives_the_same_values(options: dict, last: bool) -> None:
    torch.manual_seed(10)
    model = random_model(last, **options)
    x, query = random_inputs(5, 4)
    for samples in (None, K) if model.has_samples else (None,):
        torch.manual_seed(0)
        expected = model(x, query, samples=samples)
        torch.manual_seed(0)
        with torch.no_grad():
            found = model(x, query, samples=samples)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@either_layer
@family
def test_float32_and_autocast_stay_close(options: dict, last: bool) -> None:
    """float32 to float64, and bfloat16 autocast to float32: in eval, and its gradients finite."""
    torch.manual_seed(11)
    double = random_model(last, **options).eval()
    model = ARNN(3, 2, last=last, hidden=3, context=4, **options).eval()
    model.load_state_dict(double.state_dict())
    x, query = random_inputs(5, 4)
    expected = model(x.float(), query.float())
    torch.testing.assert_close(expected.double(), double(x, query), rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x.float(), query.float())
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    if last:
        torch.testing.assert_close(out.float().sum((2, 3)), torch.ones(2, 1), rtol=0, atol=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.train()(x.float(), query.float())
    (out.float() * torch.randn(out.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("last_map", ["softmax", "gate"])
@either_layer
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name: str, last: bool, last_map: str) -> None:
    """From the initial weights, in training."""
    torch.manual_seed(12)
    options = VARIANTS[name] | {"last": last, "last_map": last_map, "context": 8}
    model = ARNN(3, 2, **{"hidden": 4} | options).double()
    out = model(*random_inputs(6, 7))
    (out * torch.randn(out.shape)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 1e-9, parameter_name


# --------------------------------------------------------------------- activations and weights


@pytest.mark.parametrize("last_map", ["softmax", "gate"])
@either_layer
@family
def test_activations(options: dict, last: bool, last_map: str) -> None:
    torch.manual_seed(13)
    model = ARNN(3, 2, last=last, last_map=last_map, **options)
    out = model(*(v.float() for v in random_inputs(4, 5)))
    assert out.shape == (2, 1, 4, 5) and (out > 0).all() and (out < 1).all()
    summed = out.sum((1, 2, 3))
    if last and last_map == "softmax":
        torch.testing.assert_close(summed, torch.ones(2))
    else:
        assert ((summed - 1).abs() > 1e-3).all()


def test_initial_weights() -> None:
    """Orthonormal recurrence, forget gates open, blocks back by nearest upsampling."""
    torch.manual_seed(14)
    model = ARNN(3, 2, last=False, hidden=6, context=4, block=2, context_kind="unet")
    for direction in model.recurrent_weight:
        for gate in direction.split(6, 1):
            torch.testing.assert_close(gate.T @ gate, torch.eye(6), rtol=0, atol=1e-5)
    bias = torch.zeros(2, 4, 6)
    bias[:, 1] = 1  # o, f, i, g
    assert torch.equal(model.input_bias.view(2, 4, 6), bias)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
    out = model(*(v.float() for v in random_inputs(6, 5)))
    blocks = out[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(out, blocks[..., :6, :5])


# ------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *itertools.product(("hidden", "context", "block"), (0, -1, 1.5, True)),
        *itertools.product(("context_size",), (0, -1, 2, 4, 3.0)),
        *itertools.product(("spread",), (-0.1, float("nan"), float("inf"), "wide", True)),
        *itertools.product(("sharpness",), (0, -1, float("inf"), "sharp", True)),
        *itertools.product(("gate_bias",), (-21, float("nan"), "shut", True)),
        *itertools.product(("focus",), (-1, float("inf"), "sharp", True)),
        *itertools.product(("sampled", "independent", "local"), (1, "yes", None)),
        ("sigma", "relu"),
        ("context_kind", "cnn"),
        ("last_map", "sigmoid"),
    ],
)  # fmt: skip
@either_layer
def test_bad_options_are_refused(option: str, value: object, last: bool) -> None:
    with pytest.raises(InputError, match=rf"\b{option} '?{value}\b"):
        ARNN(3, 2, last=last, **{option: value})


@family
def test_sharpness_leaves_the_first_maps_alone(options: dict) -> None:
    """And multiplies how fast a step on their last weights changes them."""
    x, query = (v.float() for v in random_inputs(5, 4))
    maps, steps = [], []
    for sharpness in (1.0, 4.0):
        torch.manual_seed(3)
        model = ARNN(3, 2, last=True, hidden=4, sharpness=sharpness, **options).eval()
        maps.append(model(x, query))
        row = (model.left if options.get("independent") else model.combine).weight
        (gradient,) = torch.autograd.grad(maps[-1][..., 0, 0].sum(), row)
        steps.append(gradient[0])
    torch.testing.assert_close(*maps)
    torch.testing.assert_close(4 * steps[0], steps[1])


@family
def test_gate_bias_moves_the_first_gates_alone(options: dict) -> None:
    x, query = (v.float() for v in random_inputs(6, 4))
    for last, last_map, moved in ((False, "softmax", True), (True, "softmax", False),
                                  (True, "gate", True)):  # fmt: skip
        scores = []
        for bias in (0.0, -2.0):
            torch.manual_seed(3)
            model = ARNN(3, 2, last=last, last_map=last_map, hidden=4, gate_bias=bias, **options)
            scores.append(model.eval().gaussian(x, query)[0])
        torch.testing.assert_close(scores[1] - scores[0], torch.full_like(scores[0], -2.0 * moved))


@family
def test_focus_is_a_loss_in_training_alone(options: dict) -> None:
    x, query = (v.float() for v in random_inputs(6, 4))
    torch.manual_seed(3)
    model = ARNN(3, 2, last=False, hidden=4, focus=0.5, **options)
    torch.manual_seed(4)
    a, loss = model(x, query)
    # Sure of the first answer, not of the second.
    assert loss(torch.tensor([0.0, 5.0])).item() == pytest.approx(0.25 * lit(a)[0].item())
    model.focus = 0.0
    torch.manual_seed(4)
    assert torch.equal(model(x, query), a)
    model.focus = 0.5
    assert model.eval()(x, query).shape == a.shape
    if model.has_samples:
        assert model.train()(x, query, samples=2).shape == (2, 2, 6, 4)


@pytest.mark.parametrize(("shape", "block"), [((2, 5), 3), ((5, 2), 3), ((1, 1), 2), ((4, 4), 5)])
def test_a_block_larger_than_the_map_is_refused(shape: tuple[int, int], block: int) -> None:
    with pytest.raises(InputError, match=f"block {block} .*{shape[0]} x {shape[1]}"):
        random_model(block=block)(*random_inputs(*shape))


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3)])
def test_a_block_as_large_as_the_map(shape: tuple[int, int]) -> None:
    assert random_model(block=3)(*random_inputs(*shape)).shape == (2, 1, *shape)


# --------------------------------------------------------------------------------------- U-Net


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (1, 9), (7, 1), (2, 2), (2, 3), (3, 3), (4, 5), (8, 8), (13, 6)]
)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_unet_on_any_map(shape: tuple[int, int], size: int) -> None:
    torch.manual_seed(15)
    context = UNetContext(3, 6, size, padding=size // 2).double()
    x, _ = random_inputs(*shape)
    out = context(x)
    assert out.shape == (2, 6, *shape)
    expected = torch.stack([unet(context, image) for image in x])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(out.shape).double()
    torch.testing.assert_close(
        *(torch.autograd.grad(v, x, weights)[0] for v in (out, expected)), rtol=1e-9, atol=1e-11
    )


def test_unet_sees_further_than_one_convolution() -> None:
    torch.manual_seed(16)
    context = UNetContext(3, 16, 3, padding=1).double()
    x, _ = random_inputs(25, 25, batch=4)
    gradient = torch.autograd.grad(context(x)[..., 12, 12].sum(), x)[0]
    rows, columns = gradient.ne(0).any(0).any(0).nonzero().T
    for seen in (rows, columns):
        # Centre 12 is 3 at quarter size: quarters 2 .. 4 are pixels 8 .. 19, and two more
        # convolutions widen them by 2 and by 1.
        assert 5 <= seen.min() <= 8 and 19 <= seen.max() <= 22


def test_unet_takes_the_place_of_the_convolution() -> None:
    """Its signs are those of a linear map: not only positive."""
    torch.manual_seed(17)
    model = ARNN(3, 2, last=False, context=7, context_kind="unet")
    out = model.context(torch.randn(2, 3, 9, 8))
    assert out.shape == (2, 7, 9, 8) and (out < 0).any() and (out > 0).any()
