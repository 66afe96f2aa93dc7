"""A result as a table for the terminal, with the paper's row beside ours."""

from mnistattn.evaluation.paper import printed


def table(result: dict) -> str:
    """The text table of a result (see run.evaluate)."""
    scores, dataset = result["scores"], result["dataset"]
    paper = printed(dataset["variant"], result["model"], result["options"])
    scales = paper["scales"] or (None,) * len(scores["scales"])
    rows = [("accuracy", scores["accuracy"], paper["accuracy"])]
    rows += [
        (f"  scale {s['from']:g} to {s['to']:g}", s, p)
        for s, p in zip(scores["scales"], scales, strict=True)
    ]
    lines = [
        f"{result['paper_name']} ({result['model']}) on {dataset['paper_name']}, "
        f"recipe {result['recipe']['name']}, {_epochs(result)}, "
        f"seed {result['seed']}" + "".join(f", {option}" for option in changed_options(result)),
        "",
        f"{'':24}{'ours':>8}   {'95 % interval':16}{'n':>7}{'paper':>9}",
    ]
    lines += [
        f"{name:24}{_percent(r['value'])}   {_interval(r):16}{r['n']:>7}{_paper(p, '.2f')}"
        for name, r, p in rows
    ]
    sources = dataset["sources"]
    photos = sources["backgrounds"]["source"] not in ("textures", "gaussian")
    if (paper["accuracy"] or paper["correctness"]) and not (
        photos and sources["digits"]["source"] == "mnist"
    ):
        lines.append(
            "(the paper's data: MNIST, PAN's distractors, SUN photos; not this data set's)"
        )
    if scores["masks"]:
        lines.append("")
        names = {
            "correctness": "mask correctness",
            "chance": "  chance (mean mask area)",
            "rank_accuracy": "rank accuracy",
            "pointing": "pointing game",
            "topk_iou": "top-K IoU",
            "pixel_auroc": "pixel AUROC",
            "average_precision": "average precision",
        }
        for key, name in names.items():
            beside = paper["correctness"] if key == "correctness" else None
            lines.append(_mask_line(name, scores["masks"][key], beside))
        for k, layer in enumerate(scores["layers"]):
            lines.append(_mask_line(f"  correctness, layer {k + 1}", layer, None))
    else:
        lines += ["", "no attention maps, so no mask scores"]
    cost = result["cost"]
    device = f"{cost['device']} in {cost['precision']}" if cost.get("precision") else cost["device"]
    lines += [
        "",
        f"{cost['parameters']:,} parameters, {cost['flops_per_image'] / 1e6:.0f} MFLOP an image, "
        f"trained in {cost['train_seconds'] / 60:.1f} min on {device}; a training step "
        f"takes {cost['train_times_none']['median']:.2f} times one of 'none', an answer "
        f"{cost['inference_times_none']['median']:.2f} times",
    ]
    return "\n".join(lines)


def _epochs(result: dict) -> str:
    n = result["recipe"]["epochs"]
    return f"{n} epoch{'s' * (n > 1)}"


def changed_options(result: dict) -> list[str]:
    """The options that are not the model's defaults, as "NAME=VALUE"."""
    return [f"{k}={v}" for k, v in result["changed_options"].items()]


def _percent(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{100 * value:7.2f}%"


def _interval(rate: dict) -> str:
    return f"{100 * rate['low']:.2f} .. {100 * rate['high']:.2f}" if rate["n"] else ""


def _paper(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:>9{form}}"


def _mask_line(name: str, mean: dict, beside: float | None) -> str:
    if mean["value"] is None:
        return f"{name:24}{'-':>8}"
    spread = f"+- {1.96 * mean['se']:.4f}" if mean["se"] is not None else ""
    return f"{name:24}{mean['value']:8.4f}   {spread:16}{mean['n']:>7}{_paper(beside, '.2f')}"
