"""Several models' layers side by side, from run directories; and a run's network, loaded again."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from mnistattn import cli as cli_module
from mnistattn import evaluate, generate
from mnistattn.dataset.read import read_card
from mnistattn.errors import InputError
from mnistattn.evaluation import layers as module
from mnistattn.evaluation.feed import load_feed
from mnistattn.evaluation.layers import layers_of_runs
from mnistattn.evaluation.metrics import combine, upsample
from mnistattn.evaluation.reload import load_run

CPU = torch.device("cpu")
MODELS = ("ctx", "arnn", "san", "oracle", "none")
PLUGGED = '''
import torch
from torch import nn


class Mine(nn.Module):
    """Looks at what is bright."""

    def __init__(self, channels, query_dim, *, last):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, query):
        return torch.sigmoid(self.scale * x.mean(1, keepdim=True))
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """An MBG^inv of drawn digits on textures, 48 pixels."""
    out = tmp_path_factory.mktemp("inverse") / "mbg-inv"
    return generate("mbg-inv", out, seed=3, train=16, val=8, test=20, digits="strokes",
                    backgrounds="textures", size=48, max_scale=1.5, min_objects=2, max_objects=3,
                    progress=False)  # fmt: skip


def trained(model: str, data: Path, out: Path, **options) -> Path:
    evaluate(model, data, epochs=1, batch_size=8, device="cpu", out=out, progress=False,
             say=lambda line: None, **options)  # fmt: skip
    return out


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, Path]:
    """A run of each model, one epoch. Read them, copy them, never change them."""
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mnistattn.evaluation.run.flops_per_image", lambda *_: 1)
        return {name: trained(name, data, home / name) for name in MODELS}


@pytest.fixture
def drawn(monkeypatch) -> list:
    """What the picture is made of, each time that one is drawn."""
    found = []
    draw = module.layers_picture
    monkeypatch.setattr(
        module, "layers_picture", lambda *given: found.append(given) or draw(*given)
    )
    return found


# -------------------------------------------------------------------------------- the network again


@pytest.mark.parametrize("name", ["ctx", "arnn"])
def test_a_run_has_its_network_again(runs, data, name):
    """Without its data set: it answers, and attends, as when it was scored."""
    run = load_run(runs[name])
    assert run.file == runs[name] / "result.json" and run.row.name == name
    network, card = run.network(CPU), read_card(data)
    assert not network.training
    assert (run.card.query_names, run.card.answer_names) == (card.query_names, card.answer_names)
    feed, index = load_feed(card, "test", CPU), torch.arange(16)
    with torch.inference_mode():
        logits, out = network(feed.batch(index), feed.query[index])
        other, _ = run.network(CPU, card)(feed.batch(index), feed.query[index])
    assert torch.equal(logits, other)
    with h5py.File(runs[name] / "samples.h5") as h5:
        product = combine([a.float() for a in out["attention"]], (48, 48))
        kept = torch.from_numpy(h5["gallery"][()]) / 255
    # A board's picture is 8 bits; and where the processor has bf16, the run was scored in it.
    assert abs(product - kept).max() < 0.05


def test_other_options(runs):
    assert load_run(runs["arnn"]).network(CPU, sharpness=3.0).attention["0"] is not None
    with pytest.raises(InputError, match="no option 'hiden'"):
        load_run(runs["ctx"]).network(CPU, hiden=3)
    with pytest.raises(InputError, match="does not fit"):
        load_run(runs["ctx"]).network(CPU, hidden=8)


def test_plugged_code_is_loaded_as_it_was_trained(data, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGGED)
    model = f"{file}:Mine"
    run = trained(model, data, tmp_path / "run")
    with pytest.raises(InputError, match="unknown model 'Mine'"):  # its name does not say where
        load_run(run)
    assert load_run(run, model).row.name == "Mine"
    assert isinstance(layers_of_runs([run], models=[model]), Image.Image)
    file.write_text(PLUGGED + "\n# changed\n")
    with pytest.raises(InputError, match=r"the code of Mine is not what .* was made with"):
        load_run(run, model)


# -------------------------------------------------------------------------------------- the picture


def test_the_maps_are_those_of_the_networks_on_the_first_test_images(runs, data, drawn):
    shown = ["ctx", "arnn", "san"]
    picture = layers_of_runs([runs[name] for name in shown], images=5)
    ((images, masks, captions, looks, title),) = drawn
    assert isinstance(picture, Image.Image) and title.endswith("MBG^inv")
    card = read_card(data)
    feed, index = load_feed(card, "test", CPU, masks=True), torch.arange(5)
    assert (images == feed.images[:5].numpy()).all()
    assert (masks == feed.masks(index, feed.query[index]).numpy()).all()
    assert captions == [f"{card.query_names[q]} -> {card.answer_names[a]}"
                        for q, a in zip(feed.query[:5], feed.answer, strict=False)]  # fmt: skip
    assert [look.name for look in looks] == ["CTX", "ARNN", "SAN"]
    assert [len(look.maps) for look in looks] == [4, 4, 1]
    for name, look in zip(shown, looks, strict=True):
        with torch.inference_mode():
            logits, out = load_run(runs[name]).network(CPU)(feed.batch(index), feed.query[index])
        for found, layer in zip(look.maps, out["attention"], strict=True):
            wanted = upsample(layer.float(), (48, 48)).numpy()
            assert found.shape == (5, 48, 48)
            np.testing.assert_allclose(found, wanted, rtol=0.05, atol=0.05 * wanted.max())
        with h5py.File(runs[name] / "samples.h5") as h5:
            said, right = h5["prediction"][:5], h5["correct"][:5]
        assert look.said == [f"said {card.answer_names[k]}" for k in said]
        assert look.correct == right.tolist()


def test_a_model_that_is_told_the_mask(runs, data, drawn):
    layers_of_runs([runs["oracle"]], images=16)
    ((_, masks, _, (look,), _),) = drawn
    assert len(masks) == 16
    first = look.maps[0]
    assert first[masks].mean() > 3 * first[~masks].mean()


def test_names_and_files(runs, drawn):
    """A result.json is as good as its directory; without its data set; and names are ours."""
    layers_of_runs([runs["ctx"] / "result.json", runs["ctx"]], names=["one", "two"])
    ((images, *_, looks, _),) = drawn
    assert len(images) == 8 and [look.name for look in looks] == ["one", "two"]
    assert all((a == b).all() for a, b in zip(looks[0].maps, looks[1].maps, strict=True))


# ------------------------------------------------------------------------------- what is refused


def damage(run: Path, **change) -> None:
    raw = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(raw | change))


def other_test_split(run: Path) -> None:
    raw = json.loads((run / "result.json").read_text())
    raw["dataset"]["digests"]["test"] = "0" * 64
    damage(run, dataset=raw["dataset"])


REFUSED = {
    "no weights": (lambda run: (run / "model.safetensors").unlink(),
                   "model.safetensors is missing: give a run directory with its weights"),
    "other weights": (lambda run: (run / "model.safetensors").write_text("x"), "is damaged"),
    "no gallery": (lambda run: (run / "gallery.h5").unlink(), "gallery.h5 is missing"),
    "no gallery's file": (lambda run: (run / "gallery.h5").write_text("x"), "is damaged"),
    "other samples": (lambda run: (run / "samples.h5").write_text("x"), "SHA-256 differs"),
    "no result": (lambda run: (run / "result.json").unlink(), "does not exist"),
    "unknown model": (lambda run: damage(run, model="ctxx"), "unknown model 'ctxx'"),
    "other images": (other_test_split, "are of different test splits"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_is_one_sentence(runs, tmp_path, name):
    change, words = REFUSED[name]
    run = Path(shutil.copytree(runs["ctx"], tmp_path / "run"))
    change(run)
    with pytest.raises(InputError, match=words) as caught:
        layers_of_runs([run, runs["ctx"]])
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"


@pytest.mark.parametrize(
    ("given", "words"),
    [({"runs": []}, "there are no runs to show"), ({"images": 0}, "0 images are impossible"),
     ({"images": 17}, "17 images are impossible"), ({"device": "tpu"}, "unknown device 'tpu'"),
     ({"runs": ["none"]}, "is of a model without attention maps")],
)  # fmt: skip
def test_wrong_requests(runs, given, words):
    shown = [runs[name] for name in given.pop("runs", ["ctx"])]
    with pytest.raises(InputError, match=words):
        layers_of_runs(shown, **given)


def test_the_command_line(runs, tmp_path, monkeypatch, capsys):
    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mnistattn", "layers", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli_module.main()
        return (left.value.code, *capsys.readouterr())

    out = tmp_path / "here.png"
    given = (runs["ctx"], runs["arnn"], "-n", 2, "--device", "cpu", "--out")
    assert call(*given, out) == (0, f"{out}\n", "")
    with Image.open(out) as picture:
        picture.load()
        assert picture.format == "PNG"
    code, _, err = call(*given, tmp_path / "nowhere" / "x.png")
    assert code == 1 and err.startswith("mnistattn: cannot write") and err.count("\n") == 1
    code, _, err = call(runs["none"])
    assert code == 2 and err.endswith("without attention maps: leave it out.\n")
