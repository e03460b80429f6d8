"""Settings of `export`, `import` and `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cratescope.options import Checked, PositionalPath, Site, within


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Write neuron records in another tool's format: OpenAI's NeuronRecord JSON, or delphi's cache of activations."""

    run: PositionalPath
    """Run directory with neuron records."""
    out: Path
    """Folder to write."""
    format: Literal["openai", "delphi"] = "openai"
    """`openai`: one {layer}/{neuron}.json per neuron; `delphi`: all non-zero activations (needs `collect --dump`)."""
    site: Site = "auto"
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to write; all by default."""
    data: Path | None = None
    """delphi: the data folder given to `collect`; the run's own by default."""


@dataclass(frozen=True)
class ImportConfig(Checked):
    """Read OpenAI NeuronRecord JSON made elsewhere into a run directory, to explain, simulate and score it here."""

    source: PositionalPath
    """Folder with one {layer}/{neuron}.json per neuron."""
    out: Path
    """Run directory to write; it will hold records and a tokenizer, but no model."""
    format: Literal["openai"] = "openai"
    """What the files are: NeuronRecords of `openai`."""


@dataclass(frozen=True)
class ConvertConfig(Checked):
    """Turn the authors' nanoGPT-style checkpoint (.pt) into a Hugging Face folder, or such a folder back into a .pt."""

    source: PositionalPath
    """A .pt checkpoint, or a folder with config.json and model.safetensors."""
    out: PositionalPath
    """The folder, or the .pt file, to write."""
