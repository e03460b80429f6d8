"""Open a run's model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.hardware import pick_device
from cratescope.models.folder import load_folder
from cratescope.run import Run
from cratescope.text.shards import TokenData


def data_of(run: Run, data_path: Path | None) -> TokenData:
    """Open the data given, or the data the run was trained on; its vocabulary must match the model's."""
    manifest = run.read_manifest()
    data = TokenData.open(data_path or run.data_path())
    if data.vocab_size != manifest["vocab_size"]:
        raise UserError(
            f"{data.path} has a vocabulary of {data.vocab_size}, {run.root} one of {manifest['vocab_size']}; "
            "give the data the run was trained on"
        )
    return data


def load_model(run: Run, device: str) -> PreTrainedModel:
    """The run's trained model, for reading."""
    model: Any = load_folder(run.trained_model())  # Any: the library's own annotation of `to` takes no device
    return model.to(pick_device(device)).eval()
