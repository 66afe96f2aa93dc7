"""What several tests share: a tiny generated data set, an easy set in memory, and the real data."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MREF of built-in digits, 64 / 24 / 40 images. Read it, copy it, never change it."""
    from mnistattn import generate

    out = tmp_path_factory.mktemp("tiny") / "mref"
    return generate("mref", out, seed=1, **TINY, digits="strokes", progress=False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MNIST/raw and scenes; skips where it is absent."""
    if not (REAL_DATA / "MNIST" / "raw").is_dir():
        pytest.skip("the real MNIST and photos are not in ../shared/data")
    return REAL_DATA


@pytest.fixture(scope="session")
def as_ranks():
    """A function size, line, environment -> [(exit code, stdout, stderr)]: so many processes of one
    Python command line, each told its place as torchrun would; all are ended if one fails."""

    def run(size: int, line: list, seconds: float = 120, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size),
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, *map(str, line)], text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=os.environ | told | {"RANK": k, "LOCAL_RANK": k},
            )
            for k in map(str, range(size))
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=seconds) for process in processes]
            return [(p.returncode, *words) for p, words in zip(processes, said, strict=True)]
        finally:
            for process in processes:
                process.kill()
                process.wait()

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
