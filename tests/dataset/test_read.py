"""Reading a data set: damage is found and named, masks are right, torch gets what is on disk."""

import json
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mnistattn.dataset.read import answer_masks, batches, read_card, read_split
from mnistattn.dataset.write import generate
from mnistattn.errors import InputError
from mnistattn.generators import digits

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

import mnistattn  # noqa: E402

VARIANTS = ("mref", "mbg-inv", "mbg-multi")
TARGETS = ("query", "answer", "target", "scale", "mask", "instances", "answers")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """A small data set of each kind; read only."""
    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "STROKES_COUNT", {"train": 200, "val": 100, "test": 100})
        return {
            variant: generate(
                variant, root / variant, train=12, val=0, test=4, digits="strokes", size=64,
                max_scale=1.5, workers=1, progress=False, say=lambda line: None,
            )
            for variant in VARIANTS
        }  # fmt: skip


@pytest.fixture
def copy(sets, tmp_path) -> Path:
    """A data set to be damaged."""
    return Path(shutil.copytree(sets["mref"], tmp_path / "set"))


def complaint(action, file) -> str:
    """The one sentence with which action fails; it names the file."""
    with pytest.raises(InputError) as caught:
        action()
    text = str(caught.value)
    assert str(file) in text and "\n" not in text and text.endswith((".", "'?"))
    return text


# ---------------------------------------------------------------- damage


def change_card(path: Path, **changes) -> None:
    card = json.loads((path / "dataset.json").read_text()) | changes
    (path / "dataset.json").write_text(json.dumps(card))


def test_no_data_set(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert "mnistattn generate" in complaint(lambda path=path: read_card(path), path)
        complaint(lambda path=path: mnistattn.load(path), path)
        complaint(lambda path=path: mnistattn.load_arrays(path), path)


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "3", "null", "{}", '{"format": "mnistattn"}', '{"format": "other"}'],
)
def test_a_foreign_card(copy, text):
    (copy / "dataset.json").write_text(text)
    assert "damaged, or no card" in complaint(lambda: read_card(copy), copy / "dataset.json")


def test_a_binary_card(copy):
    (copy / "dataset.json").write_bytes(b"\xff\xfe\x00\x80")
    complaint(lambda: read_card(copy), copy / "dataset.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"splits": []}, {"splits": {"train": {}}}, {"splits": {"train": {"count": "x"}}},
        {"splits": {"train": 3}}, {"spec": {}}, {"spec": {"variant": "mref", "more": 1}},
        {"spec": {"variant": "mref", "size": "big"}}, {"spec": {"variant": "other"}},
        {"spec": {"variant": "mref", "size": 5}}, {"seed": "x"}, {"sources": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_card_with_a_wrong_entry(copy, changes):
    change_card(copy, **changes)
    complaint(lambda: read_card(copy), copy / "dataset.json")


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_format_version(copy, version):
    change_card(copy, format_version=version)
    text = complaint(lambda: read_card(copy), copy / "dataset.json")
    assert f"version {version}" in text


def test_missing_splits_and_files(copy):
    assert "train, test" in complaint(lambda: mnistattn.load(copy, "val"), copy)
    assert "Did you mean 'test'" in complaint(lambda: mnistattn.load_arrays(copy, "tset"), copy)
    (copy / "train.h5").unlink()
    assert "missing" in complaint(lambda: mnistattn.load(copy), copy / "train.h5")
    assert len(mnistattn.load(copy, "test")) == 4


@pytest.mark.parametrize("keep", [0, 10, 500, 0.5, -1])
def test_a_truncated_file(copy, keep):
    file = copy / "train.h5"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else keep])
    complaint(lambda: read_split(read_card(copy), "train", check=True), file)
    complaint(lambda: mnistattn.load(copy), file)


def test_a_flipped_bit_is_found_and_its_array_named(copy):
    file = copy / "train.h5"
    with h5py.File(file, "r") as h5:
        offset = h5["image"].id.get_offset()
    data = bytearray(file.read_bytes())
    data[offset + 12345] ^= 1
    file.write_bytes(data)
    card = read_card(copy)
    text = complaint(lambda: read_split(card, "train", check=True), file)
    assert "(image differ)" in text
    complaint(lambda: read_split(card, "train", ["query"], check=True), file)
    read_split(card, "test", check=True)
    assert len(read_split(card, "train", ["query"])["query"]) == 12  # unchecked


def test_a_wrong_digest_in_the_card(copy):
    card = read_card(copy)
    card.raw["splits"]["train"]["digest"] = "0" * 64
    text = complaint(lambda: read_split(card, "train", check=True), copy / "train.h5")
    assert "(the card differ)" in text


def test_every_array_counts(copy):
    card = read_card(copy)
    names = list(read_split(card, "test"))
    for name in names:
        file = copy / "test.h5"
        whole = file.read_bytes()
        with h5py.File(file, "r+") as h5:
            values = h5[name][()]
            flat = values.reshape(-1)
            flat[-1] = flat[-1] + 1
            h5[name][...] = values
        assert f"({name} differ)" in complaint(lambda: read_split(card, "test", check=True), file)
        file.write_bytes(whole)


def test_a_file_that_does_not_fit_its_card(copy):
    file = copy / "train.h5"
    arrays = mnistattn.load_arrays(copy)

    def put(**changes):
        with h5py.File(file, "w") as h5:
            for name, values in (arrays | changes).items():
                if values is not None:
                    h5[name] = values

    for changes, name in (
        ({"image": arrays["image"][:-1]}, "image"),
        ({"image": arrays["image"].astype(np.int16)}, "image"),
        ({"scale": arrays["scale"].astype(np.float64)}, "scale"),
        ({"query": None}, "query"),
        ({"box": arrays["box"][:, :, :3]}, "box"),
        ({"digit": b"text"}, "digit"),
    ):
        put(**changes)
        for action in (lambda: mnistattn.load_arrays(copy), lambda: mnistattn.load(copy)):
            assert f"'{name}' is not" in complaint(action, file)
    with h5py.File(file, "w") as h5:
        h5.create_group("image")
    assert "'image' is not" in complaint(lambda: mnistattn.load_arrays(copy), file)
    put()
    assert np.array_equal(mnistattn.load_arrays(copy)["image"], arrays["image"])


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize("variant", VARIANTS)
def test_answer_masks(sets, variant):
    arrays = mnistattn.load_arrays(sets[variant])
    masks = answer_masks(arrays)
    assert masks.shape == arrays["instances"].shape and masks.dtype == bool
    for i in range(len(masks)):
        asks = arrays["color"] if variant == "mbg-inv" else arrays["digit"]
        right = [k + 1 for k in range(9) if asks[i, k] == arrays["query"][i]]
        assert (len(right) > 1) == (variant == "mbg-multi")
        expected = np.zeros_like(masks[i])
        for k in right:
            expected |= arrays["instances"][i] == k
        assert np.array_equal(masks[i], expected) and expected.any()


def test_names_of_queries_and_answers(sets):
    assert read_card(sets["mref"]).query_names[3] == "3"
    assert read_card(sets["mref"]).answer_names[3] == "yellow"
    assert read_card(sets["mbg-inv"]).query_names[0] == "red"
    assert read_card(sets["mbg-inv"]).answer_names[9] == "9"


def test_read_only_what_is_asked_for(sets):
    card = read_card(sets["mref"])
    assert list(read_split(card, "test", ("target", "image"))) == ["target", "image"]
    assert "answers" not in read_split(card, "test")
    assert read_split(read_card(sets["mbg-multi"]), "test")["answers"].dtype == bool


@pytest.mark.parametrize("variant", VARIANTS)
def test_items_are_the_arrays(sets, variant):
    arrays = mnistattn.load_arrays(sets[variant])
    masks = answer_masks(arrays)
    data = mnistattn.load(sets[variant], target_types=TARGETS)
    assert len(data) == 12
    for i in range(12):
        image, targets = data[i]
        assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
        assert np.array_equal(image.numpy(), arrays["image"][i].transpose(2, 0, 1))
        query, answer, target, scale, mask, instances, answers = targets
        assert (type(query), type(answer), type(target), type(scale)) == (int, int, int, float)
        assert [query, answer, target] == [arrays[n][i] for n in ("query", "answer", "target")]
        assert scale == arrays["scale"][i, target]
        assert isinstance(mask, tv_tensors.Mask) and mask.dtype == torch.bool
        assert np.array_equal(mask.numpy(), masks[i])
        assert isinstance(instances, tv_tensors.Mask)
        assert np.array_equal(instances.numpy(), arrays["instances"][i])
        assert answers.dtype == torch.bool and answers[answer]
        assert len(answers) == (10 if variant == "mbg-inv" else 5)
        if variant == "mbg-multi":
            assert np.array_equal(answers.numpy(), arrays["answers"][i]) and answers.sum() >= 2
        else:
            assert answers.sum() == 1


def test_one_target_comes_alone(sets):
    image, answer = mnistattn.load(sets["mref"], "test", target_types="answer")[3]
    assert type(answer) is int
    _, pair = mnistattn.load(sets["mref"], "test")[3]
    assert pair[1] == answer and len(pair) == 2


@pytest.mark.parametrize("variant", ["mref", "mbg-inv"])
def test_all_queries(sets, variant):
    arrays = mnistattn.load_arrays(sets[variant])
    data = mnistattn.load(sets[variant], target_types=TARGETS, queries="all")
    expected = []
    for i in range(12):
        for k in np.flatnonzero(arrays["digit"][i] >= 0):
            digit, color = int(arrays["digit"][i, k]), int(arrays["color"][i, k])
            if variant == "mref":
                expected.append((i, k, digit, color))
            elif (arrays["color"][i] == color).sum() == 1:
                expected.append((i, k, color, digit))
    assert len(data) == len(expected) > 12
    for item, (i, k, query, answer) in enumerate(expected):
        image, targets = data[item]
        assert targets[:4] == (query, answer, k, float(arrays["scale"][i, k]))
        assert np.array_equal(targets[4].numpy(), arrays["instances"][i] == k + 1)
        assert targets[6].nonzero().tolist() == [[answer]]
        assert np.array_equal(image[0].numpy(), arrays["image"][i, :, :, 0])


def test_unknown_options(sets):
    with pytest.raises(InputError, match="Did you mean 'mask'"):
        mnistattn.load(sets["mref"], target_types=("query", "masks"))
    with pytest.raises(InputError, match="unknown queries"):
        mnistattn.load(sets["mref"], queries="some")
    with pytest.raises(InputError, match="mbg-multi has several"):
        mnistattn.load(sets["mbg-multi"], queries="all")


def test_workers_of_a_loader_get_the_same(sets):
    data = mnistattn.load(sets["mref"], target_types=("query", "mask"))
    data[0]  # the file is open when the workers start
    alone = list(DataLoader(data, batch_size=5))
    shared = list(DataLoader(data, batch_size=5, num_workers=2))
    assert len(alone) == len(shared) == 3
    for (image, (query, mask)), (image2, (query2, mask2)) in zip(alone, shared, strict=True):
        assert torch.equal(image, image2) and torch.equal(query, query2)
        assert torch.equal(mask, mask2)
    assert torch.equal(torch.cat([b[0] for b in shared])[7], data[7][0])


def test_pickling(sets):
    data = mnistattn.load(sets["mbg-inv"], "test", target_types="mask")
    expected = data[2]
    again = pickle.loads(pickle.dumps(data))
    assert len(again) == 4
    assert torch.equal(again[2][0], expected[0]) and torch.equal(again[2][1], expected[1])
    assert torch.equal(data[2][0], expected[0])  # and the first one still works


def test_transforms_move_image_and_mask_together(sets):
    plain = mnistattn.load(sets["mref"], target_types=("query", "mask"))
    moves = v2.Compose([v2.RandomHorizontalFlip(1), v2.Pad((3, 5, 0, 0))])
    moved = mnistattn.load(sets["mref"], target_types=("query", "mask"), transforms=moves)
    for i in range(3):
        (image, (query, mask)), (image2, (query2, mask2)) = plain[i], moved[i]
        assert query == query2
        assert torch.equal(image2[:, 5:, 3:], image.flip(-1))
        assert torch.equal(mask2[5:, 3:], mask.flip(-1)) and mask2.sum() == mask.sum()


def test_transform_and_target_transform(sets):
    data = mnistattn.load(
        sets["mref"], target_types="answer", transform=v2.ToDtype(torch.float32, scale=True),
        target_transform=lambda answer: -answer,
    )  # fmt: skip
    plain = mnistattn.load(sets["mref"], target_types="answer")
    assert data[1][0].dtype == torch.float32 and data[1][0].max() <= 1
    assert data[1][1] == -plain[1][1]


def test_a_split_in_pieces_is_the_split(tiny) -> None:
    card = read_card(tiny)
    whole = read_split(card, "test")
    for rows in (7, 40, 1000):
        pieces = list(batches(card, "test", rows))
        assert [first for first, _ in pieces] == list(range(0, 40, rows))
        for name, values in whole.items():
            assert np.array_equal(np.concatenate([p[name] for _, p in pieces]), values)
    ((_, piece),) = batches(card, "val", 100, ["query"])
    assert list(piece) == ["query"] and len(piece["query"]) == 24
