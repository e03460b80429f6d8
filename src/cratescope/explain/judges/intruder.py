"""Intruder detection, after Paulo and Belrose 2025 (arXiv 2507.08473): which of five windows is foreign?

The prompt is ours. It needs no explanation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cratescope.explain.judges import Question
from cratescope.explain.shown import Marked, mark

GROUP, GROUPS = 5, 8
"""Windows in a prompt, and prompts per neuron."""
QUESTION = (
    "A detector marks tokens with << and >> in four of five texts; in one text they are marked at random. "
    "Which text is that?\n\n"
)
EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "1. She warmed the <<soup>> at once.\n2. They sold <<bread>> and oil.\n3. The <<road>> was closed.\n"
        "4. Grate the <<cheese>> over it.\n5. He ate an <<apple>> a day.\n",
        " 3",
    ),
    (
        "1. One <<of>> them left.\n2. a cup <<of>> tea\n3. the end <<of>> May\n4. He <<never>> wrote again.\n"
        "5. part <<of>> the text\n",
        " 4",
    ),
    (
        "1. It <<was>> late in June.\n2. born in <<Vienna>> in 1900\n3. a flight to <<Rome>>\n"
        "4. <<London>> and its river\n5. She lives in <<Oslo>>.\n",
        " 1",
    ),
)


def prompt(windows: Sequence[Marked]) -> str:
    """Numbered windows with their marks, open where the foreign one's number belongs."""
    lines = (f"{place}. {mark(window.tokens, window.marked)}\n" for place, window in enumerate(windows, 1))
    return f"{''.join(lines)}Text:"


def prompts(_: str, windows: Sequence[Marked], random: np.random.Generator) -> tuple[list[str], list[bool]]:
    """Groups of the neuron's active windows and one silent window at a random place."""
    active = [window for window in windows if window.active]
    silent = [window for window in windows if not window.active]
    groups = []
    for number in range(GROUPS):
        group = [active[place] for place in random.choice(len(active), GROUP - 1, replace=False).tolist()]
        group.insert(int(random.integers(GROUP)), silent[number % len(silent)])
        groups.append(group)
    return [prompt(group) for group in groups], [not window.active for group in groups for window in group]


PREFIX = QUESTION + "".join(f"{texts}Text:{answer}\n\n" for texts, answer in EXAMPLES)
PLACES = (" 1", " 2", " 3", " 4", " 5")
INTRUDER = Question("intruder-1", PREFIX, prompts, PLACES, group=GROUP, width=12, needs_text=False)
