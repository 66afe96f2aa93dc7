"""Where several models look, side by side: the maps of all their layers on the same test images.

In the manner of Figure 6b of Khandelwal and Sigal (ICCV 2019). From run directories alone: the
images are those of a run's gallery, the answers those of its samples; the maps of single layers are
kept nowhere, so the networks make them again.
"""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from mnistattn.errors import InputError, MnistattnError
from mnistattn.evaluation.feed import Feed
from mnistattn.evaluation.metrics import upsample
from mnistattn.evaluation.picture import Looks, layers_picture
from mnistattn.evaluation.reload import Run, load_run
from mnistattn.evaluation.result import read_result, read_samples
from mnistattn.evaluation.run import GALLERY, choose_device, gallery_maps
from mnistattn.models.registry import find

ROWS = 8  # images, if no number is given


def layers_of_runs(
    runs: Sequence[str | Path], *, names: Sequence[str] | None = None, images: int = ROWS,
    models: Sequence[str] = (), device: str = "auto",
) -> Image.Image:  # fmt: skip
    """The picture of some runs' layers on the first test images, a row an image.

    runs: directories (or result.json files) with weights, samples and gallery, all of one test
    split and with attention. names: above their panels, instead of the models' names in the paper.
    images: 1 to 16. models: where plugged models are (FILE.py:CLASS). Raises InputError for a
    request that cannot be met, MnistattnError for maps that cannot be drawn.
    """
    if not runs:
        raise InputError("there are no runs to show: give one or more run directories.")
    if not 1 <= images <= GALLERY:
        raise InputError(f"{images} images are impossible: give 1 to {GALLERY}, which a run keeps.")
    place = choose_device(device)
    plugged = {find(model).name: model for model in models}
    found = [load_run(run, plugged.get(read_result(run)[1]["model"])) for run in runs]
    first = found[0]
    for run in found:
        if run.raw["dataset"]["digests"]["test"] != first.raw["dataset"]["digests"]["test"]:
            raise InputError(f"{run.file} and {first.file} are of different test splits: show them "
                             "one by one.")  # fmt: skip
        if not run.raw["scores"]["layers"]:
            raise InputError(f"{run.file} is of a model without attention maps: leave it out.")
    image, mask = _gallery(first)
    n = min(images, len(image))
    queries, answers = first.card.query_names, first.card.answer_names
    told = read_samples(first.file, first.raw)
    captions = [f"{queries[q]} -> {answers[a]}"
                for q, a in zip(told["query"][:n], told["answer"], strict=False)]  # fmt: skip
    looks = []
    for run, name in zip(found, names or [run.raw["paper_name"] for run in found], strict=True):
        samples = read_samples(run.file, run.raw)
        looks.append(Looks(
            name, [layer[:n] for layer in _layers(run, image, mask, samples, place)],
            [f"said {answers[said]}" for said in samples["prediction"][:n]],
            samples["correct"][:n].tolist(),
        ))  # fmt: skip
    title = f"What each layer attends to on {first.raw['dataset']['paper_name']}"
    try:
        return layers_picture(image[:n], mask[:n], captions, looks, title)
    except ValueError as error:
        raise MnistattnError(f"the attention maps cannot be drawn: {error}") from error


def _gallery(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """A run's first test images, uint8 (n, H, W, 3), and their true masks, bool (n, H, W)."""
    file = run.file.with_name("gallery.h5")
    try:
        with h5py.File(file, "r") as h5:
            image, mask = h5["image"][()], h5["mask"][()]
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: evaluate the run again.") from error
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged: evaluate the run again.") from error
    return image, mask


def _layers(
    run: Run, image: np.ndarray, mask: np.ndarray, samples: dict, device: torch.device
) -> list[np.ndarray]:
    """The map of each layer on the gallery's images, upsampled to them: (n, H, W) floats."""
    query = torch.from_numpy(samples["query"][: len(image)].astype(np.int64))
    answer = torch.from_numpy(samples["answer"][: len(image)].astype(np.int64))
    # A scene of one object, the one that is asked for: all that the gallery knows of it, and what
    # a model that is told the mask has to know.
    feed = Feed(
        torch.from_numpy(image), query[:, None], answer[:, None], query, answer,
        torch.nn.functional.one_hot(answer, len(run.card.answer_names)).bool(), False, device,
        torch.from_numpy(mask.astype(np.uint8)),
    )  # fmt: skip
    layers, _ = gallery_maps(run.network(device), feed)
    height, width = image.shape[1:3]
    return [upsample(torch.from_numpy(m)[:, None], (height, width)).numpy() for m in layers]
