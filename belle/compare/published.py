"""BELLE's published scores (arXiv 2303.14742, figure 1), read off the picture to about 0.001.

Of BLOOMZ-7B1-mt, fine-tuned on so many records; the judge was ChatGPT, the questions were BELLE's.
"""

from belle.compare.results import OVERALL

SCALES = ("0.2M", "0.6M", "1M", "2M")
SCORES = {
    "math": (0.351, 0.368, 0.468, 0.465),
    "code": (0.615, 0.676, 0.691, 0.662),
    "cot": (0.354, 0.465, 0.487, 0.462),
    "classification": (0.740, 0.708, 0.753, 0.756),
    "extract": (0.691, 0.752, 0.757, 0.777),
    "rewrite": (0.834, 0.878, 0.861, 0.872),
    "open qa": (0.683, 0.727, 0.722, 0.740),
    "closed qa": (0.694, 0.741, 0.754, 0.769),
    "generation": (0.796, 0.862, 0.897, 0.890),
    "brainstorming": (0.876, 0.854, 0.855, 0.867),
    "translation": (0.797, 0.823, 0.795, 0.813),
    "summarization": (0.678, 0.728, 0.741, 0.764),
    OVERALL: (0.676, 0.715, 0.732, 0.737),
}


def scores() -> dict[str, dict[str, float]]:
    """By scale and kind."""
    return {
        f"BELLE {scale}": {kind: row[column] for kind, row in SCORES.items()}
        for column, scale in enumerate(SCALES)
    }
