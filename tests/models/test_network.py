"""Every model of the registry in its network, and the small attentions against plain loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mnistattn.errors import InputError
from mnistattn.evaluation.checkpoint import load_tensors, save_tensors
from mnistattn.models.attention.pan import CTX, NoCTX
from mnistattn.models.attention.san import SAN
from mnistattn.models.network import build
from mnistattn.models.registry import MODELS, PLACEMENTS, find

MAPS = {100: [50, 25, 12, 6], 224: [112, 56, 28, 14, 7]}
BATCH = 4
# A softmax over positions ignores what is added to all of them: the last score's bias.
IGNORED = {"ctx": "score.bias", "noctx": "score.bias", "arnn": "combine.bias"}
CASES = [(name, size, *kinds) for name in MODELS for size in MAPS for kinds in ((10, 5), (5, 10))]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A network after one backward pass (so that its norms have statistics), then in eval."""
    name, size, queries, answers = request.param
    torch.manual_seed(0)
    network = build(name, size, queries, answers)
    images = torch.rand(BATCH, 3, size, size).to(memory_format=torch.channels_last)
    query = torch.arange(BATCH)
    logits, out = network.train()(images, query)
    torch.nn.functional.cross_entropy(logits, query.flip(0)).backward()
    gradients = {n: p.grad for n, p in network.named_parameters()}
    network.eval()
    with torch.no_grad():
        eval_logits, eval_out = network(images, query)
    return SimpleNamespace(
        name=name, size=size, queries=queries, answers=answers, network=network, images=images,
        query=query, logits=logits, maps=out["attention"], gradients=gradients,
        eval_logits=eval_logits, eval_maps=eval_out["attention"],
    )  # fmt: skip


def test_shapes(case):
    sizes = {"every": MAPS[case.size], "last": MAPS[case.size][-1:], "nowhere": []}
    for logits, maps in ((case.logits, case.maps), (case.eval_logits, case.eval_maps)):
        assert logits.shape == (BATCH, case.answers)
        assert torch.isfinite(logits).all()
        assert [m.shape for m in maps] == [
            (BATCH, 1, s, s) for s in sizes[MODELS[case.name].placement]
        ]


def test_inner_maps_are_gates_and_the_last_is_a_distribution(case):
    for inner in case.maps[:-1] + case.eval_maps[:-1]:
        assert ((inner > 0) & (inner < 1)).all()
    for last in case.maps[-1:] + case.eval_maps[-1:]:
        assert (last >= 0).all()
        torch.testing.assert_close(last.sum((1, 2, 3)), torch.ones(BATCH))


def test_every_parameter_learns(case):
    last = f"attention.{len(MAPS[case.size]) - 1}.{IGNORED.get(case.name)}"
    for name, gradient in case.gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        if name != last:
            assert gradient.abs().max() > 1e-9, name


def test_nothing_leaks_across_the_batch(case):
    others = case.images.clone(memory_format=torch.preserve_format)
    others[1:] = torch.rand(BATCH - 1, 3, case.size, case.size)
    query = (case.query + 1) % case.queries
    query[0] = case.query[0]
    with torch.no_grad():
        logits, out = case.network(others, query)
        turned, turned_out = case.network(case.images.flip(0), case.query.flip(0))
    assert torch.equal(logits[0], case.eval_logits[0])
    assert not torch.equal(logits[1], case.eval_logits[1])
    torch.testing.assert_close(turned.flip(0), case.eval_logits, rtol=1e-4, atol=1e-5)
    maps = zip(out["attention"], turned_out["attention"], case.eval_maps, strict=True)
    for changed, permuted, before in maps:
        assert torch.equal(changed[0], before[0])
        torch.testing.assert_close(permuted.flip(0), before, rtol=1e-4, atol=1e-6)


def test_eval_is_deterministic_and_survives_saving(case, tmp_path):
    save_tensors(tmp_path / "weights", case.network.state_dict(), {})
    other = build(case.name, case.size, case.queries, case.answers).eval()
    other.load_state_dict(load_tensors(tmp_path / "weights")[0])
    for network in (case.network, other):
        with torch.no_grad():
            logits, out = network(case.images, case.query)
        assert torch.equal(logits, case.eval_logits)
        assert all(map(torch.equal, out["attention"], case.eval_maps))


def test_dropout_acts_in_training_only():
    network = build("none", 100, 10, 5, dropout=0.5)
    images, query = torch.rand(4, 3, 100, 100), torch.arange(4)
    assert not torch.equal(network(images, query)[0], network(images, query)[0])
    network.eval()
    assert torch.equal(network(images, query)[0], network(images, query)[0])


def test_the_answer_depends_on_the_query():
    for name in MODELS:
        torch.manual_seed(0)
        network = build(name, 100, 10, 5).eval()
        image = torch.rand(1, 3, 100, 100)
        with torch.no_grad():
            outs = [network(image, torch.tensor([q])) for q in (0, 1)]
        assert not torch.equal(outs[0][0], outs[1][0]), name
        for a, b in zip(*(o[1]["attention"] for o in outs), strict=True):
            assert not torch.equal(a, b), name


# ------------------------------------------------------------------------------------ registry


@pytest.mark.parametrize(
    ("wrong", "right"), [("ctxx", "ctx"), ("noctxt", "noctx"), ("SAN", None), ("arn", "arnn")]
)
def test_unknown_model(wrong, right):
    with pytest.raises(InputError, match=f"unknown model '{wrong}'") as caught:
        build(wrong, 100, 10, 5)
    assert "none, san, noctx, ctx, arnn" in str(caught.value)
    if right:
        assert str(caught.value).endswith(f"Did you mean '{right}'?")


def test_the_table_is_whole():
    for name, row in MODELS.items():
        assert find(name) is row
        assert row.placement in PLACEMENTS
        assert (row.attention == "") == (row.placement == "nowhere")
        assert row.summary and row.paper and row.paper_name


# ------------------------------------------------------------------- attentions, pixel by pixel


def randomised(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Give float64 weights of a size that shows to all parameters; returns them."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def activated(score: np.ndarray, last: bool) -> np.ndarray:
    if not last:
        return 1 / (1 + np.exp(-score))
    weights = np.exp(score - score.max())
    return weights / weights.sum()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [CTX, NoCTX])
def test_pan_is_its_formula(kind, last):
    """e = W_1 * X + W_q q; a = sigmoid or softmax of w_2 . ReLU(e)."""
    torch.manual_seed(1)
    module = kind(3, 4, last=last, hidden=6)
    w = randomised(module)
    x, query = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 4).double()
    with torch.no_grad():
        maps = module(x, query).numpy()
    reach = 1 if kind is CTX and not last else 0
    assert w["features.weight"].shape == (6, 3, 2 * reach + 1, 2 * reach + 1)
    for image, q, found in zip(x.numpy(), query.numpy(), maps, strict=True):
        score = np.zeros((5, 4))
        for i in range(5):
            for j in range(4):
                e = w["query.weight"] @ q + w["features.bias"]
                for di in range(-reach, reach + 1):
                    for dj in range(-reach, reach + 1):
                        if 0 <= i + di < 5 and 0 <= j + dj < 4:
                            kernel = w["features.weight"][:, :, di + reach, dj + reach]
                            e = e + kernel @ image[:, i + di, j + dj]
                score[i, j] = w["score.weight"][0, :, 0, 0] @ np.maximum(e, 0) + w["score.bias"][0]
        np.testing.assert_allclose(found[0], activated(score, last), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("last", [False, True])
def test_san_is_its_formula(last):
    """softmax over positions of w . tanh(W_x x + W_q q), whichever layer it stands in."""
    torch.manual_seed(2)
    module = SAN(3, 4, last=last, hidden=6)
    w = randomised(module)
    x, query = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 4).double()
    with torch.no_grad():
        maps = module(x, query).numpy()
    for image, q, found in zip(x.numpy(), query.numpy(), maps, strict=True):
        score = np.zeros((5, 4))
        for i in range(5):
            for j in range(4):
                e = w["features.weight"][:, :, 0, 0] @ image[:, i, j]
                e = e + w["query.weight"] @ q + w["query.bias"]
                score[i, j] = w["score.weight"][0, :, 0, 0] @ np.tanh(e)
        np.testing.assert_allclose(found[0], activated(score, True), rtol=1e-5, atol=1e-7)


def test_context_of_ctx_is_3_x_3_but_in_the_last_layer():
    for size, maps in MAPS.items():
        layers = build("ctx", size, 10, 5).attention.values()
        sides = [layer.features.kernel_size for layer in layers]
        assert sides == [(3, 3)] * (len(maps) - 1) + [(1, 1)]
        layers = build("noctx", size, 10, 5).attention.values()
        assert {layer.features.kernel_size for layer in layers} == {(1, 1)}
