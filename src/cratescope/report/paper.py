"""The scores that the paper prints, to be shown beside ours: context, not a target, and never mixed with them."""

from __future__ import annotations

from typing import Any

PAPER_SOURCE = "Bai & Ma, CPAL 2025, arXiv 2410.16443"
PAPER_TOKENS = 157e9
# x100: mean and population variance over layers, and the layers where printed. As printed: for S and B the means leave
# out the last layer.
PAPER_SCORES: dict[str, dict[str, dict[str, Any]]] = {
    "top-and-random": {
        "crate-1l": {"mean": 3.9, "variance": 0.0, "layers": (3.9,)},
        "crate-2l": {"mean": 8.05, "variance": 0.06, "layers": (7.8, 8.3)},
        "crate-3l": {"mean": 9.1, "variance": 0.26, "layers": (9.6, 9.3, 8.4)},
        "crate-s": {"mean": 7.96, "variance": 2.29, "layers": (10.5, 7.4, 5.8, 8.0, 8.1, 5.7)},
        "crate-b": {
            "mean": 6.8,
            "variance": 7.09,
            "layers": (13.6, 8.2, 6.7, 5.4, 5.0, 7.2, 5.1, 5.1, 3.6, 5.5, 9.4, 5.3),
        },
        "gpt2-1l": {"mean": 8.8, "variance": 0.0, "layers": (8.8,)},
        "gpt2-2l": {"mean": 4.2, "variance": 0.01, "layers": (4.3, 4.1)},
        "gpt2-3l": {"mean": 3.57, "variance": 7.51, "layers": (7.3, 0.8, 2.6)},
        "gpt2-s": {"mean": 5.4, "variance": 20.85, "layers": (13.7, 5.2, 1.9, 0.6, 5.6, 6.9)},
        "gpt2-b": {
            "mean": 6.34,
            "variance": 11.35,
            "layers": (15.3, 8.0, 6.4, 4.2, 3.2, 4.0, 4.7, 3.9, 3.9, 7.2, 8.9, 8.0),
        },
    },
    "random-only": {
        "crate-1l": {"mean": 4.8, "variance": 0.0, "layers": (4.8,)},
        "crate-2l": {"mean": 6.95, "variance": 1.1},
        "crate-3l": {"mean": 8.43, "variance": 1.2},
        "crate-s": {"mean": 6.36, "variance": 1.87},
        "crate-b": {"mean": 5.12, "variance": 2.83},
        "gpt2-1l": {"mean": 8.9, "variance": 0.0, "layers": (8.9,)},
        "gpt2-2l": {"mean": 1.95, "variance": 0.12},
        "gpt2-3l": {"mean": 1.37, "variance": 1.93},
        "gpt2-s": {"mean": 3.14, "variance": 18.39},
        "gpt2-b": {"mean": 2.67, "variance": 7.48},
    },
    "anthropic": {
        "crate-1l": {"mean": 10.1, "variance": 0.0, "layers": (10.1,)},
        "crate-2l": {"mean": 11.35, "variance": 0.0, "layers": (11.3, 11.4)},
        "crate-3l": {"mean": 11.23, "variance": 1.14, "layers": (12.6, 10.0, 11.1)},
        "crate-s": {"mean": 10.4, "variance": 2.01, "layers": (13.1, 10.5, 9.7, 9.2, 9.5, 3.3)},
        "crate-b": {
            "mean": 8.88,
            "variance": 18.3,
            "layers": (20.2, 11.1, 10.1, 8.2, 5.8, 9.2, 6.4, 4.6, 3.5, 8.1, 10.5, 0.6),
        },
        "gpt2-1l": {"mean": 14.2, "variance": 0.0, "layers": (14.2,)},
        "gpt2-2l": {"mean": 10.2, "variance": 0.25, "layers": (9.7, 10.7)},
        "gpt2-3l": {"mean": 9.2, "variance": 19.21, "layers": (14.8, 4.1, 8.7)},
        "gpt2-s": {"mean": 8.52, "variance": 32.56, "layers": (18.5, 10.7, 4.0, 2.6, 6.8, 5.3)},
        "gpt2-b": {
            "mean": 8.65,
            "variance": 24.65,
            "layers": (21.1, 15.9, 9.8, 6.0, 4.9, 6.3, 7.4, 5.0, 4.8, 7.2, 6.7, 5.4),
        },
    },
}
