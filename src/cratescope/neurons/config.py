"""Settings of `collect`, `effects` and `steer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cratescope.errors import UserError
from cratescope.options import (
    LARGEST_BATCH,
    LARGEST_SEED,
    Checked,
    PositionalPath,
    RayGPUs,
    RayTasks,
    Worker,
    within,
)
from cratescope.options import Site as SiteOption


@dataclass(frozen=True)
class CollectConfig(Checked):
    """Read held-out text once and write, for every neuron, windows, moments, histogram and token means."""

    run: PositionalPath
    """Run directory with a trained model."""
    model: str | None = None
    """A causal language model trained elsewhere (folder or hub name); it is copied into the run directory first."""
    data: Path | None = None
    """Folder made by `cratescope prepare`; the run's own by default."""
    site: str = "auto"
    """`auto` (CRATE: codes, others: mlp), codes, first_codes, mlp, attention, residual, or a module path with {layer}
    such as `transformer.h.{layer}.mlp.act`; append `:input` to read the module's input instead of its output."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to read; all by default. The forward pass stops after the last of them."""
    sample: Annotated[int | None, within(1)] = None
    """Neurons recorded per layer, drawn at random by the sample seed; all by default. They are the ones that `explain
    --neurons` of as many draws from records of all by the same seed, dead ones included."""
    sample_seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Draws the sample."""
    excerpts: Annotated[int, within(1)] = 8000
    """Number of excerpts, evenly spaced over the heldout split (paper: 8000)."""
    context: Annotated[int | None, within(1)] = None
    """Tokens per excerpt (paper: 1024); the model's longest context by default, required if the model states none."""
    top: Annotated[int, within(1, 100_000)] = 50
    """Windows kept around the highest activations."""
    per_excerpt: Annotated[int, within(1)] = 1
    """Largest number of top windows from any one excerpt."""
    random: Annotated[int, within(0, 100_000)] = 50
    """Windows kept around uniformly drawn positions."""
    window: Annotated[int, within(1)] = 64
    """Tokens per window, half of them before the peak (paper: -32..+31)."""
    strata: bool = True
    """Count every activation in a histogram, and keep random windows by quantile, by rank and by level."""
    tokens: Annotated[int, within(1)] = 8192
    """Number of token ids, the most frequent in the text, whose mean activation is kept."""
    dump: bool = False
    """Also write every non-zero activation with its position."""
    batch_size: Annotated[int, within(1, LARGEST_BATCH)] = 16
    """Excerpts per forward pass."""
    part: Annotated[int, within(1)] = 512
    """Excerpts in one part; a kill loses at most one part of work."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the random positions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run the model on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format to run the model in; auto keeps that of its checkpoint. Use float32 if float16 overflows."""


NEUTRAL = ("The", "It is", "In the", "This is a", "We can", "When the", "There are", "If you")
"""Texts that hint at little of what comes next."""


@dataclass(frozen=True)
class SweepConfig(Checked):
    """How units are swept."""

    strengths: Annotated[tuple[float, ...], within(0, 1e6, above=True)] = (1, 2, 4, 8, 16, 32)
    """For --sweep: how far a unit is forced, in multiples of its maximum in the records."""
    operation: Literal["set", "add"] = "set"
    """For --sweep: set the unit to that at every token, or add it."""
    units: Annotated[int, within(1)] = 32
    """For --sweep: neurons or features per layer, drawn at random from those that were ever active."""
    neuron_seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """For --sweep: draws them, as for `explain`, and the random directions."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """For --sweep: layers to sweep; all that have records by default."""
    targets: Annotated[int, within(1, 1000)] = 10
    """For --sweep: tokens that a direction is to raise, those with the highest direct logits."""
    texts: Annotated[int, within(1)] = 16
    """For --sweep: held-out texts on which predictions are compared, evenly spaced."""
    context: Annotated[int, within(2)] = 64
    """For --sweep: tokens of each; predictions in the last quarter count."""
    prefixes: tuple[str, ...] = NEUTRAL
    """For --sweep: what the model writes on from."""
    length: Annotated[int, within(1, 10_000)] = 16
    """For --sweep: tokens that it writes after each, drawn at temperature 1."""
    data: Path | None = None
    """For --sweep: folder made by `cratescope prepare`; the run's own by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := sorted({one for one in self.strengths if self.strengths.count(one) > 1}):
            raise UserError(f"--strengths {twice[0]:g}: named twice; name each once")


@dataclass(frozen=True)
class EffectsConfig(Checked):
    """Say which tokens every neuron raises and lowers: by its weights, and measured by forcing it on held-out text."""

    run: PositionalPath
    """Run directory with neuron records."""
    site: SiteOption = "auto"
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to measure; all of the records by default."""
    neurons: Annotated[int | None, within(1)] = None
    """Neurons per layer, drawn at random with --neuron-seed as `explain` draws them; all by default."""
    neuron_seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the draw of neurons; a larger --neurons keeps those already done."""
    data: Path | None = None
    """Folder made by `cratescope prepare`; the run's own by default."""
    contexts: Annotated[int, within(1)] = 64
    """Held-out texts, evenly spaced, at whose last token a neuron is forced."""
    context: Annotated[int, within(1)] = 32
    """Tokens of each."""
    strength: Annotated[float, within(0, 10_000, above=True)] = 1.0
    """What a neuron is set to, as a multiple of its maximum in the records: 1 is as strong as text makes it."""
    prompt: str = "From my experience,"
    """Neutral text that output scores are measured after (Arad et al. 2025)."""
    batch_size: Annotated[int, within(1, LARGEST_BATCH)] = 256
    """Neurons in one forward pass; fewer where the vocabulary is large."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run the model on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format to run the model in; auto keeps that of its checkpoint."""


@dataclass(frozen=True)
class SteerConfig(Checked):
    """Force neurons while the model writes: its text steered beside plain, and what the edits do to its predictions."""

    run: PositionalPath
    """Run directory with a trained model."""
    edit: tuple[str, ...] = ()
    """Edits such as `1:37=4x`: layer 1, neuron 37, set to 4 times its maximum in the records; they are made in this
    order. Set `=2` `=4x` `=1q` (its quantile 0.999) `=mean`, add `+=`, scale `*=` (`*=0` ablates), cap `<=` `>=`. Then,
    if wanted, `@prompt`, `@generated` or positions `@0,3`, and a condition `if 0:12>0.5`. Before the layer there may be
    a site: `sae/bt16/1:37=2x`. Put it in quotes: the shell reads `*`, `<` and `>`."""
    prompt: str = ""
    """Text to write on from."""
    neuron: str | None = None
    """Short for one --edit: layer and neuron, such as `1:37`, to be edited as --set says."""
    set: str = "4x"
    """What --neuron is set to: `2`, `4x`, `1q` or `mean`, as in --edit."""
    sweep: bool = False
    """Measure instead what forcing does, over strengths and beside controls: of --neuron alone, or of a sample of every
    layer, kept in RUN/steering."""
    site: str = "auto"
    """Site of edits that name none: as of `collect`, or `sae/NAME` for features of sparse autoencoders."""
    sae: Literal["delta", "replace"] = "delta"
    """How edits of features are written back: as the difference that they make to the reconstruction, or by the
    reconstruction in place of the activation, which loses what the autoencoder does not reconstruct."""
    tokens: Annotated[int, within(1, 100_000)] = 40
    """Tokens to write; fewer where the model ends its text."""
    temperature: Annotated[float, within(0, 100)] = 0.0
    """0 takes the likeliest token each time; else tokens are drawn at this temperature."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the draws; the steered text is drawn by the same random numbers as the plain one."""
    json: Path | None = None
    """File to write the same to, with all numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run the model on."""
    how: Annotated[SweepConfig, tyro.conf.arg(name="")] = field(default_factory=SweepConfig)
