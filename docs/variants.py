"""Draw docs/variants.png, the picture of the variants: strokes over textures, so no photo in it.

python docs/variants.py
"""

from pathlib import Path

import numpy as np
from PIL import Image

from mnistattn.dataset.paint import Sources
from mnistattn.dataset.read import answer_masks
from mnistattn.dataset.sheet import contact_sheet
from mnistattn.generators.variants import COLORS, DIGITS, VARIANTS, Spec

SHOWN = 224  # pixels of an image in the picture's cells, before contact_sheet enlarges them
SCENE = 6


def main() -> None:
    images, masks, captions = [], [], []
    for name, row in VARIANTS.items():
        spec = Spec(name)
        sources = Sources(spec, 0, "strokes", "separate", "textures", Path("data"))
        arrays, _ = sources.painter("test").paint(np.arange(SCENE, SCENE + 1))
        queries, answers = (COLORS, DIGITS) if row.asks == "color" else (DIGITS, COLORS)
        right = np.flatnonzero(arrays["answers"][0]) if row.repeats else arrays["answer"]
        scale = SHOWN // spec.size
        image, mask = arrays["image"][0], answer_masks(arrays)[0]
        images.append(_fit(np.kron(image, np.ones((scale, scale, 1), np.uint8))))
        masks.append(_fit(np.kron(mask, np.ones((scale, scale), bool)).astype(np.uint8)) > 0)
        answer = " or ".join(answers[a] for a in right)
        captions.append(f"{name}:  {queries[arrays['query'][0]]} -> {answer}")
    sheet = contact_sheet(np.stack(images), np.stack(masks), captions, columns=2)
    sheet.quantize(256, dither=Image.Dither.NONE).save(
        Path(__file__).with_name("variants.png"), optimize=True
    )


def _fit(image: np.ndarray) -> np.ndarray:
    """The image on a canvas of SHOWN x SHOWN, resized with the nearest pixel."""
    return np.asarray(Image.fromarray(image).resize((SHOWN, SHOWN), Image.Resampling.NEAREST))


if __name__ == "__main__":
    main()
