"""`mnistattn check` and the first look: what keeps the contract passes, each breach is caught."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mnistattn.errors import InputError, MnistattnError
from mnistattn.models import check as points
from mnistattn.models.check import check, first_look
from mnistattn.models.network import build
from mnistattn.models.registry import Model, find

ROOT = Path(__file__).parents[2]
EXAMPLES = ["mnistattn/models/template.py:MyAttention", "examples/cbam_spatial.py:CBAMSpatial"]

BUILDS, SHAPE = "builds", "shape at every size"
PX100, PX224 = "works on 100 pixels", "works on 224 pixels"
VALUES, RANGE, CONSTANT = "finite, not negative", "gate or distribution", "not constant"
QUERY, GRADIENT = "looks at the query", "gradient reaches every parameter"
EVAL, LEAK, LABELS = "deterministic in eval", "no leak across the batch", "no use of labels"
SAVED, HALF, TRAINS = "saved and loaded", "half precision", "trains"
ALL = [BUILDS, SHAPE, PX100, PX224, VALUES, RANGE, CONSTANT, QUERY, GRADIENT, EVAL, LEAK, LABELS,
       SAVED, HALF, TRAINS]  # fmt: skip
RUNS = {SHAPE, PX100, PX224, VALUES, RANGE, CONSTANT, QUERY, GRADIENT, EVAL, LEAK, SAVED, HALF}


def row_of(cls: type, placement="every") -> Model:
    return Model(cls.__name__, cls, placement, "-", "-", "-", kind="plugged")


def states(row: Model | str, options: dict | None = None) -> dict[str, str]:
    """The state of each point, the texts' form held."""
    verdicts = check(row, options)
    assert all(v.text == " ".join(v.text.split()) for v in verdicts)
    assert all(v.text for v in verdicts if v.state != "ok")
    return {v.point: v.state for v in verdicts}


def failing(row: Model | str) -> dict[str, str]:
    """The points that fail, with what they say."""
    return {v.point: v.text for v in check(row) if v.state == "fail"}


@pytest.fixture
def short(monkeypatch):
    """Without the point that takes most of the time: 20 steps of training."""
    monkeypatch.setattr(points, "_trains", lambda row, options: "")


# ------------------------------------------------------------------------- what keeps the contract


@pytest.mark.parametrize("name", ["none", "ctx", "arnn", *EXAMPLES])
def test_what_keeps_the_contract_passes_every_point(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = states(name)
    assert list(found) == [p for p in ALL if p != SHAPE or name != "none"]
    assert "fail" not in found.values(), found
    notes = {p for p, state in found.items() if state == "note"}
    gradient = "gradient reaches every parameter"  # ctx has a bias before its softmax
    assert notes == {"none": {RANGE, CONSTANT}, "ctx": {gradient}}.get(name, set())


@pytest.mark.parametrize(
    "name", ["san", "brnn", "arnn-sampled", "arnn-ind", "gradcam", "input-gradient"]
)
def test_other_models_pass_too(name, short):
    found = states(name)
    assert "fail" not in found.values(), found
    assert ("samples" in found) == (name in ("arnn-sampled", "arnn-ind"))
    assert (found.get(SHAPE) == "note") == (name == "brnn")  # a block is larger than 1 x 1


def test_the_controls_fail_what_they_are_there_for(short):
    for name in ("uniform", "center", "random"):
        assert failing(name).keys() == {CONSTANT}
    assert failing("oracle").keys() == {LABELS}


def test_a_check_leaves_no_trace_and_says_the_same_again(short):
    assert check("ctx") == check("ctx")
    with pytest.raises(InputError, match="no option 'hiden'.*Did you mean 'hidden'"):
        check("ctx", {"hiden": 3})
    with pytest.raises(InputError, match="unknown model 'ctxx'"):
        check("ctxx")


def test_options_are_those_that_are_checked(short):
    assert check("ctx", {"hidden": 3})[0].text != check("ctx")[0].text
    (verdict,) = check("ctx", {"hidden": 0})
    assert (verdict.point, verdict.state) == (BUILDS, "fail") and "hidden 0" in verdict.text


# --------------------------------------------------------------------- attentions that break it


class Sound(nn.Module):
    """An attention that keeps the contract; each breach below is one change to it."""

    def __init__(self, channels, query_dim, *, last):
        super().__init__()
        self.last = last
        self.features = nn.Conv2d(channels, 8, 1)
        self.query = nn.Linear(query_dim, 8, bias=False)
        self.score = nn.Conv2d(8, 1, 1, bias=False)
        self.make()

    def make(self):
        """Parts of a breach."""

    def scores(self, x, query):
        return self.score(torch.tanh(self.features(x) + self.query(query)[:, :, None, None]))

    def finish(self, score):
        if self.last:
            return torch.softmax(score.flatten(2), dim=2).view_as(score)
        return torch.sigmoid(score)

    def forward(self, x, query):
        return self.finish(self.scores(x, query))


class NoChannel(Sound):
    def forward(self, x, query):
        return super().forward(x, query)[:, 0]


class EvenSizes(Sound):
    def forward(self, x, query):
        a = super().forward(x, query)
        return a[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]


class Square(Sound):
    def forward(self, x, query):
        return super().forward(x, query).transpose(2, 3)


class NanOfOnePosition(Sound):
    def scores(self, x, query):
        score = super().scores(x, query)
        return score + 0.1 * torch.log(torch.tensor(score[0].numel() - 1.0)).cos()


class Nan(Sound):
    def forward(self, x, query):
        return super().forward(x, query) * torch.tensor(float("nan"))


class NanInTheDark(Sound):
    def scores(self, x, query):
        peak = x.amax((1, 2, 3), keepdim=True)
        return super().scores(x / peak, query)


class Negative(Sound):
    def finish(self, score):
        return torch.tanh(score)


class Whole(Sound):
    def finish(self, score):
        return (super().finish(score) * 100).long()


class Constant(nn.Module):
    def __init__(self, channels, query_dim, *, last):
        super().__init__()

    def forward(self, x, query):
        return torch.full((len(x), 1, *x.shape[2:]), 0.5)


class SameForAll(nn.Module):
    def __init__(self, channels, query_dim, *, last):
        super().__init__()
        self.slope = nn.Parameter(torch.randn(2))

    def forward(self, x, query):
        rows, columns = (torch.linspace(0, 1, n) for n in x.shape[2:])
        score = self.slope[0] * rows[:, None] + self.slope[1] * columns
        return torch.sigmoid(score).expand(len(x), 1, *x.shape[2:])


class Dead(Sound):
    def make(self):
        self.unused = nn.Linear(3, 4)


class Detached(Sound):
    def scores(self, x, query):
        hidden = self.features(x).detach() + self.query(query)[:, :, None, None]
        return self.score(torch.tanh(hidden))


class Rounded(Sound):
    def make(self):
        self.shift = nn.Parameter(torch.rand(2))

    def scores(self, x, query):
        return super().scores(x, query) + self.shift.round().sum()


class InfiniteSlope(Sound):
    def scores(self, x, query):
        return super().scores(x, query) + torch.sqrt(0 * self.query.weight.sum())


class DropsOutInEval(Sound):
    def scores(self, x, query):
        return nn.functional.dropout(super().scores(x, query), 0.5, training=True)


class NoiseInEval(Sound):
    def scores(self, x, query):
        return super().scores(x, query) + 0.1 * torch.rand(())


class RemembersTheBatchBefore(Sound):
    def make(self):
        self.register_buffer("before", torch.zeros(()))

    def scores(self, x, query):
        score = super().scores(x, query) * (1 + self.before)
        self.before = x.mean().detach()
        return score


class SoftmaxOverTheBatch(Sound):
    def finish(self, score):
        return torch.softmax(score, dim=0)


class LessTheBatchMean(Sound):
    def scores(self, x, query):
        score = super().scores(x, query)
        return score - score.mean(0)


class LeaksInTraining(Sound):
    def scores(self, x, query):
        score = super().scores(x, query)
        return score - score.mean(0) if self.training else score


class LeaksALittleInTheLast(Sound):
    def scores(self, x, query):
        score = super().scores(x, query)
        return score - 0.1 * score.mean(0) if self.last and not self.training else score


class RunningSum(Sound):
    def scores(self, x, query):
        return super().scores(x, query).cumsum(0)


class LooksAtTheFirst(Sound):
    def scores(self, x, query):
        return super().scores(x - x[:1] / 2, query)


class KnowsItsPlace(Sound):
    def scores(self, x, query):
        place = torch.arange(len(x)).view(-1, 1, 1, 1)
        return super().scores(x, query) * (1 + place)


class SharesWithTheBatch(Sound):
    def forward(self, x, query):
        return super().forward(x, query) / len(x)


class NotAlone(Sound):
    def scores(self, x, query):
        return super().scores(x, query).squeeze(0).view(-1, 1, *x.shape[2:]) * (len(x) > 1)


class TakesMask(Sound):
    def forward(self, x, query, mask=None):
        return super().forward(x, query)


class TakesAnswer(Sound):
    def forward(self, x, query, *, true_label=None):
        return super().forward(x, query)


class SeesMask(Sound):
    sees_mask = True

    def forward(self, x, query, mask):
        return super().forward(x, query)


class LostBySaving(Sound):
    def make(self):
        self.tilt = torch.randn(()).item()

    def scores(self, x, query):
        return super().scores(x, query) + self.tilt * x[:, :1]


class LosesItsMean(Sound):
    def make(self):
        self.mean = torch.zeros(())

    def scores(self, x, query):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        return super().scores(x - self.mean, query)


class SmallImages(Sound):
    def scores(self, x, query):
        if x.shape[2] > 60:
            raise RuntimeError("this map\nis too large")
        return super().scores(x, query)


class BadConstructor(Sound):
    def make(self):
        raise KeyError("weights")


class NoHalf(Sound):
    def scores(self, x, query):
        score = super().scores(x, query)
        total = torch.zeros(score.numel())
        total.index_add_(0, torch.arange(score.numel()), score.flatten())
        return total.view_as(score)


class NanLoss(Sound):
    def forward(self, x, query):
        a = super().forward(x, query)
        return a, a.mean() * float("nan")


class LossOfEach(Sound):
    def forward(self, x, query):
        a = super().forward(x, query)
        return a, a.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("cls", "meant", "more", "says"),
    [
        (NoChannel, SHAPE, RUNS, r"\(2, 50, 50\): it must be \(2, 1, 50, 50\)"),
        (EvenSizes, SHAPE, RUNS, r"\(2, 1, 24, 24\): it must be \(2, 1, 25, 25\)"),
        (Square, SHAPE, set(), r"\(2, 1, 8, 5\): it must be \(2, 1, 5, 8\)"),
        (NanOfOnePosition, SHAPE, set(), "NaN or infinity"),
        (Nan, VALUES, RUNS, "NaN or infinity"),
        (NanInTheDark, VALUES, {SAVED}, "NaN or infinity"),
        (Negative, VALUES, {SHAPE, PX100, PX224, HALF}, "negative values .*sigmoid"),
        (Whole, SHAPE, RUNS, "map that is torch.int64"),
        (Constant, CONSTANT, set(), "same value at every position"),
        (SameForAll, CONSTANT, set(), "same for every image"),
        (Dead, GRADIENT, set(), r"attention.0.unused.weight gets no gradient"),
        (Detached, GRADIENT, set(), r"attention.0.features.weight gets no gradient"),
        (Rounded, GRADIENT, set(), r"gradient of attention.0.shift is zero"),
        (InfiniteSlope, GRADIENT, set(), r"gradient of attention.*not finite"),
        (DropsOutInEval, EVAL, {LEAK, SAVED}, "two outputs in eval"),
        (NoiseInEval, EVAL, {LEAK, SAVED}, "two outputs in eval"),
        (RemembersTheBatchBefore, EVAL, {LEAK, SAVED}, "nothing from batch to batch"),
        (SoftmaxOverTheBatch, LEAK, set(), "in eval.*changes when other images"),
        (LessTheBatchMean, LEAK, set(), "in eval.*changes when other images"),
        (LeaksALittleInTheLast, LEAK, set(), "in eval.*changes when other images"),
        (LeaksInTraining, LEAK, set(), "in training.*changes when other images"),
        (RunningSum, LEAK, set(), "in eval.*place in the batch"),
        (LooksAtTheFirst, LEAK, set(), "in eval.*place in the batch"),
        (KnowsItsPlace, LEAK, set(), "in eval.*place in the batch"),
        (SharesWithTheBatch, LEAK, set(), "in eval.*alone gives another"),
        (NotAlone, LEAK, set(), "in eval.*alone gives another"),
        (TakesMask, LABELS, set(), "forward takes 'mask'"),
        (TakesAnswer, LABELS, set(), "forward takes 'label'"),
        (SeesMask, LABELS, set(), "asks for the true mask"),
        (LostBySaving, SAVED, set(), "saved and loaded .*another map"),
        (LosesItsMean, SAVED, {LEAK}, "saved and loaded .*another map"),
        (SmallImages, PX224, {SHAPE}, "RuntimeError: this map is too large"),
        (NoHalf, HALF, set(), "RuntimeError: "),
        (NanLoss, PX100, RUNS - {SHAPE}, "loss of its own must be one finite number"),
        (LossOfEach, PX100, RUNS - {SHAPE}, "loss of its own must be one finite number"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_breach_is_caught_by_its_point(cls, meant, more, says, short):
    """And by no other point, but for those in `more`, which cannot help it."""
    verdicts = {v.point: v for v in check(row_of(cls))}
    assert list(verdicts) == ALL
    failed = {p for p, v in verdicts.items() if v.state == "fail"}
    assert meant in failed and failed - {meant} <= more, failed
    assert re.search(says, verdicts[meant].text), verdicts[meant].text


def test_the_sound_attention_passes(short):
    assert set(states(row_of(Sound)).values()) == {"ok"}


@pytest.mark.parametrize("placement", ["last", (25, 6), (50, 12)])
def test_only_the_maps_there_are_are_looked_at(placement, short):
    if placement == "last":
        assert set(states(row_of(Sound, placement)).values()) == {"ok"}
    else:  # images of 224 pixels have other maps
        failed = failing(row_of(Sound, placement))
        assert failed.keys() == {PX224} and "there is no map of" in failed[PX224]


def test_a_constructor_that_raises_ends_the_check():
    (verdict,) = check(row_of(BadConstructor))
    assert (verdict.point, verdict.state) == (BUILDS, "fail")
    assert (
        "BadConstructor cannot be built" in verdict.text and "KeyError: 'weights'" in verdict.text
    )


def test_what_does_not_learn_is_caught_by_training():
    assert failing(row_of(Unlearns, "whole")).keys() == {TRAINS}


def test_what_is_no_breach_is_a_note(short):
    class NoQuery(Sound):
        def __init__(self, channels, query_dim, *, last):
            super().__init__(channels, query_dim, last=last)
            del self.query

        def scores(self, x, query):
            return self.score(torch.tanh(self.features(x)))

    class Large(Sound):
        def finish(self, score):
            return 3 + 2 * torch.tanh(score)

    class Shifted(Sound):
        def make(self):
            self.shift = nn.Parameter(torch.zeros(1))

        def scores(self, x, query):
            return super().scores(x, query) + self.shift.round()

    for cls, point in ((NoQuery, QUERY), (Large, RANGE), (Shifted, GRADIENT)):
        found = states(row_of(cls))
        assert {p: s for p, s in found.items() if s != "ok"} == {point: "note"}, cls


@pytest.mark.parametrize("kind", ["loss", "batch norm", "parameter-free", "sample"])
def test_what_the_contract_allows_is_ok(kind, short):
    class Losing(Sound):
        def forward(self, x, query):
            a = super().forward(x, query)
            return a, 0.01 * a.mean()

    class Normed(Sound):
        def make(self):
            self.norm = nn.BatchNorm2d(1)

        def scores(self, x, query):
            return self.norm(super().scores(x, query))

    class Free(Constant):
        def forward(self, x, query):
            return torch.sigmoid((x * query[:, :, None, None]).mean(1, True))

    class Sampled(Sound):
        def scores(self, x, query):
            score = super().scores(x, query)
            return score + 0.1 * torch.randn_like(score) if self.training else score

    cls = {"loss": Losing, "batch norm": Normed, "parameter-free": Free, "sample": Sampled}[kind]
    found = {p: s for p, s in states(row_of(cls)).items() if s != "ok"}
    # a batch norm's bias stands before the last map's softmax, which ignores it
    assert found == ({GRADIENT: "note"} if kind == "batch norm" else {})


# ------------------------------------------------------------------------------- whole networks


class Net(nn.Module):
    """A whole network that keeps the contract."""

    placement = "whole"

    def __init__(self, size, queries, answers):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(3, 8, 5, 4)
        self.query = nn.Embedding(queries, 8)
        self.head = nn.Linear(16, answers)

    def forward(self, images, query):
        x, q = self.conv(images).relu(), self.query(query)
        a = torch.sigmoid((x * q[:, :, None, None]).sum(1, True))
        return self.end(self.head(torch.cat([(x * a).mean((2, 3)), q], 1)), a)

    def end(self, logits, a):
        return logits, {"attention": [a]}


class ExtraAnswer(Net):
    def end(self, logits, a):
        return torch.cat([logits, logits[:, :1]], 1), {"attention": [a]}


class NoDict(Net):
    def end(self, logits, a):
        return logits, [a]


class LogitsAlone(Net):
    def end(self, logits, a):
        return logits


class NoList(Net):
    def end(self, logits, a):
        return logits, {"attention": a}


class NoMaps(Net):
    def end(self, logits, a):
        return logits, {}


class TwoChannels(Net):
    def end(self, logits, a):
        return logits, {"attention": [a.expand(-1, 2, -1, -1)]}


class LargerThanTheImage(Net):
    def end(self, logits, a):
        side = self.size + 1
        return logits, {"attention": [nn.functional.interpolate(a, size=(side, side))]}


class NanLossOfANet(Net):
    def end(self, logits, a):
        return logits, {"attention": [a], "loss": a.log().sum() * float("inf") * 0}


class BatchNet(Net):
    def end(self, logits, a):
        return logits - logits.mean(0), {"attention": [a]}


class AnsweredNet(Net):
    def forward(self, images, query, answer=None):
        return super().forward(images, query)


class SmallNet(Net):
    def forward(self, images, query):
        if images.shape[2] != 100:
            raise RuntimeError("100 pixels only")
        return super().forward(images, query)


class DeadNet(Net):
    def end(self, logits, a):
        return logits.detach() + self.head.bias, {"attention": [a]}


class Unlearns(Net):
    def end(self, logits, a):
        return 2 * logits.detach() - logits, {"attention": [a]}  # the gradient's sign is wrong


EVERYTHING = RUNS | {TRAINS}


@pytest.mark.parametrize(
    ("cls", "meant", "more", "says"),
    [
        (ExtraAnswer, PX100, {PX224}, r"logits \(4, 6\) for 4 images and 5 answers"),
        (NoDict, PX100, EVERYTHING, "out a dict"),
        (LogitsAlone, PX100, EVERYTHING, r"must return \(logits, out\)"),
        (NoList, PX100, EVERYTHING, "a list of maps"),
        (NoMaps, PX100, EVERYTHING, "a list of maps"),
        (TwoChannels, PX100, {PX224, VALUES, HALF}, r"\(4, 2, 24, 24\): it must be \(4, 1, h, w\)"),
        (LargerThanTheImage, PX100, {PX224}, r"\(4, 1, 101, 101\).*at most 100"),
        (NanLossOfANet, PX100, EVERYTHING, "one finite number"),
        (BatchNet, LEAK, set(), "changes when other images"),
        (AnsweredNet, LABELS, set(), "forward takes 'answer'"),
        (SmallNet, PX224, set(), "100 pixels only"),
        (DeadNet, GRADIENT, set(), "conv.weight gets no gradient"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_breach_of_a_whole_network_is_caught_by_its_point(cls, meant, more, says, short):
    verdicts = {v.point: v for v in check(row_of(cls, "whole"))}
    assert list(verdicts) == [p for p in ALL if p != SHAPE]
    failed = {p for p, v in verdicts.items() if v.state == "fail"}
    assert meant in failed and failed - {meant} <= more, failed
    assert re.search(says, verdicts[meant].text), verdicts[meant].text


def test_a_whole_network_that_keeps_the_contract_passes(short):
    assert set(states(row_of(Net, "whole")).values()) == {"ok"}

    class Blind(Net):
        def end(self, logits, a):
            return logits, {"attention": []}

    found = states(row_of(Blind, "whole"))
    assert {p: s for p, s in found.items() if s != "ok"} == {RANGE: "note", CONSTANT: "note"}


# --------------------------------------------------------------------------------- the first look


def look(row: Model, size: int = 100, queries: int = 10, answers: int = 5) -> nn.Module:
    torch.manual_seed(0)
    network = build(row, size, queries, answers)
    first_look(network, row, size, queries, answers)
    return network


@pytest.mark.parametrize("name", [*EXAMPLES, "ctx", "arnn-sampled", "none", "gradcam"])
@pytest.mark.parametrize(("size", "classes"), [(100, (10, 5)), (224, (5, 10)), (32, (2, 3))])
def test_a_first_look_leaves_the_network_as_it_was(name, size, classes, monkeypatch):
    monkeypatch.chdir(ROOT)
    row = find(name)
    torch.manual_seed(0)
    before = build(row, size, *classes)
    network = look(row, size, *classes)
    state = network.state_dict()
    assert any("num_batches_tracked" in key for key in state)
    for key, value in before.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert network.training and all(m.training for m in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_a_first_look_at_a_whole_network():
    for size, classes in ((100, (10, 5)), (224, (5, 10))):
        assert look(row_of(Net, "whole"), size, *classes).training
    assert look(row_of(SmallNet, "whole"))


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (NoChannel, r"NoChannel gave torch.float32 \(2, 50, 50\)"),
        (EvenSizes, r"EvenSizes gave torch.float32 \(2, 1, 24, 24\)"),
        (Nan, "Nan gave a map with NaN or infinity"),
        (Negative, "Negative gave a map with negative values"),
        (Whole, "Whole gave torch.int64"),
        (SoftmaxOverTheBatch, "SoftmaxOverTheBatch does not keep.*other images"),
        (LeaksALittleInTheLast, "LeaksALittleInTheLast does not keep.*other images"),
        (LessTheBatchMean, "LessTheBatchMean does not keep.*other images"),
        (KnowsItsPlace, "KnowsItsPlace does not keep.*place in the batch"),
        (SharesWithTheBatch, "SharesWithTheBatch does not keep.*alone"),
        (TakesMask, "TakesMask does not keep.*'mask'"),
        (SeesMask, "SeesMask does not keep.*true mask"),
        (NanLoss, "NanLoss: a loss of its own must be one finite number"),
        (LossOfEach, "LossOfEach: a loss of its own must be one finite number"),
        (ExtraAnswer, r"ExtraAnswer gave logits \(2, 6\) for 2 images and 5 answers"),
        (NoDict, "NoDict must return"),
        (NoList, "NoList must return"),
        (TwoChannels, r"TwoChannels gave a map \(2, 2, 24, 24\)"),
        (LargerThanTheImage, r"LargerThanTheImage gave a map \(2, 1, 101, 101\)"),
        (BatchNet, "BatchNet does not keep.*other images"),
        (AnsweredNet, "AnsweredNet does not keep.*'answer'"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_first_look_refuses_with_one_sentence(cls, says):
    placement = "whole" if issubclass(cls, Net) else "every"
    with pytest.raises(MnistattnError, match=says) as caught:
        look(row_of(cls, placement))
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and not said.endswith("..")
