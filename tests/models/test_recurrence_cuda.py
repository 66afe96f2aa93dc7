"""The fused kernels for GPUs, and the graphs where they do not fit: against the reference.

On a machine with a GPU all of this runs on it. Without one the kernels run in Triton's interpreter
(see conftest.py), on small maps, and what only a GPU can do is skipped, saying so.
"""

import copy
import functools
import json
import os
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnistattn.errors import InputError, MnistattnWarning
from mnistattn.models import recurrence
from mnistattn.models.attention import arnn
from mnistattn.models.recurrence import cuda, diagonal_lstm, graphed, reference

pytest.importorskip("triton", reason="Triton is not installed")

GPU = torch.cuda.is_available()
if not GPU and not cuda.interpreted():
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if GPU else "cpu")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
WITHIN = {F32: 1e-5, BF16: 1e-2}
NAMES = ["hidden", "x", "input_weight", "recurrent_weight", "offset"]
MAPS = [(1, 1), (1, 4), (5, 1), (2, 2), (3, 5), (7, 4), (2, 9), (6, 6)]
SIZES = [(2, 32, 16), (3, 3, 8), (1, 20, 32), (1, 4, 64), (5, 1, 11)]  # batch, C, t
IN_USE = [(50, 50), (25, 25), (12, 12), (56, 56), (112, 112)]
TALL = [(25, 2), (50, 1), (65, 1), (112, 2), (128, 1)]
on_gpu = pytest.mark.skipif(not GPU, reason="there is no GPU here")

fused = functools.partial(diagonal_lstm, backend="cuda")
plain = functools.partial(diagonal_lstm, backend="reference")


def tensors(batch: int, channels: int, shape: tuple[int, int], t: int, seed: int = 0,
            dtype: torch.dtype = F32) -> list[Tensor]:  # fmt: skip
    """x of a type, and float32 input_weight, recurrent_weight and offset."""
    draw = functools.partial(torch.randn, generator=torch.manual_seed(seed))
    found = [
        draw(batch, channels, *shape),
        draw(2, channels, 4 * t) * (1.5 / channels**0.5),
        draw(2, 2 * t, 4 * t) * (1.0 / (2 * t) ** 0.5),
        draw(batch, 2, 4 * t),
    ]
    return [found[0].to(DEVICE, dtype), *(v.to(DEVICE) for v in found[1:])]


def run(lstm, inputs: list[Tensor], weights: Tensor | None = None) -> list[Tensor]:
    """hidden and the gradients of the inputs, the output weighted by `weights`."""
    inputs = [v.detach().requires_grad_() for v in inputs]
    hidden = lstm(*inputs)
    if weights is None:
        weights = torch.randn(hidden.shape, generator=torch.manual_seed(1))
    weights = weights.to(hidden.device, hidden.dtype)
    return [hidden.detach(), *torch.autograd.grad(hidden, inputs, weights, materialize_grads=True)]


def errors(ours: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """|ours - truth| / |truth| of each; NaN if anything is not a number."""
    return {
        name: ((one.double() - other).norm() / other.norm().clamp(min=1e-300)).item()
        for name, one, other in zip(NAMES, ours, truth, strict=True)
    }


def assert_true(inputs: list[Tensor], lstm=fused, dtype: torch.dtype | None = None) -> None:
    """Values and gradients within what the type of x allows."""
    within = WITHIN[dtype or inputs[0].dtype]
    found, truth = run(lstm, inputs), run(plain, [v.double() for v in inputs])
    assert [v.dtype for v in found] == [inputs[0].dtype] * 2 + [F32] * 3
    wrong = {name: e for name, e in errors(found, truth).items() if not e < within}
    assert not wrong, wrong


@pytest.fixture(autouse=True)
def poison():
    """Memory from torch that nobody has filled is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(9, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


# ------------------------------------------------------------------------------------- the kernels


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_values_and_gradients_are_the_reference_s(shape, size, dtype) -> None:
    if not GPU and (MAPS.index(shape) + SIZES.index(size) + (dtype == BF16)) % len(SIZES):
        pytest.skip("in the interpreter each map takes one of the five sizes of either type")
    batch, channels, t = size
    assert_true(tensors(batch, channels, shape, t, dtype=dtype))


@pytest.mark.parametrize("t", [1, 2, 3, 5])
def test_small_states(t) -> None:
    """In float32 alone: of so few numbers, bfloat16's rounding leaves more than a hundredth."""
    assert_true(tensors(3, 2, (3, 5), t))


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("shape", IN_USE, ids=str)
def test_maps_in_use(shape, dtype) -> None:
    if not GPU and (dtype == F32, shape) not in ((True, (12, 12)), (False, (25, 25))):
        pytest.skip("the interpreter would take minutes")
    assert_true(tensors(65 if GPU else 1, 32, shape, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("shape", TALL, ids=str)
def test_tall_maps(shape, dtype) -> None:
    if not GPU and (dtype == F32, shape) not in ((True, (25, 2)), (False, (65, 1))):
        pytest.skip("the interpreter would take minutes")
    assert_true(tensors(1, 3, shape, 8, dtype=dtype))


@on_gpu
@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@pytest.mark.parametrize("t", [8, 16, 32, 64])
@pytest.mark.parametrize("shape", [(50, 50), (25, 25), (12, 12), (6, 6), (112, 112)], ids=str)
def test_full_batches_on_a_gpu(shape, t, dtype) -> None:
    """Several images a tile too, and tiles that are not full."""
    assert_true(tensors(301 if shape[0] < 50 else 66, 32, shape, t, dtype=dtype))


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("images", [2, 4])
def test_every_plan_computes_the_same(images, ahead, hold, monkeypatch) -> None:
    """Several images in a tile must not see each other, and the last tile is not full."""
    made = cuda.plan(5, 6, 16, F32, 5, 1, 1 << 20, False)
    other = cuda.Plan(8, images, made.channels, made.width, hold, ahead, made.warps)
    monkeypatch.setattr(cuda, "_plan_for", lambda *_: other)
    assert_true(tensors(5, 6, (5, 2), 16))


def test_plans_fill_the_processors_before_the_tiles() -> None:
    few = cuda.plan(6, 32, 16, BF16, 64, 132, 1 << 18, False)
    many = cuda.plan(6, 32, 16, BF16, 4096, 132, 1 << 18, False)
    assert (few.rows * few.images, many.rows * many.images) == (16, 64)
    for rows in range(1, 129):
        made = cuda.plan(rows, 32, 16, F32, 64, 132, 1 << 18, True)
        assert made.rows >= rows and made.rows * made.images >= 16


def test_cells_see_exactly_their_quadrant() -> None:
    """And only cells of their own image."""
    m, n = 6, 6
    inputs = tensors(3, 2, (m, n), 3)
    before = fused(*inputs)
    inputs[0][1, :, 3, 2] += 1
    changed = (fused(*inputs) != before).unflatten(1, (2, 3)).any(2).cpu()
    expected = torch.zeros(3, 2, m, n, dtype=torch.bool)
    expected[1, 0, 3:, 2:] = expected[1, 1, 3:, :3] = True
    assert torch.equal(changed, expected)


def test_saturated_gates_are_exact() -> None:
    """Open gates: h is tanh of the sum of the g = 1 written; closed ones: h is nothing."""
    x, w_x, w, offset = tensors(1, 1, (3, 4), 1)
    x.fill_(1e6), w_x.fill_(1), w.zero_(), offset.zero_()
    hidden = fused(x, w_x, w, offset)
    expected = torch.arange(1.0, 5).tanh().expand(3, 4)
    expected = torch.stack((expected, expected.flip(1))).to(DEVICE)
    torch.testing.assert_close(hidden[0], expected, rtol=0, atol=1e-6)
    assert fused(-x, w_x, w, offset).abs().max() < 1e-6


def test_small_values_keep_their_digits() -> None:
    """1 - (1 - small) would lose them."""
    inputs = [1e-4 * v for v in tensors(2, 3, (4, 5), 4)]
    inputs[3].zero_()
    found, truth = run(fused, inputs), run(plain, [v.double() for v in inputs])
    assert max(errors(found, truth).values()) < 1e-5


@pytest.mark.parametrize("place", range(4))
def test_nan_is_not_swallowed(place) -> None:
    inputs = tensors(2, 2, (3, 4), 2)
    inputs[place].view(-1)[0] = float("nan")
    assert fused(*inputs).isnan().any()


# -------------------------------------------------------------------------------------- its callers


def test_strides() -> None:
    x, *rest = tensors(2, 6, (2, 3), 5)
    for view in (x.contiguous(memory_format=torch.channels_last), x[1::2, :, ::2, 1:], x.mT,
                 x[:1].expand(2, -1, -1, -1), x[..., :1, :1].expand(-1, -1, 2, 2)):  # fmt: skip
        given = [view, *rest[:2], rest[2][:1].expand(len(view), -1, -1)]
        hidden = fused(*given)
        assert hidden.is_contiguous(memory_format=torch.channels_last)
        dense = [v.contiguous() for v in given]
        weights = torch.randn(hidden.shape)
        ours, theirs = run(fused, given, weights), run(fused, dense, weights.mT.contiguous().mT)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    weights = [v.mT.contiguous().mT for v in rest[:2]]
    assert not weights[0].is_contiguous()
    assert torch.equal(fused(x, *weights, rest[2]), fused(x, *rest))


def test_no_grad_gives_the_same_bits_and_nothing_is_changed() -> None:
    inputs = tensors(3, 4, (4, 5), 3)
    before = copy.deepcopy(inputs)
    expected = run(fused, inputs)[0]
    with torch.no_grad():
        assert torch.equal(fused(*inputs), expected)
    assert torch.equal(fused(*inputs), expected)
    assert all(map(torch.equal, inputs, before))


def test_gradients_only_where_asked() -> None:
    inputs = tensors(1, 4, (2, 3), 3)
    expected = run(fused, inputs, torch.ones(1, 6, 2, 3))[1:]
    assert not fused(*inputs).requires_grad
    for only in range(4):
        asked = [v.detach().requires_grad_(k == only) for k, v in enumerate(inputs)]
        fused(*asked).sum().backward()
        assert [v.grad is not None for v in asked] == [k == only for k in range(4)]
        assert torch.equal(asked[only].grad, expected[only])


def test_an_empty_batch() -> None:
    hidden, x, *rest = run(fused, tensors(0, 3, (4, 5), 2))
    assert hidden.shape == (0, 4, 4, 5) and x.shape == (0, 3, 4, 5)
    assert rest[2].shape == (0, 2, 8) and not any(v.any() for v in rest)


def test_second_derivatives_are_refused() -> None:
    inputs = [v.requires_grad_() for v in tensors(2, 2, (2, 3), 1)]
    first = torch.autograd.grad(fused(*inputs).pow(2).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError):
        sum(g.pow(2).sum() for g in first).backward()


def test_types() -> None:
    """bfloat16 maps are multiplied so, float16 is computed in float32, autocast adds nothing."""
    x, *rest = tensors(1, 4, (2, 3), 5, dtype=BF16)
    assert fused(x, *rest).dtype == BF16
    half = fused(x.half(), *rest)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, fused(x.float(), *rest).half())
    inputs = [x.float(), *rest]
    with torch.autocast(DEVICE.type, BF16):
        assert torch.equal(fused(*inputs), fused(*inputs)) and fused(*inputs).dtype == F32
    assert torch.equal(fused(x, *(v.to(BF16) for v in rest)),
                       fused(x, *(v.to(BF16).float() for v in rest)))  # fmt: skip


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", WITHIN, ids=str)
def test_opcheck(dtype, keep) -> None:
    x, *rest = tensors(1, 2, (2, 2), 3, dtype=dtype)
    x = x.permute(0, 2, 3, 1)
    given = [v.requires_grad_() for v in (x, *rest)] if keep else [x, *rest]
    torch.library.opcheck(cuda.forward, (*given, keep))
    if keep:
        given = [v.detach() for v in given]
        kept = cuda.forward(*given, True)
        torch.library.opcheck(cuda.backward, (torch.randn_like(kept[0]), *given, *kept))


def test_torch_compile() -> None:
    inputs = tensors(3, 2, (2, 2), 3)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    try:
        for one, other in zip(run(compiled, inputs), run(fused, inputs), strict=True):
            torch.testing.assert_close(one, other)
    finally:
        torch.compiler.reset()


@on_gpu
def test_a_cuda_graph_holds_forward_and_backward() -> None:
    inputs = [v.requires_grad_() for v in tensors(8, 32, (25, 25), 16, dtype=BF16)]
    expected = run(fused, inputs, torch.ones(8, 32, 25, 25))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(fused(*inputs).sum(), inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = fused(*inputs)
        found = torch.autograd.grad(hidden.sum(), inputs)
    for _ in range(2):
        graph.replay()
        for one, other in zip((hidden, *found), expected, strict=True):
            torch.testing.assert_close(one, other)


def gradients(rank: int | None) -> list[Tensor]:
    """Of all of the batch, or (rank) of half of it, averaged by DDP."""
    torch.manual_seed(0)
    arnn.diagonal_lstm = fused
    model = arnn.ARNN(3, 2, last=False, hidden=3, context=4).to(DEVICE)
    called = model
    drawn = (torch.randn(4, *shape).to(DEVICE) for shape in ((3, 3, 4), (2,), (1, 3, 4)))
    x, query, wanted = (v if rank is None else v.chunk(2)[rank] for v in drawn)
    if rank is not None:
        called = torch.nn.parallel.DistributedDataParallel(model)
    (called(x, query) - wanted).square().mean().backward()
    arnn.diagonal_lstm = diagonal_lstm
    return [p.grad for p in model.parameters()]


def process_of_two(folder: Path) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    found = [g.flatten().tolist() for g in gradients(rank)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_training_gives_the_gradients_of_one_process(tmp_path, as_ranks) -> None:
    assert [code for code, *_ in as_ranks(2, [__file__, tmp_path])] == [0, 0]
    expected = gradients(None)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for one, other in zip(found, expected, strict=True):
            other = other.flatten().cpu()
            torch.testing.assert_close(torch.tensor(one), other, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------- where they do not fit


@pytest.mark.parametrize(
    ("shape", "channels", "t", "dtype", "says"),
    [((129, 1), 2, 2, F32, "128 rows.*not 129, 2 and 2"), ((2, 2), 129, 2, F32, "128 channels"),
     ((2, 2), 2, 65, F32, "64 of state, not 2, 2 and 65"), ((2, 2), 2, 2, F64, "no float64")],
    ids=lambda v: str(v) if isinstance(v, str) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(shape, channels, t, dtype, says) -> None:
    inputs = [v.to(dtype) for v in tensors(1, channels, shape, t)]
    with pytest.raises(InputError, match=f"cannot compute this: .*{says}.*; use 'reference'"):
        fused(*inputs)


def test_other_devices_are_refused(monkeypatch) -> None:
    with pytest.raises(InputError, match="cannot compute on meta"):
        fused(*(v.to("meta") for v in tensors(1, 2, (2, 2), 2)))
    monkeypatch.setattr(cuda, "interpreted", lambda: False)
    with pytest.raises(InputError, match="cannot compute on cpu"):
        fused(*(v.cpu() for v in tensors(1, 2, (2, 2), 2)))


def test_an_old_gpu_is_told_of(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    said = cuda.obstacle(torch.device("cuda", 0), F32, 5, 5, 5)
    assert said == "the GPU has compute capability 7.5, and the least is 8.0"


def test_a_broken_triton_is_told_of(monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "forward", broken)
    monkeypatch.setattr(torch, "zeros", lambda shape, device: torch.empty(shape))
    cuda._trial.cache_clear()
    said = cuda.obstacle(torch.device("cuda", 0), F32, 5, 5, 5)
    cuda._trial.cache_clear()
    assert said == "Triton does not run here (Failed to find C compiler.)"


class OnGpu:
    """What `_fastest` asks of a map, without a GPU."""

    device, dtype = torch.device("cuda", 0), F32


def test_the_backend_for_a_gpu(monkeypatch) -> None:
    """The kernels where they fit, silently; else graphs, with one line that says why."""
    monkeypatch.setattr(cuda, "_obstacle_of_device", lambda *_: "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recurrence._fastest(OnGpu, (50, 32, 16)) == "cuda"
    with pytest.warns(MnistattnWarning, match="CUDA graphs: it takes maps of at most 128 rows"):
        assert recurrence._fastest(OnGpu, (150, 32, 16)) == "graphed"
    monkeypatch.setattr(cuda, "_obstacle_of_device", lambda *_: "the GPU is old")
    with pytest.warns(MnistattnWarning, match="the GPU is old"):
        assert recurrence._fastest(OnGpu, (50, 32, 16)) == "graphed"


class Imitation:
    """As graphed.Graph on a CPU: its outputs are overwritten by the next replay."""

    made = 0

    def __init__(self, function, inputs) -> None:
        Imitation.made += 1
        self.function, self.inputs = function, [v.detach().clone() for v in inputs]
        self.outputs = [v.detach() for v in function(*self.inputs)]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        for own, value in zip(self.outputs, self.function(*self.inputs), strict=True):
            own.copy_(value)
        return [v.clone() for v in self.outputs]


@pytest.fixture
def graphs(monkeypatch):
    """Graphs, or on a CPU their imitation; none are left over."""
    if not GPU:
        monkeypatch.setattr(graphed, "Graph", Imitation)
        Imitation.made = 0
    graphed._graphs.clear()
    yield graphed._graphs
    graphed._graphs.clear()


def through_graphs(*inputs: Tensor) -> Tensor:
    return graphed._Graphed.apply(*inputs)


def test_graphs_give_what_the_reference_gives(graphs) -> None:
    for shape in ((3, 4), (1, 1), (6, 5)):
        for seed in (0, 1):  # captured, replayed
            assert_true(tensors(3, 4, shape, 5, seed), through_graphs)
    assert len(graphs) == 6  # forward and backward of three sizes
    assert GPU or Imitation.made == 6


def test_a_graph_s_second_call_does_not_spoil_the_first(graphs) -> None:
    """Two layers of one size: both forward passes come before the backward ones."""
    both = [[v.requires_grad_() for v in tensors(2, 3, (4, 5), 3, seed)] for seed in (0, 1)]
    outputs = [through_graphs(*inputs) for inputs in both]
    for inputs, hidden in zip(both, outputs, strict=True):
        exact = [v.detach().double().requires_grad_() for v in inputs]
        truth = plain(*exact)
        torch.testing.assert_close(hidden.double(), truth, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(hidden.sum(), inputs)
        for one, other in zip(found, torch.autograd.grad(truth.sum(), exact), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_graphs_of_many_sizes_do_not_pile_up(graphs, monkeypatch) -> None:
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 3)
    with torch.no_grad():
        for n in (1, 2, 3, 4, 5):
            inputs = tensors(1, 2, (2, n), 2)
            torch.testing.assert_close(through_graphs(*inputs), reference.diagonal_lstm(*inputs))
    assert len(graphs) == 3


# ------------------------------------------------------------------------------- ahead of time


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_spilling(capability, tmp_path) -> None:
    """For the default t, on every map in use, as a GPU would get them."""
    file = tmp_path / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / "gpu_compile.py", "--capability",
               str(capability), "--t", "16", "--dtype", "bfloat16", "--rows", "112,50,25,6",
               "--json", file]  # fmt: skip
    subprocess.run(
        command, check=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    )
    rows = json.loads(file.read_text())["kernels"]
    assert {(r["rows"], r["kernel"]) for r in rows} >= {(50, "forward"), (112, "backward")}
    for row in rows:
        assert row["spilled_bytes"] == 0 and row["registers"] <= 255, row
        assert row["shared_bytes"] <= 99 << 10, row  # what every GPU from 8.0 on has


# For the test of two processes: a spawned process may not find the test file as a module.
if __name__ == "__main__":
    process_of_two(Path(sys.argv[1]))
