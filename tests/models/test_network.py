"""Every model of the registry in its network, and the small attentions against plain loops."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation.checkpoint import load_tensors, save_tensors
from mnistattn.models.attention.focus import focus_loss
from mnistattn.models.attention.pan import CTX, NoCTX
from mnistattn.models.attention.san import SAN
from mnistattn.models.attention.scan import Scan
from mnistattn.models.network import Network, build, own_loss, placed
from mnistattn.models.registry import KINDS, MODELS, PLACEMENTS, Model, choose_options, find

MAPS = {100: [50, 25, 12, 6], 224: [112, 56, 28, 14, 7]}
BATCH = 4
# A softmax over positions ignores what is added to all of them: the last score's bias.
IGNORED = {"ctx": "score.bias", "noctx": "score.bias"}
# Their last map, or only one, is a gate; that of `ram` lacks what its windows have outside.
GATES = ["residual", "gaussian-glimpse", "stn", "ram"]
CLASSES = ((10, 5), (5, 10))  # queries and answers
PROPER = [name for name, row in MODELS.items() if row.kind == "model"]
PAPERS = ["none", "san", "noctx", "ctx", "arnn", "arnn-sampled", "arnn-ind", "arnn-ind-sampled",
          "brnn"]  # fmt: skip
WHOLE = [name for name, row in MODELS.items() if row.placement == "whole"]
CONTROLS = [name for name, row in MODELS.items() if row.kind == "control"]
CASES = [(name, size, *classes) for name in PAPERS for size in MAPS for classes in CLASSES] + [
    (name, size, *classes)
    for name in MODELS.keys() - set(PAPERS)
    for size, classes in zip(MAPS, CLASSES, strict=True)
]
CASES.sort(key=lambda case: list(MODELS).index(case[0]))


def told(name: str, images: torch.Tensor) -> dict:
    """{"mask": a rectangle of its own in each image}, of a model that has to be told; else {}."""
    if name != "oracle":
        return {}
    mask = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    for each in mask:
        top, left = (int(torch.randint(images.shape[2] - 30, ())) for _ in range(2))
        each[top : top + 30, left : left + 23] = True
    return {"mask": mask}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A network after one backward pass (so that its norms have statistics), then in eval."""
    name, size, queries, answers = request.param
    torch.manual_seed(0)
    network = build(name, size, queries, answers)
    images = torch.rand(BATCH, 3, size, size).to(memory_format=torch.channels_last)
    query = torch.arange(BATCH)
    mask = told(name, images)
    logits, out = network.train()(images, query, **mask)
    each = torch.nn.functional.cross_entropy(logits, query.flip(0), reduction="none")
    (each.mean() + own_loss(out, each)).backward()
    gradients = {n: p.grad for n, p in network.named_parameters()}
    network.eval()
    with torch.no_grad():
        eval_logits, eval_out = network(images, query, **mask)
    return SimpleNamespace(
        name=name, size=size, queries=queries, answers=answers, network=network, images=images,
        query=query, mask=mask, logits=logits, maps=out["attention"], gradients=gradients,
        eval_logits=eval_logits, eval_maps=eval_out["attention"],
    )  # fmt: skip


def test_shapes(case):
    every = MAPS[case.size]
    sizes = {"every": every, "first": every[:1], "last": every[-1:], "nowhere": [],
             "whole": [case.size // 2]}  # fmt: skip
    for logits, maps in ((case.logits, case.maps), (case.eval_logits, case.eval_maps)):
        assert logits.shape == (BATCH, case.answers)
        assert torch.isfinite(logits).all()
        assert [m.shape for m in maps] == [
            (BATCH, 1, s, s) for s in sizes[MODELS[case.name].placement]
        ]


def test_inner_maps_are_gates_and_the_last_is_a_distribution(case):
    for inner in case.maps[:-1] + case.eval_maps[:-1]:
        if case.name in PAPERS:
            assert ((inner > 0) & (inner < 1)).all()
        else:
            assert ((inner >= 0) & (inner <= 1)).all()
            assert (inner > 0.9).any() or case.name in PROPER
    for last in case.maps[-1:] + case.eval_maps[-1:]:
        assert (last >= 0).all()
        if case.name in GATES:
            assert (last <= 1).all()
            continue
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
    masks, flipped = told(case.name, others), {k: v.flip(0) for k, v in case.mask.items()}
    for key, mask in masks.items():
        mask[0] = case.mask[key][0]
    with torch.no_grad():
        logits, out = case.network(others, query, **masks)
        turned, turned_out = case.network(case.images.flip(0), case.query.flip(0), **flipped)
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
            logits, out = network(case.images, case.query, **case.mask)
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
        mask = told(name, image)
        with torch.no_grad():
            outs = [network(image, torch.tensor([q]), **mask) for q in (0, 1)]
        assert not torch.equal(outs[0][0], outs[1][0]), name
        for a, b in zip(*(o[1]["attention"] for o in outs), strict=True):
            assert torch.equal(a, b) == (name in CONTROLS), name


# ------------------------------------------------------------------------------------- samples

K = 3
SAMPLED = ["arnn-sampled", "arnn-ind", "arnn-ind-sampled"]
OPTIONS = {  # that change the computation, beyond the table's rows
    "arnn": [{"context_kind": "unet"}, {"last_map": "gate"}, {"context_size": 5, "hidden": 4}],
    "arnn-sampled": [{"block": 2, "sigma": "exp"}, {"local": True}],
    "arnn-ind-sampled": [{"block": 3, "context_kind": "unet"}],
    "brnn": [{"block": 3}, {"block": 5}],
}


def small(name: str, **options):
    """A network for 100 px in eval, its norms fitting its two images, and these with queries."""
    torch.manual_seed(0)
    network = build(name, 100, 10, 5, **options)
    for norm in (*network.norms, network.pooled_norm):
        norm.momentum = None  # the mean of all batches: of one, or eval would be all but zero
    images, query = torch.rand(2, 3, 100, 100), torch.tensor([3, 8])
    with torch.no_grad():
        network(images, query, **told(name, images))
    return network.eval(), images, query


@pytest.mark.parametrize(
    ("name", "options"), [(name, o) for name, all_of in OPTIONS.items() for o in all_of], ids=str
)
def test_options_change_the_network_and_it_learns(name, options):
    torch.manual_seed(0)
    network = build(name, 100, 10, 5, **options)
    logits, out = network(torch.rand(2, 3, 100, 100), torch.arange(2))
    assert logits.shape == (2, 5)
    assert [m.shape for m in out["attention"]] == [(2, 1, s, s) for s in MAPS[100]]
    sums = out["attention"][-1].sum((1, 2, 3))
    assert torch.allclose(sums, torch.ones(2)) == ("last_map" not in options)
    torch.nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [*((n, {}) for n in SAMPLED), ("brnn", {"sampled": True})], ids=str
)
def test_samples_through_the_network(name, options, training):
    network, images, query = small(name, **options)
    logits, out = network.train(training)(images, query, samples=K)
    assert logits.shape == (2, K, 5) and torch.isfinite(logits).all()
    assert [m.shape for m in out["attention"]] == [(2, K, s, s) for s in MAPS[100]]
    for v in (logits, *out["attention"]):
        assert all((v[:, k] != v[:, k - 1]).any() for k in range(K))
    torch.testing.assert_close(out["attention"][-1].sum((2, 3)), torch.ones(2, K))
    assert network(images, query, samples=1)[0].shape == (2, 1, 5)
    one, out = network(images[:1], query[:1], samples=K)  # as many features as images: one
    assert one.shape == (1, K, 5) and out["attention"][-1].shape == (1, K, 6, 6)
    with pytest.raises(ValueError, match="0"):
        network(images, query, samples=0)


@pytest.mark.parametrize("count", [1, 2, K])
@pytest.mark.parametrize("name", SAMPLED)
def test_passes_without_spread_are_the_eval_pass(name, count):
    """In the order of the images, whatever the count, also where it is the number of images."""
    network, images, query = small(name, spread=0)
    with torch.no_grad():
        expected, expected_out = network(images, query)
        logits, out = network(images, query, samples=count)
    for v, e in zip(
        (logits, *out["attention"]), (expected[:, None], *expected_out["attention"]), strict=True
    ):
        torch.testing.assert_close(v, e.expand_as(v), rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", SAMPLED)
def test_a_pass_is_one_sample_in_every_layer(name, monkeypatch):
    """Pass k of K, with the same normal numbers, is a pass of one sample on its own."""
    network, images, query = small(name)
    drawn = []

    def draw(v):
        drawn.append(torch.randn(v.shape))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", draw)
    with torch.no_grad():
        logits, out = network(images, query, samples=K)
        noise = [v.reshape(2, K, *v.shape[2:]) for v in drawn]
        assert len(noise) == len(MAPS[100])
        for k in range(K):
            layers = iter(noise)
            monkeypatch.setattr(
                torch, "randn_like", lambda v, k=k, layers=layers: next(layers)[:, k : k + 1]
            )
            alone, alone_out = network(images, query, samples=1)
            torch.testing.assert_close(logits[:, k], alone[:, 0], rtol=1e-4, atol=1e-5)
            for all_of, one in zip(out["attention"], alone_out["attention"], strict=True):
                torch.testing.assert_close(all_of[:, k], one[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_of_an_image_do_not_depend_on_the_others(name):
    network, images, query = small(name)
    others, other_query = images.clone(), query.clone()
    others[1], other_query[1] = torch.rand(3, 100, 100), 5
    results = []
    for arguments in ((images, query), (others, other_query)):
        torch.manual_seed(1)
        with torch.no_grad():
            logits, out = network(*arguments, samples=K)
        results.append((logits, *out["attention"]))
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before[0], after[0], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(before[1], after[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {*SAMPLED, *WHOLE}))
def test_models_that_are_no_distribution_have_no_samples(name):
    network, images, query = small(name)
    with pytest.raises(ValueError, match="sample"):
        network(images, query, samples=K, **told(name, images))


def test_sampled_models_vary_in_training_and_not_in_eval():
    for name in SAMPLED:
        network, images, query = small(name)
        with torch.no_grad():
            assert torch.equal(network(images, query)[0], network(images, query)[0])
            network.attention.train()
            varies = not torch.equal(network(images, query)[0], network(images, query)[0])
        assert varies == (name != "arnn-ind"), name


def test_a_block_is_at_most_the_last_map():
    images, query = torch.rand(2, 3, 100, 100), torch.arange(2)
    assert build("brnn", 100, 10, 5, block=6)(images, query)[0].isfinite().all()
    with pytest.raises(InputError, match="block 7 .*6 x 6"):
        build("brnn", 100, 10, 5, block=7)(images, query)


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
        assert find(name) is row and find(row) is row and row.name == name
        assert row.placement in PLACEMENTS and row.kind in KINDS and row.kind != "plugged"
        assert (row.attention == "") == (row.placement == "nowhere")
        assert (row.explain != "") == (row.kind == "post-hoc") == (row.weights != name)
        assert row.weights in (name, "none")
        assert row.summary and row.paper and row.paper_name and row.origin == "mnistattn"
    assert len({row.paper_name for row in MODELS.values()}) == len(MODELS)
    assert CONTROLS == ["uniform", "center", "random", "oracle"]
    assert MODELS.keys() - {*PROPER, *CONTROLS} == {"gradcam", "input-gradient"}


def test_only_the_oracle_is_told_the_mask():
    seers = [name for name in MODELS if getattr(build(name, 100, 10, 5), "sees_mask", False)]
    assert seers == ["oracle"]
    network, images, query = small("oracle")
    masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    masks[0, 10:40, 50:90] = masks[1, 60:70, 5:95] = True
    with torch.no_grad():
        outs = [network(images, query, mask=mask)[1] for mask in (masks, masks.flip(0))]
    for a, b in zip(*(out["attention"] for out in outs), strict=True):
        assert torch.equal(a, b.flip(0)) and not torch.equal(a, b)


ARNN_DEFAULTS = {
    "hidden": 16, "context": 32, "context_size": 3, "context_kind": "conv", "sampled": False,
    "independent": False, "sigma": "softplus", "spread": 1.0, "last_map": "softmax", "block": 1,
    "local": False, "sharpness": 1.0, "gate_bias": 0.0, "focus": 0.0,
}  # fmt: skip
SCORE = {"estimator": "score", "temperature": 1.0, "baseline": True, "entropy": 0.01,
         "expected": 0.5}  # fmt: skip
DEFAULTS = {
    "none": {},
    "san": {"hidden": 32},
    "noctx": {"hidden": 32, "gate_bias": 0.0, "focus": 0.0},
    "ctx": {"hidden": 32, "gate_bias": 0.0, "focus": 0.0},
    "arnn": ARNN_DEFAULTS,
    "arnn-sampled": ARNN_DEFAULTS | {"sampled": True},
    "arnn-ind": ARNN_DEFAULTS | {"independent": True},
    "arnn-ind-sampled": ARNN_DEFAULTS | {"sampled": True, "independent": True},
    "brnn": ARNN_DEFAULTS | {"block": 2},
    "scan": {"hidden": 8, "width": 16, "context": 3, "gate_bias": 0.0, "focus": 0.0},
    "soft": {"hidden": 32},
    "hard": {"hidden": 32} | SCORE,
    "item-soft": {"hidden": 32, "sides": 4},
    "item-hard": {"hidden": 32, "sides": 4} | SCORE,
    "gaussian": {"count": 4, "hidden": 32, "context": 3},
    "gaussian-glimpse": {"hidden": 32},
    "stn": {"form": "affine", "scale": 0.7, "hidden": 32},
    "ram": {"glimpses": 4, "side": 16, "scales": 3, "sigma": 0.15, "hidden": 128, "weight": 1.0},
    "cbam": {"reduction": 16, "least": 4, "kernel": 7},
    "cbam-arnn": {
        "reduction": 16,
        "least": 4,
        "hidden": 16,
        "context": 32,
        "local": False,
        "sharpness": 1.0,
    },
    "residual": {"depth": 2, "per_channel": False, "metric": "mask"},
    "self": {"layers": 2, "heads": 4, "width": 32, "expansion": 4},
    "uniform": {},
    "center": {"width": 0.25},
    "random": {"map_seed": 0},
    "oracle": {},
    "gradcam": {},
    "input-gradient": {},
}


def test_defaults_of_every_model():
    assert {name: find(name).defaults() for name in MODELS} == DEFAULTS
    assert {name: choose_options(name, {}) for name in MODELS} == DEFAULTS


def test_chosen_options_leave_the_table_alone():
    for name in MODELS:
        for option in DEFAULTS[name]:
            chosen = choose_options(name, {option: 7})
            assert chosen == DEFAULTS[name] | {option: 7}
            chosen[option] = 9
            assert find(name).defaults() == DEFAULTS[name]
    assert choose_options("brnn", {"block": 3}) == DEFAULTS["brnn"] | {"block": 3}


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("arnn", "hiden", "hidden"),
        ("arnn-ind", "context_sise", "context_size"),
        ("brnn", "blocks", "block"),
        ("ctx", "Hidden", "hidden"),
        ("ctx", "block", None),
        ("arnn", "last", "last_map"),
        ("arnn", "channels", None),
        ("none", "hidden", None),
        ("gradcam", "hidden", None),
        ("uniform", "channels", None),
        ("center", "widht", "width"),
        ("random", "seed", "map_seed"),
    ],
)
def test_unknown_option(name, wrong, right):
    for refuse in (
        lambda: choose_options(name, {wrong: 3}),
        lambda: build(name, 100, 10, 5, **{wrong: 3}),
    ):
        with pytest.raises(InputError, match=f"model {name} has no option '{wrong}'") as caught:
            refuse()
        message = str(caught.value)
        assert all(option in message for option in DEFAULTS[name])
        assert ("it takes none" in message) == (not DEFAULTS[name])
        if right:
            assert message.endswith(f"Did you mean '{right}'?")


def test_options_of_an_unknown_model():
    with pytest.raises(InputError, match="unknown model 'arn'.*Did you mean 'arnn'"):
        choose_options("arn", {})


def test_options_are_the_keywords_with_a_default():
    class Mine(torch.nn.Module):
        def __init__(self, a, b=1, *, last, size=2, **more):
            super().__init__()

    class Whole(torch.nn.Module):
        def __init__(self, a, b, c=3, depth=4, *, needed, last=5):
            super().__init__()

    assert row_of(Mine).defaults() == {"size": 2}  # neither the features and query, nor `last`
    assert row_of(Mine, options={"size": 5}).defaults() == {"size": 5}
    assert choose_options(row_of(Whole, "whole"), {"depth": 6})["depth"] == 6
    with pytest.raises(InputError, match="no option 'needed'"):
        choose_options(row_of(Whole, "whole"), {"needed": 6})


def test_rows_set_the_options_of_their_family():
    """In every layer; the activation of the last alone is a softmax."""
    for name in ("arnn", "arnn-sampled", "arnn-ind", "arnn-ind-sampled", "brnn"):
        layers = list(build(name, 100, 10, 5).attention.values())
        expected = tuple(DEFAULTS[name][o] for o in ("sampled", "independent", "block"))
        assert [(v.sampled, v.independent, v.block) for v in layers] == [expected] * 4
        assert [layer.softmax for layer in layers] == [False, False, False, True]
    layers = build("arnn", 100, 10, 5, hidden=5, context=6, last_map="gate").attention.values()
    assert {layer.recurrent_weight.shape for layer in layers} == {(2, 10, 20)}
    assert {layer.context.out_channels for layer in layers} == {6}
    assert not any(layer.softmax for layer in layers)


@pytest.mark.parametrize("name", ["san", "noctx", "ctx", "arnn"])
@pytest.mark.parametrize("hidden", [0, -1, 1.5])
def test_bad_hidden(name, hidden):
    with pytest.raises(InputError, match=rf"hidden {hidden}\b"):
        build(name, 100, 10, 5, hidden=hidden)


# ---------------------------------------------------------------------- an attention of one's own


class Mine(torch.nn.Module):
    """A gate at each position; `made` has what `last` and `scale` each one was made with."""

    made: ClassVar[list] = []

    def __init__(self, channels: int, query_dim: int, *, last: bool, scale: float = 1.0):
        super().__init__()
        if scale < 0:
            raise ValueError(f"scale {scale} is impossible")
        self.score = torch.nn.Conv2d(channels, 1, 1)
        self.query = torch.nn.Linear(query_dim, 1)
        self.scale = scale
        self.made.append((last, scale))

    def forward(self, x, query):
        return torch.sigmoid(self.scale * (self.score(x) + self.query(query)[:, :, None, None]))


def row_of(cls: type, placement="every", **more) -> Model:
    return Model(cls.__name__, cls, placement, "-", "-", "-", kind="plugged", **more)


def outputs(row: Model, size: int = 100, **options) -> tuple[torch.Tensor, dict]:
    torch.manual_seed(0)
    network = build(row, size, 10, 5, **options).eval()
    with torch.no_grad():
        return network(torch.rand(3, 3, size, size), torch.arange(3))


@pytest.mark.parametrize(
    ("placement", "size", "stages"),
    [
        ("every", 100, [0, 1, 2, 3]),
        ("every", 224, [0, 1, 2, 3, 4]),
        ("last", 100, [3]),
        ("last", 224, [4]),
        ("first", 100, [0]),
        ("first", 224, [0]),
        ("nowhere", 100, []),
        ((25, 6), 100, [1, 3]),
        ((6, 25), 100, [1, 3]),
        ((12,), 100, [2]),
        ((7, 112), 224, [0, 4]),
        ((16, 2), 32, [0, 3]),
    ],
)
def test_placement_says_where_attention_stands(placement, size, stages):
    assert placed(placement, size) == stages


def test_placed_at_sizes_there_are_maps_of_those_and_the_last_is_told_so():
    for placement, size, lasts in (
        ((25, 6), 100, [False, True]),
        ((25,), 100, [False]),
        ((56, 14), 224, [False, False]),
        ((7,), 224, [True]),
    ):
        Mine.made.clear()
        maps = outputs(row_of(Mine, placement), size, scale=0.5)[1]["attention"]
        assert [tuple(a.shape) for a in maps] == [(3, 1, s, s) for s in placement]
        assert Mine.made == [(last, 0.5) for last in lasts]


@pytest.mark.parametrize(
    ("word", "sizes"),
    [("every", (50, 25, 12, 6)), ("first", (50,)), ("last", (6,)), ("every", (6, 12, 25, 50))],
)
def test_a_word_for_the_placement_is_its_sizes(word, sizes):
    by_word, by_sizes = (outputs(row_of(Mine, placement)) for placement in (word, sizes))
    assert torch.equal(by_word[0], by_sizes[0])
    assert all(map(torch.equal, by_word[1]["attention"], by_sizes[1]["attention"]))


@pytest.mark.parametrize(
    ("placement", "size", "wrong", "there"),
    [
        ((25, 13), 100, 13, "50, 25, 12, 6"),
        ((25, 6), 224, 25, "112, 56, 28, 14, 7"),
        ((100,), 100, 100, "50, 25, 12, 6"),
        ((0,), 100, 0, "50, 25, 12, 6"),
    ],
)
def test_a_map_size_that_there_is_not_is_refused(placement, size, wrong, there):
    with pytest.raises(InputError, match=f"no map of {wrong} pixels: images of {size} .* {there}"):
        build(row_of(Mine, placement), size, 10, 5)


def test_losses_of_all_layers_are_added_up():
    class Losing(Mine):
        def forward(self, x, query):
            a = super().forward(x, query)
            return a, a.square().mean()

    plain, out = outputs(row_of(Mine))
    assert "loss" not in out
    logits, out = outputs(row_of(Losing))
    assert torch.equal(logits, plain)
    expected = sum(a.square().mean().item() for a in out["attention"])
    assert out["loss"].shape == () and out["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1

    class OnceLosing(Losing):
        def forward(self, x, query):
            a, loss = super().forward(x, query)
            return (a, loss) if x.shape[2] == 25 else a

    out = outputs(row_of(OnceLosing))[1]
    assert out["loss"].item() == pytest.approx(out["attention"][1].square().mean().item(), rel=1e-5)

    network = build(row_of(OnceLosing), 100, 10, 5)
    network(torch.rand(3, 3, 100, 100), torch.arange(3))[1]["loss"].backward()
    reached = [a.score.weight.grad is not None for a in network.attention.values()]
    assert reached == [True, True, False, False]  # the gate below feeds the features above


def test_a_loss_may_be_a_function_of_the_cross_entropies():
    class Judged(Mine):
        def forward(self, x, query):
            a = super().forward(x, query)
            return a, lambda cross_entropy: (cross_entropy * a.mean((1, 2, 3))).sum()

    class Mixed(Judged):
        def forward(self, x, query):
            a, loss = super().forward(x, query)
            return (a, loss) if x.shape[2] == 25 else (a, a.mean())

    cross_entropy = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    for cls, judged in ((Judged, range(4)), (Mixed, [1])):
        out = outputs(row_of(cls))[1]
        means = [a.mean((1, 2, 3)) for a in out["attention"]]
        expected = sum(
            (cross_entropy.detach() @ m).item() if i in judged else m.mean().item()
            for i, m in enumerate(means)
        )
        assert own_loss(out, cross_entropy).item() == pytest.approx(expected, rel=1e-5)
    network = build(row_of(Judged), 100, 10, 5)
    own_loss(network(torch.rand(3, 3, 100, 100), torch.arange(3))[1], cross_entropy).backward()
    assert cross_entropy.grad is None
    assert all(a.score.weight.grad is not None for a in network.attention.values())
    assert own_loss({"attention": []}, cross_entropy) == 0


def test_features_of_its_own_take_the_place_of_the_product():
    class Residual(Mine):
        def forward(self, x, query):
            a = super().forward(x, query)
            return a, {"features": (1 + a) * x}

    class Product(Mine):
        def forward(self, x, query):
            a = super().forward(x, query)
            return a, {"features": a * x, "loss": a.mean()}

    def last(x):
        return x.shape[2] == 6

    class Pooled(Product):
        def forward(self, x, query):
            a, own = super().forward(x, query)
            return a, {"features": own["features"].sum((2, 3), keepdim=True)} if last(x) else own

    plain, kept = outputs(row_of(Mine))
    other, maps = outputs(row_of(Residual))
    assert torch.equal(maps["attention"][0], kept["attention"][0])
    assert not torch.allclose(other, plain)
    for cls in (Product, Pooled):
        again, out = outputs(row_of(cls))
        torch.testing.assert_close(again, plain)
        assert all(map(torch.equal, out["attention"], kept["attention"]))
    assert own_loss(outputs(row_of(Product))[1], torch.zeros(3)) > 0


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            lambda x: x[..., 1:],
            r"gave torch.float32 \(3, 32, 50, 49\) for features \(3, 32, 50, 50",
        ),
        (lambda x: x.mean(1, True), r"\(3, 1, 50, 50\) .* as x, .* with 32 channels of 3 images"),
        (lambda x: x[0], r"torch.float32 \(32, 50, 50\)"),
        (lambda x: 3, "gave int"),
    ],
)
def test_features_that_do_not_fit_are_refused(own, says):
    class Wrong(Mine):
        def forward(self, x, query):
            return super().forward(x, query), {"features": own(x)}

    with pytest.raises(MnistattnError, match=says):
        outputs(row_of(Wrong))


def test_what_stands_beside_a_map_has_a_known_name():
    class Wrong(Mine):
        def forward(self, x, query):
            return super().forward(x, query), {"feature": x}

    with pytest.raises(MnistattnError, match="may give features and loss beside its map, not fea"):
        outputs(row_of(Wrong))


@pytest.mark.parametrize(
    ("give", "found"),
    [
        (lambda a: a[:, 0], r"torch.float32 \(3, 50, 50\)"),
        (lambda a: a.expand(-1, 32, -1, -1), r"torch.float32 \(3, 32, 50, 50\)"),
        (lambda a: a[:1], r"torch.float32 \(1, 1, 50, 50\)"),  # these three would broadcast
        (lambda a: a.mean((2, 3), True), r"torch.float32 \(3, 1, 1, 1\)"),
        (lambda a: a[0, 0, 0, 0], r"torch.float32 \(\)"),
        (lambda a: a[..., 1:], r"torch.float32 \(3, 1, 50, 49\)"),
        (lambda a: a.transpose(0, 1), r"torch.float32 \(1, 3, 50, 50\)"),
        (lambda a: (a > 0.5).long(), r"torch.int64 \(3, 1, 50, 50\)"),
        (lambda a: a > 0.5, r"torch.bool \(3, 1, 50, 50\)"),
        (lambda a: a.to(torch.complex64), r"torch.complex64 \(3, 1, 50, 50\)"),
        (lambda a: a.detach().numpy(), "ndarray"),
        (lambda a: [a], "list"),
        (lambda a: None, "NoneType"),
        (lambda a: (a, a.mean(), a), "tuple"),
        (lambda a: (a[:, 0], a.mean()), r"torch.float32 \(3, 50, 50\)"),
        (lambda a: (None, a.mean()), "NoneType"),
    ],
)
def test_what_is_no_map_is_named_with_its_class_and_shapes(give, found):
    class Wrong(Mine):
        def forward(self, x, query):
            return give(super().forward(x, query))

    sentence = rf"Wrong gave {found} for features \(3, 32, 50, 50\): .* \(3, 1, 50, 50\)"
    with pytest.raises(MnistattnError, match=sentence):
        outputs(row_of(Wrong))


def test_a_whole_network_is_taken_as_it_is():
    class Whole(torch.nn.Module):
        def __init__(self, size, queries, answers, *, width=3):
            super().__init__()
            self.made = (size, queries, answers, width)

    for options, width in (({}, 3), ({"width": 8}, 8)):
        network = build(row_of(Whole, "whole"), 224, 5, 10, dropout=0.5, **options)
        assert type(network) is Whole and network.made == (224, 5, 10, width)


def test_what_a_class_raises_when_built_is_one_sentence():
    for placement in ("every", "last", (25,)):
        with pytest.raises(
            InputError, match="^Mine cannot be built with .*'scale': -1.*ValueError"
        ):
            build(row_of(Mine, placement), 100, 10, 5, scale=-1)

    class NoLast(torch.nn.Module):
        def __init__(self, channels, query_dim):
            super().__init__()

    with pytest.raises(InputError, match="^NoLast cannot be built with {}: TypeError: .*last"):
        build(row_of(NoLast), 100, 10, 5)


def test_attend_is_forward_of_all_but_post_hoc_models():
    for name in [*PROPER, *CONTROLS]:
        network = build(name, 100, 10, 5).eval()
        if name in WHOLE:
            assert not hasattr(network, "attend")
            continue
        assert type(network) is Network
        images = torch.rand(2, 3, 100, 100)
        mask = told(name, images)
        with torch.no_grad():
            (logits, out), (again, attended) = (
                f(images, torch.arange(2), **mask) for f in (network, network.attend)
            )
        assert torch.equal(logits, again), name
        assert all(map(torch.equal, out["attention"], attended["attention"])), name


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


@pytest.mark.parametrize("kind", [CTX, NoCTX, Scan])
def test_a_gate_may_start_nearly_shut(kind):
    x, query = torch.randn(2, 3, 5, 4), torch.randn(2, 4)
    for last in (False, True):
        maps = []
        for bias in (0.0, -2.0):
            torch.manual_seed(1)
            maps.append(kind(3, 4, last=last, gate_bias=bias)(x, query))
        odds = [a / (1 - a) for a in maps]
        torch.testing.assert_close(odds[1], odds[0] * (1 if last else torch.tensor(-2.0).exp()))
    with pytest.raises(InputError, match="gate_bias -30 is impossible: give a number from -20"):
        kind(3, 4, last=False, gate_bias=-30)


@pytest.mark.parametrize("kind", [CTX, NoCTX, Scan])
@pytest.mark.parametrize("last", [False, True])
def test_focus_is_a_loss_of_maps_that_are_right_already(kind, last):
    torch.manual_seed(1)
    module = kind(3, 4, last=last, focus=0.3)
    x, query = torch.randn(3, 3, 5, 4), torch.randn(3, 4)
    a, loss = module(x, query)
    assert torch.equal(module.eval()(x, query), a)
    flat = a.detach().double().numpy().reshape(3, -1)
    lit = flat.sum(1) ** 2 / (20 * (flat**2).sum(1))
    assert (lit > 1 / 20).all() and (lit < 1).all()
    right = torch.tensor([0.9, 0.2, 0.6])  # the second's answer is wrong: its map is left alone
    expected = 0.3 * (0.8 * lit[0] + 0.2 * lit[2]) / 3
    assert loss(-right.log()).item() == pytest.approx(expected, rel=1e-5)
    scaled = focus_loss(7 * a, 0.3)(-right.log())
    torch.testing.assert_close(scaled, loss(-right.log()))
    (gradient,) = torch.autograd.grad(loss(-right.log()), a)
    assert gradient[1].abs().max() == 0 and gradient[0].abs().max() > 0
    assert focus_loss(torch.zeros(2, 1, 3, 3), 1.0)(torch.zeros(2)).item() == 0


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
