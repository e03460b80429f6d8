"""A small data folder and a small trained run of each family, made once for all tests that need them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models are fastest on one thread; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Shapes in signatures are checked in tests only. It must come before the first import of what it checks. Configurations
# are left out: tyro fills options with markers for what is missing, and transformers adds arguments of its own.
SOURCE = Path(__file__).parent.parent / "src"
install_import_hook(
    [
        ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for path in SOURCE.rglob("*.py")
        if path.name not in ("__init__.py", "config.py", "configuration_crate.py")
    ],
    "shapes.check",
)

from cratescope.lm.config import TrainConfig
from cratescope.lm.train import train
from cratescope.text.config import PrepareConfig
from cratescope.text.prepare import prepare

SUBJECTS = ("the cat", "a judge", "our baker", "the old river", "Paris", "a number like 42", "the court", "salt")
VERBS = ("found", "sold", "quoted", "crossed", "forgot", "boiled", "measured", "returned")
OBJECTS = ("three apples", "the licence", "its name", "a function", "(every bracket)", "the answer", "bread", "Rome")

SMALL_TRAINING = {
    "context": 32,
    "batch_tokens": 128,
    "micro_batch": 2,
    "steps": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "validate_every": 4,
    "validation_crops": 4,
    "log_every": 1,
    "save_every": 2,
    "device": "cpu",
    "dtype": "float32",
}


def sentences(n, seed):
    chance = random.Random(seed)
    return " ".join(f"{chance.choice(SUBJECTS)} {chance.choice(VERBS)} {chance.choice(OBJECTS)}." for _ in range(n))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """120 short documents in one folder."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(120):
        (folder / f"{number:03d}.txt").write_text(f"Document {number}. {sentences(12, number)}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data_folder(text_folder, tmp_path_factory):
    """The documents as tokens of a 320-entry BPE."""
    out = tmp_path_factory.mktemp("data") / "data"
    prepare(PrepareConfig(str(text_folder), out, tokenizer="bpe:320", validation=0.2, heldout=0.3))
    return out


@pytest.fixture(scope="session")
def runs_folder(data_folder, tmp_path_factory):
    """Runs `crate` and `gpt2` of one layer, trained for a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    for family in ("crate", "gpt2"):
        train(TrainConfig(folder / family, data_folder, preset=f"{family}-1l", **SMALL_TRAINING))
    return folder
