"""The run directory: paths, manifest, and the identity of what a folder was made from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cratescope.errors import UserError
from cratescope.files import (
    Shape,
    as_json,
    atomic_path,
    check_whole,
    known_sha256,
    make_folder,
    read_json,
    remove_leftovers,
    sha256,
    slug,
)
from cratescope.zoo import bring, instead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from cratescope.results.neuron import Neuron


def made_from(files: Iterable[Path], root: Path, **settings: Any) -> dict[str, str]:
    """Settings, plus one SHA-256 over the names (relative to `root`) and contents of files, to detect any change."""
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        digest.update(f"{name} {sha256(path)}\n".encode())
    return {name: str(value) for name, value in settings.items()} | {"files": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    names = ("cratescope", "torch", "transformers", "tokenizers", "numpy", "pyarrow")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def claim(folder: Path, identity: dict[str, Any], fix: str = "delete that folder or use another run directory") -> None:
    """Record what `folder` is made from, or check that it was made from the same.

    The first stage writes `folder/manifest.json`; a later one with another identity (another model, other
    data, other settings) is refused, because mixing the two would give a result that belongs to neither.

    Raises:
        UserError: the folder was made from something else; names the first key of `identity` that differs, and `fix`.
    """
    make_folder(folder)
    path = folder / "manifest.json"
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        with atomic_path(path, first=True) as temporary:
            temporary.write_text(as_json({"identity": identity, "versions": versions()}), encoding="utf-8")
    remove_leftovers(folder)
    found = read_json(path)
    found = found.get("identity") if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a file of cratescope; use another folder")
    for key in identity | found:  # in the order of `identity`: what was asked for comes before what follows from it
        if found.get(key) != identity.get(key):
            raise UserError(f"{folder} was made with {key} = {found.get(key)!r}, not {identity.get(key)!r}; {fix}")


ARM: Shape = dict.fromkeys(("family", "attention", "feed_forward", "size", "site", "variant"), str)
ARM |= dict.fromkeys(("seed", "tokens_trained"), (int, None))
SPLIT_BY: Shape = {"source?": str, "source_files?": str, "validation?": float, "heldout?": float, "seed?": int}
"""What decides which documents of a data folder are in which split."""
RUN: Shape = {
    **{"arm?": ARM, "parameters": int, "n_layer": (int, None), "context": (int, None)},
    "data": {"path": str, "manifest_sha256": str, "split_by?": SPLIT_BY},
    **dict.fromkeys(("seed?", "parameters_without_positions?", "n_neurons?", "vocab_size?", "steps?"), int),
    **{"preset?": str, "tokens_trained?": int, "settings?": {}, "seconds?": float},
}
TRAINED: Shape = {"steps": int}
BEFORE_ARMS: Shape = {"family": str, "preset": str, "seed": int, "tokens_trained": int}
"""Entries of run.json that later stages read, those of a run trained here, and those of one older than arms."""
METRICS: Shape = {"step": int, "tokens": int}
METRICS |= dict.fromkeys(("loss?", "learning_rate?", "validation_loss?", "validation_standard_error?"), (float, None))
"""A line of metrics.jsonl."""
IDENTITY: Shape = {"identity": {"windows?": int, "candidates?": [{"windows?": int}]}}
"""A stage's manifest.json."""


@dataclass(frozen=True)
class Run:
    """One model and everything measured on it, in one folder.

    `zoo/NAME`, a model that comes with the package, is copied to that folder the first time.
    """

    root: Path

    def __init__(self, root: Path | str) -> None:
        object.__setattr__(self, "root", Path(root))
        bring(self.root)

    @property
    def name(self) -> str:
        """The folder's name; for a milestone, its run's name as well, since milestones of all runs are named alike."""
        root = self.root.resolve()
        return f"{root.parents[1].name}-{root.name}" if root.parent.name == "milestones" else root.name

    @property
    def manifest(self) -> Path:
        """run.json: arm, parameters, data, steps, settings, versions."""
        return self.root / "run.json"

    @property
    def model(self) -> Path:
        """The final Hugging Face checkpoint: config.json, model.safetensors, tokenizer."""
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def milestone(self, step: int) -> Run:
        """The run as it was after `step`: a run directory of its own, never deleted by rotation."""
        return Run(self.root / "milestones" / f"step-{step:06d}")

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step: step, tokens, loss, learning_rate, speed; or step, tokens, validation_loss."""
        return self.root / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    def records(self, site: str) -> Path:
        """Folder with one Parquet file per layer."""
        return self.root / "records" / slug(site)

    def effects(self, site: str) -> Path:
        """Folder with one Parquet file of effects per layer."""
        return self.root / "effects" / slug(site)

    def scores(self, site: str, explainer: str, simulator: str) -> Path:
        """Folder with one Parquet file per layer (a row per neuron, protocol, control and measure) and scores.json."""
        return self.root / "scores" / slug(site) / slug(explainer) / slug(simulator)

    def saes(self, name: str) -> Path:
        """Folder of the sparse autoencoders of one name: one folder per layer."""
        return self.root / "saes" / slug(name)

    def steering(self, site: str, replaced: bool = False) -> Path:
        """Folder of steering curves, one Parquet file per layer.

        replaced: of features whose autoencoder takes the place of the activations.
        """
        return self.root / "steering" / (slug(site) + ("-replace" if replaced else ""))

    def quality(self, site: str) -> Path:
        """File with the activation quality of every layer and neuron, measured from the records alone."""
        return self.root / "scores" / slug(site) / "quality.json"

    def read_manifest(self) -> dict[str, Any]:
        if not self.manifest.exists():
            raise UserError(f"{self.root}: not a run directory (no run.json); {instead(self.root)}")
        maker = "`cratescope train` or what made the run"
        found = read_json(self.manifest, RUN, maker)
        shape = {"family": str} if "adopted" in found else TRAINED | BEFORE_ARMS
        shape = shape if "arm" not in found else {} if "adopted" in found else TRAINED
        return read_json(self.manifest, RUN | shape, maker)

    def data_entry(self, data: Path) -> dict[str, str]:
        """Describe a data folder for run.json: its path relative to the run's folder, so that both can move together.

        If either is reached through a link there are two such paths: through real folders, and as given.
        """
        real = os.path.relpath(data.resolve(), self.root.resolve())
        given = os.path.relpath(data, self.root)
        entry = {"path": real, "manifest_sha256": sha256(data / "manifest.json")}
        return entry if given == real else entry | {"path_as_given": given}

    def data_path(self) -> Path:
        """Find the data folder that run.json names; of several candidates, the one that holds the run's own data.

        Raises:
            UserError: not a run directory.
        """
        entry = self.read_manifest()["data"]
        found: list[Path] = []
        for relative in (entry["path"], entry.get("path_as_given", entry["path"])):
            # An unnormalised `..` leaves a linked folder's target; a normalised one leaves the link itself.
            found.append((self.root.resolve() / relative).resolve())
            found.append(Path(os.path.normpath(self.root.absolute() / relative)))
        there = [path for path in found if (path / "manifest.json").is_file()]
        own = (path for path in there if sha256(path / "manifest.json") == entry.get("manifest_sha256"))
        return next(own, (there or found)[0])

    def trained_model(self) -> Path:
        """Return the model's folder. Raises UserError when training has not finished, or a file in it is damaged."""
        if not (self.model / "model.safetensors").exists():
            raise UserError(f"{self.model}: no model there yet; finish `cratescope train` for {self.root} first")
        check_whole(self.model)
        return self.model

    def fingerprint(self) -> str:
        """SHA-256 of the model's weights, which every later stage names as its origin."""
        return known_sha256(self.trained_model() / "model.safetensors")

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer, read once."""
        from cratescope.text.tokenizer import load_tokenizer

        return load_tokenizer(self.model)

    def load_model(self) -> PreTrainedModel:
        """The trained model, on the CPU."""
        from cratescope.models.folder import load_folder

        return load_folder(self.trained_model())

    def neuron(
        self,
        layer: int,
        index: int,
        site: str = "auto",
        explainer: str | None = None,
        simulator: str | None = None,
    ) -> Neuron:
        """Everything known of one neuron, or what one explainer and simulator say; a notebook shows it as a card.

        Raises:
            UserError: no records, no such site, layer or neuron; or a file is damaged.
        """
        return self.neurons(layer, [index], site, explainer, simulator)[0]

    def neurons(
        self,
        layer: int,
        indices: Sequence[int] | None = None,
        site: str = "auto",
        explainer: str | None = None,
        simulator: str | None = None,
    ) -> list[Neuron]:
        """Neurons of one layer, in the order of `indices`; all of them unless given. Errors as of `neuron`."""
        from cratescope.results.neuron import read_neurons

        return read_neurons(self, layer, indices, site, explainer, simulator)
