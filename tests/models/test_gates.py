"""CBAM, residual attention and self-attention against their equations, written out, and against
torch's own encoder."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistattn.errors import InputError
from mnistattn.models.attention import residual, self_attention
from mnistattn.models.attention.arnn import ARNN
from mnistattn.models.attention.cbam import CBAM, CBAMARNN
from mnistattn.models.attention.residual import Residual
from mnistattn.models.attention.self_attention import SelfAttention

MAPS = [(1, 1), (1, 4), (3, 2), (5, 8), (7, 7)]
MODULES = {
    "cbam": (CBAM, {}),
    "cbam-3": (CBAM, {"kernel": 3, "reduction": 2, "least": 1}),
    "cbam-arnn": (CBAMARNN, {"hidden": 3, "context": 4}),
    "cbam-arnn-local": (CBAMARNN, {"hidden": 3, "local": True, "sharpness": 2}),
    "residual": (Residual, {}),
    "residual-1": (Residual, {"depth": 1, "metric": "output"}),
    "residual-3": (Residual, {"depth": 3, "per_channel": True}),
    "self": (SelfAttention, {"width": 8, "heads": 2}),
    "self-1": (SelfAttention, {"width": 12, "heads": 3, "layers": 1, "expansion": 1}),
}
C, Q, B = 6, 5, 3

every = pytest.mark.parametrize("name", MODULES)
either_layer = pytest.mark.parametrize("last", [False, True], ids=["inner", "last"])
sizes = pytest.mark.parametrize("shape", MAPS, ids=[f"{h}x{w}" for h, w in MAPS])


def make(name: str, last: bool = False, seed: int = 0, **options) -> nn.Module:
    """A float64 module all of whose parameters, biases too, are random and of a size that shows."""
    torch.manual_seed(seed)
    cls, chosen = MODULES[name]
    module = cls(C, Q, last=last, **chosen | options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 6
            parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
    return module


def inputs(*shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Features (3, 6, *shape) as of a ReLU and queries (3, 5), float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, *shape, generator=generator, dtype=torch.float64).relu()
    return x, torch.randn(B, Q, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------- what all must be


@every
@either_layer
@sizes
def test_shapes_and_ranges(name: str, last: bool, shape: tuple[int, int]) -> None:
    x, query = inputs(*shape)
    a, extra = make(name, last)(x, query)
    f = extra["features"]
    assert a.shape == (B, 1, *shape) and a.dtype == f.dtype == torch.float64
    assert f.shape == ((B, C, 1, 1) if last and name.startswith("self") else x.shape)
    assert (a >= 0).all() and (a <= 1).all()
    if name.startswith("self") or (last and not name.startswith("residual")):
        torch.testing.assert_close(a.sum((1, 2, 3)), torch.ones(B, dtype=torch.float64))


@every
@either_layer
def test_images_of_a_batch_do_not_meet(name: str, last: bool) -> None:
    """Turned, cut to one, and with other neighbours: an image's output is the same."""
    module, (x, query) = make(name, last), inputs(5, 4)
    a, f = module(x, query)[0], module(x, query)[1]["features"]
    order = torch.tensor([2, 0, 1])
    turned, extra = module(x[order], query[order])
    torch.testing.assert_close(turned, a[order])
    torch.testing.assert_close(extra["features"], f[order])
    alone, extra = module(x[1:2], query[1:2])
    torch.testing.assert_close(alone, a[1:2])
    torch.testing.assert_close(extra["features"], f[1:2])


@every
@either_layer
def test_map_and_features_depend_on_the_query(name: str, last: bool) -> None:
    module, (x, query) = make(name, last), inputs(5, 4)
    a, extra = module(x, query)
    b, other = module(x, query.roll(1, 0))
    assert ((a - b).abs().amax((1, 2, 3)) > 1e-6).all()
    difference = (extra["features"] - other["features"]).abs()
    assert (difference.amax((1, 2, 3)) > 1e-4).all()


@every
@either_layer
def test_every_parameter_learns_from_the_first_weights(name: str, last: bool) -> None:
    torch.manual_seed(0)
    cls, options = MODULES[name]
    module = cls(C, Q, last=last, **options)
    x, query = (t.float() for t in inputs(6, 6))
    x.requires_grad_()
    f = module(x, query)[1]["features"]
    (f * torch.randn_like(f)).sum().backward()
    for n, p in module.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, n
    assert x.grad is not None and torch.isfinite(x.grad).all()


@every
@either_layer
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_the_extremes(name: str, last: bool, scale: float) -> None:
    """A black image, and features as none should be; in float32 and under autocast."""
    module = make(name, last).float()
    x, query = (t.float() * scale for t in inputs(5, 4))
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            a, extra = module(x, query)
        module.zero_grad()
        extra["features"].float().sum().backward()
        assert torch.isfinite(a).all() and torch.isfinite(extra["features"]).all()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@every
@either_layer
def test_bfloat16_is_close(name: str, last: bool) -> None:
    module = make(name, last).float()
    x, query = (t.float() for t in inputs(6, 6))
    a, extra = module(x, query)
    with torch.autocast("cpu", torch.bfloat16):
        b, other = module(x, query)
    torch.testing.assert_close(b.float(), a, rtol=0.1, atol=0.03)
    scale = extra["features"].abs().max().item()
    torch.testing.assert_close(
        other["features"].float(), extra["features"], rtol=0.1, atol=0.05 * scale
    )


@pytest.mark.parametrize(
    ("cls", "options", "sentence"),
    [
        (CBAM, {"kernel": 4}, "kernel 4 is even: give an odd number."),
        (CBAM, {"reduction": 0}, "reduction 0 is impossible: give a whole number from 1."),
        (CBAM, {"least": 1.5}, "least 1.5 is impossible: give a whole number from 1."),
        (CBAMARNN, {"hidden": 0}, "hidden 0 is impossible: give a whole number from 1."),
        (CBAMARNN, {"reduction": True}, "reduction True is impossible: give a whole number"),
        (Residual, {"depth": 0}, "depth 0 is impossible: give a whole number from 1."),
        (Residual, {"per_channel": 1}, "per_channel 1 is impossible: give true or false."),
        (Residual, {"metric": "a"}, "unknown metric 'a': it is one of mask, output."),
        (SelfAttention, {"layers": 0}, "layers 0 is impossible: give a whole number from 1."),
        (SelfAttention, {"width": 30}, "width 30 is impossible with 4 heads: give a multiple of 4"),
        (SelfAttention, {"heads": 3}, "width 32 is impossible with 3 heads: give a multiple of 4 "
                                      "and of 3."),
    ],
)  # fmt: skip
def test_impossible_options(cls: type, options: dict, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        cls(32, 32, last=False, **options)
    assert str(error.value).startswith(sentence)


# -------------------------------------------------------------------------------------------- CBAM


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def channel_gate(module: nn.Module, x: np.ndarray, query: np.ndarray) -> np.ndarray:
    """sigmoid(MLP([avg; q]) + MLP([max; q])) (C,) of one image (C, H, W), unit by unit."""
    first, _, second = module.channel.mlp
    w0, b0, w1, b1 = (
        p.detach().numpy() for p in (first.weight, first.bias, second.weight, second.bias)
    )
    total = np.zeros(len(x))
    for pooled in ([c.mean() for c in x], [c.max() for c in x]):
        v = [*pooled, *query]
        hidden = [max(0.0, sum(w * u for w, u in zip(row, v, strict=True)) + b)
                  for row, b in zip(w0, b0, strict=True)]  # fmt: skip
        total += [sum(w * u for w, u in zip(row, hidden, strict=True)) + b
                  for row, b in zip(w1, b1, strict=True)]  # fmt: skip
    return sigmoid(total)


def spatial_score(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """K * [mean_c; max_c] (H, W) of one image (C, H, W), pixel by pixel; zeros outside."""
    conv = module.spatial.conv
    weight = conv.weight.detach().numpy()[0]
    bias = 0.0 if conv.bias is None else conv.bias.item()
    pooled = np.stack([x.mean(0), x.max(0)])
    height, width = x.shape[1:]
    half = weight.shape[1] // 2
    score = np.full((height, width), bias)
    for i, j in itertools.product(range(height), range(width)):
        for di, dj in itertools.product(range(-half, half + 1), repeat=2):
            if 0 <= i + di < height and 0 <= j + dj < width:
                score[i, j] += weight[:, di + half, dj + half] @ pooled[:, i + di, j + dj]
    return score


@pytest.mark.parametrize("name", ["cbam", "cbam-3"])
@either_layer
@sizes
def test_cbam_is_its_equations(name: str, last: bool, shape: tuple[int, int]) -> None:
    module, (x, query) = make(name, last), inputs(*shape)
    a, extra = module(x, query)
    for image, q, b, f in zip(x.numpy(), query.numpy(), a, extra["features"], strict=True):
        gated = image * channel_gate(module, image, q)[:, None, None]
        score = spatial_score(module, gated)
        wanted = np.exp(score) / np.exp(score).sum() if last else sigmoid(score)
        np.testing.assert_allclose(b[0].detach().numpy(), wanted, rtol=1e-9)
        np.testing.assert_allclose(f.detach().numpy(), gated * wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("channels", "options", "hidden"),
    [(32, {}, 4), (32, {"least": 1}, 2), (128, {}, 8), (32, {"reduction": 2}, 16),
     (8, {"reduction": 16, "least": 1}, 1)],
)  # fmt: skip
def test_cbam_bottleneck(channels: int, options: dict, hidden: int) -> None:
    for cls in (CBAM, CBAMARNN):
        assert cls(channels, 32, last=False, **options).channel.mlp[0].out_features == hidden


@either_layer
@pytest.mark.parametrize("options", [{}, {"local": True, "sharpness": 3.0}], ids=["plain", "local"])
def test_cbam_arnn_is_arnn_on_the_gated_features(last: bool, options: dict) -> None:
    module = make("cbam-arnn", last, **options)
    arnn = ARNN(C, Q, last=last, **{"hidden": 3, "context": 4} | options).double()
    arnn.load_state_dict(module.spatial.state_dict())
    x, query = inputs(5, 4)
    gate = np.stack([channel_gate(module, i, q)
                     for i, q in zip(x.numpy(), query.numpy(), strict=True)])  # fmt: skip
    gated = x * torch.from_numpy(gate)[:, :, None, None]
    a, extra = module(x, query)
    torch.testing.assert_close(a, arnn(gated, query))
    torch.testing.assert_close(extra["features"], gated * a)


# ---------------------------------------------------------------------------------------- residual


@pytest.mark.parametrize("name", ["residual", "residual-1", "residual-3"])
@sizes
def test_residual_output_is_one_plus_mask(name: str, shape: tuple[int, int]) -> None:
    """And the map is the mask, its mean over channels, or half of 1 + mask."""
    module, (x, query) = make(name, last=True), inputs(*shape)
    a = module.soft_mask(x, query)
    shown, extra = module(x, query)
    assert a.shape == (B, C if module.mask[2].out_channels > 1 else 1, *shape)
    assert (a > 0).all() and (a < 1).all()
    torch.testing.assert_close(extra["features"], x + a * x)
    wanted = a.mean(1, keepdim=True)
    torch.testing.assert_close(shown, (1 + wanted) / 2 if name == "residual-1" else wanted)


def unit(u: residual.Unit, x: Tensor) -> Tensor:
    """A residual unit with its convolutions as sums over shifted maps."""

    def conv(c: nn.Conv2d, v: Tensor) -> Tensor:
        padded = F.pad(v, (1, 1, 1, 1))
        total = c.bias[None, :, None, None].expand(len(v), -1, *v.shape[2:])
        for i, j in itertools.product(range(3), repeat=2):
            part = padded[:, :, i : i + v.shape[2], j : j + v.shape[3]]
            total = total + torch.einsum("oc,bchw->bohw", c.weight[:, :, i, j], part)
        return total

    return x + conv(u.second, conv(u.first, x.clamp(min=0)).clamp(min=0))


def halved(x: Tensor) -> Tensor:
    """The maximum of each 2 x 2 block, what there is of it at the edges."""
    rows = [x[:, :, i : i + 2].amax(2) for i in range(0, x.shape[2], 2)]
    x = torch.stack(rows, 2)
    return torch.stack([x[..., j : j + 2].amax(3) for j in range(0, x.shape[3], 2)], 3)


def enlarged(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned, by the weights of each output row and column."""
    for dim, n in zip((2, 3), shape, strict=True):
        m = x.shape[dim]
        weight = torch.zeros(n, m, dtype=x.dtype)
        for i in range(n):
            place = max((i + 0.5) * m / n - 0.5, 0.0)
            low = min(int(place), m - 1)
            weight[i, low] += 1 - (place - low)
            weight[i, min(low + 1, m - 1)] += place - low
        x = torch.tensordot(x, weight, ([dim], [1])).movedim(-1, dim)
    return x


@sizes
def test_residual_is_its_equations(shape: tuple[int, int]) -> None:
    """Two levels, written out; odd sides and sides of 1 among the sizes."""
    module, (x, query) = make("residual"), inputs(*shape)
    d1 = unit(module.down[0], halved(x))
    d2 = unit(module.down[1], halved(d1))
    assert d2.shape[2:] == tuple(-(-n // 4) for n in shape)
    # [D; q] at every position, through one 1 x 1 convolution.
    spread = query[:, :, None, None].expand(-1, -1, *d2.shape[2:])
    weight = torch.cat((module.bottom.weight, module.query.weight[:, :, None, None]), 1)
    e2 = unit(module.turn, F.conv2d(torch.cat((d2, spread), 1), weight, module.bottom.bias).relu())
    e1 = unit(module.up[0], enlarged(e2, d1.shape[2:]) + unit(module.skip[0], d1))
    first, _, second = module.mask
    e0 = torch.einsum("oc,bchw->bohw", first.weight[:, :, 0, 0], enlarged(e1, shape) + x)
    e0 = (e0 + first.bias[:, None, None]).relu()
    a = torch.einsum("oc,bchw->bohw", second.weight[:, :, 0, 0], e0) + second.bias
    torch.testing.assert_close(module(x, query)[0], 1 / (1 + (-a).exp()))


# --------------------------------------------------------------------------------- self-attention


def encoder(module: SelfAttention) -> nn.TransformerEncoder:
    """torch's own, with the module's weights."""
    width, block = module.width, module.blocks[0]
    layer = nn.TransformerEncoderLayer(
        width, block.heads, block.inner.out_features, dropout=0.0, activation="gelu",
        batch_first=True, norm_first=True,
    )  # fmt: skip
    norm = nn.LayerNorm(width)
    own = nn.TransformerEncoder(layer, len(module.blocks), norm, enable_nested_tensor=False)
    own = own.double()
    norm.load_state_dict(module.norm.state_dict())
    for theirs, ours in zip(own.layers, module.blocks, strict=True):
        theirs.self_attn.in_proj_weight.data.copy_(ours.mix.weight)
        theirs.self_attn.in_proj_bias.data.zero_()
        theirs.self_attn.out_proj.load_state_dict(ours.out.state_dict())
        for name, part in (("norm1", ours.norm1), ("norm2", ours.norm2),
                           ("linear1", ours.inner), ("linear2", ours.outer)):  # fmt: skip
            getattr(theirs, name).load_state_dict(part.state_dict())
    return own


def tokens(module: SelfAttention, x: Tensor, query: Tensor) -> Tensor:
    """T_0: the query, then the positions row by row, each with its sines and cosines."""
    height, width = x.shape[2:]
    cells = [module.query(query)]
    n = module.width // 4
    for i, j in itertools.product(range(height), range(width)):
        waves = [[f(p * 100 ** (-k / n)) for k in range(n)]
                 for p in (i, j) for f in (np.sin, np.cos)]  # fmt: skip
        cells.append(module.features(x[:, :, i, j]) + torch.tensor(waves).flatten())
    return torch.stack(cells, 1)


@pytest.mark.parametrize("name", ["self", "self-1"])
@either_layer
@sizes
def test_self_is_torchs_encoder(name: str, last: bool, shape: tuple[int, int]) -> None:
    module, (x, query) = make(name, last), inputs(*shape)
    wanted = module.out(encoder(module)(tokens(module, x, query)))
    f = module(x, query)[1]["features"]
    if last:
        torch.testing.assert_close(f[:, :, 0, 0], wanted[:, 0])
    else:
        torch.testing.assert_close(f.flatten(2).transpose(1, 2), wanted[:, 1:])


@pytest.mark.parametrize("name", ["self", "self-1"])
@either_layer
@pytest.mark.parametrize("most", [1, 40, 1 << 22], ids=["row by row", "in parts", "at once"])
def test_map_is_the_rollout_of_torchs_attention(
    name: str, last: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights by nn.MultiheadAttention, the product of whole matrices by numpy."""
    monkeypatch.setattr(self_attention, "MOST", most)
    module, (x, query) = make(name, last), inputs(3, 4)
    t = tokens(module, x, query)
    product = np.eye(13)
    for layer in encoder(module).layers:
        v = layer.norm1(t)
        a = layer.self_attn(v, v, v, need_weights=True, average_attn_weights=True)[1]
        step = 0.5 * a.detach().numpy() + 0.5 * np.eye(13)
        product = step / step.sum(2, keepdims=True) @ product
        t = layer(t)
    row = product[:, 0, 1:] if last else product[:, 1:, 1:].mean(1)
    wanted = (row / row.sum(1, keepdims=True)).reshape(B, 1, 3, 4)
    np.testing.assert_allclose(module(x, query)[0].numpy(), wanted, rtol=1e-9)


def test_self_tells_positions_apart() -> None:
    """Without the positions a shuffled map would give the same answer; with them it does not."""
    module, (x, query) = make("self", last=True), inputs(4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    first, second = (module(v, query)[1]["features"] for v in (x, shuffled))
    assert ((first - second).abs().amax((1, 2, 3)) > 1e-4).all()
    places = self_attention.positions(9, 12, 8)
    distances = torch.cdist(places, places) + torch.eye(108)
    assert distances.min() > 0.01


def test_a_query_that_sees_itself_alone_gives_a_uniform_map() -> None:
    """Not a division by zero: every position's weight is nothing in float32."""
    wanted = torch.tensor([[0.25] * 4, [0, 1, 0, 0]])
    row = torch.tensor([[0.0] * 4, [0, 1e-3, 0, 0]])
    torch.testing.assert_close(self_attention.spread(row), wanted)
