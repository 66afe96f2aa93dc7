"""A few kills and flipped bits at fixed seeds; benchmarks/chaos.py does many."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mnistattn.generators.digits.mnist import FILES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    """Files like MNIST's, of squares: to read them takes no time, as to draw strokes would, in each
    of many processes."""
    root = tmp_path_factory.mktemp("data")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for part, n in FILES.items():
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 8:20, 8:20] = np.arange(n)[:, None, None] % 200 + 55
        for name, values in (
            (f"{part}-images-idx3-ubyte", images),
            (f"{part}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8)),
        ):
            head = np.array([2049 if values.ndim == 1 else 2051, *values.shape], ">u4").tobytes()
            (root / "MNIST" / "raw" / name).write_bytes(head + values.tobytes())
    return root


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
@pytest.mark.parametrize(("engine", "kills", "flips"), [("local", 4, 5), ("dask", 2, 0)])
def test_nothing_is_lost_and_nothing_false_accepted(tmp_path, data_root, engine, kills, flips):
    if engine == "dask" and find_spec("distributed") is None:
        pytest.skip("Dask's distributed is not installed")
    file = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--json", file, "--subjects", "generate",
         "--engines", engine, "--kills", str(kills), "--flips", str(flips), "--variant", "mref",
         "--train", "2000", "--val", "0", "--test", "0", "--shards", "40", "--seed", "1",
         "--digits", "mnist", "--data-root", data_root],
        stdout=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    result = json.loads(file.read_text())
    (killed,) = result["kills"]
    assert killed["kills"] == kills and killed["equal"]
    assert killed["false"] == killed["left"] == killed["said"] == []
    if flips:
        flipped = result["flips"]
        assert flipped["found"] == flipped["located"] == flipped["repaired"] == flips
