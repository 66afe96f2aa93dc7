"""`scan`: its recurrence against the definition cell by cell, and the attention around it."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from mnistattn.errors import InputError
from mnistattn.models.attention.scan import LONGEST, SHORTEST, Scan
from mnistattn.models.recurrence import linear_scan_cpu
from mnistattn.models.recurrence.linear_scan import BACKENDS, COLUMNS, ROWS, gated_scan

F32, F64 = torch.float32, torch.float64
MAPS = [(1, 1), (1, 4), (5, 1), (2, 2), (3, 8), (7, 5)]
# batch and t: the compiled cells take eight channels at a time, and the rest one by one.
SIZES = [(1, 1), (3, 8), (2, 11), (2, 16)]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
either_axis = pytest.mark.parametrize("axis", [ROWS, COLUMNS], ids=["rows", "columns"])


@pytest.fixture
def threads():
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(batch: int, t: int, shape: tuple[int, int], scale: float = 1.5) -> list[Tensor]:
    """gates and offset, float64."""
    draw = functools.partial(torch.randn, dtype=F64, generator=torch.manual_seed(0))
    return [draw(batch, *shape, 4 * t) * scale, draw(batch, 4 * t)]


def by_hand(gates: Tensor, offset: Tensor, axis: int) -> Tensor:
    """h = f h_before + (1 - f) v, number by number, as the docstring has the channels."""
    _, m, n, width = gates.shape
    t = width // 4
    h: dict[tuple, Tensor] = {}
    for second in (False, True):
        order = [range(m), range(n)]
        if second:
            order = [reversed(range(m)), reversed(range(n))]
        for i, j in itertools.product(*map(list, order)):
            back = 1 if second else -1
            before = (i, j + back) if axis == ROWS else (i + back, j)
            z = gates[:, i, j] + offset
            f, v = z[:, 2 * t * second :][:, :t].sigmoid(), z[:, 2 * t * second + t :][:, :t]
            h[second, i, j] = f * h.get((second, *before), torch.zeros_like(v)) + (1 - f) * v
    cells = [torch.cat((h[False, i, j], h[True, i, j]), 1) for i in range(m) for j in range(n)]
    return torch.stack(cells, 1).unflatten(1, (m, n))


def run(scan, inputs: list[Tensor], dtype: torch.dtype = F64) -> list[Tensor]:
    """h and the gradients of gates and offset, h weighted by random numbers."""
    inputs = [v.to(dtype).requires_grad_() for v in inputs]
    h = scan(*inputs)
    weights = torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    return [h.detach(), *torch.autograd.grad(h, inputs, weights.to(dtype))]


def assert_close(ours: list[Tensor], theirs: list[Tensor], within: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.to(F64), other, rtol=within, atol=within)


# ------------------------------------------------------------------------------ the recurrence


@every_backend
@either_axis
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("batch, t", SIZES)
def test_values_and_gradients_are_those_of_the_equation(backend, axis, shape, batch, t):
    inputs = tensors(batch, t, shape)
    dtype, within = (F32, 2e-5) if backend == "cpu" else (F64, 1e-11)
    ours = run(lambda *v: gated_scan(*v, axis, backend), inputs, dtype)
    assert_close(ours, run(lambda *v: by_hand(*v, axis), inputs), within)


@pytest.mark.parametrize("backend", ["loop", "doubling"])
@either_axis
def test_derivatives_by_finite_differences(backend, axis):
    inputs = [v.requires_grad_() for v in tensors(2, 2, (3, 5))]
    assert torch.autograd.gradcheck(lambda *v: gated_scan(*v, axis, backend), inputs)


@either_axis
def test_a_long_line_by_every_backend(axis):
    """More than one task, and lines as long as a map of 224 pixels has them."""
    batch = linear_scan_cpu.TASK_CELLS // (112 * 3) + 2
    inputs = tensors(batch, 2, (112, 3) if axis == COLUMNS else (3, 112))
    wanted = run(lambda *v: gated_scan(*v, axis, "loop"), inputs)
    assert_close(run(lambda *v: gated_scan(*v, axis, "doubling"), inputs), wanted, 1e-11)
    assert_close(run(lambda *v: gated_scan(*v, axis, "cpu"), inputs, F32), wanted, 1e-4)


@every_backend
def test_columns_are_the_rows_of_the_transposed_map(backend):
    gates, offset = (v.to(F32) for v in tensors(2, 9, (4, 7)))
    down = gated_scan(gates, offset, COLUMNS, backend)
    right = gated_scan(gates.transpose(1, 2), offset, ROWS, backend).transpose(1, 2)
    torch.testing.assert_close(down, right)


@every_backend
@either_axis
def test_the_second_direction_is_the_first_on_the_mirrored_map(backend, axis):
    gates, offset = (v.to(F32) for v in tensors(2, 9, (4, 7)))

    def swap(x: Tensor) -> Tensor:
        return torch.cat(x.chunk(2, -1)[::-1], -1)

    mirrored = gated_scan(swap(gates.flip(axis)), swap(offset), axis, backend)
    torch.testing.assert_close(swap(mirrored).flip(axis), gated_scan(gates, offset, axis, backend))


@every_backend
@either_axis
def test_a_cell_hears_of_those_before_it_on_its_line_and_of_no_other(backend, axis):
    gates, offset = (v.to(F32) for v in tensors(2, 2, (5, 6), scale=0.3))
    gates.requires_grad_()
    h = gated_scan(gates, offset, axis, backend)
    i, j = 2, 3
    for direction in range(2):
        own = h[0, i, j, 2 * direction : 2 * direction + 2].sum()
        (seen,) = torch.autograd.grad(own, gates, retain_graph=True)
        wanted = torch.zeros(2, 5, 6, 4, 2, dtype=torch.bool)
        upto = slice(None, (j if axis == ROWS else i) + 1)
        onward = slice(j if axis == ROWS else i, None)
        line = upto if direction == 0 else onward
        place = (0, i, line) if axis == ROWS else (0, line, j)
        wanted[(*place, slice(2 * direction, 2 * direction + 2))] = True
        assert torch.equal(seen.unflatten(3, (4, 2)) != 0, wanted)


@every_backend
@either_axis
def test_gates_that_are_shut_or_open_keep_all_or_nothing(backend, axis):
    gates, offset = torch.randn(2, 4, 5, 8), torch.zeros(2, 8)
    v = gates.unflatten(3, (2, 2, 2))[..., 1, :].flatten(3).clone()
    for z, wanted in ((-1e4, v), (1e4, torch.zeros_like(v))):
        gates.unflatten(3, (2, 2, 2))[..., 0, :] = z
        leaf = gates.clone().requires_grad_()
        h = gated_scan(leaf, offset, axis, backend)
        torch.testing.assert_close(h, wanted, atol=1e-5, rtol=1e-5)
        h.square().sum().backward()
        assert leaf.grad.isfinite().all()


@every_backend
def test_nan_stays_and_spreads_along_its_line_only(backend):
    gates, offset = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4)
    gates[0, 1, 1] = torch.nan
    h = gated_scan(gates, offset, ROWS, backend)
    wanted = torch.zeros(2, 3, 4, 2, dtype=torch.bool)
    wanted[0, 1, 1:, 0] = wanted[0, 1, :2, 1] = True
    assert torch.equal(h.isnan(), wanted)


@every_backend
def test_strides_do_not_matter_and_a_batch_may_be_empty(backend):
    gates, offset = (v.to(F32) for v in tensors(2, 3, (4, 5)))
    strange = gates.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    spread = offset[:1].expand(2, -1)
    plain = gated_scan(gates, spread.contiguous(), ROWS, backend)
    torch.testing.assert_close(gated_scan(strange, spread, ROWS, backend), plain, rtol=0, atol=0)
    assert gated_scan(gates[:0], offset[:0], ROWS, backend).shape == (0, 4, 5, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    gates, offset = (v.to(dtype) for v in tensors(2, 8, (6, 5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = gated_scan(gates, offset, ROWS)
    assert h.dtype == dtype
    assert torch.equal(h, gated_scan(gates.float(), offset.float(), ROWS).to(dtype))


@either_axis
def test_any_number_of_threads_gives_the_same_bits(axis, threads):
    inputs = tensors(9, 8, (50, 50))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(lambda *v: gated_scan(*v, axis, "cpu"), inputs, F32))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_operator_is_registered_as_torch_wants_it():
    gates, offset = (v.to(F32).requires_grad_() for v in tensors(2, 3, (4, 5)))
    torch.library.opcheck(linear_scan_cpu.forward, (gates, offset, ROWS))
    h = linear_scan_cpu.forward(gates, offset, ROWS).detach()
    inputs = (torch.randn_like(h), gates.detach(), offset.detach(), h, ROWS)
    torch.library.opcheck(linear_scan_cpu.backward, inputs)


def test_the_meta_device_has_shapes():
    gates, offset = (v.to("meta", F32) for v in tensors(2, 3, (4, 5)))
    assert gated_scan(gates, offset, COLUMNS).shape == (2, 4, 5, 6)


def test_without_a_compiler_the_definition_computes(monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", True)
    gates, offset = (v.to(F32) for v in tensors(2, 8, (6, 5)))
    assert torch.equal(gated_scan(gates, offset, ROWS), gated_scan(gates, offset, ROWS, "loop"))


def test_what_it_refuses():
    gates, offset = torch.zeros(2, 3, 4, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"gates must be \(B, m, n, 4t\)"):
        gated_scan(gates[..., :6], offset, ROWS)
    with pytest.raises(ValueError, match=r"gates must be .* got \(2, 0, 4, 8\)"):
        gated_scan(gates[:, :0], offset, ROWS)
    with pytest.raises(ValueError, match=r"offset must be \(2, 8\), got \(1, 8\)"):
        gated_scan(gates, offset[:1], ROWS)
    with pytest.raises(ValueError, match="axis must be 1 or 2, got 3"):
        gated_scan(gates, offset, 3)
    with pytest.raises(InputError, match="unknown backend 'fast': it is one of loop, doubling"):
        gated_scan(gates, offset, ROWS, "fast")
    with pytest.raises(InputError, match="cannot compute torch.float64 on cpu: use 'loop'"):
        gated_scan(gates.double(), offset.double(), ROWS, "cpu")


# ------------------------------------------------------------------------------- the attention


def model(**options) -> Scan:
    """All parameters random, in float64."""
    torch.manual_seed(0)
    scan = Scan(3, 2, **{"last": False, "hidden": 3, "width": 4} | options).double()
    with torch.no_grad():
        for parameter in scan.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return scan


@pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 2)], ids=str)
def test_the_map_is_that_of_the_equations(last, shape):
    """The file's equations, everything concatenated and the query spread over the map."""
    scan = model(last=last)
    x, query = torch.randn(2, 3, *shape).double(), torch.randn(2, 2).double()
    cells = query[:, None, None].expand(-1, *shape, -1)
    e = (scan.local(x) + scan.query(query)[:, :, None, None]).relu().permute(0, 2, 3, 1)
    zero = torch.zeros(2, 12).double()

    def gates(parts: list[Tensor], weights: list[Tensor], query: torch.nn.Linear) -> Tensor:
        weight = torch.cat([*weights, query.weight], 1)
        return torch.cat([*parts, cells], -1) @ weight.T + query.bias

    of_e = [part.weight for part in scan.evidence]
    rows = by_hand(gates([e], [of_e[0]], scan.rows_query), zero, ROWS)
    weights = [of_e[1], scan.rows_to_columns.weight]
    columns = by_hand(gates([e, rows], weights, scan.columns_query), zero, COLUMNS)
    weights = [of_e[2], scan.rows_to_head.weight, scan.columns_to_head.weight]
    score = scan.score(gates([e, rows, columns], weights, scan.head_query).relu())[..., 0]
    wanted = score.flatten(1).softmax(1).view_as(score) if last else score.sigmoid()
    torch.testing.assert_close(scan(x, query)[:, 0], wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("context", [1, 3, 5])
def test_every_position_can_hear_from_every_other(context):
    scan = model(context=context)
    x, query = torch.rand(2, 3, 6, 7).double().requires_grad_(), torch.randn(2, 2).double()
    a = scan(x, query)
    for i, j in ((0, 0), (3, 2), (5, 6)):
        (seen,) = torch.autograd.grad(a[0, 0, i, j], x, retain_graph=True)
        assert (seen[0] != 0).any(0).all()
        assert not seen[1].any()


@pytest.mark.parametrize("hidden", [1, 8])
def test_at_the_start_a_state_spans_few_to_many_cells(hidden):
    scan = Scan(3, 2, last=False, hidden=hidden)
    for linear in (scan.rows_query, scan.columns_query):
        f, v = linear.bias.view(2, 2, hidden).unbind(1)
        assert not v.any()
        span = 1 / (1 - f.sigmoid())
        torch.testing.assert_close(span[:, 0], torch.full((2,), SHORTEST))
        if hidden > 1:
            torch.testing.assert_close(span[:, -1], torch.full((2,), LONGEST))
            assert (span.diff(dim=1) > 0).all()


@pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])
def test_float32_and_compiled_is_near_float64_and_the_definition(last):
    torch.manual_seed(0)
    scan = Scan(32, 32, last=last)
    x, query = torch.randn(3, 32, 25, 13).relu(), torch.randn(3, 32)
    exact = Scan(32, 32, last=last).double()
    exact.load_state_dict(scan.state_dict())
    torch.testing.assert_close(
        scan(x, query).double(), exact(x.double(), query.double()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("scale", [0, 1e3, 1e6])
@pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])
def test_large_features_give_finite_maps_and_gradients(scale, last):
    torch.manual_seed(0)
    scan = Scan(32, 32, last=last)
    a = scan(torch.rand(2, 32, 12, 12) * scale, torch.randn(2, 32) * max(1, scale**0.5))
    (a * torch.randn_like(a)).sum().backward()
    assert a.isfinite().all() and (a >= 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scan.parameters())


def test_bfloat16_autocast_is_near_float32():
    torch.manual_seed(0)
    scan = Scan(32, 32, last=False)
    x, query = torch.rand(2, 32, 12, 12), torch.randn(2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = scan(x, query)
    narrow.float().sum().backward()
    torch.testing.assert_close(narrow.float(), scan(x, query), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"hidden": 0}, "hidden 0 is impossible: give a whole number from 1."),
        ({"width": 1.5}, "width 1.5 is impossible: give a whole number from 1."),
        ({"context": 2}, "context 2 is even: give an odd number."),
    ],
)
def test_impossible_options(options, said):
    with pytest.raises(InputError, match=said):
        Scan(3, 2, last=False, **options)
