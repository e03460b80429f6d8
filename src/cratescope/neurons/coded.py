"""Features of sparse autoencoders as a site: `sae/NAME` of a run is read and edited like neurons.

What is seen of a layer are the codes z of its activations x. An edited code z' is written back as x + decode(z') -
decode(z), so that what the autoencoder does not reconstruct is kept and editing nothing changes nothing, or in its
place (`replace`) as decode(z'), which leaves out the error x - decode(z).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.files import known_sha256, read_json
from cratescope.models.sae import WEIGHTS, SparseCoder, coder_folder, coder_of
from cratescope.neurons.records import read_columns
from cratescope.neurons.sample import SAE, record_files
from cratescope.neurons.sites import Given, SampledSite, Site, Visit, site_named
from cratescope.run import IDENTITY, Run


@dataclass(frozen=True)
class CodedSite(Site):
    """The features of one autoencoder a layer, of the activations that `pattern` names.

    coders: by layer. identity: what stands for them in the identity of records. replace: how edits are written back.
    """

    coders: Mapping[int, SparseCoder] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    replace: bool = False

    def layers(self, model: nn.Module) -> list[int]:
        return [layer for layer in super().layers(model) if layer in self.coders]

    def module(self, model: nn.Module, layer: int) -> nn.Module:
        """The module whose activations are coded. Raises UserError also for a layer without an autoencoder."""
        if layer not in self.coders:
            there = ", ".join(map(str, sorted(self.coders)))
            raise UserError(f"{self.name}: layer {layer} has no autoencoder; name one of those that have: {there}")
        return super().module(model, layer)

    def hook(self, model: PreTrainedModel, layer: int, visit: Visit, given: Given) -> Any:
        self.module(model, layer)

        def coded(layer: int, x: Tensor) -> Tensor | None:
            coder = self._coder(layer, x)
            codes = coder.encode(x)
            edited = visit(layer, codes)
            if edited is None:
                return None
            found = coder.decode(edited)
            return (found if self.replace else x + (found - coder.decode(codes))).to(x.dtype)

        return super().hook(model, layer, coded, given)

    def only(self, chosen: Mapping[int, Int64[Tensor, " n"]]) -> Site:
        """As of `Site`; features that do not depend on others are the only ones to be computed."""
        alone = {layer for layer in chosen if self.coders[layer].config.by_threshold}
        narrow = {layer: self.coders[layer].only(chosen[layer]) for layer in alone}
        cut = {layer: features for layer, features in chosen.items() if layer not in alone}
        return SampledSite(self.name, self.pattern, replace(self, coders={**self.coders, **narrow}), cut)

    def _coder(self, layer: int, x: Tensor) -> SparseCoder:
        """On the device of the activations x."""
        coder = self.coders[layer]
        if x.shape[-1] != coder.config.d_in:
            raise UserError(
                f"{self.name}: layer {layer}'s autoencoder is of activations of width {coder.config.d_in}, "
                f"{self.pattern} has {x.shape[-1]}; it was made for another model or site"
            )
        return coder.to(x.device)


def find_coders(run: Run, name: str, replace: bool = False) -> CodedSite:
    """The site `sae/NAME` of a run; `replace` as of `CodedSite`.

    Raises:
        UserError: the run has no such autoencoder, one is damaged, or it was trained on another model's activations.
    """
    folder = run.saes(name)
    layers = sorted(int(path.name.removeprefix("layer-")) for path in folder.glob("layer-*"))
    if not layers:
        found = ", ".join(sorted(path.name for path in folder.parent.glob("*") if any(path.glob("layer-*")))) or "none"
        raise UserError(f"{run.root}: no sparse autoencoder {name!r} (found: {found}); train one with `cratescope sae`")
    coders = {layer: coder_of(run, name, layer) for layer in layers}
    patterns = sorted({coder.origin.pattern for coder in coders.values()})
    if len(patterns) > 1:
        raise UserError(f"{folder}: layers of different sites ({', '.join(patterns)}); give them different names")
    identity = {str(layer): known_sha256(coder_folder(run, name, layer) / WEIGHTS) for layer in layers}
    return CodedSite(f"{SAE}{name}", patterns[0], coders, identity, replace)


def site_of(run: Run, name: str, model: PreTrainedModel, replace: bool = False) -> Site:
    """The site that is meant by --site: `sae/NAME` of the run, or a site of the model. Errors as of both.

    replace: as of `CodedSite`.
    """
    return find_coders(run, name.removeprefix(SAE), replace) if name.startswith(SAE) else site_named(name, model)


def recorded_site(run: Run, folder: str) -> Site:
    """The site that a folder of records is of. UserError: records of another model, of other features or imported."""
    path = run.records(folder)
    found = read_json(path / "manifest.json", IDENTITY, "`cratescope collect`")["identity"]
    if "imported" in found:
        raise UserError(f"{path}: records of another tool, which do not say of what module; run `cratescope collect`")
    name = read_columns(next(iter(record_files(path).values())), ["site"]).column("site")[0].as_py()
    site = find_coders(run, name.removeprefix(SAE)) if name.startswith(SAE) else Site(name, found["site"])
    same = found.get("model_sha256") == run.fingerprint() and found.get("site") == site.pattern
    if isinstance(site, CodedSite):
        same = same and found.get("sae_sha256") == dict(site.identity)
    if not same:
        raise UserError(f"{path}: records of another model or site; delete it and run `cratescope collect`")
    return site
