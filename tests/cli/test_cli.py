"""The command line: what each request gives, and one sentence where it cannot be met."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from urllib.error import URLError

import click
import h5py
import pytest
from PIL import Image

from mnistattn import cli as cli_module
from mnistattn.cli import COMMANDS, cli
from mnistattn.dataset.seal import sealed
from mnistattn.models.registry import MODELS

FEW = "--train 3 --val 2 --test 2 --digits strokes"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function "command line" -> (exit code, standard output, standard error), in tmp_path.

    What a progress bar has drawn and wiped again is left out.
    """
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mnistattn", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli_module.main()
        out, err = capsys.readouterr()
        return left.value.code, out, err.rpartition("\r")[2]

    return run


def process(*arguments, **options) -> subprocess.Popen:
    # Started from the background, as tests may be, a process ignores Ctrl-C.
    return subprocess.Popen(
        [sys.executable, "-m", "mnistattn", *map(str, arguments)], stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory) -> Path:
    """Data sets with one thing wrong each, and other things that are no data sets."""
    root = tmp_path_factory.mktemp("broken")

    def copy(name: str) -> Path:
        path = root / name
        path.mkdir()
        for file in ("dataset.json", "test.h5"):
            shutil.copy(tiny / file, path)
        card = json.loads((path / "dataset.json").read_text())
        card["splits"] = {"test": card["splits"]["test"]}
        (path / "dataset.json").write_bytes(sealed(card))
        return path

    (copy("card") / "dataset.json").write_text('{"format": "mnist')
    (copy("other-card") / "dataset.json").write_text('{"format": "coco"}')
    path = copy("version") / "dataset.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    path = copy("truncated") / "test.h5"
    path.write_bytes(path.read_bytes()[:5000])
    (copy("text") / "test.h5").write_text("no HDF5")
    (copy("gone") / "test.h5").unlink()
    with h5py.File(copy("foreign") / "test.h5", "w") as h5:
        h5["cells"] = [1, 2, 3]
    with h5py.File(copy("count") / "test.h5", "r+") as h5:
        kept = h5["query"][:7]
        del h5["query"]
        h5["query"] = kept
    path = copy("flipped") / "test.h5"
    with h5py.File(path) as h5:
        at = h5["color"].id.get_offset() + 11
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)

    (root / "nothing").mkdir()
    for split in ("train", "val", "test"):
        (root / "photos" / split).mkdir(parents=True)
        (root / "photos" / split / "a.jpg").write_text("no picture")
    (root / "file").write_text("some text")
    return root


# --------------------------------------------------------------------------- what goes wrong

WRONG = [
    # names
    ("generat", 2, "unknown command 'generat'", "Did you mean 'generate'?"),
    ("generate --variant mbgg", 2, "unknown variant 'mbgg'", "Did you mean 'mbg'?"),
    ("generate --varient mbg", 2, "--varient", "--variant"),
    ("generate", 2, "--variant"),
    ("generate --variant mref --digits stroke", 2, "'stroke'", "Did you mean 'strokes'?"),
    ("generate --variant mref --distractors patch", 2, "'patch'", "Did you mean 'patches'?"),
    ("generate --variant mref --placement papr", 2, "'papr'", "Did you mean 'paper'?"),
    ("generate --variant mref --digit-split pool", 2, "'pool'", "Did you mean 'pooled'?"),
    ("generate --variant mbg --digits strokes --backgrounds texture", 2,
     "backgrounds 'texture' is neither", "Did you mean 'textures'?"),
    ("show {tiny} --split tset", 2, "unknown split", "Did you mean 'test'?"),
    ("evaluate --model ctxx --data {tiny}", 2, "unknown model 'ctxx'", "Did you mean 'ctx'?"),
    ("evaluate --model ctx --variant mreff", 2, "unknown variant", "Did you mean 'mref'?"),
    ("evaluate --model ctx --data {tiny} --recipe fats", 2, "unknown recipe 'fats'", "fast"),
    ("evaluate --model ctx --data {tiny} --queries each", 2, "'each'", "one, fresh, all"),
    ("evaluate --model ctx --data {tiny} --device tpu", 2, "'tpu'", "auto, cpu, cuda"),
    ("evaluate --model arnn --data {tiny} --set hiden=8", 2, "no option 'hiden'", "'hidden'?"),
    ("evaluate --model arnn --data {tiny} --set sigma=log", 2, "unknown sigma 'log'", "softplus"),
    ("evaluate --model none --data {tiny} --set hidden=8", 2, "it takes none"),
    # numbers
    ("evaluate --model arnn --data {tiny} --set hidden", 2, "is no NAME=VALUE"),
    ("evaluate --model arnn --data {tiny} --set hidden=", 2, "is no NAME=VALUE"),
    ("evaluate --model arnn --data {tiny} --set hidden=0", 2, "hidden 0 is impossible"),
    ("evaluate --model arnn --data {tiny} --set hidden=1.5", 2, "hidden 1.5 is impossible"),
    ("evaluate --model arnn --data {tiny} --set hidden=2 --set hidden=3", 2, "given twice"),
    ("evaluate --model arnn --data {tiny} --set sampled=yes", 2, "give true or false"),
    ("evaluate --model arnn --data {tiny} --set context_size=4", 2, "give an odd number"),
    ("evaluate --model arnn --data {tiny} --set spread=-1", 2, "spread -1 is impossible"),
    ("evaluate --model arnn --data {tiny} --set sharpness=0", 2, "sharpness 0 is impossible"),
    ("evaluate --model brnn --data {tiny} --set block=0", 2, "block 0 is impossible"),
    ("evaluate --model brnn --data {tiny} --set block=7", 2, "larger than a map of 6 x 6"),
    ("generate --variant mref --train -5", 2, "-5 images in train is impossible"),
    ("generate --variant mref --test -1", 2, "-1 images in test is impossible"),
    ("generate --variant mref --train 0 --val 0 --test 0", 2, "no images were asked for"),
    ("generate --variant mref --seed -1", 2, "seed -1 is out of range"),
    ("generate --variant mref --seed zero", 2, "--seed", "'zero' is not a valid integer"),
    ("generate --variant mref --train 1.5", 2, "--train", "'1.5' is not a valid integer"),
    ("generate --variant mref --workers -2", 2, "-2 workers are impossible"),
    ("generate --variant mref --shards 0", 2, "0 shards of 30000 images are impossible"),
    ("generate --variant mref --shards 5 " + FEW, 2, "5 shards of 3 images", "give 1 to 3"),
    ("show {tiny} -n 0", 2, "-n 0 is out of range"),
    ("show {tiny} -n 1001", 2, "-n 1001 is out of range"),
    ("show {tiny} -n many", 2, "'many' is not a valid integer"),
    ("verify {tiny} --redraw -1", 2, "--redraw -1 is impossible"),
    ("evaluate --model ctx --data {tiny} --epochs 0", 2, "epochs 0"),
    ("evaluate --model ctx --data {tiny} --batch-size 1", 2, "batch size 1"),
    ("evaluate --model ctx --data {tiny} --lr 0", 2, "learning rate 0.0"),
    ("evaluate --model ctx --data {tiny} --lr nan", 2, "learning rate nan"),
    ("evaluate --model ctx --data {tiny} --lr fast", 2, "'fast' is not a valid float"),
    ("evaluate --model ctx --data {tiny} --seed -1", 2, "seed -1 is out of range"),
    # what does not go together
    ("generate --variant mref --engine dask", 2, "give --shards"),
    ("generate --variant mref --shards 2 --engine local --scheduler tcp://x:1 " + FEW, 2,
     "give --engine dask"),
    ("generate --variant mref --shards 2 --scheduler tcp://x:1 --workers 2 " + FEW, 2,
     "leave --workers out"),
    ("evaluate --model ctx", 2, "either a data set's directory or a variant"),
    ("evaluate --model ctx --data {tiny} --variant mref", 2, "not both"),
    ("evaluate --data {tiny}", 2, "--model"),
    ("info", 2, "DIR"),
    ("show {tiny} {tiny}", 2, "unexpected extra argument"),
    # files that are missing, damaged or something else
    ("info nowhere", 2, "nowhere is no data set"),
    ("show nowhere", 2, "nowhere is no data set"),
    ("verify nowhere", 2, "nowhere is no data set"),
    ("evaluate --model ctx --data nowhere", 2, "nowhere is no data set"),
    ("info {broken}/nothing", 2, "has no dataset.json"),
    ("info {broken}/file", 2, "is no data set"),
    ("info {broken}/card", 2, "dataset.json is damaged"),
    ("info {broken}/other-card", 2, "no card of mnistattn's"),
    ("info {broken}/version", 2, "format version 99", "reads 1"),
    ("info {broken}/truncated", 2, "test.h5 is damaged or no HDF5 file"),
    ("info {broken}/text", 2, "test.h5 is damaged or no HDF5 file"),
    ("info {broken}/gone", 2, "test.h5 is missing"),
    ("show {broken}/foreign", 2, "test.h5 does not fit its card", "'image'"),
    ("show {broken}/count", 2, "'query' is not uint8 (40,)"),
    ("evaluate --model ctx --data {tiny} --checkpoint nowhere", 2, "nowhere does not exist"),
    ("evaluate --model ctx --data {tiny} --checkpoint {broken}/file", 2, "is damaged or not one"),
    # where it is to go
    ("generate --variant mref --out {tiny}", 2, "exists", "--overwrite"),
    ("generate --variant mref --out {broken} --overwrite", 2, "is no data set", "move it"),
    ("generate --variant mref --out {broken}/file/x " + FEW, 1, "cannot write", "Not a directory"),
    ("show {tiny} --out nowhere/sheet.png", 1, "cannot write nowhere/sheet.png"),
    ("show {tiny} --out sheet.abc", 1, "cannot write sheet.abc", "extension"),
    ("evaluate --model ctx --data {tiny} --out {broken}/file", 1, "cannot write"),
    # photos
    ("generate --variant mbg --backgrounds {broken}/nothing " + FEW, 2, "leaves no photo"),
    ("generate --variant mbg --backgrounds {broken}/photos --out x " + FEW, 2,
     "a.jpg is no image", "remove it"),
    ("generate --variant mbg --backgrounds {broken}/file " + FEW, 2, "is neither a folder nor"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "words"), [(w[0], w[1], w[2:]) for w in WRONG])
def test_one_sentence_and_a_code(call, tiny, broken, tmp_path, line, code, words):
    found, out, err = call(line.format(tiny=tiny, broken=broken))
    assert found == code, err
    assert out == ""
    assert err.startswith("mnistattn: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_no_cuda(call, tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = call(f"evaluate --model ctx --data {tiny} --device cuda")
    assert code == 2 and "there is no CUDA device here: use --device cpu" in err


def test_no_network(call, monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr("torchvision.datasets.MNIST", unreachable)
    code, _, err = call("generate --variant mref --digits mnist --out x --data-root here")
    assert code == 2
    assert "MNIST is not in here/MNIST/raw and could not be downloaded (URLError)" in err
    assert "--digits strokes" in err
    assert not (tmp_path / "x").exists()
    # Where the choice is free, the built-in digits do, and it says so.
    code, out, err = call("generate --variant mref --train 2 --val 0 --test 0 --data-root here")
    assert code == 0 and out.startswith("data/mref: done")
    card = json.loads((tmp_path / "data/mref/dataset.json").read_text())
    assert card["sources"]["digits"]["source"] == "strokes"


def test_real_mnist(call, real_data):
    code, _, err = call(
        f"generate --variant mref --train 2 --val 2 --test 2 --out x --data-root '{real_data}'"
    )
    assert code == 0, err
    assert call("info x")[1].count("digits: source mnist") == 1
    assert call(f"verify x --redraw 2 --data-root '{real_data}'")[0] == 0


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 130, "interrupted."), (MemoryError(), 1, "out of memory."),
     (OSError(28, "No space left on device"), 1, "No space left on device"),
     (BrokenPipeError(), 0, "")],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_failures_on_the_way(call, tiny, monkeypatch, error, code, said):
    def fail(path):
        raise error

    monkeypatch.setattr("mnistattn.dataset.describe.describe", fail)
    monkeypatch.setattr(os, "dup2", lambda *files: None)  # would silence this process for good
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    found, out, err = call(f"info {tiny}")
    assert found == code
    assert said in err
    assert "Traceback" not in err
    assert err.strip().count("\n") == 0


# --------------------------------------------------------------------------------------- help


def test_help_ends_with_an_example_that_parses():
    context = click.Context(cli, info_name="mnistattn")
    commands = [cli.get_command(context, name) for name in COMMANDS]
    assert cli.list_commands(context) == list(COMMANDS)
    for command in [cli, *commands]:
        shown = command.get_help(click.Context(command, parent=context, info_name=command.name))
        example = shown.rstrip().rpartition("\n\n")[2]
        words = shlex.split(example)
        assert words[:2] == ["Example:", "mnistattn"], command.name
        assert command is cli or words[2] == command.name
        named = cli.get_command(context, words[2])
        named.make_context(words[2], words[3:])  # raises if an option does not exist
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (command.name, parameter.name)


@pytest.mark.parametrize("line", ["", "-h", "--help"])
def test_help(call, line):
    code, out, err = call(line)
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out for name in COMMANDS)


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0 and out.endswith(f", version {version('mnistattn')}\n")


def test_help_answers_without_torch():
    script = (
        "import sys; from mnistattn.cli import COMMANDS, cli\n"
        "for name in COMMANDS: cli.main([name, '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'numba', 'h5py'} & set(sys.modules), 'a slow import'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------ what goes well


def test_generate(call, tmp_path):
    code, out, err = call(
        f"generate --variant mdist --out set --seed 7 {FEW} --distractors gaussian "
        "--placement balanced --digit-split pooled --workers 1"
    )
    assert (code, out) == (0, "set: done. See it with: mnistattn show set\n"), err
    assert {p.name for p in tmp_path.iterdir()} == {"set"}
    card = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert card["seed"] == 7
    assert (card["spec"]["distractors"], card["spec"]["placement"]) == ("gaussian", "balanced")
    assert card["sources"]["digits"]["split"] == "pooled"
    assert {split: e["count"] for split, e in card["splits"].items()} == {
        "train": 3, "val": 2, "test": 2,
    }  # fmt: skip
    code, _, _ = call(f"generate --variant mref --out set {FEW} --overwrite --train 4")
    assert code == 0
    card = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert (card["variant"], card["splits"]["train"]["count"]) == ("mref", 4)
    assert {p.name for p in tmp_path.iterdir()} == {"set"}


def test_info(call, tiny):
    code, out, err = call(f"info {tiny}")
    assert (code, err) == (0, "")
    assert out.startswith(f"MREF (mref) in {tiny}: train 64, val 24, test 40 images of 100 x 100")
    card = json.loads((tiny / "dataset.json").read_text())
    for entry in card["splits"].values():
        assert entry["digest"] in out
    assert "digits: source strokes" in out and "seed 1" in out


def test_show(call, tiny, tmp_path):
    code, out, err = call(f"show {tiny} --split train -n 5 --out sheet.png")
    assert (code, out, err) == (0, "sheet.png\n", "")
    with Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
    assert call(f"show {tiny} -n 1000")[0] == 0  # more than there are


def test_verify(call, tiny, broken):
    code, out, err = call(f"verify {tiny} --redraw 3")
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["ok", f"{split}:"] for split in ("train", "val", "test") for _ in range(2)
    ]
    assert out.count("byte for byte") == 3
    code, out, err = call(f"verify {broken}/flipped --redraw 0")
    assert code == 1
    assert err.splitlines()[-1] == ("mnistattn: test.h5 is damaged: 'color' of images 0 to 39.")
    assert out == ""
    # What is drawn anew tells which image it is: 9 objects an image, byte 11 is in image 1.
    code, _, err = call(f"verify {broken}/flipped --redraw 40")
    assert code == 1
    assert "image 1 (of 1 of 40 drawn anew) is not what the seed gives" in err


def test_verify_names_a_damaged_file(call, broken):
    code, _, err = call(f"verify {broken}/truncated --redraw 0")
    assert code == 1
    assert err.splitlines()[-1].startswith("mnistattn: test.h5 has 5,000 bytes, not ")


def test_shards_and_repair(call, tmp_path):
    line = f"generate --variant mref --out set {FEW} --shards 2 --workers 1"
    code, out, err = call(line)
    assert (code, out) == (0, "set: done. See it with: mnistattn show set\n"), err
    code, out, _ = call("info set")
    assert code == 0 and "train 3 (2 shards), val 2 (2 shards), test 2 (2 shards)" in out
    assert call("show set")[0] == 0
    code, out, err = call(line)
    assert code == 0 and "set is there already" in err
    path = tmp_path / "set" / "train-00001-of-00002.h5"
    whole = path.read_bytes()
    with h5py.File(path) as h5:
        at = h5["target"].id.get_offset()
    path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
    code, out, err = call("verify set --redraw 0")
    assert code == 1
    said = "mnistattn: train-00001-of-00002.h5 is damaged: 'target' of images 1 to 2."
    assert err.splitlines()[-1] == said
    code, out, err = call("verify set --redraw 2 --repair")
    assert code == 0 and "repaired: train-00001-of-00002.h5" in err and out.count("ok ") == 6
    assert path.read_bytes() == whole


def test_models(call):
    code, out, err = call("models")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(MODELS)
    code, out, err = call("models --options")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    brnn = next(i for i, line in enumerate(lines) if line.startswith("brnn"))
    assert "hidden=" in lines[brnn + 1] and "sampled=false" in lines[brnn + 1]
    assert lines[brnn + 1].endswith("focus=0.0")


def test_set(call, tiny, tmp_path):
    code, out, err = call(
        f"evaluate --model arnn --set hidden=2 --set context=3 --set sigma=exp --data {tiny} "
        "--epochs 1 --batch-size 20 --device cpu"
    )
    assert code == 0, err
    run = tmp_path / "runs" / "mref-arnn-context=3-hidden=2-sigma=exp-fast-seed0"
    options = json.loads((run / "result.json").read_text())["options"]
    assert (options["hidden"], options["context"], options["sigma"]) == (2, 3, "exp")


def test_evaluate(call, tiny, tmp_path):
    line = (
        f"evaluate --model none --data {tiny} --epochs 1 --batch-size 20 --lr 0.01 "
        "--queries fresh --seed 5 --device cpu"
    )
    code, out, err = call(line)
    assert code == 0, err
    assert out.startswith("NONE (none) on MREF, recipe fast, 1 epoch, seed 5")
    assert "result.json, samples.h5, picture.png, model.safetensors\n" in out
    assert out.rstrip().endswith("Beside others: mnistattn leaderboard runs")
    run = tmp_path / "runs" / "mref-none-fast-seed5"
    result = json.loads((run / "result.json").read_text())
    recipe = result["recipe"]
    assert (recipe["epochs"], recipe["batch_size"], recipe["lr"]) == (1, 20, 0.01)
    assert (recipe["queries"], result["seed"]) == ("fresh", 5)
    code, out, _ = call(
        f"evaluate --model none --data {tiny} --checkpoint {run}/model.safetensors "
        "--device cpu --out again"
    )
    assert code == 0
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["scores"] == result["scores"]
    code, out, err = call(line + " --lr 0.1 --out runs/mref-none-fast-seed5")
    assert code == 2 and "give another --out" in err


# --------------------------------------------------------------------------------- processes


def test_the_module_runs(tiny):
    """The real entry point, and a reader that goes away (mnistattn info | head)."""
    child = process("info", tiny, stdout=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(60) == 0


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    child = process(
        "generate", "--variant", "mref", "--digits", "strokes", "--out", tmp_path / "big",
        "--train", 1_000_000,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not any(f.stat().st_size > 1 << 20 for f in tmp_path.glob(".big.partial-*/train.h5")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert err.splitlines()[-1] == "mnistattn: interrupted."
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path):
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        child = process(
            "generate", "--variant", "mref", "--digits", "strokes", "--out", tmp_path / "set",
            "--train", 300, "--val", 0, "--test", 0,
        )  # fmt: skip
        _, err = child.communicate(timeout=60)
        left = list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert child.returncode == 1
    said = f"mnistattn: cannot write {tmp_path / 'set'}: No space left on device."
    assert err.splitlines()[-1] == said
    assert "Traceback" not in err
    assert not left
