"""Tars for the webdataset library: SPLIT-000000.tar, ... in the order of the images.

A sample of key SPLIT-00000012 is

    SPLIT-00000012.instances.png   mask, mode L: 0 background, k the k-th object
    SPLIT-00000012.json            query, answer, target, digit, color, ... (see `common.rows`)
    SPLIT-00000012.png             image, mode RGB

`.decode("rgb8")` gives image and mask as uint8 (H, W, 3), the mask's three channels alike.
"""

import json

from mnistattn.dataset.export.common import Job, png, rows


def write(job: Job) -> None:
    """Write the tars. Times, owners and order are fixed, so the bytes are the same each time."""
    from webdataset import TarWriter

    for split in job.splits:
        for shard, pieces in job.shards(split):
            # A stream, not a path: webdataset takes some paths for commands and addresses.
            with (
                open(job.folder / f"{split}-{shard:06d}.tar", "wb") as stream,
                TarWriter(
                    stream, encoder=False, mtime=0, user="mnistattn", group="mnistattn", mode=0o644
                ) as tar,
            ):
                for first, arrays in pieces:
                    for i, row in enumerate(rows(job.card, first, arrays)):
                        tar.write(
                            {
                                "__key__": f"{split}-{first + i:08d}",
                                "png": png(arrays["image"][i]),
                                "instances.png": png(arrays["instances"][i]),
                                "json": json.dumps({"split": split} | row).encode(),
                            }
                        )
