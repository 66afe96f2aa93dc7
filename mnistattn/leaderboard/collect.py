"""Read results from folders: which ones may stand on a board, and a sentence for each that may not.

The rules of admission, all checked here (docs/leaderboard.md says them in words):

1. The JSON file fits the schema (evaluation/result.py).
2. Its per-sample file is there, whole, and the one that it was made with (SHA-256).
3. All scores follow from the samples, and each sample is marked by its own answer.
4. Results of one test set agree on what was asked, what is right, and the target's scale.
5. One entry a name: no two results of one model, options and seed in a group, and no two plugged
   models of one name and different code.
6. On a public board: anyone can remake the data set (MNIST or strokes over black, distractors or
   textures), and its digests are those of a data set whose card is in the folder (dataset.json).
"""

import hashlib
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation.result import differences, read_result, read_samples
from mnistattn.generators.variants import VARIANTS

DATASET = "dataset.json"
GALLERY = "gallery.h5"
COMPANIONS = ("curve", "coverage")
NOT_RESULTS = {DATASET, *(f"{kind}.json" for kind in COMPANIONS)}
PUBLIC_DIGITS = ("mnist", "strokes")
PUBLIC_BACKGROUNDS = ("black", "patches", "gaussian", "textures")
TRUTH = ("query", "answer", "scale")


@dataclass
class Submission:
    """A result, its samples by name, and its retests, each with its samples."""

    file: Path
    result: dict
    samples: dict[str, np.ndarray]
    retests: list[tuple[dict, dict[str, np.ndarray]]] = field(default_factory=list)

    @property
    def group(self) -> str:
        """What it may be compared within: data of test and training, and recipe; a short hash."""
        return group_key(self.result)

    @property
    def name(self) -> str:
        """The model with the options that are not its defaults."""
        return entry_name(self.result)

    def gallery(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Images uint8 (k, H, W, 3) and masks bool (k, H, W) of the test set, from beside it."""
        try:
            with h5py.File(self.file.with_name(GALLERY), "r") as h5:
                return h5["image"][()], h5["mask"][()].astype(bool)
        except (OSError, KeyError):
            return None


def entry_name(result: dict) -> str:
    """The model with the options that are not its defaults, as "arnn hidden=32"."""
    changed = (f"{k}={json.dumps(v).strip(chr(34))}" for k, v in result["changed_options"].items())
    return " ".join([result["model"], *changed])


def group_key(result: dict) -> str:
    """A short hash of what comparable results share: test set, training data, recipe."""
    shared = [result["dataset"]["digests"]["test"], result["trained_on"], result["recipe"]]
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]


def is_public(dataset: dict) -> bool:
    """Whether anyone can remake the data set's bytes: no photos of one's own."""
    sources = dataset["sources"]
    return (sources["digits"].get("source") in PUBLIC_DIGITS
            and sources["backgrounds"].get("source") in PUBLIC_BACKGROUNDS)  # fmt: skip


def one_answer(raw: dict) -> bool:
    """Whether each image of a result has one right answer; a retest does not say, so no."""
    variant = raw.get("dataset", {}).get("variant")
    return variant in VARIANTS and not VARIANTS[variant].repeats


def published() -> Path | None:
    """The folder of results that come with the package, if they are there: beside it in a clone,
    in share/mnistattn of an installation."""
    clone = Path(__file__).parents[2] / "leaderboard"
    for folder in (clone, Path(sysconfig.get_path("data")) / "share/mnistattn/leaderboard",
                   Path(sys.prefix) / "share/mnistattn/leaderboard"):  # fmt: skip
        if folder.is_dir():
            return folder
    return None


def collect(
    folders: Iterable[str | Path], public: bool = False
) -> tuple[list[Submission], list[str]]:
    """All admissible results under the folders, and a sentence for each file left out.

    public: apply rule 6. A folder that is missing or without results is a sentence too.
    """
    found: list[Submission] = []
    retests: list[tuple[Path, dict, dict]] = []
    problems: list[str] = []
    for folder in map(Path, folders):
        files = sorted(_json_files(folder))
        if not files:
            state = "holds no results" if folder.exists() else "does not exist"
            problems.append(f"{folder} {state}: 'mnistattn evaluate' makes some.")
        for file in files:
            try:
                submission = _read(file)
            except InputError as error:
                problems.append(str(error))
                continue
            if submission is None:
                continue
            if submission.result["format"] == "mnistattn-retest":
                retests.append((file, submission.result, submission.samples))
            else:
                found.append(submission)
    kept = _comparable(found, problems, public)
    by_samples = {s.result["samples"]["sha256"]: s for s in kept}
    for file, raw, samples in retests:
        problem: str | None = "is the retest of no result here."
        if raw["of"] in by_samples:
            problem = _attach(by_samples[raw["of"]], raw, samples)
        if problem:
            problems.append(f"{file} {problem}")
    return kept, problems


def read_submission(path: str | Path) -> Submission:
    """One result by its JSON file or run directory, held against rules 1 to 3. InputError."""
    file, raw = read_result(path)
    if raw["format"] != "mnistattn-result":
        raise InputError(f"{file} is a retest: give the result that it is of.")
    submission = _checked(file, raw)
    for other in sorted(file.parent.glob(f"{file.stem}.retest-*.json")):
        retest = _read(other)
        if retest and retest.result.get("of") == raw["samples"]["sha256"]:
            submission.retests.append((retest.result, retest.samples))
    return submission


def faults(raw: dict, samples: dict[str, np.ndarray]) -> list[str]:
    """What breaks rule 3, or could not be shown on a board, though no schema sees it."""
    if "dataset" in raw and not _shown(raw["dataset"]):
        return ["its dataset section does not say what the data set is made of"]
    columns = {name: values for name, values in samples.items() if name != "gallery"}
    missing = {*TRUTH, "prediction", "correct"} - set(columns)
    if missing:
        return [f"the per-sample file lacks {', '.join(sorted(missing))}"]
    shapes = {np.shape(values) for values in columns.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1 or columns["correct"].dtype != bool:
        return ["the per-sample file's columns are not one value an image"]
    if "dataset" in raw:
        names = 5 if VARIANTS[raw["dataset"]["variant"]].asks == "digit" else 10
        if max(samples[k].max(initial=0) for k in ("answer", "prediction")) >= names:
            return [f"the per-sample file has answers beyond the {names} of its data set"]
    attention = columns.get("correctness", np.zeros(1))
    if not (np.isnan(attention) | ((attention >= 0) & (attention <= 1))).all():
        return ["the per-sample file has a correctness outside 0 .. 1"]
    return differences(raw["scores"], samples, one_answer(raw))


def add(run: str | Path, folder: str | Path, photos: bool = False) -> Path:
    """Copy a run's result, samples and retests into a board's folder; returns the JSON file there.

    photos: allow data sets on photos of one's own. InputError if it may not stand there, or another
    result of that model, options, recipe, data and seed does already.
    """
    submission = read_submission(run)
    raw = submission.result
    if not is_public(raw["dataset"]) and not photos:
        raise InputError(
            f"{submission.file} is on photos of one's own, which nobody else can remake: put it on "
            "a board of your own, with --photos."
        )
    # Of all splits' digests: two data sets may share a test split, and each needs its card.
    digests = json.dumps(raw["dataset"]["digests"], sort_keys=True)
    short = hashlib.sha256(digests.encode()).hexdigest()[:8]
    home = Path(folder) / f"{raw['dataset']['variant']}-{short}"
    name = submission.name.replace(" ", "-").replace("/", "_")
    stem = f"{name}-{submission.group}-seed{raw['seed']}"
    target = home / f"{stem}.json"
    if target.exists() and json.loads(target.read_text()) != _published(raw, stem):
        raise InputError(f"{target} is there already, of another run: remove it first.")
    try:
        home.mkdir(parents=True, exist_ok=True)
        gallery = submission.file.with_name(GALLERY)
        if gallery.exists() and not (home / GALLERY).exists():
            shutil.copyfile(gallery, home / GALLERY)
        if not (home / DATASET).exists():
            _write(home / DATASET, _placeless(raw["dataset"]) | {"trained_on": raw["trained_on"]})
        for i, (content, _) in enumerate([(raw, None), *submission.retests]):
            name = stem if i == 0 else f"{stem}.retest-{content['test_seed']}"
            source = submission.file.with_name(content["samples"]["file"])
            shutil.copyfile(source, home / f"{name}.h5")
            _write(home / f"{name}.json", _published(content, name))
        for kind in COMPANIONS:
            if (source := companion(submission.file, kind)).exists():
                shutil.copyfile(source, companion(target, kind))
    except OSError as error:
        raise MnistattnError(f"cannot write {target}: {error.strerror or error}.") from error
    return target


def companion(file: Path, kind: str) -> Path:
    """A file that lies beside a result, and is not part of it: "curve" (the history) or "coverage",
    by the name that it has in a run directory or on a board."""
    name = f"{kind}.json" if file.name == "result.json" else f"{file.stem}.{kind}.json"
    return file.with_name(name)


def _published(raw: dict, stem: str) -> dict:
    """A result, or a retest, as it stands on a board."""
    dataset = {"dataset": _placeless(raw["dataset"])} if "dataset" in raw else {}
    return raw | dataset | {"samples": raw["samples"] | {"file": f"{stem}.h5"}}


def _placeless(dataset: dict) -> dict:
    """A data set that says of a folder of photos its name alone, not where it lies on a disk."""
    sources = dataset["sources"]
    under = sources["backgrounds"]
    if "path" not in under:
        return dataset
    named = under | {"path": Path(under["path"]).name}
    return dataset | {"sources": sources | {"backgrounds": named}}


def _write(file: Path, content: dict) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)


def _json_files(folder: Path) -> Iterable[Path]:
    if folder.is_file():
        return [folder]
    return (f for f in folder.rglob("*.json")
            if f.name not in NOT_RESULTS and not f.name.startswith(".")
            and not f.name.endswith(tuple(f".{kind}.json" for kind in COMPANIONS)))  # fmt: skip


def _read(file: Path) -> Submission | None:
    """The result of a file; None for a JSON file that does not say to be one."""
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, OSError):
        raw = None
    if raw is not None and not (
        isinstance(raw, dict) and str(raw.get("format", "")).startswith("mnistattn-re")
    ):
        return None
    return _checked(*read_result(file))


def _checked(file: Path, raw: dict) -> Submission:
    samples = read_samples(file, raw)
    wrong = faults(raw, samples)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{file} does not follow from its samples: {wrong[0]}{more}.")
    return Submission(file, raw, samples)


def _shown(dataset: dict) -> bool:
    """Whether a data set's section has all that a board's headings and captions are made of."""
    try:
        kinds = [dataset["sources"][part]["source"] for part in ("digits", "backgrounds")]
        kinds += [dataset["spec"]["placement"], dataset["digests"]["test"]]
    except (KeyError, TypeError):
        return False
    return dataset["variant"] in VARIANTS and all(isinstance(kind, str) for kind in kinds)


def _attach(s: Submission, raw: dict, samples: dict[str, np.ndarray]) -> str | None:
    """Give a result its retest, once; what is wrong with it, if anything."""
    wrong = differences(raw["scores"], samples, one_answer(s.result))
    if wrong:
        return f"does not follow from its samples: {wrong[0]}."
    if len(samples["correct"]) != len(s.samples["correct"]):
        return f"has {len(samples['correct'])} images, unlike the result that it is of."
    same = [other for other, _ in s.retests if other["test_seed"] == raw["test_seed"]]
    if same and same[0]["samples"]["sha256"] != raw["samples"]["sha256"]:
        return f"is a second retest of {s.file} on test seed {raw['test_seed']}: remove one."
    if not same:  # the same retest twice, in two folders, is no problem
        s.retests.append((raw, samples))
    return None


def _comparable(found: Sequence[Submission], problems: list[str], public: bool) -> list[Submission]:
    """Those that keep rules 4 to 6."""
    kept: list[Submission] = []
    truth = _agreed(found)
    seen: dict[tuple, Submission] = {}
    code: dict[str, Submission] = {}
    for s in found:
        raw = s.result
        digest = raw["dataset"]["digests"]["test"]
        if public:
            problem = _unknown(s)
            if problem:
                problems.append(f"{s.file} {problem}")
                continue
        if _truth(s) != truth[digest]:
            problems.append(
                f"{s.file} has other queries, answers or scales than most results of its test "
                f"digest ({digest[:16]}): it is not what it says."
            )
            continue
        key = (s.group, s.name, raw["seed"])
        if key in seen:
            if raw["samples"]["sha256"] != seen[key].result["samples"]["sha256"]:
                problems.append(
                    f"{s.file} has the name, data, recipe and seed of {seen[key].file}: remove one."
                )
            continue  # the same result twice, in two folders, is no problem
        other = code.setdefault(raw["model"], s)
        plugged = "plugged" in (raw["kind"], other.result["kind"])
        if plugged and raw["code"] != other.result["code"]:
            problems.append(
                f"{s.file} and {other.file} are both named {raw['model']}, of different code: "
                "rename one class and evaluate it again."
            )
            continue
        seen[key] = s
        kept.append(s)
    return kept


def _truth(s: Submission) -> str:
    """A hash of what was asked, what is right, and how large the targets are."""
    columns = (np.ascontiguousarray(s.samples[k]) for k in TRUTH)
    return hashlib.sha256(b"".join(c.astype(np.float64).tobytes() for c in columns)).hexdigest()


def _agreed(found: Sequence[Submission]) -> dict[str, str]:
    """Of each test digest, the truth that most results have (the first, where none has more)."""
    votes: dict[str, list[str]] = {}
    for s in found:
        votes.setdefault(s.result["dataset"]["digests"]["test"], []).append(_truth(s))
    return {digest: max(cast, key=cast.count) for digest, cast in votes.items()}


def _unknown(s: Submission) -> str | None:
    """Rule 6."""
    dataset = s.result["dataset"]
    if not is_public(dataset):
        return "is on photos of one's own, which nobody else can remake: not for a public board."
    try:
        card = json.loads(s.file.with_name(DATASET).read_text())
        known = card["digests"] == dataset["digests"]
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        return (f"is on a data set of an unknown digest ({dataset['digests']['test'][:16]}): no "
                f"{DATASET} beside it has it.")  # fmt: skip
    return None
