"""evaluate() from a data set to a run directory, and all it refuses."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from mnistattn import evaluate, load_arrays
from mnistattn.dataset.lock import only_writer
from mnistattn.dataset.read import answer_masks, read_card
from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation import paper, report, score, train
from mnistattn.evaluation import run as run_module
from mnistattn.evaluation.paper import printed
from mnistattn.evaluation.train import STATE

FILES = {
    "result.json", "model.safetensors", "samples.h5", "gallery.h5", "curve.json", "picture.png",
}  # fmt: skip
REQUEST = {"epochs": 1, "batch_size": 16, "seed": 3}


def quiet(model: str, data=None, variant=None, **options) -> dict:
    options = {"progress": False, "say": lambda line: None, "device": "cpu"} | options
    return evaluate(model, data, variant, **options)


def no_training(*arguments):
    raise AssertionError("trained")


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> SimpleNamespace:
    """A finished run of ctx. Read it, copy it, never change it."""
    path = tmp_path_factory.mktemp("runs") / "ctx"
    result = quiet("ctx", tiny, out=path, **REQUEST)
    return SimpleNamespace(path=path, result=result, checkpoint=path / "model.safetensors")


@pytest.fixture
def ctx(done, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(done.path, tmp_path / "ctx"))


def samples_of(path: Path) -> dict:
    with h5py.File(path / "samples.h5") as h5:
        return {name: values[()] for name, values in h5.items()}


# --------------------------------------------------------------------------------- what is there


def test_the_files(done):
    assert {p.name for p in done.path.iterdir()} == FILES
    assert done.result["run"] == str(done.path)
    kept = json.loads((done.path / "result.json").read_text())
    assert kept == {k: v for k, v in done.result.items() if k != "run"}
    with Image.open(done.path / "picture.png") as picture:
        picture.load()
        assert min(picture.size) > 100


def test_the_result(done, tiny):
    result, card = done.result, read_card(tiny)
    assert (result["format"], result["result_version"]) == ("mnistattn-result", 2)
    assert (result["model"], result["paper_name"]) == ("ctx", "CTX")
    # all of them, also those that were not given
    assert result["options"] == {"hidden": 32, "gate_bias": 0.0, "focus": 0.0}
    assert (result["kind"], result["origin"], result["changed_options"]) == (
        "model",
        "mnistattn",
        {},
    )
    file = Path(run_module.__file__).parents[1] / "models" / "attention" / "pan.py"
    assert result["code"] == hashlib.sha256(file.read_bytes()).hexdigest()
    dataset = result["dataset"]
    assert (dataset["variant"], dataset["paper_name"], dataset["seed"]) == ("mref", "MREF", 1)
    assert dataset["spec"] == card.raw["spec"]
    assert dataset["sources"]["digits"]["source"] == "strokes"
    digests = {split: card.digest(split) for split in ("train", "val", "test")}
    assert dataset["digests"] == digests
    assert result["trained_on"] == {split: digests[split] for split in ("train", "val")}
    recipe = result["recipe"]
    assert (recipe["name"], recipe["epochs"], recipe["batch_size"]) == ("fast", 1, 16)
    assert (result["seed"], result["epochs_trained"], result["best_epoch"]) == (3, 1, 1)
    scores = result["scores"]
    assert scores["accuracy"]["n"] == 40
    assert sum(row["n"] for row in scores["scales"]) == 40
    assert set(scores["masks"]) == set(score.MASK_METRICS)
    assert len(scores["layers"]) == 4
    network = run_module.build("ctx", 100, 10, 5)
    assert result["cost"]["parameters"] == sum(p.numel() for p in network.parameters())
    # The four 3 x 3 convolutions alone; a product and a sum count as two.
    least = 2 * 9 * 32 * (3 * 100**2 + 32 * (50**2 + 25**2 + 12**2))
    assert least < result["cost"]["flops_per_image"] < 3 * least
    assert result["cost"]["train_seconds"] > 0
    assert result["cost"]["batch_size"] == 16
    for ratio in (result["cost"]["train_times_none"], result["cost"]["inference_times_none"]):
        assert 0 < ratio["min"] == ratio["median"] == ratio["max"]
        assert ratio["rounds"] == 1
    assert set(result["versions"]) == {
        "mnistattn", "torch", "torchvision", "numpy", "numba", "h5py", "python",
    }  # fmt: skip
    assert torch.__version__.startswith(result["versions"]["torch"].split("+")[0])


def test_the_scores_follow_from_the_samples(done):
    samples = samples_of(done.path)
    gallery = samples.pop("gallery")
    assert {len(values) for values in samples.values()} == {40}
    assert score.summarize(samples | {"gallery": gallery}) == done.result["scores"]
    digest = hashlib.sha256((done.path / "samples.h5").read_bytes()).hexdigest()
    assert done.result["samples"] == {"file": "samples.h5", "sha256": digest}


def test_the_gallery(done, tiny):
    """Sixteen images and masks, and of each the combined map, brought to a peak of 255."""
    maps = samples_of(done.path)["gallery"]
    assert (maps.dtype, maps.shape) == (np.uint8, (16, 56, 56))
    assert (maps.max((1, 2)) == 255).all()
    with h5py.File(done.path / "gallery.h5") as h5:
        kept = {name: values[()] for name, values in h5.items()}
    assert set(kept) == {"image", "mask"}
    arrays = load_arrays(tiny, "test")
    assert np.array_equal(kept["image"], arrays["image"][:16])
    assert kept["mask"].dtype == bool
    assert np.array_equal(kept["mask"], answer_masks(arrays)[:16])
    # The maps are the network's: their mass in the mask is what the samples say.
    small = [np.asarray(Image.fromarray(m).resize((56, 56), Image.BOX)) / 255
             for m in (255 * kept["mask"]).astype(np.uint8)]  # fmt: skip
    share = (maps * np.array(small)).sum((1, 2)) / maps.sum((1, 2), dtype=float)
    np.testing.assert_allclose(share, samples_of(done.path)["correctness"][:16], atol=0.02)


def test_the_history(done):
    (entry,) = json.loads((done.path / "curve.json").read_text())
    assert entry["epoch"] == 1
    assert entry["loss"] > 0
    assert entry["seconds"] == done.result["cost"]["train_seconds"]


def test_the_table(done):
    text = report.table(done.result)
    assert "CTX (ctx) on MREF, recipe fast, 1 epoch, seed 3" in text
    assert f"{100 * done.result['scores']['accuracy']['value']:.2f}%" in text
    assert f"{done.result['scores']['masks']['pointing']['value']:.4f}" in text
    assert "correctness, layer 4" in text


def test_the_network_has_the_best_weights(done, tiny):
    """The weights on disk give the validation accuracy of the best epoch."""
    network = run_module.build("ctx", 100, 10, 5)
    network.load_state_dict(run_module.load_tensors(done.checkpoint)[0])
    network = network.to(memory_format=torch.channels_last)
    feed = run_module.load_feed(read_card(tiny), "val", torch.device("cpu"), masks=True)
    (entry,) = json.loads((done.path / "curve.json").read_text())
    found = train.validate(network, feed)
    assert found == {name: entry[name] for name in ("val_accuracy", "val_correctness")}


def test_options(tiny, tmp_path, monkeypatch):
    """They change the model, name the run, stand in the result, and come with a checkpoint."""
    monkeypatch.chdir(tmp_path)
    options = {"hidden": 3, "context": 4, "sampled": True}
    result = quiet("brnn", tiny, options=options, **REQUEST)
    run = Path("runs/mref-brnn-context=4-hidden=3-sampled=True-fast-seed3")
    assert Path(result["run"]) == run
    assert result["options"] == {
        "hidden": 3, "context": 4, "context_size": 3, "context_kind": "conv", "sampled": True,
        "independent": False, "sigma": "softplus", "spread": 1.0, "last_map": "softmax", "block": 2,
        "local": False, "sharpness": 1.0, "gate_bias": 0.0, "focus": 0.0,
    }  # fmt: skip
    assert result["changed_options"] == options  # what differs from the model's own
    first_line = report.table(result).splitlines()[0]
    assert first_line.endswith("seed 3, hidden=3, context=4, sampled=True")
    again = quiet("brnn", tiny, checkpoint=run / "model.safetensors", out="again")
    assert again["scores"] == result["scores"] and again["options"] == result["options"]
    with pytest.raises(InputError, match="does not fit.*other options"):
        quiet("brnn", tiny, checkpoint=run / "model.safetensors", options={"hidden": 4}, out="x")


def test_a_run_made_before_an_option_was_there(ctx, tiny, monkeypatch):
    """It had the default: neither trained again nor refused, while another value still is."""
    file = ctx / "model.safetensors"
    tensors, note = run_module.load_tensors(file)
    note["identity"]["options"] = {}
    run_module.save_tensors(file, tensors, note)
    monkeypatch.setattr(run_module, "train", no_training)
    quiet("ctx", tiny, out=ctx, **REQUEST)
    with pytest.raises(InputError, match="holds a run of another model"):
        quiet("ctx", tiny, out=ctx, options={"hidden": 8}, **REQUEST)


def test_no_attention(tiny, tmp_path):
    result = quiet("none", tiny, out=tmp_path / "none", **REQUEST)
    assert result["scores"]["masks"] is None
    assert result["scores"]["layers"] == []
    assert "gallery" not in samples_of(tmp_path / "none")
    assert score.summarize(samples_of(tmp_path / "none")) == result["scores"]
    assert "no attention maps, so no mask scores" in report.table(result)
    assert {p.name for p in (tmp_path / "none").iterdir()} == FILES


@pytest.mark.parametrize("variant", ["mbg-inv", "mbg-multi"])
def test_the_other_questions(tmp_path, variant):
    """Colour -> digit, and several right answers: what is counted is what the data set says."""
    from mnistattn import generate

    counts = {"train": 8, "val": 4, "test": 12}
    data = generate(variant, tmp_path / "set", digits="strokes", progress=False, **counts)
    result = quiet("san", data, out=tmp_path / "run", epochs=1, batch_size=4)
    samples, arrays = samples_of(tmp_path / "run"), load_arrays(data, "test")
    said = samples["prediction"]
    if variant == "mbg-inv":
        network = run_module.build("san", 100, 5, 10)
        assert np.array_equal(samples["correct"], said == arrays["answer"])
    else:
        network = run_module.build("san", 100, 10, 5)
        assert np.array_equal(samples["correct"], arrays["answers"][np.arange(12), said])
    parameters = sum(p.numel() for p in network.parameters())
    assert result["cost"]["parameters"] == parameters
    masks = [
        np.isin(ids, 1 + np.flatnonzero((digit == query) if variant == "mbg-multi" else one))
        for ids, digit, query, one in zip(
            arrays["instances"], arrays["digit"], arrays["query"], np.eye(9)[arrays["target"]],
            strict=True,
        )
    ]  # fmt: skip
    chance = np.mean(masks, (1, 2))
    np.testing.assert_allclose(samples["chance"], chance, rtol=0, atol=2.0**-17)
    assert np.array_equal(samples["scale"], arrays["scale"][np.arange(12), arrays["target"]])


# ------------------------------------------------------------------------------- once more


def test_the_same_request_does_not_train_again(done, ctx, tiny, monkeypatch):
    monkeypatch.setattr(run_module, "train", no_training)
    again = quiet("ctx", tiny, out=ctx, **REQUEST)
    assert again["scores"] == done.result["scores"]
    assert again["best_epoch"] == 1
    assert again["samples"] == done.result["samples"]  # the same bytes
    assert (ctx / "model.safetensors").read_bytes() == done.checkpoint.read_bytes()


def test_the_same_seed_gives_the_same_scores(done, tiny, tmp_path):
    again = quiet("ctx", tiny, out=tmp_path / "again", **REQUEST)
    assert again["scores"] == done.result["scores"]


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"epochs": 2}, {"lr": 0.1}, {"queries": "all"}, {"model": "noctx"},
              {"options": {"hidden": 8}}],
    ids=str,
)  # fmt: skip
def test_another_request_on_the_same_directory(ctx, tiny, other, monkeypatch):
    monkeypatch.setattr(run_module, "train", no_training)
    before = {p.name: p.read_bytes() for p in ctx.iterdir()}
    request = {"model": "ctx"} | REQUEST | other
    with pytest.raises(InputError, match="holds a run of another model"):
        quiet(data=tiny, out=ctx, **request)
    assert {p.name: p.read_bytes() for p in ctx.iterdir()} == before


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    request = REQUEST | {"epochs": 2}
    whole = quiet("none", tiny, out=tmp_path / "whole", **request)
    validate, calls = train.validate, []

    def interrupt(*arguments, **named):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*arguments, **named)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "validate", interrupt)
        quiet("none", tiny, out=tmp_path / "part", **request)
    assert [p.name for p in (tmp_path / "part").iterdir()] == [STATE]
    with pytest.raises(InputError, match="holds a run of another"):
        quiet("none", tiny, out=tmp_path / "part", **request | {"seed": 8})
    part = quiet("none", tiny, out=tmp_path / "part", **request)
    assert part["scores"] == whole["scores"]
    states = (
        run_module.load_tensors(tmp_path / n / "model.safetensors") for n in ("whole", "part")
    )
    (one, _), (two, _) = states
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert {p.name for p in (tmp_path / "part").iterdir()} == FILES


# ------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_gives_the_same_scores(done, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "train", no_training)
    result = quiet("ctx", tiny, out=tmp_path / "out", checkpoint=done.checkpoint)
    for field in ("scores", "recipe", "seed", "trained_on", "best_epoch", "epochs_trained"):
        assert result[field] == done.result[field], field
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES - {"model.safetensors"}


def test_a_checkpoint_needs_the_test_split_alone(done, tiny, tmp_path):
    data = Path(shutil.copytree(tiny, tmp_path / "data"))
    (data / "train.h5").unlink()
    result = quiet("ctx", data, out=tmp_path / "out", checkpoint=done.checkpoint)
    assert result["scores"] == done.result["scores"]


def test_a_checkpoint_does_not_replace_another_run(done, tiny, tmp_path):
    out = tmp_path / "none"
    quiet("none", tiny, out=out, **REQUEST)
    before = (out / "result.json").read_bytes()
    with pytest.raises(InputError, match="holds a run of another model"):
        quiet("ctx", tiny, out=out, checkpoint=done.checkpoint)
    assert (out / "result.json").read_bytes() == before


def test_a_checkpoint_of_another_model(done, tiny, tmp_path):
    with pytest.raises(InputError, match="is of model ctx, not noctx: give --model ctx"):
        quiet("noctx", tiny, out=tmp_path / "out", checkpoint=done.checkpoint)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_size(done, tmp_path):
    from mnistattn import generate

    counts = {"train": 0, "val": 0, "test": 2}
    data = generate("mbg-up", tmp_path / "up", digits="strokes", progress=False, **counts)
    with pytest.raises(InputError, match="does not fit.*another image size"):
        quiet("ctx", data, out=tmp_path / "out", checkpoint=done.checkpoint)


@pytest.mark.parametrize("damage", ["truncated", "text", "missing", "state"])
def test_a_damaged_checkpoint(done, tiny, tmp_path, damage):
    file = tmp_path / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(done.checkpoint.read_bytes()[:-9])
    elif damage == "text":
        file.write_text("no weights")
    elif damage == "state":  # the right note, other tensors
        tensors, note = run_module.load_tensors(done.checkpoint)
        run_module.save_tensors(file, {f"last.{k}": v for k, v in tensors.items()}, note)
    with pytest.raises(InputError, match=f"^checkpoint {file} [^\n]*\\.$"):
        quiet("ctx", tiny, out=tmp_path / "out", checkpoint=file)
    assert not (tmp_path / "out").exists()


def test_a_damaged_run(ctx, tiny):
    (ctx / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is damaged"):
        quiet("ctx", tiny, out=ctx, **REQUEST)


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_missing_split_is_found_before_the_training(tiny, tmp_path, monkeypatch, split):
    monkeypatch.setattr(run_module, "train", no_training)
    data = tmp_path / "data"
    data.mkdir()
    card = json.loads((tiny / "dataset.json").read_text())
    del card["splits"][split]
    (data / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=f"unknown split of .* '{split}'"):
        quiet("ctx", data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_not_trained_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "train", no_training)
    data = Path(shutil.copytree(tiny, tmp_path / "data"))
    with h5py.File(data / "train.h5", "r+") as h5:
        h5["image"][5, 50, 50, 0] ^= 1
    with pytest.raises(InputError, match=r"train\.h5 does not have the digest .*image differ"):
        quiet("ctx", data, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "ctxx"}, "Did you mean 'ctx'"),
        ({"data": None}, "either a data set's directory or a variant"),
        ({"variant": "mref"}, "either a data set's directory or a variant"),
        ({"device": "tpu"}, "unknown device 'tpu': it is one of auto, cpu, cuda"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 1 << 32}, "seed 4294967296 is out of range"),
        ({"epochs": 0}, "epochs 0"),
        ({"recipe": "slow"}, "unknown recipe 'slow'"),
        ({"options": {"depth": 3}}, "model ctx has no option 'depth': it takes hidden"),
        ({"options": {"hiden": 3}}, "Did you mean 'hidden'"),
        ({"options": {"hidden": 0}}, "hidden 0 is impossible"),
        ({"model": "none", "options": {"hidden": 3}}, "no option 'hidden': it takes none"),
        ({"model": "brnn", "options": {"block": 7}}, "block 7 is larger than a map of 6 x 6"),
        ({"data": "nowhere"}, "nowhere is no data set"),
    ],
    ids=str,
)
def test_impossible_requests(tiny, tmp_path, options, words):
    request = {"model": "ctx", "data": tiny, "out": tmp_path / "out"} | options
    with pytest.raises(InputError, match=words):
        quiet(**request)
    assert not (tmp_path / "out").exists()


def test_no_cuda(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device here: use --device cpu"):
        quiet("ctx", tiny, out=tmp_path / "out", device="cuda")
    assert run_module.choose_device("auto") == torch.device("cpu")


def test_a_directory_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MnistattnError, match=r"cannot write .*Not a directory") as caught:
        quiet("ctx", tiny, out=tmp_path / "file" / "run")
    assert caught.value.exit_code == 1


# ------------------------------------------------------------------------- data made on the way


def test_missing_data_are_generated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    counts = {"train": 6, "val": 4, "test": 5, "digits": "strokes"}
    result = quiet("none", variant="mref", say=said.append, epochs=1, **counts)
    assert "data/mref does not exist: generating it first" in said
    assert result["run"] == "runs/mref-none-fast-seed0"
    assert result["scores"]["accuracy"]["n"] == 5
    made = read_card("data/mref").splits
    assert {split: entry["count"] for split, entry in made.items()} == {
        "train": 6, "val": 4, "test": 5,
    }  # fmt: skip

    said.clear()  # and used again
    assert quiet("none", variant="mref", say=said.append, epochs=1)["scores"] == result["scores"]
    assert not said
    Path("data/mref").rename("data/mbg")
    with pytest.raises(InputError, match="data/mbg holds mref, not mbg: give --data"):
        quiet("none", variant="mbg")


def test_an_unknown_variant_is_not_generated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="Did you mean 'mref'"):
        quiet("none", variant="mreff")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- the paper's numbers


def test_the_printed_numbers():
    """Spot checks against Tables 1 to 3 and section 4.1 of the AttentionRNN paper."""
    assert printed("mref", "san")["accuracy"] == 83.42
    assert printed("mdist", "noctx")["accuracy"] == 89.92
    assert printed("mbg", "ctx") == {
        "accuracy": 79.00, "scales": (77.39, 87.13, 84.96, 75.59, 63.72), "correctness": 0.31,
    }  # fmt: skip
    assert printed("mbg", "arnn")["accuracy"] == 85.84
    assert printed("mbg", "arnn")["correctness"] == 0.42
    assert printed("mbg-up", "arnn")["scales"] == (84.89, 92.25, 94.24, 94.70, 94.52)
    assert printed("mbg-up", "none")["accuracy"] == 91.43
    assert printed("mbg", "arnn-ind")["accuracy"] == 84.27
    assert printed("mbg", "arnn-sampled")["correctness"] == 0.39
    assert printed("mbg-up", "brnn", {"block": 2})["accuracy"] == 92.68
    assert printed("mbg-up", "brnn", {"block": 3})["scales"][0] == 85.97
    assert printed("mbg-up", "brnn", {"block": 4})["accuracy"] is None
    assert printed("mbg-inv", "ctx")["accuracy"] == 66.37
    assert printed("mbg-inv", "noctx")["correctness"] == 0.20


def test_what_is_unconfirmed_is_not_printed():
    assert printed("mref", "ctx")["accuracy"] is None
    assert printed("mdist", "arnn")["accuracy"] is None
    assert printed("mbg", "arnn")["scales"][2:] == (None, None, None)
    nothing = {"accuracy": None, "scales": None, "correctness": None}
    assert printed("mbg-multi", "ctx") == printed("nowhere", "nothing") == nothing


def test_the_totals_agree_with_the_scales():
    """Weighted with the bins' shares that PAN's placement gives, the rows add up."""
    shares = {"mbg": (0.709, 0.170, 0.056, 0.035, 0.030),
              "mbg-up": (0.297, 0.250, 0.200, 0.143, 0.110)}  # fmt: skip
    for variant, rows in paper.SCALE_ACCURACY.items():
        for model, row in rows.items():
            if None not in row:
                total = sum(s * a for s, a in zip(shares[variant], row, strict=True))
                assert total == pytest.approx(paper.ACCURACY[variant][model], abs=0.1), model


# ------------------------------------------------------------------------ a model of one's own


MINE = '''
import torch
from torch import nn


class Mine(nn.Module):
    """Softmax of what fits the query."""

    placement = "last"

    def __init__(self, channels, query_dim, *, last, hidden=1):
        super().__init__()
        self.query = nn.Linear(query_dim, channels)
        self.score = nn.Conv2d(channels, hidden, 1)

    def forward(self, x, query):
        score = self.score(x * self.query(query)[:, :, None, None]).mean(1, keepdim=True)
        a = torch.softmax(score.flatten(2), 2).view_as(score)
        return a
'''

WHOLE = '''
import torch
from torch import nn


class Whole(nn.Module):
    """A grid of mean colours."""

    placement = "whole"

    def __init__(self, size, queries, answers, *, grid=5):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.query = nn.Embedding(queries, 3)
        self.head = nn.Linear(3 * grid * grid, answers)

    def forward(self, images, query):
        cells = self.pool(images)
        fits = (cells * self.query(query)[:, :, None, None]).sum(1, keepdim=True)
        a = torch.sigmoid(fits)
        return self.head((a * cells).flatten(1)), {"attention": [a]}
'''


def mine(folder: Path, change: tuple[str, str] = ("", ""), source: str = MINE) -> str:
    """Write mine.py, with one piece of it changed: the reference to its class."""
    assert change[0] in source
    (folder / "mine.py").write_text(source.replace(*change) if change[0] else source)
    return f"{folder / 'mine.py'}:{'Whole' if source is WHOLE else 'Mine'}"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return run_module.load_tensors(run / "model.safetensors")[0]


def test_a_model_of_ones_own(tiny, tmp_path, monkeypatch):
    """The result says what was run, and nothing of this machine's folders."""
    monkeypatch.chdir(tmp_path)
    said = []
    model = mine(tmp_path)
    result = quiet(model, tiny, options={"hidden": 3}, say=said.append, **REQUEST)
    run = Path("runs/mref-Mine-hidden=3-fast-seed3")
    assert Path(result["run"]) == run
    assert {p.name for p in run.iterdir()} == FILES
    assert (result["model"], result["kind"], result["origin"]) == (
        "Mine",
        "plugged",
        "mine.py:Mine",
    )
    assert result["summary"] == "Softmax of what fits the query."
    assert result["code"] == hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()
    assert result["options"] == result["changed_options"] == {"hidden": 3}
    assert len(result["scores"]["layers"]) == 1
    for name in ("result.json", "model.safetensors"):
        assert str(tmp_path).encode() not in (run / name).read_bytes(), name
    assert not said

    monkeypatch.setattr(run_module, "train", no_training)  # and once more: it is the same run
    (tmp_path / "mine.py").write_bytes(MINE.replace("\n", "\r\n").encode())  # line ends aside
    again = quiet(model, tiny, options={"hidden": 3}, **REQUEST)
    assert again["scores"] == result["scores"]
    assert again["code"] == result["code"]


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_a_changed_file_is_another_model(tiny, tmp_path, monkeypatch, finished):
    """Its old weights are neither scored as the new model's nor trained on."""
    kept = {"identity": None}

    def trained(network, recipe, feed, validation, seed, run, identity, *rest):
        kept["identity"] = identity
        note = {"identity": identity, "history": []}
        run_module.save_tensors(run / (STATE if not finished else "model.safetensors"), {}, note)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run_module, "train", trained)
        quiet(mine(tmp_path), tiny, out=tmp_path / "run", **REQUEST)
    assert kept["identity"]["model"] == "Mine"
    monkeypatch.setattr(run_module, "train", no_training)
    changed = mine(tmp_path, ("return a", "return a * 0.5"))
    with pytest.raises(InputError, match="holds a run of another model"):
        quiet(changed, tiny, out=tmp_path / "run", **REQUEST)


@pytest.mark.parametrize(
    ("change", "ending", "words"),
    [
        (("import torch\n", "import torch\n1 / 0\n"), "", r"mine\.py, line 3, raises ZeroDivision"),
        (("import torch\n", "import torchh\n"), "", r"mine\.py, line 2, raises ModuleNotFound"),
        (("import torch\n", "import torch(\n"), "", r"mine\.py, line 2, raises SyntaxError"),
        (("", ""), "s", r"mine\.py has no class 'Mines': it defines Mine\. Did you mean 'Mine'\?"),
        (("nn.Module", "object"), "", r"mine\.py:Mine is no class of torch\.nn\.Module"),
        (("forward", "forwards"), "", r"mine\.py:Mine has no forward"),
        (("class Mine", "class ctx"), "", r"mine\.py has no class 'Mine': it defines ctx"),
        (('"last"', '"second"'), "", "placement 'second' is impossible"),
        (("hidden=1", "hidden"), "", "Mine cannot be built with {}: TypeError"),
    ],
    ids=str,
)
def test_a_file_that_does_not_load(tiny, tmp_path, change, ending, words):
    model = mine(tmp_path, change) + ending
    with pytest.raises(InputError, match=words) as caught:
        quiet(model, tiny, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("a * float('nan')", "Mine gave a map with NaN or infinity"),
        ("a / 0", "Mine gave a map with NaN or infinity"),
        ("a - 0.1", "Mine gave a map with negative values"),
        ("a[:, 0]", r"a map must be a float tensor \(2, 1, 6, 6\)"),
        ("a[:, :, :3]", r"a map must be a float tensor \(2, 1, 6, 6\)"),
        ("a.expand(-1, 2, -1, -1)", r"a map must be a float tensor \(2, 1, 6, 6\)"),
        ("a > 0.1", r"a map must be a float tensor \(2, 1, 6, 6\)"),
        ("None", "Mine gave NoneType"),
        ("torch.softmax(score, 0)", "other images of the batch"),
        ("a * torch.arange(1, len(a) + 1).view(-1, 1, 1, 1)", "its place in the batch"),
        ("(a, a.mean((1, 2, 3)))", "a loss of its own must be one finite number"),
        ("(a, a.sum() * float('inf'))", "a loss of its own must be one finite number"),
    ],
)
def test_a_broken_contract_is_found_before_the_training(
    tiny, tmp_path, monkeypatch, returned, words
):
    monkeypatch.setattr(run_module, "train", no_training)
    model = mine(tmp_path, ("return a", f"return {returned}"))
    with pytest.raises(MnistattnError, match=words) as caught:
        quiet(model, tiny, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_constant_map_is_scored_with_a_note(tiny, tmp_path):
    said = []
    model = mine(tmp_path, ("return a", "return torch.full_like(a, 0.5)"))
    result = quiet(model, tiny, out=tmp_path / "run", say=said.append, **REQUEST)
    assert len(said) == 1
    assert "every map of Mine is constant" in said[0]
    masks = result["scores"]["masks"]
    assert masks["correctness"] == masks["chance"]
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES


def test_a_loss_of_ones_own_is_trained_on(tiny, tmp_path):
    """The same network, with and without a loss that pulls its scores' weights to zero."""
    runs = {}
    for name, returned in (("without", "a"), ("with", "(a, 100 * self.score.weight.abs().sum())")):
        (tmp_path / name).mkdir()
        model = mine(tmp_path / name, ("return a", f"return {returned}"))
        runs[name] = tmp_path / name / "run"
        quiet(model, tiny, out=runs[name], **REQUEST)
    plain, pulled = (weights_of(run)["attention.3.score.weight"] for run in runs.values())
    assert pulled.abs().sum() < 0.97 * plain.abs().sum()
    one, two = (json.loads((run / "curve.json").read_text())[0]["loss"] for run in runs.values())
    assert two > one + 50 * pulled.abs().sum()


def test_a_whole_model_of_ones_own(tiny, tmp_path):
    result = quiet(mine(tmp_path, source=WHOLE), tiny, out=tmp_path / "run", **REQUEST)
    assert (result["model"], result["kind"], result["options"]) == ("Whole", "plugged", {"grid": 5})
    assert result["cost"]["parameters"] == 10 * 3 + 75 * 5 + 5
    assert result["cost"]["flops_per_image"] == 2 * 75 * 5  # its only matrix product
    assert len(result["scores"]["layers"]) == 1
    scores = result["scores"]
    assert scores["layers"][0] == scores["masks"]["correctness"]  # of a single map
    checkpoint = tmp_path / "run" / "model.safetensors"
    again = quiet(mine(tmp_path, source=WHOLE), tiny, out=tmp_path / "b", checkpoint=checkpoint)
    assert again["scores"] == scores


@pytest.mark.parametrize("value", ["(0.5, 1.0)", "{'a': 1}", "float('inf')", "object()"])
def test_an_option_that_no_result_can_hold_is_found_before_the_training(
    tiny, tmp_path, monkeypatch, value
):
    monkeypatch.setattr(run_module, "train", no_training)
    model = mine(tmp_path, ("hidden=1", f"hidden=1, extra={value}"))
    with pytest.raises(InputError, match="option 'extra'"):
        quiet(model, tiny, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------ controls and post-hoc


@pytest.fixture(scope="module")
def none(tiny, tmp_path_factory) -> SimpleNamespace:
    """A finished run of none. Read it, copy it, never change it."""
    path = tmp_path_factory.mktemp("runs") / "none"
    result = quiet("none", tiny, out=path, **REQUEST)
    return SimpleNamespace(path=path, result=result, checkpoint=path / "model.safetensors")


@pytest.fixture(scope="module")
def controls(tiny, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Finished runs of all controls."""
    runs = {}
    for name in ("uniform", "center", "random", "oracle"):
        path = tmp_path_factory.mktemp("controls") / name
        result = quiet(name, tiny, out=path, **REQUEST)
        runs[name] = SimpleNamespace(path=path, result=result, samples=samples_of(path))
    return runs


def test_controls_are_said_to_be_controls(controls, none):
    for name, run in controls.items():
        assert (run.result["model"], run.result["kind"]) == (name, "control")
        assert {p.name for p in run.path.iterdir()} == FILES
        assert len(run.result["scores"]["layers"]) == 4
        assert run.result["cost"]["parameters"] == none.result["cost"]["parameters"]


def test_uniform_is_chance(controls):
    masks, samples = controls["uniform"].result["scores"]["masks"], controls["uniform"].samples
    assert masks["correctness"] == masks["chance"]
    for name in ("correctness", "rank_accuracy", "average_precision"):
        np.testing.assert_allclose(samples[name], samples["chance"], rtol=0, atol=2.0**-16)
    assert (samples["pixel_auroc"] == 0.5).all()
    assert masks["pointing"]["value"] == 0


def test_center_and_random_look_at_no_image(controls):
    for name in ("center", "random"):
        gallery = controls[name].samples["gallery"]
        assert (gallery == gallery[0]).all(), name
        assert gallery[0].min() < gallery[0].max() == 255
    middle = controls["center"].samples["gallery"][0]
    assert np.array_equal(middle, middle[::-1]) and np.array_equal(middle, middle.T)
    assert middle[28, 28] == 255 and middle[0, 0] < 10


def test_the_oracle_is_the_ceiling(controls):
    """It attends to the digit that is asked for, in the test as in the training."""
    masks = {name: run.result["scores"]["masks"] for name, run in controls.items()}
    for metric in ("correctness", "rank_accuracy", "pixel_auroc", "average_precision", "topk_iou"):
        best = max(masks, key=lambda name: masks[name][metric]["value"])
        assert best == "oracle", metric
    assert masks["oracle"]["correctness"]["value"] > 0.5
    assert masks["oracle"]["pixel_auroc"]["value"] > 0.95
    for name in ("uniform", "center", "random"):
        assert masks[name]["correctness"]["value"] < 0.2


@pytest.mark.parametrize("name", ["gradcam", "input-gradient"])
def test_maps_made_of_a_checkpoint_of_none(none, tiny, tmp_path, monkeypatch, name):
    """The same network, so the same answers to the last one; only the maps are new."""
    monkeypatch.setattr(run_module, "train", no_training)
    result = quiet(name, tiny, out=tmp_path / "out", checkpoint=none.checkpoint)
    assert (result["model"], result["kind"]) == (name, "post-hoc")
    assert result["scores"]["accuracy"] == none.result["scores"]["accuracy"]
    assert result["cost"]["parameters"] == none.result["cost"]["parameters"]
    for field in ("recipe", "seed", "trained_on", "best_epoch"):
        assert result[field] == none.result[field], field
    one, two = samples_of(none.path), samples_of(tmp_path / "out")
    for column in one:
        assert np.array_equal(one[column], two[column]), column
    assert len(result["scores"]["layers"]) == 1
    assert len(np.unique(two["pixel_auroc"])) > 10  # of each image another map
    with pytest.raises(InputError, match="is of model none, not ctx"):
        quiet("ctx", tiny, out=tmp_path / "ctx", checkpoint=none.checkpoint)


def test_gradcam_trains_none(none, tiny, tmp_path):
    """Without a checkpoint: the weights are none's, and serve as a checkpoint of none."""
    out = tmp_path / "gradcam"
    result = quiet("gradcam", tiny, out=out, **REQUEST)
    kept, same = weights_of(none.path), weights_of(out)
    assert kept.keys() == same.keys()
    assert all(torch.equal(kept[name], same[name]) for name in kept)
    assert result["scores"]["accuracy"] == none.result["scores"]["accuracy"]
    plain = quiet("none", tiny, out=tmp_path / "none", checkpoint=out / "model.safetensors")
    assert plain["scores"] == none.result["scores"]


def test_gradcam_does_not_replace_the_result_of_none(none, tiny, tmp_path):
    """They share weights, but not a directory."""
    out = Path(shutil.copytree(none.path, tmp_path / "none"))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for request in (REQUEST, {"checkpoint": none.checkpoint}):
        with pytest.raises(InputError, match="holds a run of"):
            quiet("gradcam", tiny, out=out, **request)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_checkpoint_of_other_code_is_refused(tiny, tmp_path):
    file = tmp_path / "gate.py"
    file.write_text(GATE_SOURCE)
    quiet(f"{file}:Gate", tiny, out=tmp_path / "run", **REQUEST)
    file.write_text(GATE_SOURCE.replace("torch.sigmoid", "softmax_of_all"))
    with pytest.raises(InputError, match="is not what .* was trained with"):
        quiet(
            f"{file}:Gate", tiny, checkpoint=tmp_path / "run/model.safetensors", out=tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


def test_what_a_plugged_forward_raises_is_one_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "train", no_training)
    file = tmp_path / "gate.py"
    file.write_text(GATE_SOURCE.replace("self.score(x)", "x.no_such_thing"))
    with pytest.raises(MnistattnError, match="Gate raises AttributeError on images of 100 pixels"):
        quiet(f"{file}:Gate", tiny, out=tmp_path / "run", **REQUEST)


GATE_SOURCE = """
import torch
from torch import nn


def softmax_of_all(x):
    return torch.softmax(x.flatten(1), 1).view_as(x)


class Gate(nn.Module):
    def __init__(self, channels, query_dim, *, last):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)
        self.query = nn.Linear(query_dim, 1)

    def forward(self, x, query):
        return torch.sigmoid(self.score(x) + self.query(query)[:, :, None, None])
"""


def test_too_little_memory_on_a_gpu_says_what_to_lower(tiny, tmp_path, monkeypatch) -> None:
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(run_module, "train", full)
    with pytest.raises(MnistattnError, match="memory for none in batches of 7: give a smaller"):
        quiet("none", tiny, out=tmp_path / "run", batch_size=7)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_run_has_one_writer(tiny, tmp_path) -> None:
    """The second is refused while the first trains; nothing is left of the lock."""
    run = tmp_path / "run"
    with only_writer(run), pytest.raises(InputError, match="run is being written by process"):
        quiet("none", tiny, out=run, epochs=1)
    assert not run.exists()
    quiet("none", tiny, out=run, epochs=1)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
