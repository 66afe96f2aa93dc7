"""AttentionRNN against the paper's equations, written out pixel by pixel."""

import itertools

import pytest
import torch
from torch import Tensor

from mnistattn.models.attention import diagonal_lstm as diagonal_lstm_module
from mnistattn.models.attention.arnn import ARNN
from mnistattn.models.attention.diagonal_lstm import diagonal_lstm

MAPS = [(1, 1), (1, 4), (4, 1), (2, 2), (3, 5), (5, 3), (5, 5)]


@pytest.fixture(params=["fused", "autograd"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations of diagonal_lstm: the CPU's and the other devices'."""
    if request.param == "fused":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(diagonal_lstm_module, "numba", None)
    return request.param


def random_model(channels: int = 3, query: int = 2, t: int = 3, *, last: bool = False) -> ARNN:
    """A float64 module all of whose parameters, biases too, are random and of a size that shows."""
    model = ARNN(channels, query, last=last, hidden=t, context=4).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def by_the_equations(model: ARNN, x: Tensor, query: Tensor) -> Tensor:
    """mu of one pixel after another, for one image at a time; nothing shared with the module but
    its parameters."""
    t = model.hidden
    zero = x.new_zeros(t)
    images = []
    for image, q in zip(x, query, strict=True):
        channels, m, n = image.shape

        def local_context(i: int, j: int, image: Tensor = image, q: Tensor = q) -> Tensor:
            total = x.new_zeros(model.context.out_channels)
            for di, dj in itertools.product((-1, 0, 1), repeat=2):
                if 0 <= i + di < image.shape[1] and 0 <= j + dj < image.shape[2]:
                    kernel = model.context.weight[:, :, di + 1, dj + 1]
                    total = total + kernel @ image[:, i + di, j + dj]
            return torch.cat((total, q))

        def lstm(cells: dict[tuple[int, int], Tensor], direction: int) -> dict:
            k_x, bias = model.input_weight[direction], model.input_bias[direction]
            k_left, k_up = model.recurrent_weight[direction].split(t)
            h, c = {}, {}
            for i, j in sorted(cells):
                a = k_x @ cells[i, j] + bias
                a = a + h.get((i, j - 1), zero) @ k_left + h.get((i - 1, j), zero) @ k_up
                o, f, g_in, g = a[:t], a[t : 2 * t], a[2 * t : 3 * t], a[3 * t :]
                c[i, j] = torch.sigmoid(f) * c.get((i, j - 1), zero)
                c[i, j] = c[i, j] + torch.sigmoid(g_in) * torch.tanh(g)
                h[i, j] = torch.sigmoid(o) * torch.tanh(c[i, j])
            return h

        cells = {(i, j): local_context(i, j) for i in range(m) for j in range(n)}
        h_left = lstm(cells, 0)
        mirrored = lstm({(i, n - 1 - j): v for (i, j), v in cells.items()}, 1)
        rows = []
        for i in range(m):
            row = []
            for j in range(n):
                h_right = mirrored[i - 1, n - 1 - j] if i else zero
                mu_l, sigma_l = model.left(h_left[i, j])
                mu_r, sigma_r = model.right(h_right)
                sigma_l, sigma_r = torch.log1p(sigma_l.exp()), torch.log1p(sigma_r.exp())
                row.append(model.combine(torch.stack((mu_l, sigma_l, mu_r, sigma_r))))
            rows.append(torch.stack(row))
        images.append(torch.stack(rows).permute(2, 0, 1))
    return torch.stack(images)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", MAPS)
def test_values_and_gradients_follow_the_equations(
    shape: tuple[int, int], batch: int, implementation: str
) -> None:
    torch.manual_seed(0)
    model = random_model()
    x = torch.randn(batch, 3, *shape, dtype=torch.float64, requires_grad=True)
    query = torch.randn(batch, 2, dtype=torch.float64, requires_grad=True)
    names = ["x", "query", *(name for name, _ in model.named_parameters())]
    inputs = [x, query, *model.parameters()]
    ours, theirs = model.mean(x, query), by_the_equations(model, x, query)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(x, query), theirs.sigmoid(), rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, inputs, weights, materialize_grads=True)
    expected = torch.autograd.grad(theirs, inputs, weights, materialize_grads=True)
    for name, one, other in zip(names, gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda s, n=name: n + s)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (3, 4), (4, 2)])
def test_diagonal_lstm_gradcheck(shape: tuple[int, int], implementation: str) -> None:
    torch.manual_seed(1)
    gates = torch.randn(*shape, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(diagonal_lstm, (gates, weight, offset))


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(2)
    model = ARNN(3, 2, last=True, hidden=4, context=4)
    out = model(torch.randn(2, 3, 4, 5), torch.randn(2, 2))
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        if name == "combine.bias":  # a softmax does not see a shift
            continue
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


def test_hidden_state_sees_exactly_its_quadrant(implementation: str) -> None:
    torch.manual_seed(3)
    m, n = 4, 5
    gates = torch.randn(m, n, 1, 2, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 12, dtype=torch.float64)
    hidden = diagonal_lstm(gates, weight)
    for i, j, direction in itertools.product(range(m), range(n), (0, 1)):
        (gradient,) = torch.autograd.grad(
            hidden[i, j, 0, direction].sum(), gates, retain_graph=True
        )
        seen = (gradient[:, :, 0] != 0).any(-1)
        expected = torch.zeros(m, n, 2, dtype=torch.bool)
        columns = slice(0, j + 1) if direction == 0 else slice(j, n)
        expected[: i + 1, columns, direction] = True
        assert torch.equal(seen, expected), (i, j, direction)


def dilated(positions: Tensor) -> Tensor:
    """The 3 x 3 neighbourhoods of K^c around the positions."""
    return torch.nn.functional.max_pool2d(positions[None].float(), 3, 1, 1)[0] > 0


@pytest.mark.parametrize("halves", ["left", "right", "both"])
def test_attention_sees_exactly_the_allowed_positions(halves: str) -> None:
    torch.manual_seed(4)
    m, n = 6, 7
    model = random_model()
    with torch.no_grad():  # f_comb reads (mu_l, sigma_l, mu_r, sigma_r)
        if halves == "left":
            model.combine.weight[:, 2:] = 0
        elif halves == "right":
            model.combine.weight[:, :2] = 0
    x = torch.randn(1, 3, m, n, dtype=torch.float64, requires_grad=True)
    mu = model.mean(x, torch.randn(1, 2, dtype=torch.float64))
    for i, j in itertools.product(range(m), range(n)):
        (gradient,) = torch.autograd.grad(mu[0, 0, i, j], x, retain_graph=True)
        seen = (gradient[0] != 0).any(0)
        allowed = torch.zeros(m, n, dtype=torch.bool)
        if halves != "right":
            allowed[: i + 1, : j + 1] = True
        if halves != "left":
            allowed[:i, j:] = True
        assert torch.equal(seen, dilated(allowed)), (i, j)


def test_perturbation_leaves_the_past_alone() -> None:
    """The same by values: a changed pixel changes nothing whose quadrants lack it, to the bit."""
    torch.manual_seed(5)
    model = random_model()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    query = torch.randn(1, 2, dtype=torch.float64)
    before = model.mean(x, query)[0, 0]
    x[0, :, 3, 3] += 1
    changed = model.mean(x, query)[0, 0] != before
    expected = torch.zeros(6, 6, dtype=torch.bool)
    for p, q in itertools.product((2, 3, 4), repeat=2):  # where X^c changes
        expected[p:, q:] = True  # the left LSTM's readers
        expected[p + 1 :, : q + 1] = True  # the right LSTM's, a row further down
    assert torch.equal(changed, expected)


def test_state_outside_the_map_is_zero(implementation: str) -> None:
    """Cells without neighbours take a single step from the zero state, whatever the biases, and
    a map is not affected by how much room its diagonals leave."""
    torch.manual_seed(6)
    t = 3
    gates = torch.zeros(4, 5, 2, 2, 4 * t, dtype=torch.float64)
    weight = torch.randn(2, 2 * t, 4 * t, dtype=torch.float64)
    offset = torch.randn(2, 2, 4 * t, dtype=torch.float64)  # nothing but nonzero biases
    hidden = diagonal_lstm(gates, weight, offset)

    def step(direction: int, left: tuple, up: tuple) -> tuple[Tensor, Tensor]:
        state = torch.cat((left[0], up[0]), dim=-1)
        o, f, i, g = (state @ weight[direction] + offset[:, direction]).split(t, dim=-1)
        c = f.sigmoid() * left[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    outside = (torch.zeros(2, t, dtype=torch.float64),) * 2
    for direction, edge in ((0, 0), (1, 4)):
        inward = 1 if direction == 0 else -1
        first = step(direction, outside, outside)
        second = step(direction, first, outside)
        below = step(direction, outside, first)
        torch.testing.assert_close(hidden[0, edge, :, direction], first[0])
        torch.testing.assert_close(hidden[0, edge + inward, :, direction], second[0])
        torch.testing.assert_close(hidden[1, edge, :, direction], below[0])
    # A sub-map that holds the start corner is computed as if the rest were not there.
    torch.testing.assert_close(diagonal_lstm(gates[:2, :3], weight, offset)[..., 0, :],
                               hidden[:2, :3, :, 0])  # fmt: skip
    torch.testing.assert_close(diagonal_lstm(gates[:3, 3:], weight, offset)[..., 1, :],
                               hidden[:3, 3:, :, 1])  # fmt: skip


def test_no_leak_across_the_batch() -> None:
    torch.manual_seed(7)
    model = random_model()
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    query = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    mu = model.mean(x, query)
    for b in range(3):
        gradients = torch.autograd.grad(mu[b].sum(), (x, query), retain_graph=True)
        for gradient in gradients:
            touched = gradient.flatten(1).ne(0).any(1)
            assert touched.tolist() == [k == b for k in range(3)]
        torch.testing.assert_close(model.mean(x[b : b + 1], query[b : b + 1]), mu[b : b + 1])


def test_activations() -> None:
    torch.manual_seed(8)
    x, query = torch.randn(2, 3, 4, 5), torch.randn(2, 6)
    last = ARNN(3, 6, last=True)(x, query)
    assert last.shape == (2, 1, 4, 5) and (last > 0).all()
    torch.testing.assert_close(last.sum((1, 2, 3)), torch.ones(2))
    inner = ARNN(3, 6, last=False)(x, query)
    assert inner.shape == (2, 1, 4, 5) and (inner > 0).all() and (inner < 1).all()


@pytest.mark.parametrize("t", [5, 16, 32])
def test_float32_agrees_with_float64(t: int, implementation: str) -> None:
    """Inputs large enough to saturate gates: float32 has its own tanh."""
    torch.manual_seed(9)
    gates = (torch.randn(7, 9, 3, 2, 4 * t, dtype=torch.float64) * 6).requires_grad_()
    weight = (torch.randn(2, 2 * t, 4 * t, dtype=torch.float64) / t).requires_grad_()
    offset = torch.randn(3, 2, 4 * t, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 9, 3, 2, t, dtype=torch.float64)
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden = diagonal_lstm(*(v.to(dtype) for v in (gates, weight, offset)))
        assert hidden.dtype == dtype
        gradients = torch.autograd.grad(hidden, (gates, weight, offset), weights.to(dtype))
        results.append([hidden.double(), *gradients])
    for single, double in zip(*results, strict=True):
        # A saturated gate has a small difference of 1 and itself in its gradient.
        torch.testing.assert_close(single, double, rtol=1e-3, atol=2e-5 * double.abs().max().item())
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=2e-6)


def test_a_nan_stays_one(implementation: str) -> None:
    gates = torch.zeros(2, 2, 1, 2, 8)
    gates[0, 0, 0, 0, 0] = float("nan")
    hidden = diagonal_lstm(gates, torch.ones(2, 4, 8))
    assert hidden[..., 0, :].isnan()[1, 1].any() and not hidden[..., 1, :].isnan().any()


def test_no_grad_gives_the_same_values(implementation: str) -> None:
    torch.manual_seed(10)
    model = random_model()
    x, query = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 2).double()
    expected = model(x, query)
    with torch.no_grad():
        torch.testing.assert_close(model(x, query), expected, rtol=0, atol=0)


def test_autocast() -> None:
    torch.manual_seed(11)
    model = ARNN(3, 6, last=False)
    x, query = torch.randn(2, 3, 5, 4), torch.randn(2, 6)
    expected = model(x, query)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, query)
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_shapes_are_refused() -> None:
    gates, weight = torch.zeros(2, 2, 1, 2, 8), torch.zeros(2, 4, 8)
    for wrong in (
        (gates[..., 0, :], weight),
        (gates, weight[:, :3]),
        (gates, weight, torch.zeros(1, 8)),
    ):
        with pytest.raises(ValueError, match="must be"):
            diagonal_lstm(*wrong)
