"""The original algorithm, image by image, in numpy and Pillow: what mnistattn is timed against.

Written as one would write it for a single use, after the description of PAN's code (Seo et al.,
BMVC 2018): nothing is slowed down on purpose and nothing is tuned. Used by generate.py.

    draw_scene          five to nine distinct digits, placed by rejection with the scale redrawn at
                        each try, resized by Pillow, alpha-pasted; image, instances, query, answer
    patches_background  MDIST's 17 coloured crops of digits
    photo_background    MBG's photo: opened, cropped at random, resized, every time anew
"""

from pathlib import Path

import numpy as np
from PIL import Image

PALETTE = np.array(
    [(0x92, 0x10, 0x10), (0x10, 0xA6, 0x51), (0x10, 0x62, 0xC0), (0xFF, 0xF1, 0x4E),
     (0xE0, 0xE0, 0xE0)]
)  # fmt: skip
COVERAGES = (1.0, 0.75, 0.6)  # of the photo's shorter side, as mnistattn's three levels


def draw_scene(rng: np.random.Generator, classes: list[np.ndarray], background: np.ndarray) -> dict:
    """Draw digits, of glyphs (n, 28, 28) uint8 by class, over background (S, S, 3) uint8.

    Returns image, instances, lists of the objects' properties, query, answer, target.
    """
    size = len(background)
    canvas = Image.fromarray(background)
    instances = np.zeros((size, size), np.uint8)
    digits = rng.permutation(10)[: rng.integers(5, 10)]
    colors, scales, boxes = [], [], []
    for k, digit in enumerate(digits):
        glyph = classes[digit][rng.integers(len(classes[digit]))]
        while True:
            scale = rng.uniform(0.5, 3)
            z = int(28 * scale)
            left, top = (round(rng.uniform(0, size - z)) for _ in range(2))
            if not instances[top : top + z, left : left + z].any():
                break
        v = np.asarray(Image.fromarray(glyph).resize((z, z), Image.Resampling.BILINEAR))
        instances[top : top + z, left : left + z][v > 0] = k + 1
        color = rng.integers(len(PALETTE))
        level = np.clip(PALETTE[color] + rng.normal(0, 10), 0, 255).astype(np.uint16)
        ink = (level * v[:, :, None] // 255).astype(np.uint8)
        canvas.paste(Image.fromarray(ink), (left, top), Image.fromarray(v))
        colors.append(int(color))
        scales.append(scale)
        boxes.append((top, left, z, z))
    target = int(rng.integers(len(digits)))
    return {
        "image": np.asarray(canvas), "instances": instances, "digit": digits, "color": colors,
        "scale": scales, "box": boxes, "query": int(digits[target]), "answer": colors[target],
        "target": target,
    }  # fmt: skip


def black_background(size: int) -> np.ndarray:
    """(size, size, 3) uint8 of zeros."""
    return np.zeros((size, size, 3), np.uint8)


def patches_background(rng: np.random.Generator, glyphs: np.ndarray, size: int) -> np.ndarray:
    """Seventeen 5 x 5 crops of glyphs (n, 28, 28), coloured, scaled and added (uint8, wrapping)."""
    canvas = black_background(size)
    for _ in range(17):
        glyph = glyphs[rng.integers(len(glyphs))]
        top, left = rng.integers(0, 24, 2)
        z = int(5 * rng.uniform(0.5, 3))
        crop = Image.fromarray(glyph[top : top + 5, left : left + 5].copy())
        v = np.asarray(crop.resize((z, z), Image.Resampling.BILINEAR))
        color = PALETTE[rng.integers(len(PALETTE))]
        level = np.clip(color + rng.normal(0, 10), 0, 255).astype(np.uint16)
        x, y = (round(rng.uniform(0, size - z)) for _ in range(2))
        canvas[y : y + z, x : x + z] += (level * v[:, :, None] // 255).astype(np.uint8)
    return canvas


def photo_background(rng: np.random.Generator, paths: list[Path], size: int) -> np.ndarray:
    """A random square of a random photo, resized to (size, size, 3)."""
    with Image.open(paths[rng.integers(len(paths))]) as file:
        photo = file.convert("RGB")
    side = int(min(photo.size) * COVERAGES[rng.integers(len(COVERAGES))])
    left = int(rng.integers(photo.width - side + 1))
    top = int(rng.integers(photo.height - side + 1))
    box = (left, top, left + side, top + side)
    return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box=box))
