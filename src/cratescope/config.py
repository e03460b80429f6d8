"""Settings of `study`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cratescope.explain.config import DEFAULT_PROTOCOLS, Scorer, Simulator, TermsConfig
from cratescope.llm.config import LLMConfig
from cratescope.options import LARGEST_SEED, Checked, PositionalPath, within
from cratescope.sae.config import SaeConfig


@dataclass(frozen=True)
class NeuronsConfig(Checked):
    """Section [neurons] of a study: options shared by the stages about neurons."""

    sites: tuple[str, ...] = ("auto",)
    """Sites to look at, each as in `collect --site`."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols to explain for, simulate, judge and score."""
    neurons: Annotated[int | None, within(1)] = None
    """Neurons per layer, drawn at random by the seed; all by default."""
    neuron_seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Draws the neurons."""
    simulators: tuple[Simulator, ...] = ("list-pmi",)
    """Simulators, each with scores and a report of its own."""
    judges: tuple[Scorer, ...] = ()
    """Scorers of `judge`; none by default, unless there is a section [judge]."""
    explain_milestones: bool = True
    """Explain the neurons of milestones, too; those of [terms], which cost little, are in any case."""
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)


@dataclass(frozen=True)
class BesideConfig(TermsConfig):
    """Section [terms] of a study: explanations by terms beside those of a language model, in a report of their own."""

    neurons: Annotated[int | None, within(1)] = None
    """Neurons per layer that are explained by terms; all by default."""
    protocols: tuple[str, ...] | None = None
    """Protocols to simulate and score them by; those of [neurons] by default."""


@dataclass(frozen=True)
class CodersConfig(Checked):
    """Table [[sae]] of a study: sparse autoencoders of its models, whose features are then a site like any other."""

    models: tuple[str, ...] | None = None
    """Models of the study that get them; all by default."""
    features: Annotated[int | None, within(1)] = None
    """Features per layer whose records are kept; all by default."""
    sae: Annotated[SaeConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: SaeConfig(Path("run")))
    """Their training, of which the study gives the run and the data."""

    @property
    def names(self) -> list[str]:
        """Names of the autoencoders: one, or one per combination of a grid. UserError: the grid is not one."""
        from cratescope.sae.train import settings_of

        return [setting.name for setting in settings_of(self.sae)]


@dataclass(frozen=True)
class StudyConfig(Checked):
    """Prepare, train, collect, explain, simulate, score and report a matrix of models described in one TOML file."""

    config: PositionalPath
    """TOML file; `studies/demo.toml` shows every section."""
    out: Path
    """Folder to write; finished work is skipped, so the same command resumes."""


@dataclass(frozen=True)
class ZooConfig(Checked):
    """List the trained models that come with cratescope; each may stand wherever a run directory is asked for."""
