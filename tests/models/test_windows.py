"""Attention by windows: DRAW's Gaussians, the Spatial Transformer, recurrent glimpses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import gaussian, stn
from mnistattn.models.attention.gaussian import Gaussian, GaussianGlimpse, Locator, filters, window
from mnistattn.models.attention.policy import score_function
from mnistattn.models.attention.ram import RAM, crop, pyramid
from mnistattn.models.attention.stn import STN, density

MAPS = [(1, 1), (1, 4), (5, 1), (2, 3), (12, 9)]
MODULES = {
    "gaussian": (Gaussian, {}),
    "gaussian-2": (Gaussian, {"count": 2, "context": 1}),
    "glimpse": (GaussianGlimpse, {}),
    "affine": (STN, {}),
    "zoom": (STN, {"form": "zoom"}),
}

every = pytest.mark.parametrize(("cls", "options"), MODULES.values(), ids=MODULES)
cutting = pytest.mark.parametrize(
    ("cls", "options"), [v for k, v in MODULES.items() if "gaussian" not in k]
)
either_layer = pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(cls: type, last: bool = False, **options) -> nn.Module:
    """A float64 module, all of whose parameters are random and of a size that shows."""
    module = cls(3, 2, last=last, **{"hidden": 4} | options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def inputs(*shape: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, *shape, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(batch, 2, dtype=torch.float64, requires_grad=True)


def spots(*places: tuple[int, int], side: int = 24) -> Tensor:
    """Images of three channels, dark but for a 2 x 2 spot each."""
    x = torch.zeros(len(places), 3, side, side, dtype=torch.float64)
    for i, (row, column) in enumerate(places):
        x[i, :, row : row + 2, column : column + 2] = 1
    return x


def seeing(module: nn.Module, sharpness: float = 500.0) -> nn.Module:
    """A module whose locator finds what is bright, and hardly anything else."""
    locate: Locator = module.locate
    with torch.no_grad():
        for conv in (*locate.down, locate.features):
            conv.weight.fill_(0.1)
            if conv.bias is not None:
                conv.bias.zero_()
        locate.query.weight.zero_()
        locate.score.weight.fill_(sharpness)
    return module


# ---------------------------------------------------------------------------------- all of them


@every
@either_layer
@pytest.mark.parametrize("shape", MAPS)
def test_maps_are_gates_or_distributions_with_finite_gradients(cls, options, last, shape) -> None:
    module = small(cls, last, **options)
    x, query = inputs(*shape)
    out = module(x, query)
    a, f = (out[0], out[1]["features"]) if isinstance(out, tuple) else (out, out * x)
    assert a.shape == (2, 1, *shape) and f.shape == x.shape
    assert (a >= 0).all() and (a <= 1 + 1e-12).all()
    if last:
        torch.testing.assert_close(a.sum((1, 2, 3)), torch.ones(2, dtype=a.dtype))
    (f * torch.randn_like(f)).sum().backward()
    for tensor in (x, query, *module.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()


@every
def test_an_image_is_alone_in_its_batch(cls, options) -> None:
    module = small(cls, **options)
    x, query = inputs(6, 9, batch=3)
    whole, alone = module(x, query), module(x[1:2], query[1:2])
    if isinstance(whole, tuple):
        torch.testing.assert_close(whole[1]["features"][1:2], alone[1]["features"])
        whole, alone = whole[0], alone[0]
    torch.testing.assert_close(whole[1:2], alone)


@every
def test_half_precision_keeps_its_type(cls, options) -> None:
    module = cls(3, 2, last=True, **options)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.rand(2, 3, 8, 8, dtype=torch.bfloat16), torch.randn(2, 2))
    a = out[0] if isinstance(out, tuple) else out
    assert a.dtype == torch.bfloat16
    assert (a.float().sum((1, 2, 3)) - 1).abs().max() < 0.02
    if isinstance(out, tuple):
        assert out[1]["features"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("cls", "options", "sentence"),
    [
        (Gaussian, {"count": 1}, "count 1 is impossible: one filter has no stride"),
        (Gaussian, {"count": 2.5}, "count 2.5 is impossible: give a whole number from 1"),
        (Gaussian, {"context": 2}, "context 2 is even"),
        (GaussianGlimpse, {"hidden": 0}, "hidden 0 is impossible"),
        (STN, {"form": "rigid"}, "unknown form 'rigid': it is one of affine, zoom"),
        (STN, {"scale": 0}, "scale 0 is impossible: give a number from 0.01"),
    ],
)
def test_impossible_options(cls, options, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        cls(3, 2, last=False, **options)


# ------------------------------------------------------------------------------------- gaussian


def draw_filters(g: float, delta: float, sigma: float, count: int, side: int) -> Tensor:
    """Equations 19, 20, 25 and 26 for an axis, as they are written; g in pixels from 0."""
    bank = torch.zeros(count, side, dtype=torch.float64)
    for i in range(1, count + 1):
        mu = g + (i - count / 2 - 0.5) * delta
        for a in range(side):
            bank[i - 1, a] = math.exp(-((a - mu) ** 2) / (2 * sigma**2))
        bank[i - 1] /= bank[i - 1].sum()
    return bank


@pytest.mark.parametrize(("count", "side"), [(1, 5), (2, 7), (4, 4), (5, 12), (3, 1)])
def test_filters_are_draws(count: int, side: int) -> None:
    cases = [(0.3, 0.5, 0.4), (side / 2, 1.7, 2.0), (side - 1.0, 3.0, 1.1)]
    found = filters(*torch.tensor(cases, dtype=torch.float64).unbind(1), count, side)
    for bank, case in zip(found, cases, strict=True):
        torch.testing.assert_close(bank, draw_filters(*case, count, side))


@either_layer
def test_gate_is_the_outer_product_of_draws_filters(last: bool) -> None:
    module = small(Gaussian, last, count=3)
    x, query = inputs(6, 9)
    axes = module.parameters_of(x, query, (3, 3))
    for i, a in enumerate(module(x, query)):
        y, z = (
            draw_filters(*(p[i].item() for p in axis), 3, side).sum(0)
            for axis, side in zip(axes, (6, 9), strict=True)
        )
        expected = torch.outer(y, z)
        expected = expected / (expected.sum() if last else expected.max())
        torch.testing.assert_close(a[0], expected)


def test_glimpse_and_its_map_are_draws() -> None:
    module = small(GaussianGlimpse)
    x, query = inputs(5, 8)
    rows, columns = module.banks(x, query, (5, 8))
    a, out = module(x, query)
    expected = torch.einsum("bia,bcad,bjd->bcij", rows, x, columns)
    torch.testing.assert_close(out["features"], expected)
    sums = torch.einsum("bia,bjd->bad", rows, columns)[:, None]
    torch.testing.assert_close(a, sums / sums.amax((2, 3), keepdim=True))


def test_a_fine_grid_at_the_centre_reproduces_the_pixels() -> None:
    one = torch.ones(1, dtype=torch.float64)
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    y, z = filters(4 * one, one, 0.05 * one, 3, 9), filters(5 * one, one, 0.05 * one, 5, 9)
    torch.testing.assert_close(y[:, None] @ x @ z.transpose(1, 2)[:, None], x[..., 3:6, 3:8])
    a = window(y, z, last=False)
    torch.testing.assert_close(a[0, 0, 3:6, 3:8], torch.ones(3, 5, dtype=a.dtype))
    assert a.sum() == pytest.approx(15)


@either_layer
def test_gradient_of_all_six_parameters(last: bool) -> None:
    weight = torch.randn(2, 1, 5, 7, dtype=torch.float64)

    def value(six: Tensor) -> Tensor:
        cy, cx, dy, dx, sy, sx = six.unbind(1)
        return (window(filters(cy, dy, sy, 3, 5), filters(cx, dx, sx, 3, 7), last) * weight).sum()

    six = torch.tensor([[2.1, 3.3, 0.8, 1.2, 0.9, 1.1], [1.2, 4.4, 1.3, 0.6, 0.7, 0.8]])
    six = six.double().requires_grad_()
    assert torch.autograd.gradcheck(value, six)
    (slope,) = torch.autograd.grad(value(six), six)
    assert (slope.abs() > 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centre", [2.0, 2.5, 2.4999, -100.0, 1e4])
def test_a_vanishing_width_is_finite(centre: float, dtype: torch.dtype) -> None:
    six = torch.tensor([[centre, 0.7, 1e-8]], dtype=dtype, requires_grad=True)
    bank = filters(six[:, 0], six[:, 1], six[:, 2], 4, 6)
    torch.testing.assert_close(bank.sum(2), torch.ones(1, 4, dtype=dtype))
    a = window(bank, bank, False)
    (a * torch.randn_like(a)).sum().backward()
    assert six.grad is not None and six.grad.isfinite().all() and a.max() == 1


def test_the_module_keeps_a_width_whose_gradient_is_small() -> None:
    module = small(Gaussian)
    with torch.no_grad():
        module.shape.bias.fill_(-1e3)  # softplus is 0
    x, query = inputs(8, 8)
    for _, _, width in module.parameters_of(x, query, (4, 4)):
        torch.testing.assert_close(width, torch.full_like(width, gaussian.SIGMA_MIN))
    module(x, query).sum().backward()
    assert max(p.grad.abs().max() for p in module.parameters()) < 1e4


def test_the_window_starts_wide() -> None:
    for side in (6, 50, 112):
        a = Gaussian(32, 32, last=False)(torch.rand(4, 32, side, side), torch.randn(4, 32))
        assert 0.3 < a.mean() < 0.9


# -------------------------------------------------------------------------- where things are


def test_expected_position_is_in_the_frame_of_the_image() -> None:
    """A 3 x 3 convolution of stride 2 has its cell o over pixel 2 o, and pixels have a middle."""
    for strided in (0, 1, 2):
        locate = Locator(3, 2, 4, strided, 1)
        x = torch.zeros(1, 3, 24, 40)
        x[:, :, 8, 16] = 1
        with torch.no_grad():
            for conv in (*locate.down, locate.features):
                conv.weight.zero_()
                conv.weight[:, :, conv.weight.shape[2] // 2, conv.weight.shape[3] // 2] = 1
                conv.bias.zero_()
            locate.score.weight.fill_(50)
            centre, _ = locate(x, torch.zeros(1, 2))
        expected = torch.tensor([[2 * 8.5 / 24 - 1, 2 * 16.5 / 40 - 1]])
        torch.testing.assert_close(centre, expected)


@pytest.mark.parametrize("cls", [Gaussian, GaussianGlimpse, STN])
def test_a_window_follows_what_moves(cls: type) -> None:
    module = seeing(cls(3, 2, last=False, hidden=4).double())
    x = spots((8, 8), (12, 8), (8, 12))
    query = torch.zeros(3, 2, dtype=torch.float64)
    centre = module.locate(x, query)[0] * 12  # pixels
    moved = torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(centre[1:] - centre[:1], moved, atol=0.02, rtol=0)
    out = module(x, query)
    a = (out[0] if isinstance(out, tuple) else out)[:, 0]
    middle = [(a[i].sum(1) @ torch.arange(24.0).double() / a[i].sum()).item() for i in range(3)]
    assert middle[1] > middle[0] + 1 and middle[2] == pytest.approx(middle[0], abs=0.1)


def test_a_warp_brings_what_moves_to_the_middle() -> None:
    module = seeing(STN(3, 2, last=False, form="zoom", hidden=4, scale=0.4).double())
    with torch.no_grad():
        module.matrix.weight.zero_()
    out = module(spots((8, 8), (12, 8), (8, 12)), torch.zeros(3, 2, dtype=torch.float64))[1]
    first, down, right = out["features"]
    torch.testing.assert_close(down, first, atol=0.05, rtol=0)
    torch.testing.assert_close(right, first, atol=0.05, rtol=0)
    assert first.sum() > spots((8, 8)).sum()  # it zooms


# ------------------------------------------------------------------------------------------ stn


@cutting
def test_the_map_is_the_gradient_of_the_sum(cls, options) -> None:
    module = small(cls, **options)
    x, query = inputs(7, 10)
    a, out = module(x, query)
    fixed = x.detach().requires_grad_()
    if cls is STN:
        grid = F.affine_grid(module.theta(x, query), list(x.shape), align_corners=False)
        features = F.grid_sample(fixed, grid.detach(), align_corners=False)
    else:
        rows, columns = (f.detach() for f in module.banks(x, query, (7, 10)))
        features = rows[:, None] @ fixed @ columns.transpose(1, 2)[:, None]
    torch.testing.assert_close(out["features"], features)
    (source,) = torch.autograd.grad(features[:, 0].sum(), fixed)
    source = source[:, :1]
    torch.testing.assert_close(a, source / source.amax((2, 3), keepdim=True).clamp(min=1e-6))


def test_density_of_a_wild_grid_is_autograds() -> None:
    x = torch.zeros(3, 1, 4, 6, dtype=torch.float64, requires_grad=True)
    grid = torch.randn(3, 9, 5, 2, dtype=torch.float64)
    grid[0] = -1 + 2 * torch.rand(9, 5, 2).round().double()  # corners
    grid[1, 0] = torch.tensor([1e30, -1e30])
    (source,) = torch.autograd.grad(F.grid_sample(x, grid, align_corners=False).sum(), x)
    torch.testing.assert_close(density(grid, 4, 6), source)


@either_layer
def test_identity_gives_the_features_and_a_uniform_map(last: bool) -> None:
    module = small(STN, last)
    x, query = inputs(6, 9)
    eye = torch.eye(2, 3, dtype=torch.float64).expand(2, 2, 3)
    module.theta = lambda *_: eye
    a, out = module(x, query)
    torch.testing.assert_close(out["features"], x)
    torch.testing.assert_close(a, torch.full_like(a, 1 / 54 if last else 1.0))


@pytest.mark.parametrize("form", stn.FORMS)
def test_theta_starts_as_a_zoom_on_the_middle(form: str) -> None:
    x, query = torch.rand(4, 32, 50, 50), torch.randn(4, 32)
    theta = STN(32, 32, last=False, form=form, scale=0.6).theta(x, query)
    start = torch.tensor([[0.6, 0.0, 0.0], [0.0, 0.6, 0.0]])
    assert (theta - start).abs().max() < 0.25


def test_theta_of_a_zoom_has_one_scale() -> None:
    theta = small(STN, form="zoom").theta(*inputs(6, 9))
    torch.testing.assert_close(theta[:, 0, 0], theta[:, 1, 1])
    assert (theta[:, 0, 0] > 0).all() and not theta[:, [0, 1], [1, 0]].any()


@either_layer
def test_sampling_outside_the_image(last: bool) -> None:
    module = small(STN, last)
    x, query = inputs(6, 9)
    away = torch.tensor([[0.1, 0.0, 9.0], [0.0, 0.1, 9.0]], dtype=torch.float64)
    module.theta = lambda *_: away.expand(2, 2, 3).requires_grad_()
    a, out = module(x, query)
    assert not out["features"].any()
    torch.testing.assert_close(a, torch.full_like(a, 1 / 54 if last else 0.0))


# ------------------------------------------------------------------------------------------ ram

RAM_SIZE = 32


def ram(**options) -> RAM:
    kept = {"glimpses": 3, "side": 4, "scales": 2, "hidden": 16} | options
    return RAM(RAM_SIZE, 4, 3, **kept)


def images(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 3, RAM_SIZE, RAM_SIZE), torch.arange(batch) % 4


@pytest.mark.parametrize("size", [16, 21])
def test_crops_are_slices(size: int) -> None:
    """A window that lies on a level's pixels is a slice of the image's block means."""
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    padded = torch.zeros(2, 3, size + 40, size + 40, dtype=torch.float64)
    padded[..., 20 : 20 + size, 20 : 20 + size] = x
    for k, level in enumerate(pyramid(x, 3)):
        step = 2**k
        for top, left in ((0, 4), (8, 4), (-4, 8), (12, 16)):  # of the window, in pixels
            centre = torch.tensor([[top + 2.0 * step, left + 2.0 * step]] * 2).double()
            found = crop(level, centre, 4, step)
            for i in range(4):
                for j in range(4):
                    y, z = 20 + top + i * step, 20 + left + j * step
                    block = padded[..., y : y + step, z : z + step].mean((2, 3))
                    torch.testing.assert_close(found[..., i, j], block)


def test_crops_between_pixels_are_bilinear() -> None:
    ramp = (torch.arange(16.0)[:, None] * 3 + torch.arange(16.0)).expand(1, 3, 16, 16).double()
    for k, level in enumerate(pyramid(ramp, 2)):
        found = crop(level, torch.tensor([[7.3, 8.9]]).double(), 4, 2**k)
        y = 7.3 - 0.5 + (torch.arange(4.0).double() - 1.5) * 2**k
        x = 8.9 - 0.5 + (torch.arange(4.0).double() - 1.5) * 2**k
        torch.testing.assert_close(found[0, 0], y[:, None] * 3 + x)


def test_painted_windows_hold_a_mass_of_one() -> None:
    model = ram()
    inside = torch.tensor([[[0.0, 0.0], [0.3, -0.41], [-0.2, 0.7]]])
    a = model.paint(inside, RAM_SIZE)
    assert a.shape == (1, 1, 16, 16)
    assert a.sum().item() == pytest.approx(1, abs=1e-5)
    # One window of 4 pixels and one of 8, around the middle: 2 x 2 and 4 x 4 cells.
    one = model.paint(torch.zeros(1, 1, 2), RAM_SIZE)[0, 0]
    expected = torch.zeros(16, 16)
    expected[6:10, 6:10] += 0.5 / 16
    expected[7:9, 7:9] += 0.5 / 4
    torch.testing.assert_close(one, expected)


def test_painted_windows_lose_what_lies_outside() -> None:
    model = ram()
    corner, beyond = (model.paint(torch.full((1, 2, 2), v), RAM_SIZE).sum() for v in (-1.0, 3.0))
    assert corner.item() == pytest.approx(0.25)
    assert beyond == 0


def test_painted_windows_on_an_odd_image() -> None:
    a = RAM(33, 4, 3, side=4, scales=2).paint(torch.zeros(1, 1, 2), 33)
    assert a.shape == (1, 1, 16, 16) and a.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(a, a.flip(2, 3))


def test_ram_looks_with_noise_only_in_training() -> None:
    model, (x, query) = ram(), images()
    first, again = model(x, query), model(x, query)
    assert callable(first[1]["loss"]) and not torch.equal(first[0], again[0])
    model.eval()
    first, again = model(x, query), model(x, query)
    assert "loss" not in first[1] and torch.equal(first[0], again[0])
    assert torch.equal(first[1]["attention"][0], again[1]["attention"][0])


def test_ram_images_do_not_see_each_other() -> None:
    model, (x, query) = ram().eval(), images()  # BatchNorm aside
    outs = []
    for others in (x[1:], x[1:].flip(0) * 0.3):
        logits, out = model(torch.cat([x[:1], others]), query)
        outs.append((logits[0], out["attention"][0][0]))
    torch.testing.assert_close(outs[0], outs[1])


LOOKING = ("find", "start", "aim", "score", "look")  # the parameters of where


def test_no_location_has_a_gradient_from_the_cross_entropy() -> None:
    model, (x, query) = ram(), images()
    logits, _ = model(x, query)
    F.cross_entropy(logits, torch.arange(3)).backward()
    for name, parameter in model.named_parameters():
        looks = name.startswith((*LOOKING, "baseline"))
        assert (parameter.grad is None) == looks, name


@pytest.mark.parametrize("glimpses", [1, 3])
def test_both_losses_train_everything(glimpses: int) -> None:
    model, (x, query) = ram(glimpses=glimpses), images()
    logits, out = model(x, query)
    ce = F.cross_entropy(logits, torch.arange(3), reduction="none")
    (ce.mean() + out["loss"](ce.detach())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The locations of all glimpses, in order."""
    places: list[Tensor] = []
    glimpse = RAM.glimpse

    def noted(self, levels, at, *rest) -> Tensor:
        places.append(at)
        return glimpse(self, levels, at, *rest)

    monkeypatch.setattr(RAM, "glimpse", noted)
    return places


def test_a_reward_moves_the_location(taken: list[Tensor]) -> None:
    """With a cross entropy of the distance to a spot, the score function finds the spot."""
    model = ram(glimpses=1, sigma=0.2)
    x, query = torch.zeros(64, 3, RAM_SIZE, RAM_SIZE), torch.zeros(64, dtype=torch.int64)
    x[:, :, 24:28, 4:8] = 1
    goal = torch.tensor([26 / 16 - 1, 6 / 16 - 1])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        _, out = model(x, query)
        optimizer.zero_grad()
        out["loss"](((taken[-1] - goal) ** 2).sum(1)).backward()
        optimizer.step()
    model.eval()(x[:1], query[:1])
    assert taken[0].mean(0).norm() < 0.15  # from the middle
    torch.testing.assert_close(taken[-1][0], goal, atol=0.2, rtol=0)


def test_score_function_has_the_exact_gradient_in_the_mean() -> None:
    """One step, a location N(mu, sigma) on a line, the reward integrated numerically."""
    sigma, count = 0.3, 200_000

    def cross_entropy(at: Tensor) -> Tensor:
        return torch.log1p(torch.exp(-3 * at)) + torch.sin(2 * at) ** 2

    mu = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64)  # in sigmas
    density_ = torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    exact = torch.autograd.grad(
        torch.trapezoid(density_ * cross_entropy(mu + sigma * grid), grid), mu
    )[0]
    at = (mu + sigma * torch.randn(count, dtype=torch.float64)).detach()
    log_prob = -(((at - mu) / sigma) ** 2) / 2
    baseline = torch.full((count,), -0.5, dtype=torch.float64)
    (found,) = torch.autograd.grad(score_function(log_prob, baseline)(cross_entropy(at)), mu)
    assert found.item() == pytest.approx(exact.item(), abs=0.02)


def test_the_loss_is_that_of_a_normal_location(taken: list[Tensor]) -> None:
    """With one glimpse, its gradient against torch's density and the advantage written out."""
    model, (x, query) = ram(glimpses=1), images()
    _, out = model(x, query)
    found, look = model.context(x, model.embedding(query))
    normal = torch.distributions.Normal(model.locate(found, look, RAM_SIZE), model.sigma)
    ce = torch.tensor([2.0, 0.5, 1.0])
    advantage = (-ce - model.baseline(look)[:, 0]).detach()
    written = -(advantage * normal.log_prob(taken[0]).sum(1)).mean()
    (expected,) = torch.autograd.grad(written, model.score.weight)
    (grad,) = torch.autograd.grad(out["loss"](ce), model.score.weight, retain_graph=True)
    torch.testing.assert_close(grad, expected)
    # The baseline is fitted, and to nothing but the rewards.
    (grad,) = torch.autograd.grad(out["loss"](ce), model.baseline.bias)
    torch.testing.assert_close(grad, -2 * advantage.mean()[None])


def test_location_is_in_the_frame_of_the_image() -> None:
    """Its cells are 4 pixels of the context wide, and of 8 where that is of half the side."""
    for size, cell in ((32, 4), (100, 8)):
        model = RAM(size, 4, 3, side=4, scales=2)
        found = torch.zeros(1, 32, size // cell, size // cell)
        found[0, :, 3, 1] = 1e3
        with torch.no_grad():
            model.score.weight.fill_(1)
            at = model.locate(found, torch.zeros(1, 128), size)
        expected = torch.tensor([[3.5 * cell * 2 / size - 1, 1.5 * cell * 2 / size - 1]])
        torch.testing.assert_close(at, expected)


def test_the_context_reaches_the_answer_through_the_locations_alone() -> None:
    """With one place to look at, what lies outside its windows does not matter."""
    model, (x, query) = ram().eval(), images(1)
    with torch.no_grad():
        model.score.weight.zero_()
    logits, out = model(x, query)
    seen = F.interpolate(out["attention"][0], scale_factor=2.0) > 0
    seen = F.max_pool2d(seen.float(), 3, 1, 1) > 0  # the bilinear margin
    other = torch.where(seen, x, torch.rand_like(x))
    torch.testing.assert_close(model(other, query)[0], logits)
    assert not torch.allclose(model(torch.rand_like(x), query)[0], logits)


@pytest.mark.parametrize("size", [30, 33, 100])
def test_ram_on_other_sizes(size: int) -> None:
    model = RAM(size, 4, 3, side=5, hidden=16)
    logits, out = model(torch.rand(2, 3, size, size), torch.tensor([0, 3]))
    (a,) = out["attention"]
    assert logits.shape == (2, 3) and a.shape == (2, 1, size // 2, size // 2)
    assert a.isfinite().all() and (a >= 0).all() and a.sum((2, 3)).max() < 1.001


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"glimpses": 0}, "glimpses 0 is impossible"),
        ({"side": 3}, "side 3 is impossible: a crop is pooled twice"),
        ({"scales": 6}, "6 scales of side 4 reach 128 pixels"),
        ({"sigma": 0}, "sigma 0 is impossible: give a number from 0.001"),
        ({"weight": -1}, "weight -1 is impossible"),
    ],
)
def test_impossible_options_of_ram(options, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        ram(**options)
