"""What the compiler says of the fused kernels of the recurrence, for GPUs that need not be there.

    python benchmarks/gpu_compile.py
    python benchmarks/gpu_compile.py --capability 90 --t 16,32 --dtype bfloat16 --json FILE

Each kernel is compiled as the `cuda` backend would plan it (mnistattn.models.recurrence.cuda) for a
batch of 64, and its machine code read: registers a thread, bytes that spill out of them, shared
memory, and, of the loop over diagonals, the instructions, barriers and products of one pass.
"""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # compile, whatever the environment says

import torch
import triton
from common import machine, machine_line, table, write_json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mnistattn.models.recurrence import cuda, cuda_kernels

BIN = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
DEVICES = {80: (108, 163 << 10), 90: (132, 227 << 10)}  # processors, shared bytes: A100, H100
ROWS = (112, 56, 50, 28, 25, 14, 12, 7, 6)
TYPES = {"float32": "fp32", "bfloat16": "bf16"}
CONSTANTS = ("R", "IMAGES", "C", "T", "HOLD", "AHEAD", "KEEP", "FAST", "WIDEN")


def compiled(name: str, capability: int, plan: cuda.Plan, dtype: str):
    """A kernel by a plan, compiled for a GPU."""
    kernel = getattr(cuda_kernels, name)
    names = kernel.arg_names
    values = {"R": plan.rows, "IMAGES": plan.images, "C": plan.channels, "T": plan.width,
              "HOLD": plan.hold, "AHEAD": plan.ahead, "KEEP": True, "FAST": dtype == "bfloat16",
              "WIDEN": False}  # fmt: skip
    signature = {}
    for argument in names:
        if argument in CONSTANTS:
            signature[argument] = "constexpr"
        elif argument in ("offset_at", "c_at"):
            signature[argument] = "*fp32"
        else:
            signature[argument] = f"*{TYPES[dtype]}" if argument.endswith("_at") else "i32"
    # As at a launch with 32 channels and t = 16: the launcher sees what 16 divides.
    aligned = {(k,): [["tt.divisibility", 16]] for k, a in enumerate(names)
               if a.endswith("_at") or a in ("channels", "t")}  # fmt: skip
    constants = {(k,): values[a] for k, a in enumerate(names) if a in CONSTANTS}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": plan.warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(found) -> dict:
    """Resources of a compiled kernel, and what is in its longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loop = longest_loop(code)
    return {
        "registers": numbers["REG"], "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": found.metadata.shared + numbers["SHARED"],
        "loop_instructions": len(loop), "loop_barriers": sum("BAR." in line for line in loop),
        "loop_products": sum("MMA" in line for line in loop),
        "loop_special": sum("MUFU" in line for line in loop),
    }  # fmt: skip


def tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [BIN / name, *arguments], check=True, capture_output=True, text=True
    ).stdout


def longest_loop(code: str) -> list[str]:
    """The instructions between a label and the last jump back to it, of the longest such loop."""
    lines = [line.strip() for line in code.splitlines()]
    labels: dict[str, int] = {}
    best: list[str] = []
    for number, line in enumerate(lines):
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = number
        elif (match := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and match[1] in labels:
            body = [x for x in lines[labels[match[1]] : number + 1] if x.startswith("/*")]
            best = max(best, body, key=len)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", default="80,90", help="80 (A100) and 90 (H100)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="of the maps")
    parser.add_argument("--t", default="8,16,32,64", help="channels of the state")
    parser.add_argument("--dtype", default=",".join(TYPES))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    about = machine()
    print(machine_line(about), f"; triton {triton.__version__}\n", sep="")
    found, shown = [], set()
    for capability in map(int, arguments.capability.split(",")):
        for dtype in arguments.dtype.split(","):
            for t in map(int, arguments.t.split(",")):
                for rows in map(int, arguments.rows.split(",")):
                    for kernel in ("forward", "backward"):
                        plan = cuda.plan(rows, 32, t, getattr(torch, dtype), arguments.batch_size,
                                         *DEVICES[capability], kernel == "backward")  # fmt: skip
                        row = {"capability": capability, "dtype": dtype, "t": t, "rows": rows,
                               "kernel": kernel, "plan": vars(plan)}  # fmt: skip
                        found.append(row | report(compiled(kernel, capability, plan, dtype)))
    lines = []
    for row in found:
        key = (row["capability"], row["dtype"], row["kernel"], str(row["plan"]))
        if key not in shown:  # several maps share one plan
            shown.add(key)
            plan = row["plan"]
            lines.append([f"sm_{row['capability']} {row['dtype']} {row['kernel']}", str(row["t"]),
                          str(plan["rows"] * plan["images"]), str(plan["warps"]),
                          *(str(row[k]) for k in ("registers", "spilled_bytes", "shared_bytes",
                            "loop_instructions", "loop_barriers", "loop_products",
                            "loop_special"))])  # fmt: skip
    print(table(["kernel", "t", "rows", "warps", "registers", "spilled", "shared", "instructions",
                 "barriers", "products", "special"], lines))  # fmt: skip
    write_json(arguments.json, {"machine": about, "triton": triton.__version__, "kernels": found})


if __name__ == "__main__":
    main()
