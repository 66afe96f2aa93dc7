"""How close the built-in background source `textures` comes to photos, in numbers.

    python -m benchmarks.textures_vs_photos --photos DIR [-n 200] [--json FILE]

Photos (JPEG or PNG, an even choice of n from DIR) are cut to a centred square and shrunk to
134 x 134; textures are drawn at that size. Both go through the same statistics:

- channel means, the spread of images' means, the spread of pixels within an image;
- the slope of the radially averaged luminance power spectrum (natural images: about -2);
- the kurtosis of the horizontal and vertical luminance differences (natural: far above 3);
- RGB correlations, within images;
- the standard deviation of luminance within 8 x 8 and 28 x 28 blocks (28: a digit), and the share
  of luminance differences above 16 and 48 grey levels: how cluttered the picture is;
- the histogram of HSV saturation, and the share of vivid pixels (max - min of RGB above 100);
- the sRGB opponent spreads: red-green R - G, blue-yellow B - (R + G) / 2.
"""

import argparse
import json
from pathlib import Path

import numpy as np

SIZE = 134


def load_photos(folder: str, n: int) -> np.ndarray:
    """An even choice of n photos, centred squares shrunk to SIZE, (n, SIZE, SIZE, 3) uint8."""
    from PIL import Image

    names = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".png"))
    names = [names[i * len(names) // n] for i in range(n)] if len(names) > n else names
    photos = []
    for name in names:
        with Image.open(name) as image:
            image.draft("RGB", (SIZE * 2, SIZE * 2))
            image = image.convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            photos.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)))
    return np.stack(photos)


def spectrum_slope(luma: np.ndarray) -> float:
    """One image's slope of log power over log frequency, 3 cycles per image to 1/3 per pixel."""
    n = luma.shape[0]
    window = np.hanning(n)[:, None] * np.hanning(n)[None, :]
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2
    f = np.fft.fftfreq(n) * n
    radius = np.hypot(f[:, None], f[None, :])
    edges = np.geomspace(3, n / 3, 12)
    band = np.digitize(radius.ravel(), edges)
    mean = [power.ravel()[band == b].mean() for b in range(1, len(edges))]
    center = np.sqrt(edges[1:] * edges[:-1])
    return float(np.polyfit(np.log(center), np.log(np.array(mean) + 1e-9), 1)[0])


def block_std(luma: np.ndarray, side: int) -> np.ndarray:
    """The standard deviation within each side x side block of a stack (n, h, w)."""
    n, h, w = luma.shape[0], luma.shape[1] // side, luma.shape[2] // side
    cut = luma[:, : h * side, : w * side].reshape(n, h, side, w, side)
    return cut.std(axis=(2, 4)).ravel()


def statistics(images: np.ndarray) -> dict[str, float]:
    """Every statistic of the module docstring, by name, for a stack (n, h, w, 3) uint8."""
    x = images.astype(np.float64)
    luma = x @ np.array([0.299, 0.587, 0.114])
    out = {}
    for c, name in enumerate("RGB"):
        out[f"mean {name}"] = x[..., c].mean()
        out[f"std of image means {name}"] = x[..., c].mean(axis=(1, 2)).std()
        out[f"mean within-image std {name}"] = x[..., c].std(axis=(1, 2)).mean()
    within = luma.std(axis=(1, 2))
    for q in (10, 50, 90):
        out[f"luma within-image std p{q}"] = np.percentile(within, q)
    for q in (1, 10, 50, 90, 99):
        out[f"luma p{q}"] = np.percentile(luma, q)
    slopes = [spectrum_slope(i) for i in luma]
    for q in (10, 50, 90):
        out[f"spectrum slope p{q}"] = np.percentile(slopes, q)
    kurtosis, share16, share48 = [], [], []
    for i in luma:
        d = np.concatenate([np.diff(i, axis=0).ravel(), np.diff(i, axis=1).ravel()])
        kurtosis.append((d**4).mean() / ((d**2).mean() ** 2 + 1e-9))
        share16.append((np.abs(d) > 16).mean())
        share48.append((np.abs(d) > 48).mean())
    for q in (10, 50, 90):
        out[f"gradient kurtosis p{q}"] = np.percentile(kurtosis, q)
    for q in (10, 50, 90):
        out[f"share of |gradient| > 16 p{q}"] = np.percentile(share16, q)
    out["share of |gradient| > 48 mean"] = np.mean(share48)
    flat = (x - x.mean(axis=(1, 2), keepdims=True)).reshape(-1, 3)
    correlation = np.corrcoef(flat.T)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        out[f"correlation {'RGB'[a]}{'RGB'[b]}"] = correlation[a, b]
    for side in (8, 28):
        blocks = block_std(luma, side)
        for q in (10, 25, 50, 75, 90):
            out[f"block {side} std p{q}"] = np.percentile(blocks, q)
    high, low = x.max(axis=3), x.min(axis=3)
    saturation = (high - low) / np.maximum(high, 1)
    histogram = np.histogram(saturation, bins=5, range=(0, 1))[0] / saturation.size
    for i, share in enumerate(histogram):
        out[f"saturation {i / 5:.1f}-{(i + 1) / 5:.1f}"] = share
    out["share of chroma > 100"] = (high - low > 100).mean()
    chroma = (high - low).mean(axis=(1, 2))
    for q in (10, 50, 90):
        out[f"image chroma p{q}"] = np.percentile(chroma, q)
    red_green = x[..., 0] - x[..., 1]
    blue_yellow = x[..., 2] - (x[..., 0] + x[..., 1]) / 2
    for name, axis in (("red-green", red_green), ("blue-yellow", blue_yellow)):
        out[f"{name} mean"] = axis.mean()
        out[f"{name} std of image means"] = axis.mean(axis=(1, 2)).std()
        out[f"{name} mean within-image std"] = axis.std(axis=(1, 2)).mean()
    return {name: float(value) for name, value in out.items()}


def main() -> None:
    """Print the table, and write it as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", required=True, metavar="DIR")
    parser.add_argument("-n", type=int, default=200, help="photos and textures (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    from mnistattn.generators.backgrounds.textures import texture

    photos = statistics(load_photos(args.photos, args.n))
    drawn = np.stack([texture(args.seed, "train", i, SIZE, SIZE) for i in range(args.n)])
    textures = statistics(drawn)
    print(f"{'':34}{'photos':>10}{'textures':>10}")
    for name, value in photos.items():
        print(f"{name:34}{value:10.3f}{textures[name]:10.3f}")
    if args.json:
        result = {"n": args.n, "seed": args.seed, "photos": photos, "textures": textures}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
