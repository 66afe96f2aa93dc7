"""What the benchmarks share: a machine's description, medians with their spread, tables, JSON.

Imported by the scripts beside it, which are run as `python benchmarks/SCRIPT.py`.
"""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict:
    """Processor, cores this process may use, load, system and the versions of the libraries."""
    names = ("mnistattn", "numpy", "numba", "h5py", "pillow", "torch")
    unix = hasattr(os, "sched_getaffinity")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if unix else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in names},
    }


def machine_line(about: dict) -> str:
    """`machine()` on one line."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['cpu']}, {about['cores']} cores, load {about['load']} at the start, "
        f"{about['system']}; {versions}"
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def wait(device) -> None:
    """Until a torch device has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def summary(values: Sequence[float]) -> dict:
    """Median, least and greatest of some measurements, and all of them in order."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """'median (min .. max)'."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} .. {high:,.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_json(file: Path | None, result: dict) -> None:
    """Write a result as JSON, if a file was asked for."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten: {file}")
