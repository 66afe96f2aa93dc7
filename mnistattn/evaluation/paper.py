"""The numbers that the AttentionRNN paper prints (Khandelwal & Sigal, ICCV 2019), to stand beside
ours. Only those that could be confirmed: cells that the sources at hand cut off are left out.
"""

# Accuracy in percent: Table 1 (MREF, MDIST, MBG), Table 3 (MBG^up), section 4.1 (MBG^inv).
ACCURACY = {
    "mref": {"san": 83.42, "noctx": 95.69},
    "mdist": {"san": 80.06, "noctx": 89.92},
    "mbg": {"san": 58.07, "noctx": 69.33, "ctx": 79.00, "arnn": 85.84},
    "mbg-up": {"none": 91.43, "arnn": 91.09},
    "mbg-inv": {"arnn": 72.77, "ctx": 66.37, "noctx": 40.15},
}

# Accuracy in percent in the five scale bins: Tables 2 and 3.
SCALE_ACCURACY: dict[str, dict[str, tuple[float | None, ...]]] = {
    "mbg": {
        "san": (53.05, 74.85, 72.18, 59.52, 54.91),
        "noctx": (68.20, 76.37, 73.30, 61.60, 57.28),
        "ctx": (77.39, 87.13, 84.96, 75.59, 63.72),
        "arnn": (84.45, 91.40, None, None, None),
    },
    "mbg-up": {
        "none": (85.63, 92.57, 94.96, 94.77, 93.59),
        "arnn": (84.89, 92.25, 94.24, 94.70, 94.52),
    },
}

# Mask correctness: Table 2 and section 4.1.
CORRECTNESS = {
    "mbg": {"san": 0.15, "noctx": 0.28, "ctx": 0.31, "arnn": 0.42},
    "mbg-inv": {"arnn": 0.39, "ctx": 0.24, "noctx": 0.20},
}


def printed(variant: str, model: str) -> dict:
    """What the paper prints: accuracy (%), scales (five %, None where unconfirmed), correctness."""
    return {
        "accuracy": ACCURACY.get(variant, {}).get(model),
        "scales": SCALE_ACCURACY.get(variant, {}).get(model),
        "correctness": CORRECTNESS.get(variant, {}).get(model),
    }
