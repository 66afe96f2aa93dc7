"""What several tests share: a tiny generated data set, an easy set in memory, and the real data."""

import functools
import importlib
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT / ".." / "shared" / "data"
# Without an NVIDIA driver (Linux, WSL), Triton's kernels are interpreted on the CPU. Triton looks
# for this when it is imported, by whichever test comes first.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"
TINY = {"train": 64, "val": 24, "test": 40}


@pytest.fixture(scope="module", autouse=True)
def one_round() -> Iterator[None]:
    """Costs are measured in one round, not many: tests need no steady ratio.

    Files that do not import torch do not pay for it; a test of theirs takes all rounds.
    """
    with pytest.MonkeyPatch.context() as patched:
        if "torch" in sys.modules:
            patched.setattr("mnistattn.evaluation.cost.ROUNDS", 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread_each() -> None:
    """Processes that share the cores (pytest -n) compute with one thread each: OpenMP's wait for
    each other at the end of each loop, busily."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        importlib.import_module("torch").set_num_threads(1)


@functools.lru_cache(maxsize=6)  # the splits of two seeds, 110 MiB
def _glyphs(draw: Callable, seed: int, split: str, count: int) -> tuple:
    found = draw(seed, split, count)
    for array in found:
        array.flags.writeable = False
    return found


@pytest.fixture(scope="module", autouse=True)
def strokes_once() -> Iterator[None]:
    """The 70,000 glyphs of a seed are drawn once in this process, not for each data set: that takes
    longer than all else of a small one. test_strokes.py, and other processes, draw their own."""
    with pytest.MonkeyPatch.context() as patched:
        if "mnistattn.generators.digits" in sys.modules:  # others do not pay for the import
            module = importlib.import_module("mnistattn.generators.digits.strokes")
            draw = functools.partial(_glyphs, module.stroke_glyphs)
            patched.setattr(module, "stroke_glyphs", draw)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MREF of built-in digits, 64 / 24 / 40 images. Read it, copy it, never change it."""
    from mnistattn import generate

    out = tmp_path_factory.mktemp("tiny") / "mref"
    return generate("mref", out, seed=1, **TINY, digits="strokes", progress=False)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MREF of 48 x 48 images, 48 / 16 / 20 of them: where a training is not what is looked at.
    Read it, copy it, never change it."""
    from mnistattn import generate

    out = tmp_path_factory.mktemp("small") / "mref"
    return generate("mref", out, seed=1, train=48, val=16, test=20, digits="strokes", size=48,
                    max_scale=1.5, min_objects=2, max_objects=3, progress=False)  # fmt: skip


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MNIST/raw and scenes; skips where it is absent."""
    if not (REAL_DATA / "MNIST" / "raw").is_dir():
        pytest.skip("the real MNIST and photos are not in ../shared/data")
    return REAL_DATA


# What a rank does before it runs its command line: it takes its place, and speaks into two files.
RANK = """
import os, runpy, sys
os.environ.update(told)
for stream, file in enumerate(files, 1):
    os.dup2(os.open(file, os.O_WRONLY), stream)
module = line[0] == "-m"
sys.argv = line[module:]
runpy.run_module(line[1], run_name="__main__", alter_sys=True) if module else runpy.run_path(
    line[0], run_name="__main__")
"""
IMPORTED = ["torch._dynamo", "torch.distributed", "mnistattn.cli.evaluate",
            "mnistattn.evaluation.run", "mnistattn.models.attention.arnn"]  # fmt: skip


@pytest.fixture(scope="session")
def rank_maker() -> multiprocessing.context.BaseContext:
    """Where ranks come from: on Linux they are forked from a process that has imported torch and
    has one thread, since imports take most of a rank's time."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")  # counts when torch is imported
        patched.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()
    return made


@pytest.fixture(scope="session")
def as_ranks(rank_maker, tmp_path_factory):
    """A function size, line, environment -> [(exit code, stdout, stderr)]: so many processes of one
    Python command line, each told its place as torchrun would; all are ended if one fails."""

    def run(size: int, line: list, seconds: float = 120, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size),
                "OMP_NUM_THREADS": "1"} | environment  # fmt: skip
        folder = tmp_path_factory.mktemp("ranks")
        ranks = []
        for k in map(str, range(size)):
            files = [folder / f"{k}.out", folder / f"{k}.err"]
            for file in files:
                file.touch()
            place = told | {"RANK": k, "LOCAL_RANK": k}
            given = {"told": place, "files": files, "line": [str(word) for word in line]}
            ranks.append((rank_maker.Process(target=exec, args=(RANK, given)), files))
        try:
            for process, _ in ranks:
                process.start()
            deadline = time.monotonic() + seconds
            for process, _ in ranks:
                process.join(deadline - time.monotonic())
            said = [(p.exitcode, *(file.read_text() for file in files)) for p, files in ranks]
            assert all(code is not None for code, *_ in said), f"after {seconds} s: {said}"
            return said
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()

    return run


@pytest.fixture(scope="session")
def easy():
    """A function n, seed -> Feed of 32 x 32 images that are one colour, the answer to any query."""
    import numpy as np
    import torch

    from mnistattn.evaluation.feed import Feed
    from mnistattn.generators.variants import PALETTE

    def feed(n: int, seed: int = 0) -> Feed:
        rng = np.random.default_rng(seed)
        answer = rng.integers(0, 5, n)
        noise = rng.integers(-20, 20, (n, 32, 32, 3))
        images = np.clip(np.array(PALETTE)[answer][:, None, None] + noise, 0, 255).astype(np.uint8)
        digit = torch.from_numpy(np.stack([rng.permutation(10)[:3] for _ in range(n)]))
        answer = torch.from_numpy(answer)
        return Feed(
            torch.from_numpy(images), digit, answer[:, None].expand(n, 3), digit[:, 0], answer,
            torch.nn.functional.one_hot(answer, 5).bool(), False, torch.device("cpu"),
        )  # fmt: skip

    return feed
