"""One training by several processes: the same as by one; and what happens when one fails."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mnistattn.cli import main
from mnistattn.errors import InputError
from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.ranks import ALONE, Ranks, Together, check_batch, launched, together
from mnistattn.evaluation.recipes import make_recipe
from mnistattn.evaluation.train import PREVIOUS, STATE, load_state, train
from mnistattn.models.network import build

F64 = torch.float64
CPU = torch.device("cpu")
# 35 images in batches of 11: whole batches of uneven parts, and 2 images left over for 3 processes.
RECIPE = make_recipe("fast", epochs=3, batch_size=11)
TIMES = ("seconds", "images_per_second")


# ------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize(("n", "size"), [(16, 2), (17, 2), (7, 3), (3, 3), (2, 3), (0, 2), (50, 7)])
def test_parts_are_all_and_even(n, size):
    parts = [range(n)[Ranks(rank, size).part(n)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_place_is_torchruns(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is ALONE
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert launched() == Ranks(5, 8, 1) and not launched().first
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() is ALONE


def test_a_batch_too_small_to_share():
    check_batch(Ranks(0, 4), 4)
    with pytest.raises(InputError, match="3 images cannot be shared by 4 processes"):
        check_batch(Ranks(0, 4), 3)


# ---------------------------------------------------------------------------------- batch norms

NORMS = {
    "2d": (lambda: nn.BatchNorm2d(3), (7, 3, 4, 5)),
    "1d": (lambda: nn.BatchNorm1d(3), (7, 3)),
    "mean of all": (lambda: nn.BatchNorm2d(3, momentum=None), (7, 3, 2, 2)),
    "no weights": (lambda: nn.BatchNorm2d(3, affine=False), (7, 3, 2, 2)),
    "remembers nothing": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (7, 3, 2, 2)),
}


def normed(kind: str, ranks: Ranks) -> dict[str, Tensor]:
    """Two passes of a batch norm of inputs far from zero: gradients and running statistics."""
    make, shape = NORMS[kind]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(0, 0), make()).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, *shape, dtype=F64) * 3 + 100
    wanted = torch.randn(2, *shape, dtype=F64)
    mine = ranks.part(shape[0])
    called = network
    if ranks.size > 1:
        # DDP takes no network without parameters.
        network.append(nn.PReLU(init=1.0).double())
        called = Together(network, CPU)
    found = {}
    for k in range(2):
        inputs = x[k, mine].clone().requires_grad_()
        (called(inputs) - wanted[k, mine]).square().sum().backward()
        found[f"x{k}"] = inputs.grad
    found |= {f"p{i}": p.grad * ranks.size for i, p in enumerate(network[1].parameters())}
    found |= {name: b.double().clone() for name, b in network[1].named_buffers()}
    if ranks.size > 1:
        before = network[1](x[0, mine])
        assert called.release() is network
        alone = network[1](x[0, mine])
        assert "forward" not in vars(network[1]) and not torch.equal(before, alone)
    return found


@pytest.mark.parametrize("kind", NORMS)
def test_batch_norms_are_over_all_images(three, kind):
    expected = normed(kind, ALONE)
    for rank in range(3):
        found = load_file(three / f"{kind}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("x"):
                value = value[Ranks(rank, 3).part(7)]
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


# ------------------------------------------------------------------------------------- training


def images(n: int, seed: int) -> Feed:
    """Images of one colour, the answer, in some noise; the query is of no use."""
    drawn = torch.Generator().manual_seed(seed)
    answer = torch.randint(0, 3, (n,), generator=drawn)
    noise = torch.randint(0, 90, (n, 32, 32, 3), generator=drawn)
    lit = torch.nn.functional.one_hot(answer, 3)[:, None, None] * 120
    digit = torch.arange(3).expand(n, 3)
    return Feed(
        (noise + lit).byte(), digit, answer[:, None].expand(n, 3), digit[:, 0], answer,
        torch.nn.functional.one_hot(answer, 5).bool(), False, CPU,
    )  # fmt: skip


def trained(model: str, ranks: Ranks, folder: Path | None = None, **changes):
    """The weights and the history of a training, in float64."""
    torch.manual_seed(3)
    network = build(model, 32, 10, 5).double()
    recipe = dataclasses.replace(RECIPE, **changes)
    feed, validation = (Double(**vars(images(n, n))) for n in (35, 13))
    history = train(network, recipe, feed, validation, 0, folder, {"model": model},
                    progress=False, ranks=ranks)  # fmt: skip
    return network.state_dict(), [{k: v for k, v in e.items() if k not in TIMES} for e in history]


class Double(Feed):
    """A feed of float64, to tell apart what is wrong from what is rounded."""

    def batch(self, index: Tensor) -> Tensor:
        return super().batch(index).double()


MODELS = ["ctx", "arnn", "noctx"]
BEGUN = "begun by one"  # a run of ctx, of which one process has made two epochs


def by_three(folder: Path) -> None:
    """All that the tests here want of a rank: that ranks start takes longer than what they do."""
    ranks = launched()
    with together(ranks, CPU):
        for kind in NORMS:
            found = {k: v.contiguous() for k, v in normed(kind, ranks).items()}
            save_file(found, folder / f"{kind}-{ranks.rank}.safetensors")
        for name in (*MODELS, BEGUN):
            model = "ctx" if name == BEGUN else name
            weights, history = trained(model, ranks, folder / name)
            found = {k: v.contiguous() for k, v in weights.items()}
            save_file(found, folder / name / f"{ranks.rank}.safetensors")
            (folder / name / f"{ranks.rank}.json").write_text(json.dumps(history))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The trainings of one process, by model: weights, history, and its run directory."""
    made = {}
    for model in MODELS:
        run = tmp_path_factory.mktemp("alone")
        made[model] = (*trained(model, ALONE, run), run)
    return made


@pytest.fixture(scope="module")
def three(alone, tmp_path_factory, as_ranks) -> Path:
    """Where three processes have written what `by_three` makes."""
    folder = tmp_path_factory.mktemp("three")
    for name in (*MODELS, BEGUN):
        (folder / name).mkdir()
    shutil.copy(alone["ctx"][2] / PREVIOUS, folder / BEGUN / STATE)
    for code, _, said in as_ranks(3, [__file__, "by_three", folder]):
        assert code == 0, said
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_a_training_is_that_of_one_process(three, alone, model):
    weights, history, _ = alone[model]
    for rank in range(3):
        same_weights(three / model / f"{rank}.safetensors", weights)
        found = json.loads((three / model / f"{rank}.json").read_text())
        for one, other in zip(found, history, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    assert load_state(three / model)[1]["history"][-1]["epoch"] == 3


def test_ranks_go_on_where_one_process_was(three, alone):
    weights, _, run = alone["ctx"]
    whole = load_state(run)[1]["history"]
    after = load_state(three / BEGUN)[1]["history"]
    # Times and all: those epochs were not repeated, but the last one was made.
    assert after[:2] == whole[:2] and len(after) == len(whole) == 3
    assert after[2]["seconds"] != whole[2]["seconds"]
    same_weights(three / BEGUN / "1.safetensors", weights)


def same_weights(file: Path, weights: dict[str, Tensor]) -> None:
    found = load_file(file)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# -------------------------------------------------------------------------------- the command line

MODULE = ["-m", "mnistattn", "evaluate"]
REQUEST = ["--epochs", "2", "--batch-size", "16", "--seed", "3"]


def torchrun(*words, size: int = 2) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size]
    return subprocess.run([str(w) for w in (*line, *words)], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


def request(data: Path, out: Path) -> list:
    return [*MODULE, "--model", "ctx", "--data", data, *REQUEST, "--out", out]


@pytest.fixture(scope="module")
def by_one(small, tmp_path_factory) -> Path:
    """A run by this process, with one thread as theirs are."""
    run = tmp_path_factory.mktemp("one") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["mnistattn", *map(str, request(small, run)[2:])])
        with pytest.raises(SystemExit) as left:
            main()
    torch.set_num_threads(threads)
    assert left.value.code == 0
    return run


@pytest.fixture(scope="module")
def by_torchrun(small, tmp_path_factory) -> Path:
    """A run by two processes that torchrun started."""
    run = tmp_path_factory.mktemp("two") / "run"
    done = torchrun(*request(small, run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples.h5") == 1  # one of them speaks
    return run


def test_torchrun_gives_the_scores_of_one_process(by_one, by_torchrun):
    one, two = (json.loads((run / "result.json").read_text()) for run in (by_one, by_torchrun))
    for name in ("recipe", "seed", "trained_on", "epochs_trained", "options"):
        assert one[name] == two[name]
    assert two["cost"]["device"].startswith("2 x CPU")
    # In float32, rounding grows fast where a gradient is all but zero and AdamW scales it up: two
    # threads in place of one change as much (above, in float64, it is told apart from mistakes).
    hits = [run["scores"]["accuracy"]["hits"] for run in (one, two)]
    assert hits[0] == pytest.approx(hits[1], abs=2)
    found = [run["scores"]["masks"]["correctness"]["value"] for run in (one, two)]
    assert found[0] == pytest.approx(found[1], rel=2e-2)
    curves = [json.loads((run / "curve.json").read_text()) for run in (by_one, by_torchrun)]
    for first, second in zip(*curves, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=2e-2)
    assert {p.name for p in by_torchrun.iterdir()} == {p.name for p in by_one.iterdir()}


def test_a_run_that_is_there_is_scored_by_the_first_alone(by_one, small, tmp_path, as_ranks):
    """As by one process."""
    run = Path(shutil.copytree(by_one, tmp_path / "run"))
    again = as_ranks(2, request(small, run))
    assert [code for code, *_ in again] == [0, 0], again
    assert [("samples.h5" in said) for _, said, _ in again] == [True, False]
    scores = [json.loads((p / "result.json").read_text())["scores"] for p in (by_one, run)]
    assert scores[0] == scores[1]


def test_a_wrong_request_is_said_once(small, tmp_path):
    done = torchrun(*MODULE, "--model", "nonsense", "--data", small, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("mnistattn: unknown model") == 1
    assert not (tmp_path / "run").exists()


def test_a_sweep_starts_its_own_processes(small, tmp_path, monkeypatch, capsys):
    line = ["sweep", "--models", "ctx", "--data", str(small), "--out", str(tmp_path)]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["mnistattn", *line])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and "without torchrun" in said and "Traceback" not in said


def evaluated_by_ranks(run: Path, *data: str) -> None:
    """As the command line, each rank with the data set of its number."""
    sys.argv = ["mnistattn", *map(str, request(data[launched().rank % len(data)], run)[2:])]
    main()


def test_a_rank_with_another_data_set(small, tmp_path, as_ranks):
    other = Path(shutil.copytree(small, tmp_path / "other"))
    card = json.loads((other / "dataset.json").read_text())
    card["splits"]["train"]["digest"] = "0" * 64
    (other / "dataset.json").write_text(json.dumps(card))
    first, second = as_ranks(2, [__file__, "evaluated_by_ranks", tmp_path / "run", small, other])
    assert second[0] == 2 and "process 1 of 2 has another data set" in second[2]
    assert first[0] == 1 and "lost the others" in first[2]
    assert "Traceback" not in first[2] + second[2]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def killed_by_rank(run: Path, data: str, epoch: str) -> None:
    """As the command line; the second rank dies when an epoch begins."""
    from mnistattn.evaluation import train as module

    begin = module._epoch

    def dying(steps, seed, number, bar):
        if number == int(epoch) and steps.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(steps, seed, number, bar)

    module._epoch = dying
    evaluated_by_ranks(run, data)


def test_a_rank_that_dies_loses_no_epoch(by_torchrun, small, tmp_path, as_ranks):
    run = tmp_path / "run"
    first, second = as_ranks(2, [__file__, "killed_by_rank", run, small, "1"])
    assert second[0] == -signal.SIGKILL
    assert first[0] == 1 and "lost the others" in first[2] and "Traceback" not in first[2]
    assert len(load_state(run)[1]["history"]) == 1
    for code, _, said in as_ranks(2, request(small, run)):
        assert code == 0, said
    one, two = (load_file(out / "model.safetensors") for out in (run, by_torchrun))
    assert all(torch.equal(one[name], two[name]) for name in two)


# For the tests above: a process that is started may not find the test file as a module.
if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
