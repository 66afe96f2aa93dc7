"""Grad-CAM and the input's gradient against their definitions, and what they must leave alone."""

import pytest
import torch
from torch import Tensor

from mnistattn.models.network import Network, build
from mnistattn.models.registry import MODELS

pytest.importorskip("captum")
NAMES = [name for name, row in MODELS.items() if row.kind == "post-hoc"]
both = pytest.mark.parametrize("name", NAMES)


def fitted(name: str, size: int = 100, answers: int = 5, batch: int = 3):
    """A network in eval whose norms and last bias fit its images, so that its answers differ."""
    torch.manual_seed(0)
    network = build(name, size, 10, answers)
    for norm in (*network.norms, network.pooled_norm):
        norm.momentum = None
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    images, query = torch.rand(batch, 3, size, size), torch.arange(batch) * 3 % 10
    with torch.no_grad():
        network(images, query)
        network.eval().head[-1].bias -= network(images, query)[0].mean(0)
    return network, images, query


def logits_and_channels(network: Network, images: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """The pass written out, with the last convolution's output (B, C, h, w)."""
    x, last = images, images
    for conv, norm in zip(network.convs, network.norms, strict=True):
        last = conv(x)
        x = norm(torch.nn.functional.max_pool2d(last, 2)).clamp(min=0)
    pooled = network.pooled_norm(x.sum((2, 3)))
    return network.head(torch.cat([pooled, network.embedding(query)], 1)), last


# -------------------------------------------------------------------------------- the definitions


@pytest.mark.parametrize(("size", "side"), [(100, 12), (224, 14)])
def test_gradcam_weighs_channels_by_the_mean_slope_of_the_answer_given(size, side):
    network, images, query = fitted("gradcam", size, batch=4)
    logits, out = network.attend(images, query)
    again, channels = logits_and_channels(network, images, query)
    torch.testing.assert_close(logits, again)
    assert len(logits.argmax(1).unique()) > 1
    (found,) = out["attention"]
    assert found.shape == (4, 1, side, side)
    for b, answer in enumerate(logits.argmax(1)):
        (slopes,) = torch.autograd.grad(again[b, answer], channels, retain_graph=True)
        alpha = [slopes[b, c].mean() for c in range(32)]
        expected = sum(a * channels[b, c] for c, a in enumerate(alpha)).clamp(min=0)
        assert expected.max() > 0
        torch.testing.assert_close(
            found[b, 0], expected, rtol=1e-3, atol=1e-4 * expected.max().item()
        )


def test_the_input_gradient_is_the_largest_slope_of_the_answer_given_by_a_pixels_channels():
    network, images, query = fitted("input-gradient")
    logits, out = network.attend(images, query)
    (found,) = out["attention"]
    assert found.shape == (3, 1, 100, 100)
    inputs = images.clone().requires_grad_()
    again, _ = logits_and_channels(network, inputs, query)
    for b, answer in enumerate(logits.argmax(1)):
        (slopes,) = torch.autograd.grad(again[b, answer], inputs, retain_graph=True)
        expected = torch.stack(list(slopes[b])).abs().max(0).values
        assert expected.max() > 0
        torch.testing.assert_close(
            found[b, 0], expected, rtol=1e-3, atol=1e-4 * expected.max().item()
        )


def test_the_input_gradient_is_what_a_small_change_of_a_pixel_does():
    network, images, query = fitted("input-gradient")
    network, images, query = network.double(), images[:1].double(), query[:1]
    logits, out = network.attend(images, query)
    answer, step = logits.argmax(), 1e-7
    strongest = out["attention"][0].flatten().topk(5).indices.tolist()
    for place in [*strongest, 0, 5050, 9999]:
        row, column = divmod(place, 100)
        slopes = []
        for channel in range(3):
            values = []
            for sign in (1, -1):
                moved = images.clone()
                moved[0, channel, row, column] += sign * step
                with torch.no_grad():
                    values.append(network(moved, query)[0][0, answer])
            slopes.append(((values[0] - values[1]) / (2 * step)).abs())
        expected = torch.stack(slopes).max()
        found = out["attention"][0][0, 0, row, column]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------ what holds of them both


@both
def test_maps_are_finite_and_not_negative_and_of_each_image_alone(name):
    network, images, query = fitted(name)
    (maps,) = network.attend(images, query)[1]["attention"]
    assert torch.isfinite(maps).all() and (maps >= 0).all()
    assert maps.dtype == torch.float32 and not maps.requires_grad
    for b in range(3):
        (alone,) = network.attend(images[b : b + 1], query[b : b + 1])[1]["attention"]
        torch.testing.assert_close(alone[0], maps[b], rtol=1e-3, atol=1e-4 * maps[b].max().item())
        assert maps[b].amax() > maps[b].amin()


@both
def test_another_query_has_another_map(name):
    network, images, query = fitted(name)
    maps = [network.attend(images, q)[1]["attention"][0] for q in (query, (query + 1) % 10)]
    assert all((a - b).abs().max() > 1e-3 * a.max() for a, b in zip(*maps, strict=True))


@both
def test_the_logits_are_those_of_forward_and_of_none(name):
    network, images, query = fitted(name)
    none = build("none", 100, 10, 5)
    assert network.state_dict().keys() == none.state_dict().keys()
    none.load_state_dict(network.state_dict())
    none.eval()
    logits, out = network.attend(images, query)
    with torch.no_grad():
        assert torch.equal(network(images, query)[0], logits)
        assert torch.equal(none(images, query)[0], logits)
        assert torch.equal(none.attend(images, query)[0], logits)
        assert network(images, query)[1] == none(images, query)[1] == {"attention": []}
    assert len(out["attention"]) == 1 and not logits.requires_grad


@both
def test_explaining_works_where_no_gradient_is_taken(name):
    network, images, query = fitted(name)
    logits, out = network.attend(images, query)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            # Tensors made in inference mode have no derivative.
            again, again_out = network.attend(images * 1, query + 0)
        assert torch.equal(again, logits)
        assert torch.equal(again_out["attention"][0], out["attention"][0])
        torch.add(again_out["attention"][0], 1)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@both
def test_explaining_leaves_network_and_images_alone(name):
    network, images, query = fitted(name)
    network.head[1].weight.grad = torch.ones_like(network.head[1].weight)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    kept, kept_query = images.clone(), query.clone()
    for _ in range(2):
        network.attend(images, query)
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert (network.head[1].weight.grad == 1).all()
    gradients = [n for n, p in network.named_parameters() if p.grad is not None]
    assert gradients == ["head.1.weight"]
    assert all(p.requires_grad for p in network.parameters()) and not network.training
    assert torch.equal(images, kept) and torch.equal(query, kept_query)
    assert not images.requires_grad and images.grad is None
    hooks = [m for m in network.modules() if m._forward_hooks or m._backward_hooks]
    assert not hooks


@both
def test_channels_last_and_half_precision_give_about_the_same(name):
    network, images, query = fitted(name)
    (maps,) = network.attend(images, query)[1]["attention"]
    (same,) = network.attend(images.to(memory_format=torch.channels_last), query)[1]["attention"]
    torch.testing.assert_close(same, maps, rtol=1e-3, atol=1e-4 * maps.max().item())
    with torch.autocast("cpu", torch.bfloat16):
        (half,) = network.attend(images, query)[1]["attention"]
    assert torch.isfinite(half).all() and (half >= 0).all()
    together = torch.stack([half.float().flatten(), maps.flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.8
