"""Scenes: what the rules of each variant promise, and an independent drawing of the same scenes."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from PIL import Image

from mnistattn.errors import InputError, MnistattnError
from mnistattn.generators.digits.pool import DigitPool
from mnistattn.generators.digits.strokes import stroke_glyphs
from mnistattn.generators.random import normal_table, stream_key
from mnistattn.generators.scene import SceneDrawer
from mnistattn.generators.variants import PALETTE, PLACEMENTS, VARIANTS, Spec

KEY = stream_key(0, "train")
ALL = list(product(VARIANTS, PLACEMENTS))
SCENES = 60

# SHA-256 of image and instances of the first 8 scenes over black, with 500 strokes, placement
# `paper`. A change here changes every data set: it needs a new version of the format.
GOLDEN = {
    "mref": "4d748086cb3e783e8e5538f49056b54d783f1e9133be3fd02dfdef528bb7071c",
    "mdist": "4d748086cb3e783e8e5538f49056b54d783f1e9133be3fd02dfdef528bb7071c",
    "mbg": "4d748086cb3e783e8e5538f49056b54d783f1e9133be3fd02dfdef528bb7071c",
    "mbg-inv": "4d748086cb3e783e8e5538f49056b54d783f1e9133be3fd02dfdef528bb7071c",
    "mbg-up": "2cc5d80bbd8b1825996679a36f0cf37dfc7186d2cf18209fc92ca5464aa4ff4c",
    "mbg-multi": "4a15610903e65603b4288f870c37c2475dc142f08cc1bd95cc21eeda44531684",
    "mbg-hard": "912d6247c008f4cf7562a2ede826ef4730cb940bf0aece0d293f5de9af159ce5",
}


@pytest.fixture(scope="module")
def pool() -> DigitPool:
    return DigitPool.from_labels(*stroke_glyphs(0, "train", 500))


def draw(spec: Spec, pool: DigitPool, indices, key=KEY) -> dict[str, np.ndarray]:
    indices = np.asarray(indices, np.int64)
    drawer = SceneDrawer(spec, pool)
    out = drawer.empty(len(indices))
    out["effort"] = drawer.draw(out, key, indices)
    return out


def sha(out: dict[str, np.ndarray], names=("image", "instances")) -> str:
    return hashlib.sha256(b"".join(out[name].tobytes() for name in names)).hexdigest()


@pytest.fixture(scope="module", params=ALL, ids="-".join)
def drawn(request, pool):
    variant, placement = request.param
    spec = Spec(variant, placement=placement)
    return spec, draw(spec, pool, range(SCENES))


# ---------------------------------------------------------------- what the rules promise


def test_shapes_and_padding(drawn):
    spec, out = drawn
    assert out["image"].shape == (SCENES, spec.size, spec.size, 3)
    there = out["digit"] >= 0
    count = there.sum(1)
    least, most = spec.row.objects
    assert set(count) == set(range(least, most + 1))
    assert np.array_equal(there, np.arange(most) < count[:, None])  # no holes
    for name in ("color", "scale"):
        assert ((out[name] >= 0) == there).all() and (out[name][~there] == -1).all()
    assert (out["box"][~there] == -1).all() and (out["box"][there] >= 0).all()
    assert (out["digit"] <= 9).all() and (out["color"] <= 4).all()
    assert (out["effort"][:, 0] >= count).all()


def test_digits_colours_query_and_answer(drawn):
    spec, out = drawn
    copies = set()
    for k in range(SCENES):
        n = (out["digit"][k] >= 0).sum()
        digit, color = out["digit"][k, :n].tolist(), out["color"][k, :n].tolist()
        target, query, answer = (int(out[name][k]) for name in ("target", "query", "answer"))
        assert target < n
        right = {c for d, c in zip(digit, color, strict=True) if d == digit[target]}
        assert set(np.flatnonzero(out["answers"][k])) == right
        if spec.row.asks == "color":
            assert (query, answer) == (color[target], digit[target])
            assert color.count(query) == 1 and len(set(digit)) == n
            continue
        assert (query, answer) == (digit[target], color[target])
        if spec.row.repeats:
            asked = [c for d, c in zip(digit, color, strict=True) if d == query]
            copies.add(len(asked))
            assert 2 <= len(asked) <= 4 and len(set(asked)) == len(asked)
            others = [d for d in digit if d != query]
            assert len(set(others)) == len(others) == n - len(asked)
        else:
            assert len(set(digit)) == n and right == {answer}
    assert copies == ({2, 3, 4} if spec.row.repeats else set())
    if spec.placement == "balanced":
        assert (out["target"] == 0).all()
    else:
        assert len(set(out["target"])) > 4
    assert len(set(out["answer"])) == (10 if spec.row.asks == "color" else 5)


def test_boxes_and_scales(drawn):
    spec, out = drawn
    there = out["digit"] >= 0
    scale, box = out["scale"][there], out["box"][there].astype(int)
    assert scale.min() >= 0.5 and scale.max() <= 3 and scale.max() > 2
    z = (28 * scale.astype(np.float64)).astype(int)
    assert np.array_equal(box[:, 2], z) and np.array_equal(box[:, 3], z)
    assert (box[:, 0] + z <= spec.size).all() and (box[:, 1] + z <= spec.size).all()
    assert box[:, :2].min() <= 2 and (box[:, :2] + z[:, None]).max() >= spec.size - 2


def test_no_stroke_lies_in_the_box_of_a_later_digit(drawn):
    _, out = drawn
    for k in range(SCENES):
        n = (out["digit"][k] >= 0).sum()
        instances = out["instances"][k]
        assert set(np.unique(instances)) == set(range(n + 1))
        own = np.zeros_like(instances)
        for j in range(n):
            top, left, h, w = out["box"][k, j]
            inside = instances[top : top + h, left : left + w]
            assert not ((inside > 0) & (inside <= j)).any()
            assert (inside == j + 1).sum() == (instances == j + 1).sum()
            own[top : top + h, left : left + w] = 1
        assert (instances[own == 0] == 0).all()


def test_nothing_is_drawn_off_the_instances(drawn):
    _, out = drawn
    assert (out["image"][out["instances"] == 0] == 0).all()
    # v > 0 and black are possible together, but only in faint edges.
    lit = out["image"].any(3)[out["instances"] > 0]
    assert lit.mean() > 0.8


# ---------------------------------------------------------------- an independent drawing


class Stream:
    """Philox 4x32-10 in Python's own integers, by its publication."""

    def __init__(self, purpose: int, restart: int, index: int):
        self.key = [int(k) for k in KEY]
        self.name = [purpose | restart << 8, index & 0xFFFFFFFF, index >> 32]
        self.block, self.left = 0, []

    def next(self) -> int:
        if not self.left:
            c, (k0, k1) = [self.block, *self.name], self.key
            for _ in range(10):
                a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
                c = [b >> 32 ^ c[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k1, a & 0xFFFFFFFF]
                k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
            self.block += 1
            self.left = c
        return self.left.pop(0)

    def below(self, n: int) -> int:
        return self.next() * n >> 32

    def shuffle(self, items: list, first: int = 0) -> list:
        for j in range(first, len(items)):
            other = j + self.below(len(items) - j)
            items[j], items[other] = items[other], items[j]
        return items


def redraw(spec: Spec, pool: DigitPool, index: int, background: np.ndarray) -> dict:
    """One scene drawn with Python integers, floats and Pillow."""
    multi, inverse, balanced = (
        spec.row.repeats, spec.row.asks == "color", spec.placement == "balanced"
    )  # fmt: skip
    plan = Stream(0, 0, index)
    least, most = spec.row.objects
    n = least + plan.below(most - least + 1)
    classes = plan.shuffle(list(range(10)))
    if multi:
        copies = 2 + plan.below(3)
        repeated = classes[0]
        digit = ([repeated] * copies + classes[1:])[:n]
        digit = plan.shuffle(digit, 1 if balanced else 0)
    else:
        digit = classes[:n]
    glyphs = []
    for d in digit:
        of = pool.order[pool.start[d] : pool.start[d + 1]]
        glyphs.append(pool.images[of[plan.below(len(of))]])
    forced = 0.5 + 2.5 * plan.next() / 2**32 if balanced else None

    stream = Stream(7, 0, index)
    instances = np.zeros((spec.size, spec.size), np.uint8)
    scale, box, patches = [], [], []
    for j in range(n):
        while True:
            s = forced if balanced and j == 0 else 0.5 + 2.5 * stream.next() / 2**32
            z = int(28 * s)
            left = int((spec.size - z) * stream.next() / 2**32 + 0.5)
            top = int((spec.size - z) * stream.next() / 2**32 + 0.5)
            window = instances[top : top + z, left : left + z]
            if not window.any():
                break
        patch = Image.fromarray(glyphs[j]).resize((z, z), Image.Resampling.BILINEAR)
        patches.append(np.array(patch))
        window[patches[j] > 0] = j + 1
        scale.append(s)
        box.append((top, left, z, z))

    stream = Stream(1, 0, index)
    while True:
        color = [stream.below(5) for _ in range(n)]
        if multi:
            deck, dealt = list(range(5)), 0
            for j in range(n):
                if digit[j] == repeated:
                    other = dealt + stream.below(5 - dealt)
                    deck[dealt], deck[other] = deck[other], deck[dealt]
                    color[j] = deck[dealt]
                    dealt += 1
        once = [color.count(c) == 1 for c in color]
        if not inverse or (once[0] if balanced else any(once)):
            break
    shift = [int(normal_table(10)[stream.next() >> 16]) for _ in range(n)]

    if inverse:
        allowed = [j for j in range(n) if once[j]]
    else:
        allowed = [j for j in range(n) if not multi or digit[j] == repeated]
    target = 0 if balanced else allowed[Stream(2, 0, index).below(len(allowed))]

    image = background.astype(float)
    for j in range(n):
        v = patches[j][:, :, None].astype(int)
        top, left, z, _ = box[j]
        ink = np.clip(np.array(PALETTE[color[j]]) + shift[j], 0, 255) * v // 255
        under = image[top : top + z, left : left + z]
        under[:] = np.round(under + (ink - under) * (v / 255))
    return {
        "digit": digit, "color": color, "box": box, "scale": scale, "target": target,
        "instances": instances, "image": image,
    }  # fmt: skip


@pytest.mark.parametrize(("variant", "placement"), ALL)
def test_scenes_are_those_of_an_independent_drawing(pool, variant, placement):
    spec = Spec(variant, placement=placement)
    drawer = SceneDrawer(spec, pool)
    indices = np.array([0, 1, 2, 41, (1 << 33) + 5])
    out = drawer.empty(len(indices))
    out["image"][1:] = np.random.default_rng(1).integers(0, 256, out["image"][1:].shape)
    backgrounds = out["image"].copy()  # black under the first scene, noise under the others
    effort = drawer.draw(out, KEY, indices)
    assert (effort[:, 1] == 0).all()
    for k, index in enumerate(indices.tolist()):
        expected = redraw(spec, pool, index, backgrounds[k])
        n = len(expected["digit"])
        for name in ("digit", "color", "box"):
            assert np.array_equal(out[name][k, :n], expected[name]), name
        assert (out["digit"][k, n:] == -1).all()
        assert out["scale"][k, :n].tolist() == np.float32(expected["scale"]).tolist()
        assert out["target"][k] == expected["target"]
        assert np.array_equal(out["instances"][k], expected["instances"])
        # On black within a level; on noise two where our glyph and Pillow's are a level apart.
        off = np.abs(out["image"][k] - expected["image"])
        assert off.max() <= (1 if k == 0 else 2)
        assert (off > 1).mean() < 2e-4


# ---------------------------------------------------------------- the distribution


def share_errors(hits: np.ndarray, totals: np.ndarray, expected: float) -> float:
    """How many standard errors a share over scenes (clusters) is off."""
    share = hits.sum() / totals.sum()
    residual = hits - share * totals
    return abs(share - expected) / (np.sqrt((residual**2).sum()) / totals.sum())


def scale_bin(scale: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(scale * 2) - 2, 0, 4).astype(int)  # (0.5, 1], (1, 1.5], ...


@pytest.mark.parametrize(
    ("variant", "scenes", "shares"),
    [
        ("mref", 3000, (0.709, 0.170, 0.056, 0.035, 0.030)),
        ("mbg-up", 600, (0.297, 0.250, 0.200, 0.143, 0.110)),
    ],
)
def test_scales_are_shared_out_as_in_the_paper(pool, variant, scenes, shares):
    out = draw(Spec(variant), pool, range(scenes))
    there = out["digit"] >= 0
    bins = scale_bin(out["scale"])
    for b, expected in enumerate(shares):
        # The printed shares are of MNIST's digits and rounded: 0.002 for that.
        hits = ((bins == b) & there).sum(1)
        off = share_errors(hits, there.sum(1), expected)
        slack = 0.004 / (np.sqrt(expected * (1 - expected) / there.sum()))
        assert off < 4 + slack, (b, hits.sum() / there.sum())
    counts = np.bincount(there.sum(1), minlength=10)[5:]
    assert np.abs(counts - scenes / 5).max() < 4 * np.sqrt(scenes * 0.16)
    colors = np.bincount(out["color"][there], minlength=5)
    assert np.abs(colors - there.sum() / 5).max() < 4 * np.sqrt(there.sum() * 0.16)
    asked = np.bincount(out["query"], minlength=10)
    assert np.abs(asked - scenes / 10).max() < 4 * np.sqrt(scenes * 0.09)


@pytest.mark.parametrize("variant", ["mref", "mbg-inv", "mbg-multi"])
def test_balanced_targets_have_every_scale_alike(pool, variant):
    scenes = 1000
    out = draw(Spec(variant, placement="balanced"), pool, range(scenes))
    target = out["scale"][np.arange(scenes), out["target"]]
    counts = np.bincount(scale_bin(target), minlength=5)
    assert np.abs(counts - scenes / 5).max() < 4 * np.sqrt(scenes * 0.16)
    assert abs(target.mean() - 1.75) < 4 * 2.5 / np.sqrt(12 * scenes)


def test_variants_differ_in_background_alone(pool):
    first = draw(Spec("mref"), pool, range(6))
    for variant in ("mdist", "mbg"):
        other = draw(Spec(variant), pool, range(6))
        assert all(np.array_equal(first[name], other[name]) for name in first)


# ---------------------------------------------------------------- reproducible


def test_a_scene_depends_on_its_index_alone(pool):
    spec = Spec("mbg-multi")
    batch = draw(spec, pool, range(12))
    order = np.random.default_rng(0).permutation(12)
    mixed = draw(spec, pool, order)
    prefix = draw(spec, pool, range(4))
    alone = draw(spec, pool, [7])
    for name in batch:
        assert np.array_equal(mixed[name], batch[name][order]), name
        assert np.array_equal(prefix[name], batch[name][:4]), name
        assert np.array_equal(alone[name][0], batch[name][7]), name
    assert len({image.tobytes() for image in batch["image"]}) == 12


def test_seed_split_and_high_index_bits_count(pool):
    spec = Spec("mref")
    pictures = [
        draw(spec, pool, [index], stream_key(seed, split))["image"].tobytes()
        for seed, split, index in (
            (0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1), (0, "train", 1 << 32)
        )
    ]  # fmt: skip
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_are_pinned(pool, variant):
    out = draw(Spec(variant), pool, range(8))
    assert sha(out) == GOLDEN[variant]


def test_same_bytes_without_the_compiler(capsys):
    # Every step that has rules of its own, and the backgrounds drawn here, on a small canvas.
    code = (
        "import hashlib, numpy as np\n"
        "from mnistattn.generators.backgrounds.distractors import Gaussian, Patches\n"
        "from mnistattn.generators.digits.pool import DigitPool\n"
        "from mnistattn.generators.random import stream_key\n"
        "from mnistattn.generators.scene import SceneDrawer\n"
        "from mnistattn.generators.variants import Spec\n"
        "small = dict(size=56, max_scale=0.75, max_objects=5)\n"
        "glyphs = np.zeros((20, 28, 28), np.uint8)\n"
        "glyphs[:, 4:24, 8:20] = np.random.default_rng(0).integers(0, 256, (20, 20, 12))\n"
        "pool = DigitPool.from_labels(glyphs, np.arange(20, dtype=np.uint8) % 10)\n"
        "key, indices = stream_key(3, 'val'), np.array([2**32 + 1])\n"
        "for background, spec in (\n"
        "    (Patches(pool), Spec('mref', **small)),\n"
        "    (Gaussian(), Spec('mbg-inv', **small)),\n"
        "    (Patches(pool), Spec('mbg-multi', placement='balanced', **small)),\n"
        "):\n"
        "    drawer = SceneDrawer(spec, pool)\n"
        "    out = drawer.empty(1)\n"
        "    background.fill(out['image'], key, indices)\n"
        "    drawer.draw(out, key, indices)\n"
        "    print(hashlib.sha256(b''.join(a.tobytes() for a in out.values())).hexdigest())\n"
    )

    plain = subprocess.run(
        # Warnings are errors: an int64 overflow in numpy would be one.
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    exec(code, {})  # the same, compiled
    assert plain.stdout == capsys.readouterr().out and len(plain.stdout.split()) == 3


# ---------------------------------------------------------------- requests that cannot be met


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "mbg_inv"}, "Did you mean 'mbg-inv'"),
        ({"variant": "nothing like it"}, "unknown variant"),
        ({"variant": "mdist", "distractors": "gausian"}, "Did you mean 'gaussian'"),
        ({"variant": "mref", "placement": "balance"}, "Did you mean 'balanced'"),
        ({"variant": "mref", "size": 27}, "size 27"),
        ({"variant": "mref", "size": 1025}, "size 1025"),
        ({"variant": "mref", "size": -100}, "size -100"),
        ({"variant": "mref", "size": 83}, "84 pixels"),
        ({"variant": "mref", "min_scale": 2, "max_scale": 1}, "scales 2 to 1"),
        ({"variant": "mref", "min_scale": 0}, "scales 0"),
        ({"variant": "mref", "min_scale": float("nan")}, "scales nan"),
        ({"variant": "mref", "max_scale": 9}, "scales"),
        ({"variant": "mref", "max_scale": 3.61}, "101 pixels"),
        ({"variant": "mref", "min_objects": 0}, "0 to 9 objects"),
        ({"variant": "mref", "max_objects": 11}, "5 to 11 objects"),
        ({"variant": "mref", "min_objects": 8, "max_objects": 7}, "8 to 7 objects"),
        ({"variant": "mbg-multi", "min_objects": 4}, "4 to 9 objects"),
    ],
)
def test_impossible_specs_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Spec(**options)


def test_a_spec_survives_json():
    for variant, row in VARIANTS.items():
        own = Spec(variant)
        assert own.size == row.size
        assert (own.min_objects, own.max_objects) == row.objects
        spec = Spec(variant, placement="balanced", min_scale=0.7, max_scale=2.3)
        assert Spec(**json.loads(json.dumps(spec.as_dict()))) == spec
    assert Spec("mbg-up").size == 224 and Spec("mbg").size == 100
    assert Spec("mbg-up", size=100).size == 100


@pytest.mark.parametrize("scale", [0.125, 0.3, 1.0])
def test_the_smallest_scenes(pool, scale):
    spec = Spec("mref", size=28, min_scale=scale, max_scale=scale, min_objects=1, max_objects=1)
    out = draw(spec, pool, range(30))
    z = int(28 * (round(scale * 1024) / 1024))
    assert (out["box"][:, 0, 2:] == z).all()
    assert out["scale"][:, 0] == pytest.approx(scale, abs=1 / 1024)
    assert (out["instances"] == 1).any((1, 2)).all()


def test_up_to_ten_digits(pool):
    out = draw(Spec("mref", min_objects=10, max_objects=10, max_scale=0.8), pool, range(4))
    assert (np.sort(out["digit"], 1) == np.arange(10)).all()


def test_a_scene_without_room_fails_rather_than_hangs():
    # Glyphs that are full of ink, so that no box passes and each fails at its first pixel.
    glyphs, labels = np.full((10, 28, 28), 255, np.uint8), np.arange(10, dtype=np.uint8)
    pool = DigitPool.from_labels(glyphs, labels)
    crowded = Spec("mref", size=28, min_scale=1, max_scale=1, min_objects=2, max_objects=2)
    with pytest.raises(MnistattnError, match="scene 4 could not be placed") as caught:
        draw(crowded, pool, [4])
    assert not isinstance(caught.value, InputError)
