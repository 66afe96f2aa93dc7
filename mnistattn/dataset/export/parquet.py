"""Parquet files as Hugging Face's `datasets` names and reads them: SPLIT-00000-of-00003.parquet.

    index           the image's number in its split
    image           PNG, mode RGB: an Image feature, {bytes, path}
    instances       PNG, mode L: 0 background, k the k-th object
    query, answer   ClassLabel: digits or colours by name
    target          the object that is asked for, from 0
    answers         mbg-multi only: list of ClassLabel, every right colour
    digit, color    list of ClassLabel, an entry for each object
    scale           list of float32, relative to 28 pixels
    box             list of (top, left, height, width)

`datasets.load_dataset(DIR)` finds the splits (`val` as `validation`) and the features, which stand
in the files' own metadata. Any other reader of Parquet sees plain structs, numbers and lists.
"""

import json

from mnistattn.dataset.export.common import Job, png, rows
from mnistattn.generators.variants import COLORS, DIGITS


def write(job: Job) -> None:
    """Write the files, a row group a piece."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = _schema(job)
    for split in job.splits:
        for shard, pieces in job.shards(split):
            # Neither dictionaries nor statistics over images: they would repeat them.
            with ParquetWriter(
                job.folder / file_name(job, split, shard), schema, compression="snappy",
                use_dictionary=False, write_statistics=["index", "query", "answer", "target"],
            ) as writer:  # fmt: skip
                for first, arrays in pieces:
                    table = [
                        row | {
                            name: {"bytes": png(arrays[name][i]),
                                   "path": f"{split}-{first + i:08d}{suffix}.png"}
                            for name, suffix in (("image", ""), ("instances", ".instances"))
                        }
                        for i, row in enumerate(rows(job.card, first, arrays))
                    ]  # fmt: skip
                    writer.write_table(pyarrow.Table.from_pylist(table, schema), len(table))


def file_name(job: Job, split: str, shard: int) -> str:
    """The name of a split's file."""
    return f"{split}-{shard:05d}-of-{job.shard_count(split):05d}.parquet"


def _schema(job: Job):
    """The Arrow schema, with the features for `datasets` in its metadata.

    A list is a "Sequence" there, which `datasets` reads in all of its versions ("List": from 4 on).
    """
    import pyarrow as pa

    def value(dtype: str) -> dict:
        return {"dtype": dtype, "_type": "Value"}

    def label(names: tuple[str, ...]) -> dict:
        return {"names": names, "_type": "ClassLabel"}

    def each(feature: dict, **length) -> dict:
        return {"feature": feature, **length, "_type": "Sequence"}

    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    queries, answers = job.card.query_names, job.card.answer_names
    columns = {
        "index": (pa.int64(), value("int64")),
        "image": (picture, {"_type": "Image"}),
        "instances": (picture, {"_type": "Image"}),
        "query": (pa.int64(), label(queries)),
        "answer": (pa.int64(), label(answers)),
        "target": (pa.int64(), value("int64")),
        "answers": (pa.list_(pa.int64()), each(label(answers))),
        "digit": (pa.list_(pa.int64()), each(label(DIGITS))),
        "color": (pa.list_(pa.int64()), each(label(COLORS))),
        "scale": (pa.list_(pa.float32()), each(value("float32"))),
        "box": (pa.list_(pa.list_(pa.int16(), 4)), each(each(value("int16"), length=4))),
    }
    if not job.card.spec.row.repeats:
        del columns["answers"]
    features = {"info": {"features": {name: feature for name, (_, feature) in columns.items()}}}
    return pa.schema(
        {name: kind for name, (kind, _) in columns.items()},
        metadata={"huggingface": json.dumps(features)},
    )
