"""Open a run's model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.files import sha256
from cratescope.hardware import pick_device
from cratescope.models.folder import load_folder
from cratescope.run import Run
from cratescope.text.shards import TokenData


def data_of(run: Run, data_path: Path | None) -> TokenData:
    """Open the data given, or the data the run was trained on; they must be tokens of the model's own tokenizer.

    Raises:
        UserError: no data there, or data of another tokenizer.
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
    return data


def load_model(run: Run, device: str) -> PreTrainedModel:
    """The run's trained model, for reading."""
    model: Any = load_folder(run.trained_model())  # Any: the library's own annotation of `to` takes no device
    return model.to(pick_device(device)).eval()
