"""Does an attention (or a whole model) keep the contract? Point by point, and how to mend it.

`first_look` is the short form, before each training of a plugged model; `check` is all of it.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from mnistattn.errors import InputError, MnistattnError
from mnistattn.models.network import CHANNELS, QUERY_DIM, Network, build, own_loss, unpack
from mnistattn.models.registry import Model, choose_options, find

BATCH = 4
SIZES = (100, 224)  # pixels of an image
MAPS = ((50, 50), (25, 25), (12, 12), (6, 6), (112, 112), (7, 7), (5, 8), (1, 1))
QUERIES, ANSWERS = 10, 5
CLOSE = 1e-4  # relative: a batch of another size may be summed in another order


@dataclass(frozen=True)
class Verdict:
    """One point: state "ok", "note" (nothing wrong, but be aware) or "fail", and a sentence."""

    point: str
    state: str
    text: str


class _Broken(Exception):
    """A point that does not hold; its text says what was wrong and how to mend it."""


class _Note(Exception):
    """A point to be aware of."""


def first_look(network: nn.Module, row: Model, size: int, queries: int, answers: int) -> None:
    """Two random images through a network of this model, training and in eval; MnistattnError, with
    a sentence, if the logits or maps are not what the contract says. The weights stay, and the
    statistics of BatchNorm too."""
    kept = {k: v.clone() for k, v in network.state_dict().items()}
    images, query = torch.rand(2, 3, size, size), torch.arange(2) % queries
    _refuse(row, _labels, row, network)  # first: no mask is given here
    for training in (True, False):
        network.train(training)
        try:
            with torch.no_grad(), _fitting(network):
                logits, maps, _ = _outputs(network, images, query, row.name)
        except MnistattnError:
            raise
        except Exception as error:  # of the user's code
            raise MnistattnError(
                f"{row.name} raises {type(error).__name__} on images of {size} pixels: {error}."
            ) from error
        _answers(logits, 2, answers, row.name)
        for a in maps:
            try:
                _valid(a, 2, row.name, size)
            except _Broken as error:
                raise MnistattnError(str(error)) from error
    _refuse(row, _leaks, network, row, "in eval", size, queries)
    network.load_state_dict(kept)
    network.train()


def _refuse(row: Model, test: Callable, *arguments) -> None:
    """What no score shows, and what would make it worthless."""
    try:
        test(*arguments)
    except _Broken as error:
        raise MnistattnError(f"{row.name} does not keep to the contract: {error}.") from error


def check(model: str | Model, options: dict | None = None) -> list[Verdict]:
    """All points, in order. InputError if there is no such model or option."""
    row = find(model)
    chosen = choose_options(row, options or {})
    verdicts = []
    torch.manual_seed(0)
    for point, test in _points(row, chosen):
        try:
            text, state = test() or "", "ok"
        except _Note as note:
            text, state = str(note), "note"
        except (_Broken, MnistattnError) as error:
            text, state = str(error), "fail"
        except Exception as error:  # whatever the user's code raises is what was wrong
            text, state = f"it raises {type(error).__name__}: {error}", "fail"
        verdicts.append(Verdict(point, state, " ".join(text.split())))
        if point == "builds" and state == "fail":
            break
    return verdicts


def _points(row: Model, options: dict) -> Iterator[tuple[str, Callable[[], str | None]]]:
    whole = row.placement == "whole"
    alone = bool(row.attention) and not whole
    yield "builds", lambda: _builds(row, options)
    if alone:
        yield "shape at every size", lambda: _shapes(row, options)
    for size in SIZES:
        yield f"works on {size} pixels", partial(_works, row, options, size)
    yield "finite, not negative", lambda: _values(row, options)
    yield "gate or distribution", lambda: _range(row, options)
    yield "not constant", lambda: _constant(row, options)
    yield "looks at the query", lambda: _query(row, options)
    yield "gradient reaches every parameter", lambda: _gradients(row, options)
    yield "deterministic in eval", lambda: _deterministic(row, options)
    yield "no leak across the batch", lambda: _leak(row, options)
    yield "no use of labels", lambda: _labels(row, _network(row, options))
    yield "saved and loaded", lambda: _saved(row, options)
    yield "half precision", lambda: _autocast(row, options)
    yield "trains", lambda: _trains(row, options)
    if alone and getattr(
        row.load()(CHANNELS, QUERY_DIM, last=True, **options), "has_samples", False
    ):
        yield "samples", lambda: _samples(row, options)


# ---- the points ----------------------------------------------------------------------------------


def _builds(row: Model, options: dict) -> str:
    network = _network(row, options)
    n = sum(p.numel() for p in network.parameters())
    return f"{n:,} parameters with the network around it"


def _shapes(row: Model, options: dict) -> str:
    if getattr(row.load(), "sees_mask", False):
        raise _Note("not tried: it is told the mask")
    refused = ""
    # One that only ever stands last may cost what no large map would bear.
    sizes = [s for s in MAPS if row.placement != "last" or max(s) <= 25]
    for last in {"first": (False,), "last": (True,)}.get(str(row.placement), (False, True)):
        module = row.load()(CHANNELS, QUERY_DIM, last=last, **options).eval()
        for size in sizes:
            x, query = torch.randn(2, CHANNELS, *size).relu(), torch.randn(2, QUERY_DIM)
            try:
                a = module(x, query)
            except InputError as error:  # of the package's own: a block that does not fit
                refused = str(error)
                continue
            except Exception as error:
                raise _Broken(
                    f"on features {tuple(x.shape)} it raises {type(error).__name__}: {error}; maps "
                    "may have any size from 1 x 1"
                ) from error
            _valid(unpack(a)[0], 2, row.name, exact=size)
    if refused:
        raise _Note(refused)
    return ", ".join(f"{h} x {w}" for h, w in sizes)


def _works(row: Model, options: dict, size: int) -> str:
    network = _network(row, options, size)
    logits, maps, _ = _outputs(network.train(), *_input(size), row.name, _mask(network, size))
    _answers(logits, BATCH, ANSWERS, row.name)
    for a in maps:
        _valid(a, BATCH, row.name, size)
    return "maps " + (", ".join(f"{a.shape[2]} x {a.shape[3]}" for a in maps) or "none")


def _values(row: Model, options: dict) -> None:
    network = _network(row, options).eval()  # in which a black image has features of 0
    for scale in (1.0, 0.0):
        images, query = _input()
        _, maps, _ = _outputs(network, scale * images, query, row.name, _mask(network))
        for a in maps:
            _valid(a, BATCH, row.name)


def _range(row: Model, options: dict) -> str:
    kinds = []
    for i, a in enumerate(_maps(row, options)):
        total = a.flatten(1).sum(1)
        if (total - 1).abs().max() < 1e-3:
            kinds.append("distribution")
        elif a.max() <= 1 + 1e-5:
            kinds.append("gate")
        else:
            raise _Note(
                f"map {i + 1} is neither: its values go to {a.max():.3g}, and it sums to "
                f"{total.mean():.3g}; a sigmoid or a softmax is what others give"
            )
    return ", ".join(kinds)


def _constant(row: Model, options: dict) -> None:
    for i, a in enumerate(_maps(row, options)):
        flat = a.flatten(1)
        if flat.shape[1] > 1 and bool((flat.amax(1) - flat.amin(1) <= 1e-9).all()):
            raise _Broken(f"map {i + 1} has the same value at every position: it attends to "
                          "nothing; let it depend on x")  # fmt: skip
        if len(flat) > 1 and bool((flat - flat[:1]).abs().max() <= 1e-9):
            raise _Broken(f"map {i + 1} is the same for every image and query: let it depend on x")


def _query(row: Model, options: dict) -> None:
    network = _fitted(row, options)
    images, query = _input()
    images = images[:1].expand_as(images)
    _, maps, _ = _outputs(network, images, query, row.name, _mask(network))
    if maps and all(_close([a], [a[:1]], 1e-5) for a in maps):
        raise _Note("no map depends on the query: it can find things, not what is asked for")


def _gradients(row: Model, options: dict) -> str:
    network = _network(row, options).train()
    images, query = _input()
    logits, _, loss = _outputs(network, images, query, row.name, _mask(network))
    (F.cross_entropy(logits.float(), torch.arange(BATCH) % ANSWERS) + loss).backward()
    softmax_bias = []
    own = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    if isinstance(network, Network):
        own = [(n, p) for n, p in own if n.startswith("attention.")]
    steepest: dict[str, float] = {}
    for name, parameter in own:
        if parameter.grad is None:
            raise _Broken(f"{name} gets no gradient: it does not take part in the map; remove it, "
                          "or look for .detach(), .item() or argmax on the way")  # fmt: skip
        if not torch.isfinite(parameter.grad).all():
            raise _Broken(f"the gradient of {name} is not finite")
        steepest[name] = parameter.grad.abs().max().item()
    largest = max(steepest.values(), default=0.0)
    for name, parameter in own:
        steep = steepest[name]
        if parameter.numel() == 1 and steep <= 1e-6 * largest:  # of rounding alone
            softmax_bias.append(name)  # as in the published CTX: harmless
        elif steep <= 1e-9:
            raise _Broken(f"the gradient of {name} is zero: something on its way is constant "
                          "(a dead ReLU, a rounding, a softmax over one value)")  # fmt: skip
    if softmax_bias:
        raise _Note(f"{', '.join(softmax_bias)} cannot learn: a softmax ignores what is added to "
                    "all positions; harmless")  # fmt: skip
    return f"{len(own)} tensors"


def _deterministic(row: Model, options: dict) -> None:
    network = _fitted(row, options)
    images, query = _input()
    mask = _mask(network)
    first = _flat(_outputs(network, images, query, row.name, mask))
    _outputs(network, images.flip(0).roll(5, 3), query.flip(0), row.name, mask)  # another between
    again = _flat(_outputs(network, images, query, row.name, mask))
    if not _close(first, again, 0):
        raise _Broken(
            "the same input gives two outputs in eval: draw samples and drop out only where "
            "self.training is true, and keep nothing from batch to batch"
        )


def _leak(row: Model, options: dict) -> str:
    network = _fitted(row, options)
    modes = ["eval"]
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    _leaks(network, row, "in eval")
    if isinstance(network, Network) and row.attention:
        # The network's own BatchNorm mixes a batch while training; an attention alone need not.
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm)
                    for a in network.attention.values() for m in a.modules())  # fmt: skip
        if not norms and not network.sees_mask:
            for module in network.attention.values():
                _leaks_alone(module.train(), row)
            modes.append("training")
    return " and ".join(modes) + (", its BatchNorm aside" if norms and len(modes) < 2 else "")


def _leaks(
    network: nn.Module, row: Model, where: str, size: int = 100, queries: int = QUERIES
) -> None:
    images, query = _input(size)
    query %= queries
    mask = _mask(network, size)
    plain = _outputs(network, images, query, row.name, mask)
    other = images.clone()
    other[1:] = torch.rand_like(other[1:])
    changed = _outputs(network, other, torch.cat([query[:1], query[1:].flip(0)]), row.name, mask)
    order = torch.arange(BATCH).roll(1)
    turned = _outputs(network, images[order], query[order], row.name,
                      None if mask is None else mask[order])  # fmt: skip
    if not _close([t[:1] for t in _flat(plain)], [t[:1] for t in _flat(changed)]):
        raise _Broken(f"{where}, an image's output changes when other images of the batch do: "
                      "a softmax, mean or sum runs over the batch, dim 0")  # fmt: skip
    alone = _outputs(network, images[:1], query[:1], row.name, None if mask is None else mask[:1])
    if not _close([t[:1] for t in _flat(plain)], _flat(alone)):
        raise _Broken(f"{where}, an image alone gives another output than in a batch: something "
                      "depends on the number of images, dim 0")  # fmt: skip
    if not _close([t[order] for t in _flat(plain)], _flat(turned)):
        raise _Broken(f"{where}, an image's output depends on its place in the batch: something "
                      "is indexed or accumulated along dim 0")  # fmt: skip


def _leaks_alone(module: nn.Module, row: Model) -> None:
    """In training: the same random numbers for both batches, which differ in the other images."""
    x, query = torch.randn(BATCH, CHANNELS, 6, 6).relu(), torch.randn(BATCH, QUERY_DIM)
    other = torch.cat([x[:1], torch.randn_like(x[1:]).relu()])
    outputs: list[list[Tensor]] = []
    for features in (x, other):
        torch.manual_seed(1)
        a, own, _ = unpack(module(features, query))
        outputs.append([t[:1] for t in (a, own) if isinstance(t, Tensor)])
    if not _close(outputs[0], outputs[1]):
        raise _Broken("in training, an image's map changes when other images of the batch do: "
                      "something runs over the batch, dim 0")  # fmt: skip


def _labels(row: Model, network: nn.Module) -> None:
    if getattr(network, "sees_mask", False):
        raise _Broken("it asks for the true mask (sees_mask): that is for the control 'oracle'")
    forward: Callable | None = network.forward if row.placement == "whole" else None
    if row.attention and not forward:
        forward = getattr(row.load(), "forward", None)
    if forward:
        names = set(inspect.signature(forward).parameters)
        for word in ("mask", "answer", "label", "target"):
            if any(word in name.lower() for name in names):
                raise _Broken(f"its forward takes '{word}': it is given features and query alone")


def _saved(row: Model, options: dict) -> None:
    network = _network(row, options)
    _outputs(network.train(), *_input(), row.name, _mask(network))  # move BatchNorm's statistics
    network.eval()
    copy = _network(row, options, seed=1)
    state = load_bytes(save_bytes({k: v.contiguous() for k, v in network.state_dict().items()}))
    copy.load_state_dict(state)
    images, query = _input()
    mask = _mask(network)
    kept = _flat(_outputs(network, images, query, row.name, mask))
    if not _close(kept, _flat(_outputs(copy.eval(), images, query, row.name, mask)), 0):
        raise _Broken("saved and loaded it gives another map: keep what it needs in parameters or "
                      "buffers (register_buffer), not in plain attributes")  # fmt: skip


def _autocast(row: Model, options: dict) -> None:
    network = _network(row, options).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, maps, loss = _outputs(network, *_input(), row.name, _mask(network))
    (logits.float().sum() + loss).backward()
    for a in maps:
        _valid(a, BATCH, row.name)


def _trains(row: Model, options: dict) -> str:
    """A batch learnt by heart: the loss must fall."""
    network = _network(row, options).train()
    images, query = _input()
    mask, answer = _mask(network), torch.arange(BATCH) % ANSWERS
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    losses = []
    for _ in range(20):
        logits, _, extra = _outputs(network, images, query, row.name, mask)
        loss = F.cross_entropy(logits.float(), answer)
        optimizer.zero_grad()
        (loss + extra).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise _Broken(f"20 steps on one batch do not lower the loss ({losses[0]:.3f} to "
                      f"{losses[-1]:.3f})")  # fmt: skip
    return f"loss of one batch {losses[0]:.3f} to {losses[-1]:.3f} in 20 steps"


def _samples(row: Model, options: dict) -> None:
    network = _fitted(row, options)
    images, query = _input()
    logits, out = network(images, query, samples=3)
    if logits.shape != (BATCH, 3, ANSWERS) or any(a.shape[:2] != (BATCH, 3)
                                                  for a in out["attention"]):  # fmt: skip
        raise _Broken("samples=3 must give maps (B, 3, H, W)")


# ---- inside --------------------------------------------------------------------------------------


def _network(row: Model, options: dict, size: int = 100, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(row, size, QUERIES, ANSWERS, **options)


@contextmanager
def _fitting(network: nn.Module) -> Iterator[None]:
    """Within, a pass in training makes the statistics of BatchNorm those of its batch. With the
    first ones the features of eval shrink from layer to layer, and what a leak changes with them.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = None
    yield
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def _fitted(row: Model, options: dict) -> nn.Module:
    """A network in eval, its norms fitting the images of `_input`."""
    network = _network(row, options).train()
    with torch.no_grad(), _fitting(network):
        _outputs(network, *_input(), row.name, _mask(network))
    return network.eval()


def _input(size: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(BATCH, 3, size, size, generator=generator), torch.arange(BATCH)


def _mask(network: nn.Module, size: int = 100) -> Tensor | None:
    if not getattr(network, "sees_mask", False):
        return None
    mask = torch.zeros(BATCH, size, size, dtype=torch.bool)
    for i in range(BATCH):
        mask[i, 10 * i : 10 * i + 20, 20:40] = True
    return mask


def _outputs(network, images, query, name: str, mask=None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits, maps and the loss of its own (0 for none); MnistattnError for what is no such."""
    attend = network if network.training else getattr(network, "attend", network)
    result = attend(images, query, **({} if mask is None else {"mask": mask}))
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise MnistattnError(f"{name} must return (logits, out), out a dict with 'attention'.")
    logits, out = result
    maps = out.get("attention")
    if not isinstance(logits, Tensor) or not isinstance(maps, list):
        raise MnistattnError(f"{name} must return (logits, out), out['attention'] a list of maps.")
    loss = out.get("loss", 0.0)
    if callable(loss):
        answer = torch.arange(len(logits)) % ANSWERS
        each = F.cross_entropy(logits.detach().float(), answer, reduction="none")
        loss = own_loss(out, each)
    loss = torch.as_tensor(loss)
    if loss.numel() != 1 or not bool(torch.isfinite(loss).all()):
        found = f"{loss.item():g}" if loss.numel() == 1 else f"a tensor {tuple(loss.shape)}"
        raise MnistattnError(f"{name}: a loss of its own must be one finite number, not {found}.")
    return logits, maps, loss


def _maps(row: Model, options: dict) -> list[Tensor]:
    network = _fitted(row, options)
    with torch.no_grad():
        maps = _outputs(network, *_input(), row.name, _mask(network))[1]
    if not maps:
        raise _Note("it gives no map, so its mask scores are empty")
    return maps


def _answers(logits: Tensor, batch: int, answers: int, name: str) -> None:
    """Logits that are some: MnistattnError for another shape."""
    if logits.shape != (batch, answers):
        raise MnistattnError(f"{name} gave logits {tuple(logits.shape)} for {batch} images and "
                             f"{answers} answers: they must be ({batch}, {answers}).")  # fmt: skip


def _valid(a: object, batch: int, name: str, most: int = 224, exact: tuple | None = None) -> None:
    """A map that is one: its type, shape (h and w at most `most`, or `exact`) and values."""
    if not isinstance(a, Tensor) or not a.is_floating_point():
        kind = a.dtype if isinstance(a, Tensor) else type(a).__name__
        raise _Broken(f"{name} gave a map that is {kind}: it must be a float tensor.")
    wrong = a.dim() != 4 or a.shape[:2] != (batch, 1) or max(a.shape[2:]) > most
    if wrong or (exact and a.shape[2:] != exact):
        sides = f"{exact[0]}, {exact[1]})" if exact else f"h, w), h and w at most {most}"
        raise _Broken(f"{name} gave a map {tuple(a.shape)}: it must be ({batch}, 1, {sides}.")
    if not bool(torch.isfinite(a).all()):
        raise _Broken(f"{name} gave a map with NaN or infinity: look for a division, a logarithm "
                      "or an exponential without a bound.")  # fmt: skip
    if bool((a < 0).any()):
        raise _Broken(f"{name} gave a map with negative values ({a.min():.3g}): put a sigmoid, a "
                      "softmax or a softplus at its end.")  # fmt: skip


def _flat(output: tuple[Tensor, list[Tensor], Tensor]) -> list[Tensor]:
    return [output[0], *output[1]]


def _close(first: list[Tensor], second: list[Tensor], relative: float = CLOSE) -> bool:
    return all(
        bool(((a - b).abs() <= relative * a.abs().amax().clamp(min=1e-6)).all())
        for a, b in zip(first, second, strict=True)
    )
