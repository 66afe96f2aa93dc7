"""The diagonal LSTM: every backend against the equations cell by cell, and what callers may do."""

import copy
import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mnistattn.errors import InputError
from mnistattn.models.attention import arnn
from mnistattn.models.attention.arnn import ARNN
from mnistattn.models.recurrence import BACKENDS, cpu, cpu_kernels, diagonal_lstm

ROOT = Path(__file__).parents[2]
F32, F64 = torch.float32, torch.float64
NAMES = ["x", "input_weight", "recurrent_weight", "offset"]
SAID = ["the features", "input_weight", "recurrent_weight", "the query or the bias"]
MAPS = [(1, 1), (1, 4), (5, 1), (2, 2), (3, 3), (3, 5), (5, 2), (2, 11)]
# batch, C, t: a tile is 8 images, and 4t and C + 2t are rarely whole panels.
SIZES = [(1, 5, 1), (3, 1, 3), (9, 3, 5), (9, 2, 8), (1, 4, 8), (9, 4, 1)]
SUBSETS = [s for size in range(1, 5) for s in itertools.combinations(range(4), size)]
TILED = (2 * cpu_kernels.TILE + 1, 6, (5, 7), 5)  # two full tiles and one image


# The fused kernels for GPUs have no float64: test_recurrence_cuda.py.
HERE = sorted(BACKENDS.keys() - {"cuda"})


@pytest.fixture(params=HERE)
def lstm(request: pytest.FixtureRequest) -> functools.partial:
    return functools.partial(diagonal_lstm, backend=request.param)


lstm_cpu = functools.partial(diagonal_lstm, backend="cpu")
lstm_reference = functools.partial(diagonal_lstm, backend="reference")


@pytest.fixture
def threads():
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poison():
    """Memory from torch that nobody has filled is NaN; the kernels' own scratch stays as it is."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def tensors(
    batch: int, channels: int, shape: tuple[int, int], t: int, dtype: torch.dtype = F64,
    scale: float = 1.0, seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """x, input_weight, recurrent_weight and offset, of sizes that show."""
    draw = functools.partial(torch.randn, dtype=dtype, generator=torch.manual_seed(seed))
    return [
        draw(batch, channels, *shape) * scale,
        draw(2, channels, 4 * t) * (1.5 / channels**0.5),
        draw(2, 2 * t, 4 * t) * (1.5 / (2 * t) ** 0.5),
        draw(batch, 2, 4 * t),
    ]


def leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [v.detach().requires_grad_() for v in inputs]


def run(lstm, inputs: list[Tensor], weights: Tensor | None = None) -> list[Tensor]:
    """hidden and the gradients of the inputs, the output weighted by `weights`."""
    inputs = leaves(inputs)
    hidden = lstm(*inputs)
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(hidden.shape, generator=generator, dtype=F64).to(hidden.dtype)
    return [hidden.detach(), *torch.autograd.grad(hidden, inputs, weights, materialize_grads=True)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for name, one, other in zip(["hidden", *NAMES], ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance, msg=lambda s, n=name: f"{n}: {s}")


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert_close(ours, theirs, rtol=0, atol=0)


def assert_same(lstm: functools.partial, ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To the bit; but a BLAS, in the reference, rounds by the alignment of what it is given."""
    within = 1e-10 if theirs[0].dtype == F64 else 1e-5
    if lstm.keywords["backend"] == "cpu":
        within = 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=within, atol=within)


def by_the_equations(
    x: Tensor, input_weight: Tensor, recurrent_weight: Tensor, offset: Tensor
) -> Tensor:
    """One cell of one image of one direction at a time."""
    t = recurrent_weight.shape[1] // 2
    m, n = x.shape[2:]
    zero = x.new_zeros(t)

    def one(image: Tensor, w_x: Tensor, w: Tensor, bias: Tensor, previous: int) -> list[Tensor]:
        h, c = {}, {}
        for i, j in itertools.product(range(m), range(n)[::-previous]):
            z = bias + image[:, i, j] @ w_x
            z = z + h.get((i, j + previous), zero) @ w[:t] + h.get((i - 1, j), zero) @ w[t:]
            o, f, i_, g = z[:t], z[t : 2 * t], z[2 * t : 3 * t], z[3 * t :]
            o, f, i_ = (1 / (1 + torch.exp(-gate)) for gate in (o, f, i_))
            c[i, j] = f * c.get((i, j + previous), zero) + i_ * torch.tanh(g)
            h[i, j] = o * torch.tanh(c[i, j])
        return torch.stack([h[i, j] for i in range(m) for j in range(n)], 1).view(t, m, n)

    return torch.stack([
        torch.cat([one(image, input_weight[s], recurrent_weight[s], bias[s], (-1, 1)[s])
                   for s in (0, 1)])
        for image, bias in zip(x, offset, strict=True)
    ])  # fmt: skip


# ---------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_values_and_gradients_follow_the_equations(shape, size) -> None:
    batch, channels, t = size
    inputs = tensors(batch, channels, shape, t)
    expected = run(by_the_equations, inputs)
    for name in HERE:
        ours = run(functools.partial(diagonal_lstm, backend=name), inputs)
        assert_close(ours, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (3, 3), (2, 3)], ids=str)
def test_gradcheck(shape, lstm) -> None:
    assert torch.autograd.gradcheck(lstm, leaves(tensors(2, 2, shape, 2)))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=str)
def test_the_reference_has_second_derivatives(shape) -> None:
    assert torch.autograd.gradgradcheck(lstm_reference, leaves(tensors(2, 2, shape, 1)))


def test_the_cpu_refuses_second_derivatives() -> None:
    inputs = leaves(tensors(2, 2, (2, 3), 1))
    first = torch.autograd.grad(lstm_cpu(*inputs).pow(2).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError):
        sum(g.pow(2).sum() for g in first).backward()


def test_hidden_state_sees_exactly_its_quadrant(lstm) -> None:
    m, n, t = 4, 5, 3
    inputs = leaves(tensors(1, 2, (m, n), t))
    hidden = lstm(*inputs)
    for i, j, s in itertools.product(range(m), range(n), (0, 1)):
        out = hidden[0, s * t : (s + 1) * t, i, j].sum()
        (gradient,) = torch.autograd.grad(out, inputs[0], retain_graph=True)
        expected = torch.zeros(m, n, dtype=torch.bool)
        expected[: i + 1, slice(j, n) if s else slice(j + 1)] = True
        assert torch.equal((gradient[0] != 0).any(0), expected), (i, j, s)


def test_perturbation_leaves_the_past_alone(lstm) -> None:
    """The same by values, to the bit."""
    inputs = tensors(1, 2, (6, 6), 3)
    before = lstm(*inputs)
    inputs[0][0, :, 3, 2] += 1
    changed = (lstm(*inputs) != before)[0].unflatten(0, (2, 3)).any(1)
    expected = torch.zeros(2, 6, 6, dtype=torch.bool)
    expected[0, 3:, 2:] = expected[1, 3:, :3] = True
    assert torch.equal(changed, expected)


def test_state_outside_the_map_is_zero(lstm) -> None:
    """With nothing but biases, a map's part at the start corner is computed as if the rest were not
    there, and the first cell is a single step from the zero state."""
    t = 3
    x, *rest = tensors(2, 2, (4, 5), t)
    x, offset = torch.zeros_like(x), rest[-1]
    hidden = lstm(x, *rest)
    torch.testing.assert_close(lstm(x[..., :2, :3], *rest)[:, :t], hidden[:, :t, :2, :3])
    torch.testing.assert_close(lstm(x[..., :3, 3:], *rest)[:, t:], hidden[:, t:, :3, 3:])
    o, _, i, g = offset.unflatten(2, (4, t)).unbind(2)
    first = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    torch.testing.assert_close(hidden[:, :t, 0, 0], first[:, 0])
    torch.testing.assert_close(hidden[:, t:, 0, -1], first[:, 1])


def test_no_leak_across_the_batch(lstm) -> None:
    inputs = tensors(9, 2, (3, 4), 3)
    x, w_x, w, offset = leaves(inputs)
    hidden = lstm(x, w_x, w, offset)
    for b in (0, 3, 7, 8):
        gradients = torch.autograd.grad(hidden[b].sum(), (x, offset), retain_graph=True)
        for gradient in gradients:
            assert gradient.flatten(1).any(1).nonzero().tolist() == [[b]]
        alone = lstm(x[b : b + 1], w_x, w, offset[b : b + 1])
        torch.testing.assert_close(alone, hidden[b : b + 1], rtol=1e-12, atol=1e-13)
    # By values, in a full tile and in the one that is not.
    within = 0 if lstm.keywords["backend"] == "cpu" else 1e-12
    for b in (4, 8):
        changed = [v.clone() for v in inputs]
        changed[0][b] += 1
        different = ((lstm(*changed) - hidden).abs() > within).flatten(1).any(1)
        assert different.nonzero().tolist() == [[b]]


# ------------------------------------------------------------------------------------ number types


@pytest.mark.parametrize("scale", [0.5, 6.0])
@pytest.mark.parametrize(
    ("t", "channels", "batch", "shape"),
    [(5, 3, 1, (12, 7)), (5, 32, 17, (25, 25)), (16, 3, 8, (25, 25)), (16, 32, 17, (12, 7)),
     (32, 3, 17, (7, 12)), (32, 32, 1, (25, 25)), (64, 3, 8, (12, 7)), (64, 32, 17, (9, 10))],
    ids=str,
)  # fmt: skip
def test_float32_is_as_exact_as_the_reference(t, channels, batch, shape, scale) -> None:
    """The kernels have a tanh of their own, and a scale of 6 saturates most gates. A chaotic map
    amplifies any rounding, so the measure is what plain float32 loses."""
    inputs = tensors(batch, channels, shape, t, F32, scale)
    exact = run(lstm_reference, [v.double() for v in inputs])
    plain, ours = run(lstm_reference, inputs), run(lstm_cpu, inputs)
    for name, one, other, truth in zip(["hidden", *NAMES], ours, plain, exact, strict=True):
        assert one.dtype == F32
        error, allowed = ((v.double() - truth).norm() / truth.norm() for v in (one, other))
        assert error < 3 * allowed + 2e-6, name
        assert error < 1e-4 and allowed < 1e-4, name


def test_saturated_gates_are_exact(lstm) -> None:
    """Open gates: h is tanh of the sum of the g = 1 written; closed ones: h is nothing."""
    x, w_x, w, offset = tensors(1, 1, (3, 4), 1, F32)
    x.fill_(1e6), w_x.fill_(1), w.zero_(), offset.zero_()
    hidden = lstm(x, w_x, w, offset)
    expected = torch.arange(1.0, 5).tanh().expand(3, 4)
    expected = torch.stack((expected, expected.flip(1)))
    torch.testing.assert_close(hidden[0], expected, rtol=0, atol=1e-6)
    assert lstm(-x, w_x, w, offset).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow", ["x", "all"])
def test_half_precision_is_computed_in_float32(narrow, dtype, lstm) -> None:
    x, *rest = (v.to(dtype) for v in tensors(3, 4, (5, 6), 5))
    weights = torch.randn(3, 10, 5, 6).to(dtype)
    expected = run(lstm, [v.float() for v in (x, *rest)], weights.float())
    ours = run(lstm, [x, *(rest if narrow == "all" else [v.float() for v in rest])], weights)
    assert ours[0].dtype == ours[1].dtype == dtype
    expected = [e.to(o.dtype) for e, o in zip(expected, ours, strict=True)]
    if lstm.keywords["backend"] == "cpu":
        assert_equal(ours, expected)
    else:
        assert_close(ours, expected)


def test_autocast_changes_nothing(lstm) -> None:
    inputs = tensors(3, 4, (5, 6), 5, F32)
    weights = torch.randn(3, 10, 5, 6)
    asked = leaves(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = lstm(*asked)
    assert hidden.dtype == F32
    ours = [hidden, *torch.autograd.grad(hidden, asked, weights)]
    assert_same(lstm, ours, run(lstm, inputs, weights))


# ----------------------------------------------------------------------- how a caller passes them


def test_hidden_is_channels_last(lstm) -> None:
    hidden = lstm(*tensors(3, 4, (5, 6), 5))
    assert hidden.is_contiguous(memory_format=torch.channels_last)


X_VIEWS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: x[1::2, 1:-1, ::2, 1:],
    "transposed": lambda x: x.mT,
    "batch_and_channels_swapped": lambda x: x.transpose(0, 1),
    "expanded_batch": lambda x: x[:1].expand(5, -1, -1, -1),
    "expanded_map": lambda x: x[..., :1, :1].expand(-1, -1, 3, 4),
    "expanded_channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "overlapping": lambda x: x.as_strided((4, 6, 4, 7), (1, 28, 7, 1)),
}


@pytest.mark.parametrize("view", X_VIEWS)
def test_strides_of_x(view, lstm) -> None:
    x = X_VIEWS[view](tensors(4, 6, (4, 7), 5)[0])
    _, *rest = tensors(*x.shape[:2], x.shape[2:], 5)
    assert_same(lstm, run(lstm, [x, *rest]), run(lstm, [x.contiguous(), *rest]))


def test_strides_of_the_weights(lstm) -> None:
    inputs = tensors(3, 4, (4, 5), 3)
    views = [
        [inputs[0], *(v.mT.contiguous().mT for v in inputs[1:])],
        [inputs[0], *(torch.stack((v, v), -1)[..., 0] for v in inputs[1:])],
        [inputs[0], *(v.transpose(0, 1).contiguous().transpose(0, 1) for v in inputs[1:])],
    ]
    for view in views:
        assert not any(v.is_contiguous() for v in view[1:])
        assert_same(lstm, run(lstm, view), run(lstm, inputs))
    view = [inputs[0], *(v[:1].expand(2, -1, -1) for v in inputs[1:3]),
            inputs[3][:, :1].expand(-1, 2, -1)]  # fmt: skip
    assert_same(lstm, run(lstm, view), run(lstm, [v.contiguous() for v in view]))


def test_strides_of_the_output_gradient(lstm) -> None:
    inputs = tensors(3, 4, (4, 5), 3)
    weights = torch.randn(3, 6, 4, 5, dtype=F64)
    views = [
        weights, weights.contiguous(memory_format=torch.channels_last), weights[:, :1, :1],
        weights[:1, :, :1, :1], torch.stack((weights, weights), -1)[..., 0],
        weights.mT.contiguous().mT, weights[..., :1], weights.new_ones(1, 1, 1, 1),
    ]  # fmt: skip
    for view in views:
        view = view.expand(3, 6, 4, 5)
        dense = view.clone(memory_format=torch.contiguous_format)
        assert_same(lstm, run(lstm, inputs, view), run(lstm, inputs, dense))


def test_inputs_stay_as_they_are(lstm) -> None:
    inputs = tensors(3, 4, (4, 5), 3)
    before = copy.deepcopy(inputs)
    run(lstm, inputs)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_forms_of_the_offset(dtype, lstm) -> None:
    x, w_x, w, offset = tensors(3, 4, (4, 5), 3, dtype)
    shared = offset[0]
    dense = run(lstm, [x, w_x, w, shared.expand(3, -1, -1).contiguous()])
    one = run(lstm, [x, w_x, w, shared])
    assert_same(lstm, one[:4], dense[:4])
    torch.testing.assert_close(one[4], dense[4].sum(0))
    absent, zero = lstm(x, w_x, w), lstm(x, w_x, w, torch.zeros_like(offset))
    assert_same(lstm, [absent, lstm(x, w_x, w, None)], [zero, zero])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [*MAPS, (6, 9)], ids=str)
def test_no_grad_gives_the_same_bits(shape, dtype, lstm) -> None:
    """The cpu then keeps two cells at a time instead of all."""
    inputs = tensors(9, 3, shape, 5, dtype)
    expected = lstm(*leaves(inputs))
    assert expected.requires_grad
    with torch.no_grad():
        assert_same(lstm, [lstm(*leaves(inputs))], [expected])
    with torch.inference_mode():
        assert_same(lstm, [lstm(*inputs)], [expected])
    assert_same(lstm, [lstm(*inputs)], [expected])


def test_gradients_only_where_asked(lstm) -> None:
    inputs = tensors(3, 4, (4, 5), 3)
    expected = run(lstm, inputs, torch.ones(3, 6, 4, 5, dtype=F64))[1:]
    assert not lstm(*inputs).requires_grad
    for subset in SUBSETS:
        asked = [v.detach().requires_grad_(k in subset) for k, v in enumerate(inputs)]
        lstm(*asked).sum().backward()
        for k, (tensor, gradient) in enumerate(zip(asked, expected, strict=True)):
            assert (tensor.grad is not None) == (k in subset), (subset, k)
            if k in subset:
                assert_same(lstm, [tensor.grad], [gradient])


def test_an_empty_batch(lstm) -> None:
    hidden, x, *rest = run(lstm, tensors(0, 3, (4, 5), 2))
    assert hidden.shape == (0, 4, 4, 5) and x.shape == (0, 3, 4, 5)
    assert rest[2].shape == (0, 2, 8) and not any(v.any() for v in rest)
    with torch.no_grad():
        assert lstm(*tensors(0, 3, (4, 5), 2)).shape == (0, 4, 4, 5)


# ------------------------------------------------------------------------------- threads, processes


@pytest.mark.parametrize("dtype", [F32, F64])
def test_same_bits_on_any_number_of_threads(dtype, threads) -> None:
    inputs = tensors(*TILED, dtype)
    results = []
    for count in (1, 2, 3, 16):
        threads(count)
        results.append([*run(lstm_cpu, inputs), lstm_cpu(*inputs)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_same_bits_from_two_calls_at_once(threads) -> None:
    threads(2)
    each = [tensors(*TILED, F32, seed=seed) for seed in (0, 1)]
    expected = [run(lstm_cpu, inputs) for inputs in each]
    together = threading.Barrier(2)

    def work(inputs: list[Tensor]) -> list[list[Tensor]]:
        torch.set_num_threads(2)
        together.wait(30)
        return [run(lstm_cpu, inputs) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for found, right in zip(pool.map(work, each), expected, strict=True):
            for result in found:
                assert_equal(result, right)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_forked_process(threads) -> None:
    """As a loader's worker is: the parent's threads are not there. The backward is called as the
    operator it is, as torch's own autograd may refuse to run in a fork."""
    threads(2)
    inputs = tensors(*TILED, F32)
    weights = torch.ones(TILED[0], *TILED[2], 2 * TILED[3])
    x = inputs[0].permute(0, 2, 3, 1).contiguous()

    def both() -> list[Tensor]:
        with torch.no_grad():
            kept = cpu.forward(x, *inputs[1:], True)
            return [kept[0], *cpu.backward(weights, x, *inputs[1:3], *kept)]

    expected = both()
    assert cpu._pool.cache_info().currsize, "the parent must have had threads"

    def work() -> None:
        assert all(map(torch.equal, both(), expected))

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == 0
    assert all(map(torch.equal, both(), expected)), "the parent goes on"


@pytest.mark.parametrize("dtype", [F32, F64])
def test_no_memory_is_read_before_it_is_written(dtype, request) -> None:
    cases = [tensors(batch, channels, shape, t, dtype) for shape in MAPS
             for batch, channels, t in SIZES[:4]]  # fmt: skip
    clean = [(run(lstm_cpu, inputs), lstm_cpu(*inputs)) for inputs in cases]
    request.getfixturevalue("poison")
    assert torch.empty(3).new_empty(9).isnan().all()
    for inputs, (kept, without) in zip(cases, clean, strict=True):
        assert_equal(run(lstm_cpu, inputs), kept)
        assert torch.equal(lstm_cpu(*inputs), without)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(4), ids=NAMES)
def test_nan_and_infinity_are_named(place, value) -> None:
    """At any place: every element of the small tensors, every cell of the map."""
    inputs = tensors(2, 2, (3, 4), 2, F32)
    count = inputs[place].numel()
    missed = []
    for at in range(count):
        wrong = [v.clone().requires_grad_(at % 2 == 0) for v in inputs]
        wrong[place].data.view(-1)[at] = value
        try:
            lstm_cpu(*wrong)
            missed.append(at)
        except FloatingPointError as error:
            assert str(error).endswith(f"in {SAID[place]}")
    assert not missed, f"{len(missed)} of {count} places"


@pytest.mark.parametrize("cell", [(0, 0), (0, -1), (-1, 0), (-1, -1)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("image", [0, 8])
def test_nan_in_a_corner_is_named(image, dtype, cell) -> None:
    """Of large maps, in a full tile and in the one that is not; two culprits are both named."""
    inputs = tensors(9, 3, (12, 13), 5, dtype)
    inputs[0][image, 1][cell] = float("nan")
    with pytest.raises(FloatingPointError, match="in the features$"):
        lstm_cpu(*inputs)
    inputs[3][image, 1, 7] = float("nan")
    with pytest.raises(FloatingPointError, match="in the features and in the query or the bias$"):
        lstm_cpu(*inputs)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-300, 1.0, 100.0, 1e15, -1e15])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_finite_inputs_are_never_refused(dtype, value) -> None:
    inputs = [torch.full_like(v, value) for v in tensors(9, 3, (4, 5), 5, dtype)]
    signs = [torch.randn_like(v).sign() for v in inputs]
    for tried in (inputs, [v * s for v, s in zip(inputs, signs, strict=True)]):
        assert lstm_cpu(*tried).isfinite().all()
        if abs(value) <= 100:
            assert all(v.isfinite().all() for v in run(lstm_cpu, tried))


def test_wrong_shapes_are_refused(lstm) -> None:
    x, w_x, w, offset = tensors(3, 2, (4, 5), 2)
    for wrong in [
        (x[0], w_x, w, offset),
        (x[:, :1], w_x, w, offset),
        (x[:, :0], w_x[:, :0], w, offset),
        (x[..., :0], w_x, w, offset),
        (x[..., :0, :], w_x, w, offset),
        (x, w_x[:1], w, offset),
        (x, w_x[:, :1], w, offset),
        (x, w_x[..., :4], w, offset),
        (x, w_x[0], w, offset),
        (x, w_x, w[:1], offset),
        (x, w_x, w[:, :3], offset),
        (x, w_x, w[..., :7], offset),
        (x, w_x, w[0], offset),
        (x, w_x[..., :0], w[:, :0, :0], offset[..., :0]),
        (x, w_x, w, offset[..., :4]),
        (x, w_x, w, offset[:2]),
        (x, w_x, w, offset[:1]),
        (x, w_x, w, offset[:, :1]),
        (x, w_x, w, offset[0, 0]),
        (x, w_x, w, offset[..., None]),
    ]:
        with pytest.raises(ValueError, match="must be"):
            lstm(*wrong)


def test_unknown_backends_are_refused() -> None:
    inputs = tensors(1, 2, (2, 2), 1)
    with pytest.raises(InputError, match="'warp'.*reference, cpu"):
        diagonal_lstm(*inputs, backend="warp")
    meta = [v.to("meta") for v in inputs]
    with pytest.raises(InputError, match="meta"):
        lstm_cpu(*meta)
    assert diagonal_lstm(*meta).shape == (1, 2, 2, 2)


@pytest.mark.parametrize("sizes", [(2, 5, 4, 7, 3), (1, 32, 12, 12, 16), (3, 1, 1, 1, 1),
                                   (2, 3, 6, 1, 2), (0, 2, 3, 3, 2)])  # fmt: skip
def test_the_meta_device_counts_the_definition_s_multiplications(sizes):
    batch, channels, rows, columns, t = sizes
    shapes = (batch, channels, rows, columns), (2, channels, 4 * t), (2, 2 * t, 4 * t)
    found = []
    for device in ("cpu", "meta"):
        with FlopCounterMode(display=False) as counter:
            hidden = diagonal_lstm(
                *(torch.zeros(shape, device=device) for shape in shapes), backend="reference"
            )
        assert hidden.is_contiguous(memory_format=torch.channels_last)
        found.append((counter.get_total_flops(), hidden.shape, hidden.dtype))
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------- torch around it


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_forward(keep) -> None:
    x, *rest = tensors(3, 2, (3, 4), 3)
    arguments = [x.permute(0, 2, 3, 1), *rest]
    if keep:
        arguments = leaves(arguments)
    torch.library.opcheck(cpu.forward, (*arguments, keep))


def test_opcheck_backward() -> None:
    x, *rest = tensors(3, 2, (3, 4), 3)
    x = x.permute(0, 2, 3, 1)
    kept = cpu.forward(x, *rest, True)
    torch.library.opcheck(cpu.backward, (torch.randn_like(kept[0]), x, *rest[:2], *kept))


def test_torch_compile(lstm) -> None:
    inputs = tensors(3, 2, (2, 2), 3)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    try:
        assert_close(run(compiled, inputs), run(lstm, inputs))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), lstm(*inputs))
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize(("trained", "used"), [("cpu", "reference"), ("reference", "cpu")])
def test_a_saved_model_runs_on_any_backend(trained, used, monkeypatch, tmp_path) -> None:
    def choose(backend: str) -> None:
        chosen = functools.partial(diagonal_lstm, backend=backend)
        monkeypatch.setattr(arnn, "diagonal_lstm", chosen)

    x, query = torch.randn(3, 3, 6, 7), torch.randn(3, 2)
    model, other = (ARNN(3, 2, last=False, hidden=5, context=4) for _ in range(2))
    choose(trained)
    model(x, query).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
        expected = model(x, query)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    choose(used)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(other(x, query), expected)


def gradients(rank: int | None) -> list[Tensor]:
    """Of all of the batch, or (rank) of half of it, averaged by DDP; in float64, to tell apart what
    is wrong from what is rounded."""
    torch.manual_seed(0)
    model = ARNN(3, 2, last=False, hidden=3, context=4).double()
    called = model
    x, query, wanted = (torch.randn(4, *shape, dtype=F64) for shape in ((3, 5, 6), (2,), (1, 5, 6)))
    if rank is not None:
        x, query, wanted = (v.chunk(2)[rank] for v in (x, query, wanted))
        called = torch.nn.parallel.DistributedDataParallel(model)
    (called(x, query) - wanted).square().mean().backward()
    return [p.grad for p in model.parameters()]


def process_of_two(folder: Path) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    found = {str(i): g.contiguous() for i, g in enumerate(gradients(rank))}
    save_file(found, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_training_gives_the_gradients_of_one_process(tmp_path, as_ranks) -> None:
    assert [code for code, *_ in as_ranks(2, [__file__, tmp_path])] == [0, 0]
    expected = gradients(None)
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for i, gradient in enumerate(expected):
            torch.testing.assert_close(found[str(i)], gradient, rtol=1e-10, atol=1e-12)


def test_without_the_compiler_the_reference_computes() -> None:
    code = (
        "import torch; from mnistattn.models.network import build\n"
        "network = build('arnn', 100, 10, 5)\n"
        "network(torch.rand(2, 3, 100, 100), torch.tensor([1, 2]))[0].sum().backward()"
    )
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1", OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# For the test above: a spawned process may not find the test file as a module.
if __name__ == "__main__":
    process_of_two(Path(sys.argv[1]))
