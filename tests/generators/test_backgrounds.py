"""What lies under the scenes: which photo serves which split, pixels that hang on the index."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnistattn.errors import InputError
from mnistattn.generators.backgrounds import open_background
from mnistattn.generators.backgrounds.distractors import Clutter, Gaussian, Patches
from mnistattn.generators.backgrounds.photos import Photos, list_photos
from mnistattn.generators.backgrounds.textures import Textures, texture
from mnistattn.generators.digits.pool import DigitPool
from mnistattn.generators.digits.strokes import stroke_glyphs
from mnistattn.generators.random import stream_key
from mnistattn.generators.variants import PALETTE, SPLITS, Spec

KEY = stream_key(0, "train")
SCENES = Path(__file__).parents[2] / ".." / "shared" / "data" / "scenes"
# SHA-256 of 3 backgrounds of 100 pixels. A change here changes every MDIST.
GOLDEN_PATCHES = "a6f4eec8241f805a4b32fd2acd462815b5f3a506a4b62143a140a32c6fc57208"
GOLDEN_GAUSSIAN = "9867fbc74b90c202ebce5aa5216fa853b30952f66f8701c62afe2be036057b2d"
# Over a grey of 90.
GOLDEN_CLUTTER = "b3c3edf2eaae634b677c96afc026fbd93f990314afa0519f7f3e40eeae2faa9a"


def picture(path: Path, height=30, width=40, seed=None, mode="RGB") -> Path:
    """A small noise picture with content of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = seed or int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "little")
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def fill(background, indices, size=100) -> np.ndarray:
    image = np.full((len(indices), size, size, 3), 123, np.uint8)
    background.fill(image, KEY, np.asarray(indices, np.int64))
    return image


def names(shares) -> dict[str, set[str]]:
    return {split: {path.name for path in paths} for split, paths in shares.items()}


@pytest.fixture(scope="module")
def pool() -> DigitPool:
    return DigitPool.from_labels(*stroke_glyphs(0, "train", 100))


# ---------------------------------------------------------------- photos: which split has which


def test_given_parts_are_kept_apart(tmp_path):
    for split in SPLITS:
        picture(tmp_path / split / "room" / f"{split}.png")
        picture(tmp_path / split / "same.jpg")
    picture(tmp_path / "loose.png")  # beside the parts: in none of them
    (tmp_path / "train" / "notes.txt").write_text("no photo")
    shares = list_photos(tmp_path)
    assert names(shares) == {split: {f"{split}.png", "same.jpg"} for split in SPLITS}
    for split, paths in shares.items():
        assert paths == sorted(paths)
        assert all(path.is_relative_to(tmp_path / split) for path in paths)


@pytest.mark.parametrize(
    "there", [("train", "val"), ("train", "test"), ("train",), ()], ids=lambda t: "+".join(t)
)
def test_missing_parts_take_a_share(tmp_path, there):
    for split in there or ("kitchen", "street"):
        for n in range(60):
            path = tmp_path / split / f"{split}{n}.PNG"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    shares = list_photos(tmp_path)
    assert shares == list_photos(tmp_path)
    everything = [path for split in SPLITS for path in shares[split]]
    assert len(everything) == len(set(everything)) == 60 * max(len(there), 1 + (not there))
    assert all(shares[split] for split in SPLITS)
    for split in there:
        if split != "train":
            own = {path for path in everything if path.parent.name == split}
            assert set(shares[split]) <= own
    if there == ("train", "val"):
        assert len(shares["train"]) == 60
        assert 15 < len(shares["test"]) < 45  # half of val's
    elif there == ("train", "test"):
        assert len(shares["test"]) == 60 and len(shares["val"]) < 20
    else:
        assert len(shares["train"]) > 0.6 * len(everything)


def test_the_share_of_a_photo_hangs_on_its_name_alone(tmp_path):
    for root in ("here", "there"):
        for n in range(40):
            path = tmp_path / root / "all" / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    first, second = (list_photos(tmp_path / root) for root in ("here", "there"))
    assert names(first) == names(second)
    (tmp_path / "there" / "all" / "new.jpg").touch()
    more = list_photos(tmp_path / "there")
    assert sum(len(paths) for paths in more.values()) == 41
    assert all(names(second)[split] <= names(more)[split] for split in SPLITS)
    one = hashlib.sha256(b"all/7.jpg").digest()[0] % 10  # 0: val, 1: test, else train
    assert "7.jpg" in names(first)[{0: "val", 1: "test"}.get(one, "train")]


def test_folders_that_cannot_serve(tmp_path):
    with pytest.raises(InputError, match="leaves no photo for the train split"):
        list_photos(tmp_path)
    picture(tmp_path / "only.png")
    with pytest.raises(InputError, match="leaves no photo for the"):
        list_photos(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        list_photos(tmp_path / "missing")
    for split in SPLITS:
        (tmp_path / "parts" / split).mkdir(parents=True)
        picture(tmp_path / "parts" / "train" / "a.png")
    with pytest.raises(InputError, match="leaves no photo for the val split"):
        list_photos(tmp_path / "parts")
    with pytest.raises(InputError, match="Did you mean 'textures'"):
        open_background(Spec("mbg"), "texture", tmp_path)
    with pytest.raises(InputError, match="neither a folder nor one of"):
        open_background(Spec("mbg"), str(tmp_path / "only.png"), tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "ppm"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_broken_photo_is_named(tmp_path, suffix, damage):
    good = picture(tmp_path / "a.png")
    broken = picture(tmp_path / f"broken.{suffix}")
    data = broken.read_bytes()
    broken.write_bytes({"cut": data[: len(data) // 2], "text": b"P6 x", "empty": b""}[damage])
    with pytest.raises(InputError, match=rf"broken\.{suffix}") as caught:
        photos = Photos([good, broken], tmp_path, 28)
        fill(photos, range(50), 28)  # a picture whose header is whole is found out when decoded
    assert "remove it" in str(caught.value)


def test_a_photo_that_vanishes_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        Photos([tmp_path / "gone.png"], tmp_path, 28)


# ---------------------------------------------------------------- photos: the pixels


@pytest.mark.parametrize(
    ("height", "width"), [(2, 3), (1, 1), (3, 300), (400, 2), (28, 28), (27, 29), (200, 150)]
)
def test_any_shape_covers_the_canvas(tmp_path, height, width):
    path = picture(tmp_path / "a.png", height, width)
    photos = Photos([path], tmp_path, 28)
    image = fill(photos, range(30), 28)
    source = np.asarray(Image.open(path))
    assert image.min() >= source.min() and image.max() <= source.max()
    if height * width > 1:
        assert len({one.tobytes() for one in image}) >= 3  # three zooms at the least


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    gradient = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))
    grey = Image.fromarray(gradient)
    if mode == "I;16":
        Image.fromarray(gradient.astype(np.uint16)).save(path)
    else:
        grey.convert("RGB").convert(mode).save(path)
    image = fill(Photos([path], tmp_path, 60), range(6), 60).astype(int)
    assert image.std() > 20
    assert np.abs(image[..., 0] - image[..., 1]).max() <= (80 if mode == "P" else 2)


def test_a_background_is_a_window_of_the_shrunk_photo(tmp_path):
    path = picture(tmp_path / "a.png", 90, 120)
    photo = Image.open(path)
    levels = [
        np.asarray(photo.resize((short * 120 // 90, short), Image.Resampling.BILINEAR)).astype(int)
        for short in (30, 40, 50)
    ]
    seen = set()
    for one in fill(Photos([path], tmp_path, 30), range(20), 30):
        hits = [
            zoom
            for zoom, level in enumerate(levels)
            for top in range(level.shape[0] - 29)
            for left in range(level.shape[1] - 29)
            if np.abs(level[top : top + 30, left : left + 30] - one).max() <= 1
        ]
        assert len(hits) == 1
        seen.update(hits)
    assert seen == {0, 1, 2}


def test_order_cache_and_threads_do_not_matter(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{n}.jpg") for n in range(7)]
    expected = fill(Photos(paths, tmp_path, 28), range(40), 28)
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(fill(Photos(paths, tmp_path, 28), order, 28), expected[order])
    assert np.array_equal(fill(Photos(paths, tmp_path, 28), [11], 28)[0], expected[11])
    # Hardly any cache: each picture is decoded again and again.
    monkeypatch.setattr("mnistattn.generators.backgrounds.photos.CACHE_BYTES", 20_000)
    photos = Photos(paths, tmp_path, 28)
    with ThreadPoolExecutor(4) as threads:
        parts = threads.map(lambda i: fill(photos, [i, 39 - i], 28), range(40))
    for i, part in enumerate(parts):
        assert np.array_equal(part, expected[[i, 39 - i]])
    assert photos._held == sum(
        level.nbytes for levels in photos._cache.values() for level in levels
    )
    assert photos._held <= 40_000


def test_the_card_tells_photos_apart(tmp_path):
    paths = [picture(tmp_path / f"{n}.png") for n in range(3)]
    card = Photos(paths, tmp_path, 28).card
    assert card["count"] == 3 and card == Photos(paths, tmp_path, 100).card
    assert card != Photos(paths[:2], tmp_path, 28).card
    picture(paths[1], seed=99)
    assert card["sha256"] != Photos(paths, tmp_path, 28).card["sha256"]


@pytest.mark.skipif(not SCENES.is_dir(), reason="needs the photos in ../shared/data/scenes")
def test_real_photos():
    shares = list_photos(SCENES)
    content = {
        split: {hashlib.sha256(path.read_bytes()).digest() for path in paths}
        for split, paths in shares.items()
    }
    assert sum(len(paths) for paths in shares.values()) > 100
    assert not content["train"] & content["test"] and not content["val"] & content["test"]
    image = fill(Photos(shares["test"][:3], SCENES, 100), range(9))
    assert 30 < image.mean() < 220 and (image.std((1, 2, 3)) > 5).all()


# ---------------------------------------------------------------- the others


def test_black_and_the_choice_by_name(pool, tmp_path):
    make, card = open_background(Spec("mref"), "textures", tmp_path)
    assert card == {"source": "black"} and (fill(make("train", pool), [0]) == 0).all()
    for variant, options, kind in (
        ("mdist", {}, Patches),
        ("mdist", {"distractors": "gaussian"}, Gaussian),
        ("mbg", {}, Textures),
        ("mbg-inv", {"distractors": "gaussian"}, Textures),
    ):
        make, card = open_background(Spec(variant, **options), "textures", tmp_path)
        assert isinstance(make("train", pool), kind)
        assert card["source"] == kind.__name__.lower()
    make, card = open_background(Spec("mbg-hard"), "textures", tmp_path)
    assert isinstance(make("train", pool), Clutter) and card == {"source": "textures"}
    for split in SPLITS:
        picture(tmp_path / split / "a.png")
    make, card = open_background(Spec("mbg", size=50, max_scale=1.5), str(tmp_path), tmp_path)
    assert card == {"source": "folder", "path": str(tmp_path)}
    assert fill(make("val", pool), [0], 50).std() > 5


@pytest.mark.parametrize("kind", ["patches", "gaussian", "textures"])
def test_an_image_depends_on_its_index_alone(pool, kind):
    make = {"patches": lambda: Patches(pool), "gaussian": Gaussian, "textures": Textures}[kind]
    indices = [5, 1, 1 << 32, 2, 0]
    batch = fill(make(), indices)
    assert len({one.tobytes() for one in batch}) == len(indices)
    for n, index in enumerate(indices):
        assert np.array_equal(fill(make(), [index])[0], batch[n])


def test_distractors_are_pinned(pool):
    for background, golden in (
        (Patches(pool), GOLDEN_PATCHES),
        (Gaussian(), GOLDEN_GAUSSIAN),
        (Clutter(Plain(90), pool), GOLDEN_CLUTTER),
    ):
        assert hashlib.sha256(fill(background, range(3)).tobytes()).hexdigest() == golden


def test_patches_cover_about_as_much_as_pans(pool):
    lit = fill(Patches(pool), range(200)).any(3).mean((1, 2))
    # 17 patches of (5 s)^2 pixels, E s^2 = 3.58, of which a third or so has ink.
    assert 0.02 < lit.mean() < 0.12 and lit.max() < 0.2


def test_patches_wrap():
    # White glyphs without an edge: each patch adds one plain colour, so on a crowded canvas a pixel
    # is a sum of palette colours modulo 256, and some sums of white (224 +- noise) pass 255.
    pool = DigitPool.from_labels(
        np.full((10, 28, 28), 255, np.uint8), np.arange(10, dtype=np.uint8)
    )
    image = fill(Patches(pool), range(40), 28).astype(int)
    # Clipped sums would gather at 255; wrapped ones do not, and leave values below any colour's.
    assert (image == 255).mean() < 0.05
    lit = image.any(3)
    # Unclipped by noise the darkest sum of any colours' green without a wrap is 16 - 4 sigma = 0;
    # the brightest channel of a colour is at least 0x92 - 40.
    assert (image.max(3)[lit] < 0x92 - 41).mean() > 0.02


class Plain:
    """A background of one grey."""

    card = {"source": "grey"}

    def __init__(self, level: int):
        self.level = level

    def fill(self, image, key, indices):
        image[:] = self.level


def test_clutter_lays_the_patches_over_what_is_there():
    # Without an edge a patch hides what is under it: the last one shows.
    pool = DigitPool.from_labels(
        np.full((10, 28, 28), 255, np.uint8), np.arange(10, dtype=np.uint8)
    )
    lit = fill(Patches(pool), range(40)).any(3)
    over = [fill(Clutter(Plain(level), pool), range(40)).astype(int) for level in (0, 60, 200)]
    for image, level in zip(over, (0, 60, 200), strict=True):
        assert (image[~lit] == level).mean() > 0.999  # few sums wrapped to black
        assert np.array_equal(image[lit], over[0][lit])
    shift = over[0][lit][:, None] - np.array(PALETTE)  # the same in all channels, or clipped
    whole = (over[0][lit][:, None] > 0) & (over[0][lit][:, None] < 255)
    same = np.where(whole, shift, shift.max(2, keepdims=True))
    assert (np.ptp(same, axis=2).min(1) == 0).mean() > 0.95
    assert Clutter(Plain(3), pool).card == Plain(3).card


def test_clutter_is_blended_as_digits_are(pool):
    # alpha v, ink colour * v / 255: by two grounds alpha is known, and with it the colour.
    dark, light = (fill(Clutter(Plain(level), pool), range(60)).astype(float) for level in (0, 255))
    alpha = 1 - (light - dark) / 255
    assert ((alpha >= 0) & (alpha <= 1)).all()
    assert np.abs(alpha - alpha[..., :1]).max() < 0.013  # one for all channels, to rounding
    untouched = (alpha == 0).all(3)
    assert 0.8 < untouched.mean() < 0.98 and (dark[untouched] == 0).all()
    # Where one patch lies on nothing, colour = dark / alpha^2 is one of the palette's, shifted.
    solid = alpha[..., 0] > 0.95
    color = dark[solid] / alpha[solid] ** 2
    off = (color[:, None] - np.array(PALETTE)).mean(2)
    near = np.abs(color[:, None] - np.array(PALETTE) - off[..., None]).max(2).min(1)
    assert (near < 25).mean() > 0.9


def test_gaussian_is_half_a_normal():
    image = fill(Gaussian(), range(10)).astype(float)
    sigma = 32
    n = image.size
    assert (image == 0).mean() == pytest.approx(0.5 + 0.5 / (sigma * np.sqrt(2 * np.pi)), abs=0.01)
    # max(0, N(0, s)): mean s / sqrt(2 pi), mean square s^2 / 2.
    assert image.mean() == pytest.approx(sigma / np.sqrt(2 * np.pi), abs=5 * 20 / np.sqrt(n))
    assert (image**2).mean() == pytest.approx(sigma**2 / 2, rel=0.01)
    neighbours = np.corrcoef(image[..., 0].ravel(), image[..., 1].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(n / 3)


def test_textures_fill():
    image = fill(Textures(), [3, 4], 60)
    assert np.array_equal(image[0], texture(0, "train", 3, 60, 60))
    assert (image.std((1, 2, 3)) > 3).all()
    untouched = (image == 123).all(3).mean()
    assert untouched < 0.05
