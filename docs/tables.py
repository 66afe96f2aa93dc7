"""Write the tables of measured results into README.md and the pages beside this file.

    python docs/tables.py

Reads the results in docs/results/runs (each the result.json of a run, some of an older schema, as
the runs on photos that no board takes), docs/results/reproduction, docs/results/hard
(weights of MBG on mbg-hard) and leaderboard, and replaces
what stands between the markers <!-- NAME --> and <!-- /NAME -->, so that no number is copied by
hand.
"""

import json
import re
from pathlib import Path
from statistics import mean

from mnistattn.evaluation.paper import printed
from mnistattn.leaderboard.collect import collect
from mnistattn.models.registry import MODELS, find
from mnistattn.reproduction.curves import curves
from mnistattn.reproduction.report import report, rows_of
from mnistattn.reproduction.tables import DATA, chosen

HERE = Path(__file__).parent
PARTS = ("digits of 0.5-1", "1.5-2", "2.5-3", "correctness", "last layer's")  # of a zoo's table


def main() -> None:
    runs = [json.loads(f.read_text()) for f in sorted((HERE / "results" / "runs").glob("*.json"))]
    photos = [r for r in runs if r["dataset"]["sources"]["backgrounds"]["source"] != "textures"]
    at_home = [r for r in photos if r["trained_on"]["train"] == r["dataset"]["digests"]["train"]]
    order = list(MODELS)
    at_home.sort(
        key=lambda r: (
            r["dataset"]["variant"], order.index(r["model"]), label(r), r["recipe"]["epochs"]
        )
    )  # fmt: skip
    replace(HERE.parent / "README.md", "results", accuracy_table(at_home))
    replace(HERE / "measurements.md", "models", accuracy_table(at_home) + "\n" + scales(at_home))
    replace(HERE / "measurements.md", "transfer", transfer(runs))
    replace(HERE / "measurements.md", "hard", hard(at_home))
    for name, file in (("steps", "train_step.json"), ("steps-224", "train_step-224.json")):
        result = json.loads((HERE / "results" / file).read_text())
        replace(HERE / "measurements.md", name, steps(result))
    result = json.loads((HERE / "results" / "recurrence.json").read_text())
    replace(HERE / "measurements.md", "recurrence", recurrence(result))
    replace(HERE / "reproduction.md", "tables", reproduction())
    for variant in ("mref", "mdist"):
        replace(HERE / "zoo.md", f"board-{variant}", zoo(variant))
    replace(HERE / "zoo.md", "photos", zoo_on_photos(at_home))
    result = json.loads((HERE / "results" / "train_step-zoo.json").read_text())
    replace(HERE / "zoo.md", "steps", steps(result))
    result = json.loads((HERE / "results" / "gradient_variance.json").read_text())
    replace(HERE / "zoo.md", "variance", variance(result))


def reproduction() -> str:
    """The paper's tables with ours beside them, and learning curves, which are drawn anew."""
    found, problems = collect([HERE.parent / "leaderboard", HERE / "results" / "reproduction"])
    assert not problems, problems
    text = report(chosen(["all"]), found)
    for name, rows in rows_of(found).items():
        drawn = curves(f"{name}, {DATA[name].words}", rows)
        if drawn:
            (HERE / f"curves-{name}.png").write_bytes(drawn)
            text += f"\n![Learning curves on {name}](curves-{name}.png)\n"
    return text


def zoo(variant: str) -> str:
    """All models on the board of a variant; of MREF also what they answer on MDIST, untrained for
    it."""
    found, problems = collect([HERE.parent / "leaderboard"])
    assert not problems, problems
    runs: dict[str, list[dict]] = {}
    for s in found:
        if s.result["dataset"]["variant"] == variant:
            runs.setdefault(s.name, []).append(s.result)
    cluttered = {}
    for file in sorted((HERE / "results" / "zoo").glob("*.json")):
        result = json.loads(file.read_text())
        cluttered.setdefault(label(result).replace("`", ""), []).append(accuracy(result))
    heads = ["model", "seeds", "accuracy, %", *PARTS] + ["on MDIST, %"] * (variant == "mref")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, results in sorted(runs.items(), key=lambda e: -mean(map(accuracy, e[1]))):
        cells = [f"`{name}`", str(len(results)), f"{mean(map(accuracy, results)):.1f}",
                 *parts(results)]  # fmt: skip
        if variant == "mref":
            cells.append(f"{mean(cluttered[name]):.1f}" if name in cluttered else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def zoo_on_photos(runs: list[dict]) -> str:
    """All models trained to the end on MBG by the common recipe, the best first."""
    lines = [f"| {' | '.join(['model', 'accuracy, % (95 % interval)', *PARTS])} |",
             "|---" * (2 + len(PARTS)) + "|"]  # fmt: skip
    rows = [r for r in to_the_end(runs) if not changed(r)]
    for r in sorted(rows, key=accuracy, reverse=True):
        cells = [f"`{r['model']}`", interval(r["scores"]["accuracy"]), *parts([r])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def hard(runs: list[dict]) -> str:
    """Models on MBG, on mbg-hard with the same weights, and on mbg-hard trained on it; those that
    were trained on either by `fast`, one query an image."""
    columns: list[dict[str, dict]] = [{label(r): r for r in to_the_end(runs)}, {}, {}]
    found, problems = collect([HERE / "results" / "reproduction"])
    assert not problems, problems
    for s in found:
        variant, recipe = s.result["dataset"]["variant"], s.result["recipe"]
        if variant in ("mbg", "mbg-hard") and recipe["queries"] == "one" and s.result["seed"] == 0:
            columns[0 if variant == "mbg" else 2][label(s.result)] = s.result
    for file in sorted((HERE / "results" / "hard").glob("*.json")):
        result = json.loads(file.read_text())
        columns[1][label(result)] = result
    lines = ["| model | MBG, % | correctness | mbg-hard, trained on MBG, % | correctness | "
             "mbg-hard, trained on it, % | correctness |", "|---" * 7 + "|"]  # fmt: skip
    names = sorted({*columns[1], *columns[2]},
                   key=lambda n: max(accuracy(c[n]) for c in columns[1:] if n in c))  # fmt: skip
    for name in reversed(names):
        cells = [name]
        for column in columns:
            r = column.get(name)
            masks = r["scores"]["masks"] if r else None
            cells += [interval(r["scores"]["accuracy"]) if r else "",
                      f"{masks['correctness']['value']:.3f}" if masks else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def to_the_end(runs: list[dict]) -> list[dict]:
    """Those on MBG by all of the common recipe."""
    return [r for r in runs if r["dataset"]["variant"] == "mbg"
            and (r["recipe"]["epochs"], r["recipe"]["queries"]) == (12, "one")]  # fmt: skip


def parts(results: list[dict]) -> list[str]:
    """The cells below PARTS, the means of several seeds."""
    scales = [mean(100 * r["scores"]["scales"][k]["value"] for r in results) for k in (0, 2, 4)]
    maps = [r["scores"] for r in results if r["scores"]["masks"]]
    on_target = (mean(m["masks"]["correctness"]["value"] for m in maps),
                 mean(m["layers"][-1]["value"] for m in maps)) if maps else ()  # fmt: skip
    return [f"{scale:.1f}" for scale in scales] + ([f"{s:.3f}" for s in on_target] or ["-", "-"])


def accuracy(result: dict) -> float:
    return 100 * result["scores"]["accuracy"]["value"]


def accuracy_table(runs: list[dict]) -> str:
    lines = [
        "| data set | model | epochs, queries | accuracy, % (95 % interval) | paper | correctness |"
        " last layer's | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        paper = printed(r["dataset"]["variant"], r["model"], r["options"])
        a, masks, layers = (r["scores"][k] for k in ("accuracy", "masks", "layers"))
        lines.append(
            f"| {r['dataset']['paper_name']} | {label(r)} | {r['recipe']['epochs']}, "
            f"{r['recipe']['queries']} | {interval(a)} | {number(paper['accuracy'], 2)} | "
            + (f"{masks['correctness']['value']:.3f} | {layers[-1]['value']:.3f}"
               if masks else "- | -")
            + f" | {number(paper['correctness'], 2)} |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def scales(runs: list[dict]) -> str:
    lines = [
        "Accuracy per scale bin, % (95 % interval); in brackets the paper's where confirmed:",
        "",
        "| data set | model, epochs | 0.5-1.0 | 1.0-1.5 | 1.5-2.0 | 2.0-2.5 | 2.5-3.0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        paper = printed(r["dataset"]["variant"], r["model"], r["options"])["scales"] or (None,) * 5
        cells = [
            interval(s) + (f" [{p:.2f}]" if p is not None else "")
            for s, p in zip(r["scores"]["scales"], paper, strict=True)
        ]
        lines.append(f"| {r['dataset']['paper_name']} | {label(r)}, {r['recipe']['epochs']} | "
                     f"{' | '.join(cells)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def transfer(runs: list[dict]) -> str:
    """MBG's ctx by what it was trained and tested on: photos or textures."""
    mbg = [r for r in runs if r["dataset"]["variant"] == "mbg" and r["model"] == "ctx"]
    kind = {r["dataset"]["digests"]["train"]: _kind(r) for r in mbg}
    lines = ["| `ctx` trained on | epochs | tested on photos | tested on textures |",
             "|---|---|---|---|"]  # fmt: skip
    for source in ("photos", "textures"):
        rows = [r for r in mbg if kind.get(r["trained_on"]["train"]) == source]
        for epochs in sorted({r["recipe"]["epochs"] for r in rows}):
            cells = {_kind(r): interval(r["scores"]["accuracy"]) for r in rows
                     if r["recipe"]["epochs"] == epochs}  # fmt: skip
            lines.append(f"| {source} | {epochs} | {cells.get('photos', '')} | "
                         f"{cells.get('textures', '')} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def _kind(run: dict) -> str:
    textures = run["dataset"]["sources"]["backgrounds"]["source"] == "textures"
    return "textures" if textures else "photos"


def steps(result: dict) -> str:
    """benchmarks/train_step.py's table."""
    base = result["base"]
    lines = [
        f"| model | ms an image | times `{base}` | MFLOP | of the matrix rate | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in result["models"].items():
        lines.append(
            f"| `{name}` | {middle(r['ms_per_image'], 1)} | {middle(r[f'ratio_to_{base}'], 2)} | "
            f"{r['flops_per_image_step'] / 1e6:.0f} | "
            f"{100 * r['share_of_matrix_rate']['median']:.0f} % | {r['peak_memory_mib']:.0f} |"
        )
    rate = result["matrix_flops_per_second"]["median"] / 1e9
    lines += ["", f"{result['threads']} threads, {result['size']} px, batches of "
              f"{result['batch_size']}; a large matrix product in the same rounds: "
              f"{rate:.0f} GFLOP/s."]  # fmt: skip
    return "\n".join(lines) + "\n"


def variance(result: dict) -> str:
    """benchmarks/gradient_variance.py's table."""
    lines = ["| estimator | bias | noise | cosine of the mean | of one draw | variance |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in result["estimators"].items():
        lines.append(f"| {name} | {r['bias']:.2f} | {r['noise']:.2f} | {r['cosine']:.2f} | "
                     f"{r['one draw']:.2f} | {r['variance']:.3g} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def recurrence(result: dict) -> str:
    """benchmarks/recurrence.py's table."""
    lines = [
        "| backend | forward, ms an image | backward | both | times as fast as naive | GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in result["backends"].items():
        lines.append(
            f"| {name} | {middle(r['forward_ms'], 1)} | {middle(r['backward_ms'], 1)} | "
            f"{middle(r['ms_per_image'], 1)} | {middle(r['times_as_fast_as_naive'], 1)} | "
            f"{r['gflops']['median']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def middle(numbers: dict, digits: int) -> str:
    """Median (least .. greatest)."""
    low, mid, high = (f"{numbers[k]:.{digits}f}" for k in ("min", "median", "max"))
    return f"{mid} ({low} .. {high})"


def label(run: dict) -> str:
    return " ".join([f"`{run['model']}`", *changed(run)])


def changed(run: dict) -> list[str]:
    """The options of a run that are not the usual ones."""
    usual = find(run["model"]).defaults()
    return [f"{k}={v}" for k, v in run["options"].items() if usual.get(k) != v]


def interval(rate: dict) -> str:
    return f"{100 * rate['value']:.2f} ({100 * rate['low']:.1f} .. {100 * rate['high']:.1f})"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def replace(file: Path, name: str, text: str) -> None:
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    whole = file.read_text()
    if not pattern.search(whole):
        raise SystemExit(f"{file} has no marker <!-- {name} --> ... <!-- /{name} -->.")
    file.write_text(pattern.sub(lambda _: f"<!-- {name} -->\n{text}<!-- /{name} -->", whole))


if __name__ == "__main__":
    main()
