"""A Croissant card, croissant.json, and the Parquet files that it describes (see `parquet`).

Croissant (mlcommons.org/croissant) says in JSON-LD what files a data set has, with their SHA-256,
and how to read records from them. Its readers know no HDF5; hence the Parquet files.

The record set of each split is named as the split; `digits` and `colors` say what the numbers in
query, answer, digit and color mean. A split of one file is read from that file, whose SHA-256
mlcroissant then compares; one of several from a set of files, where it does not (but the list of
the export's files has them all).

Who publishes a data set should add `url` and `datePublished`: only they know these.
"""

import json

from mnistattn.dataset.export import parquet
from mnistattn.dataset.export.common import CITATION, Job, describe, licences, sha256
from mnistattn.dataset.format import FORMAT_VERSION
from mnistattn.generators.variants import COLORS, DIGITS

MIME = "application/x-parquet"

# As Croissant 1.1 prescribes it.
CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs", "column": "cr:column", "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn", "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/", "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"}, "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"}, "extract": "cr:extract",
    "field": "cr:field", "fileProperty": "cr:fileProperty", "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet", "format": "cr:format", "includes": "cr:includes",
    "isArray": "cr:isArray", "isLiveDataset": "cr:isLiveDataset", "jsonPath": "cr:jsonPath",
    "key": "cr:key", "md5": "cr:md5", "name": {"@container": "@language"},
    "parentField": "cr:parentField", "path": "cr:path", "recordSet": "cr:recordSet",
    "references": "cr:references", "regex": "cr:regex", "repeated": "cr:repeated",
    "replace": "cr:replace", "samplingRate": "cr:samplingRate", "sc": "https://schema.org/",
    "separator": "cr:separator", "source": "cr:source", "subField": "cr:subField",
    "transform": "cr:transform",
}  # fmt: skip

# Column: data type, shape of an array ("" if it is none; -1 is one for each object), what it is.
FIELDS = {
    "index": ("sc:Integer", "", "the image's number in its split"),
    "image": ("sc:ImageObject", "", "the image, RGB"),
    "instances": ("sc:ImageObject", "", "gray levels: 0 background, k the pixels of object k - 1"),
    "query": ("sc:Integer", "", "what is asked for: a number of `{query}`"),
    "answer": ("sc:Integer", "", "the answer: a number of `{answer}`"),
    "target": ("sc:Integer", "", "the object that is asked for, from 0"),
    "answers": ("sc:Integer", "-1", "every right answer: numbers of `{answer}`"),
    "digit": ("sc:Integer", "-1", "each object's digit"),
    "color": ("sc:Integer", "-1", "each object's colour: a number of `colors`"),
    "scale": ("sc:Float", "-1", "each object's size relative to 28 pixels"),
    "box": ("sc:Integer", "-1,4", "top, left, height, width in pixels of each object's square"),
}


def write(job: Job) -> None:
    """Write the Parquet files, and the card of them."""
    parquet.write(job)
    card = job.card
    found = {
        "@context": CONTEXT, "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": f"mnistattn-{card.spec.variant}",
        "description": describe(card, job.splits),
        "license": [url or f"{name} ({covers})" for name, url, covers in licences(card)],
        "creator": {"@type": "sc:Organization", "name": "The mnistattn authors"},
        "citeAs": CITATION, "version": f"{FORMAT_VERSION}.0.0",
        "keywords": ["visual attention", "benchmark", "MNIST", card.spec.row.paper_name],
        "distribution": [entry for split in job.splits for entry in _files(job, split)],
        "recordSet": [
            *(_records(job, split) for split in job.splits),
            _names("digits", DIGITS), _names("colors", COLORS),
        ],
    }  # fmt: skip
    text = json.dumps(found, indent=2) + "\n"
    (job.folder / "croissant.json").write_text(text)


def _files(job: Job, split: str) -> list[dict]:
    """A split's files, and, if they are several, the set of them."""
    names = [parquet.file_name(job, split, shard) for shard in range(job.shard_count(split))]
    entries = []
    for name in names:
        size = (job.folder / name).stat().st_size
        entries.append(
            {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name,
             "contentSize": f"{size} B", "encodingFormat": MIME,
             "sha256": sha256(job.folder / name)}
        )  # fmt: skip
    if len(names) > 1:
        entries.append(
            {"@type": "cr:FileSet", "@id": f"{split}-files", "name": f"{split}-files",
             "encodingFormat": MIME, "includes": f"{split}-*-of-{len(names):05d}.parquet"}
        )  # fmt: skip
    return entries


def _records(job: Job, split: str) -> dict:
    """A split's record set."""
    if job.shard_count(split) > 1:
        source = {"fileSet": {"@id": f"{split}-files"}}
    else:
        source = {"fileObject": {"@id": parquet.file_name(job, split, 0)}}
    sets = {"query": "digits", "answer": "colors"}
    if job.card.spec.row.asks == "color":
        sets = {"query": "colors", "answer": "digits"}
    fields = []
    for name, (kind, shape, what) in FIELDS.items():
        if name == "answers" and not job.card.spec.row.repeats:
            continue
        # An image is a struct {bytes, path} in its column.
        inner = {"transform": {"jsonPath": "bytes"}} if kind == "sc:ImageObject" else {}
        field = {
            "@type": "cr:Field", "@id": f"{split}/{name}", "name": name, "dataType": kind,
            "description": what.format(**sets),
            "source": source | {"extract": {"column": name}} | inner,
        }  # fmt: skip
        array = {"isArray": True, "arrayShape": shape} if shape else {}
        fields.append(field | array)
    return {
        "@type": "cr:RecordSet", "@id": split, "name": split,
        "description": f"The {job.card.splits[split]['count']} images of {split}, in order.",
        "key": {"@id": f"{split}/index"}, "field": fields,
    }  # fmt: skip


def _names(what: str, names: tuple[str, ...]) -> dict:
    """The record set that says what numbers mean."""
    return {
        "@type": "cr:RecordSet", "@id": what, "name": what, "dataType": "sc:Enumeration",
        "key": {"@id": f"{what}/number"},
        "field": [
            {"@type": "cr:Field", "@id": f"{what}/number", "name": "number",
             "dataType": "sc:Integer"},
            {"@type": "cr:Field", "@id": f"{what}/name", "name": "name", "dataType": "sc:Text"},
        ],
        "data": [{f"{what}/number": i, f"{what}/name": name} for i, name in enumerate(names)],
    }  # fmt: skip
