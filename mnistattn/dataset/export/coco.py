"""Instance annotations for pycocotools: SPLIT.json, and the images in SPLIT/ as PNG.

images       id and file_name by the image's number from 0; beside COCO's fields query, answer,
             target (the annotations' `object`), and the same in words; `answers` in mbg-multi.
categories   the digit's class, id 1 for digit 0 to id 10 for digit 9: COCO counts from 1, and
             detectors keep 0 for the background. That is so in mbg-inv too.
annotations  one an object, id from 1 (COCOeval takes 0 for "none"). segmentation: compressed RLE of
             the pixels that are seen, and `area` and `bbox` (x, y, width, height) of those; `box`
             is the data set's own: top, left, height, width of the square that the digit was drawn
             into. object: its number from 0; is_target: it is asked for; is_answer: it answers the
             query, which several do in mbg-multi; digit, color, color_name, scale.

An object of which no pixel is seen (placement leaves none such) cannot be found by a detector, and
a box of no size breaks the training of most: it gets no annotation, but is kept in its image's
entry, in the list `hidden`.
"""

import json
import shutil
from collections.abc import Iterator

import numpy as np

from mnistattn.dataset.export.common import CITATION, Job, describe, licences, png, rows
from mnistattn.dataset.format import FORMAT_VERSION
from mnistattn.generators.variants import COLORS, DIGITS


def write(job: Job) -> None:
    """Write images and annotations, as they come: annotations wait in a file of their own, for
    in COCO's they stand behind all images."""
    for split in job.splits:
        (job.folder / split).mkdir()
        final, waiting = job.folder / f"{split}.json", job.folder / f"{split}.annotations"
        with open(final, "w+") as images, open(waiting, "w+") as annotations:
            images.write(_head(job, split))
            number = 1
            for first, arrays in job.pieces(split):
                for i, row in enumerate(rows(job.card, first, arrays)):
                    name = f"{row['index']:08d}.png"
                    (job.folder / split / name).write_bytes(png(arrays["image"][i]))
                    seen: list[dict] = []
                    hidden: list[dict] = []
                    for entry in _objects(job, row, arrays["instances"][i]):
                        (seen if entry["area"] else hidden).append(entry)
                    images.write("[\n" if row["index"] == 0 else ",\n")
                    images.write(json.dumps(_image(job, row, name, hidden)))
                    for entry in seen:
                        annotations.write("[\n" if number == 1 else ",\n")
                        annotations.write(json.dumps({"id": number} | entry))
                        number += 1
            images.write('\n],\n"annotations": ' + ("" if number > 1 else "["))
            annotations.seek(0)
            shutil.copyfileobj(annotations, images)
            images.write("\n]}\n")
        waiting.unlink()


def _head(job: Job, split: str) -> str:
    """The file up to its list of images."""
    card = job.card
    info = {
        "description": describe(card, (split,)), "version": f"{FORMAT_VERSION}.0.0",
        "contributor": "mnistattn", "citation": CITATION, "variant": card.spec.variant,
        "split": split, "seed": card.raw["seed"], "digest": card.digest(split), "colors": COLORS,
    }  # fmt: skip
    parts = {
        "info": info,
        "licenses": [
            {"id": i, "name": f"{name} ({covers})", "url": url}
            for i, (name, url, covers) in enumerate(licences(card), 1)
        ],
        "categories": [
            {"id": i, "name": digit, "supercategory": "digit"} for i, digit in enumerate(DIGITS, 1)
        ],
    }
    return json.dumps(parts)[:-1] + ',\n"images": '


def _image(job: Job, row: dict, name: str, hidden: list[dict]) -> dict:
    """An image's entry."""
    size = job.card.spec.size
    entry = {"id": row["index"], "file_name": name, "height": size, "width": size}
    names = ("query", "query_name", "answer", "answer_name", "target", "answers", "answers_name")
    entry |= {k: row[k] for k in names if k in row}
    return entry | ({"hidden": hidden} if hidden else {})


def _objects(job: Job, row: dict, instances: np.ndarray) -> Iterator[dict]:
    """The annotations of an image's objects, but for their id. instances: uint8 (H, W)."""
    from pycocotools import mask

    numbers = np.arange(1, len(row["digit"]) + 1)
    runs = mask.encode(np.asfortranarray(instances[:, :, None] == numbers, np.uint8))
    for k, (run, area, bbox) in enumerate(
        zip(runs, mask.area(runs).tolist(), mask.toBbox(runs).tolist(), strict=True)
    ):
        answers = row["digit"][k] == row["query"] if "answers" in row else k == row["target"]
        yield {
            "image_id": row["index"], "category_id": row["digit"][k] + 1, "iscrowd": 0,
            "segmentation": {"size": run["size"], "counts": run["counts"].decode()},
            "area": area, "bbox": bbox, "object": k, "digit": row["digit"][k],
            "color": row["color"][k], "color_name": row["color_name"][k],
            "scale": row["scale"][k], "box": row["box"][k], "is_target": k == row["target"],
            "is_answer": answers,
        }  # fmt: skip
