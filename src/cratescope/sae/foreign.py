"""Sparse autoencoders made elsewhere, as coders of a run: SAELens, sparsify and dictionary_learning.

| made by | configuration | weights |
|---|---|---|
| SAELens | cfg.json with `architecture` | sae_weights.safetensors: W_enc, b_enc, W_dec, b_dec, threshold |
| sparsify | cfg.json with `d_in`, `k` | sae.safetensors: encoder.weight, encoder.bias, W_dec, b_dec |
| dictionary_learning | config.json with `trainer` | ae.pt, read with weights_only; names by class, see `_dictionary` |

Each becomes tensors named as in SAELens' files. Where a coder does not subtract the pre-bias first, E b is added to the
features' bias, so that E (x - b) + (c + E b) is what it computes, E x + c.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cratescope.errors import UserError, as_user_error
from cratescope.files import check_whole, read_json
from cratescope.lm.load import data_of, load_model
from cratescope.locks import locked
from cratescope.models.sae import (
    CONFIG,
    WEIGHTS,
    CoderConfig,
    Kind,
    Origin,
    SparseCoder,
    build_coder,
    coder_folder,
    load_coder,
    read_weights,
    save_coder,
)
from cratescope.neurons.sites import Site, site_named
from cratescope.run import Run, claim
from cratescope.sae.config import SaeConfig
from cratescope.sae.stream import width_of

SPARSIFY, DICTIONARY = "sae.safetensors", "ae.pt"
TRIED = 16
"""Tokens by which the width of a site is found."""
HOOKS = (
    (r"blocks\.(\d+)\.hook_resid_post", "residual"),
    (r"blocks\.(\d+)\.mlp\.hook_post", "mlp"),
    (r"blocks\.(\d+)\.hook_attn_out", "attention"),
)
"""TransformerLens' names of places, and the site of ours that is the same."""


@dataclass(frozen=True)
class Foreign:
    """An autoencoder as read: what it is, its tensors by SAELens' names, and the place it says it is for."""

    kind: Kind
    k: int
    weights: dict[str, Tensor]
    path: Path
    place: str = ""

    def coder(self, origin: Origin) -> SparseCoder:
        """As one of ours. UserError: tensors that do not fit together."""
        decoder = self.weights.get("W_dec")
        if decoder is None or decoder.ndim != 2:
            raise UserError(f"{self.path}: the tensor W_dec is missing; it is not a whole sparse autoencoder")
        config = CoderConfig(self.kind, decoder.shape[1], decoder.shape[0], self.k)
        return build_coder(config, origin, self.weights, self.path)


def bring_in(config: SaeConfig) -> Path:
    """Write an autoencoder made elsewhere as RUN/saes/NAME/layer-..; return RUN/saes/NAME.

    Raises:
        UserError: no such folder or hub name, a format or kind we do not have, a pickle with objects in it, an
            autoencoder of another width or model than the site's, or of another one with this name.
    """
    run, found = Run(config.run), read_foreign(local_folder(str(config.source)))
    model = load_model(run, "cpu")
    site, layer = _place(config, found, model)
    tokens = data_of(run, config.data).split("train").spaced(1, TRIED)[0]
    width = width_of(model, site, [layer], tokens)
    coder = found.coder(Origin(run.name, run.fingerprint(), site.name, site.pattern, layer))
    if coder.config.d_in != width:
        what = f"is of activations of width {coder.config.d_in}, site {site.name} at layer {layer} has {width}"
        raise UserError(f"{found.path.parent}: {what}; give the --site it was trained on, or the run of its model")
    folder, out = run.saes(config.name), coder_folder(run, config.name, layer)
    with locked(folder, "sae"):
        claim(folder, {"from": "elsewhere", "site": site.pattern, "model_sha256": run.fingerprint()})
        if not out.exists():
            save_coder(out, coder)
        elif any(not torch.equal(a, b) for a, b in zip(load_coder(out).parameters(), coder.parameters(), strict=True)):
            raise UserError(f"{out}: holds another sparse autoencoder than {found.path}; give another --name")
    return folder


def local_folder(source: str) -> Path:
    """A folder, or of a hub name `owner/name` or `owner/name/folder` the downloaded folder."""
    if Path(source).exists():
        return Path(source)
    owner, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    if not name or source.startswith((".", "/")):
        raise UserError(f"{source}: no such folder; give one, or a hub name `owner/name/folder`")
    from huggingface_hub import snapshot_download

    wanted = [f"{inside}/*" if inside else "*"]
    fix = "check the name and the network, or download it and give its folder"
    with as_user_error(f"{source}: cannot be downloaded", fix):
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=wanted)) / inside


def read_foreign(folder: Path) -> Foreign:
    """Read a folder of one autoencoder. UserError: none of the three formats, or a kind that we do not have."""
    if (folder / SPARSIFY).is_file():
        return _sparsify(folder)
    if (folder / DICTIONARY).is_file():
        return _dictionary(folder)
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return _saelens(folder)
    inside = sorted({path.parent for pattern in (SPARSIFY, DICTIONARY, WEIGHTS) for path in folder.rglob(pattern)})
    if inside:
        raise UserError(f"{folder}: holds several sparse autoencoders; give one of them, such as {inside[0]}")
    pickles = sorted(path.name for ending in ("pt", "pth", "bin", "pkl") for path in folder.glob(f"*.{ending}"))
    if pickles:
        raise UserError(f"{folder}: {pickles[0]} may hold code, which is never run; get its weights as safetensors")
    raise UserError(f"{folder}: no sparse autoencoder of SAELens, sparsify or dictionary_learning; check the name")


_MUST_BE = {
    "normalize_activations": (None, "none", False, "expected_average_only_in"),
    "reshape_activations": (None, "none"),
    "activation_fn": (None, "relu", "topk"),
    "activation_fn_str": (None, "relu", "topk"),
}
"""Options of SAELens and the values that we have; expected_average_only_in is folded into the weights there."""


def _saelens(folder: Path) -> Foreign:
    check_whole(folder)
    said = read_json(folder / CONFIG, {"d_in": int}, "what made it")
    kinds: dict[str, Kind] = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
    kind = kinds.get(said.get("architecture", "standard"))
    if kind is None:
        raise UserError(f"{folder}: architecture {said['architecture']!r:.40}; there are {', '.join(kinds)} here")
    for name, values in _MUST_BE.items():
        if said.get(name) not in values:
            raise UserError(f"{folder}: {name} = {said[name]!r:.40} is none of what is done here; take another one")
    options = said.get("activation_fn_kwargs") or {}
    k = said.get("k", options.get("k"))
    if kind == "relu" and said.get("activation_fn_str") == "topk":
        kind = "topk"  # as SAELens wrote it before version 6
    weights = read_weights(folder / WEIGHTS)
    if said.get("apply_b_dec_to_input", True) is False:
        _without_pre_bias(weights, folder / WEIGHTS)
    if kind == "topk" and said.get("rescale_acts_by_decoder_norm"):
        _fold_norms(weights, folder / WEIGHTS)
    about = said.get("metadata") or said
    return Foreign(kind, _k(kind, k, folder), weights, folder / WEIGHTS, str(about.get("hook_name") or ""))


def _sparsify(folder: Path) -> Foreign:
    said = read_json(folder / CONFIG, {"d_in": int, "k": int}, "what made it")
    for name in ("transcode", "skip_connection"):
        if said.get(name):
            raise UserError(f"{folder}: {name} makes it a transcoder, which is no autoencoder; take another one")
    if said.get("activation", "topk") != "topk":
        raise UserError(f"{folder}: activation {said['activation']!r:.40}; only topk is done here, take another one")
    path = folder / SPARSIFY
    names = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    return Foreign("topk", _k("topk", said["k"], folder), _renamed(read_weights(path), names, path), path)


_PLAIN = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
_OWN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
CLASSES: dict[str, tuple[Kind, dict[str, str]]] = {
    "AutoEncoder": ("relu", _PLAIN | {"bias": "b_dec"}),
    "AutoEncoderTopK": ("topk", _PLAIN | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", _PLAIN | {"b_dec": "b_dec", "threshold": "threshold"}),
    "JumpReluAutoEncoder": ("jumprelu", _OWN),
    "MatryoshkaBatchTopKSAE": ("matryoshka", _OWN),
}
"""Classes of dictionary_learning: their kind, and the names of their tensors; with .T they lie the other way round."""


def _dictionary(folder: Path) -> Foreign:
    said = read_json(folder / "config.json", {"trainer": {"dict_class": str}}, "what made it")["trainer"]
    if said["dict_class"] not in CLASSES:
        raise UserError(f"{folder}: dict_class {said['dict_class']!r:.40}; there are {', '.join(CLASSES)} here")
    kind, names = CLASSES[said["dict_class"]]
    path = folder / DICTIONARY
    with as_user_error(f"{path}: cannot be read", "copy it again, or get its weights as safetensors"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds other things than tensors by name; get its weights as safetensors")
    weights = _renamed(state, names, path)
    if "threshold" in weights and "b_enc" in weights:
        weights["threshold"] = weights["threshold"].expand_as(weights["b_enc"]).clamp_min(0)
    if kind == "jumprelu":
        _without_pre_bias(weights, path)
    place = str(said.get("submodule_name") or "")
    return Foreign(kind, _k(kind, said.get("k"), folder), weights, path, place)


def _renamed(state: dict[str, Tensor], names: dict[str, str], path: Path) -> dict[str, Tensor]:
    if missing := next((name for name in names if name not in state), None):
        raise UserError(f"{path}: the tensor {missing} is missing; it is not a whole sparse autoencoder")
    found = {}
    for name, ours in names.items():
        value = state[name].float()
        found[ours.removesuffix(".T")] = value.T if ours.endswith(".T") else value
    return found


def _k(kind: Kind, k: Any, folder: Path) -> int:
    if isinstance(k, float) and k.is_integer():
        k = int(k)
    if kind == "topk" and (type(k) is not int or k < 1):
        raise UserError(f"{folder}: k = {k!r:.40} is not a number of active features; mend its configuration")
    return k if type(k) is int else 0


def _without_pre_bias(weights: dict[str, Tensor], path: Path) -> None:
    """Make a coder that does not subtract the pre-bias one that does."""
    with as_user_error(f"{path}: its tensors do not fit together", "copy it again"):
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]


def _fold_norms(weights: dict[str, Tensor], path: Path) -> None:
    """Make a coder that ranks features times the norm of their decoder rows one that has rows of norm 1."""
    with as_user_error(f"{path}: its tensors do not fit together", "copy it again"):
        norm = weights["W_dec"].norm(dim=1)
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norm, weights["b_enc"] * norm


def _place(config: SaeConfig, found: Foreign, model: Any) -> tuple[Site, int]:
    """Site and layer as given, else as the autoencoder says: a module of this model, or a name of TransformerLens."""
    site, layer = config.site, config.layers[0] if config.layers else None
    for pattern, name in HOOKS:
        if site == "auto" and (match := re.fullmatch(pattern, found.place)):
            site, layer = name, int(match[1]) if layer is None else layer
    path = found.place.removesuffix(":input").removesuffix(":neurons")
    number = re.search(r"(?<=\.)\d+(?=\.|$)", path)
    if site == "auto" and number and path in dict(model.named_modules()):
        site = found.place[: number.start()] + "{layer}" + found.place[number.end() :]
        layer = int(number[0]) if layer is None else layer
    if site == "auto" or layer is None or len(config.layers or (0,)) > 1:
        said = f"{found.place!r:.60}" if found.place else "nothing"
        raise UserError(f"{found.path.parent}: of its place it says {said}; give its --site and one of --layers")
    chosen = site_named(site, model)
    chosen.module(model, layer)
    return chosen, layer
