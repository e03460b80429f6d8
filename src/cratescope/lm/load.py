"""Open a run's model and data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.files import sha256
from cratescope.hardware import pick_device
from cratescope.models.folder import load_folder
from cratescope.progress import say
from cratescope.run import Run
from cratescope.text.shards import TokenData


def data_of(run: Run, data_path: Path | None) -> TokenData:
    """Open the data given, or the data the run was trained on; they must be tokens of the model's own tokenizer.

    Raises:
        UserError: no data there, or data of another tokenizer.

    Warns where text that it holds out may be text that the run was trained on.
    """
    manifest = run.read_manifest()
    path = data_path or run.data_path()
    if data_path is None and not path.exists():
        make = f"`cratescope prepare offline --tokenizer {run.model} --out {path}`"
        raise UserError(
            f"{path}: no such folder, where {run.root} has its text; {make} makes one, or name it by --data"
        )
    data = TokenData.open(path)
    if data.vocab_size != manifest["vocab_size"]:
        raise UserError(
            f"{data.path} has a vocabulary of {data.vocab_size}, {run.root} one of {manifest['vocab_size']}; "
            "give the data the run was trained on"
        )
    its_own = sha256(path / "manifest.json") == manifest["data"]["manifest_sha256"]
    if not its_own and data.tokenizer.get_vocab() != run.tokenizer.get_vocab():
        make = f"`cratescope prepare ... --tokenizer {run.model}`"
        raise UserError(f"{data.path} is text of another tokenizer than {run.root}'s; make it with {make}")
    if not its_own and (trained := manifest["data"].get("split_by")) and _leaks(trained, data.split_by):
        say(
            f"warning: {data.path} may hold out text that {run.root} was trained on; prepare it with --seed "
            f"{trained['seed']}, and --validation and --heldout of at most {_held_out(trained):g} together",
            "yellow",
        )
    return data


def _leaks(trained: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """May text held out by the one split be for training in the other? Only a document's text and the seed place it.

    Of different sources nothing is known, so these count as different texts.
    """
    text = "source_files" if "source_files" in trained else "source"
    known = {text, "seed", "validation", "heldout"} <= trained.keys() & given.keys()
    if not known or trained[text] != given[text]:
        return False
    return trained["seed"] != given["seed"] or _held_out(given) > _held_out(trained) + 1e-9


def _held_out(split_by: Mapping[str, Any]) -> float:
    """The share of documents that are not for training."""
    return split_by["validation"] + split_by["heldout"]


def load_model(run: Run, device: str) -> PreTrainedModel:
    """The run's trained model, for reading."""
    model: Any = load_folder(run.trained_model())  # Any: the library's own annotation of `to` takes no device
    return model.to(pick_device(device)).eval()
