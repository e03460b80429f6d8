"""Sparse autoencoders of the activations at one place of a model: encode, decode, save, load.

x an activation (d), z its code (m, sparse, never negative), E and D encoder and decoder, a feature a row (m, d), b the
pre-bias (d), c the bias of the features (m), theta their thresholds (m).

    a = E (x - b) + c                             what each feature sees
    z = a where a > theta and a > 0, else 0       relu (theta = 0), jumprelu, batchtopk, matryoshka
    z = the k largest of relu(a), else 0          topk
    y = z D + b

Sources: relu Bricken et al. 2023 (transformer-circuits.pub/2023/monosemantic-features); topk Gao et al. 2024
(arXiv 2406.04093); batchtopk Bussmann et al. 2024 (arXiv 2412.06410), which while it learns keeps the B k largest of a
batch of B tokens, and afterwards what is above the mean of the smallest kept (section 2); matryoshka Bussmann et al.
2025 (arXiv 2503.17547); jumprelu Rajamanoharan et al. 2024 (arXiv 2407.14435). What each learns from is in sae/loss.py.

The files are SAELens' (cfg.json, sae_weights.safetensors), which calls E, c, D, b: W_enc (d, m), b_enc, W_dec, b_dec.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float32, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cratescope.errors import UserError, as_user_error
from cratescope.files import Shape, atomic_folder, check_whole, mark_whole, read_json, write_json
from cratescope.run import Run

Kind = Literal["relu", "topk", "batchtopk", "jumprelu", "matryoshka"]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES: dict[str, str] = {"relu": "standard", "topk": "topk"}
"""SAELens' word for a kind; the others are `jumprelu`: what they are once their thresholds are known."""


@dataclass(frozen=True)
class CoderConfig:
    """What a coder is and learns from; the weights of penalties are for activations of norm sqrt(d) (sae/loss.py)."""

    kind: Kind
    d_in: int
    """Width d of an activation."""
    width: int
    """Number m of features."""
    k: int = 32
    """Active features per token (topk; on average: batchtopk, matryoshka)."""
    penalty: float = 0.0
    """Weight of the L1 norm of the code (relu) or of the number of active features (jumprelu)."""
    bandwidth: float = 0.05
    """Width of the kernel by which thresholds learn (jumprelu)."""
    prefixes: tuple[int, ...] = ()
    """Numbers of features that have to reconstruct alone, besides all of them (matryoshka)."""
    aux: float = 1 / 32
    """Weight of the dead features' reconstruction of the error, AuxK (topk, batchtopk, matryoshka)."""
    frozen: bool = False
    """Whether decoder rows stay as random as they were at first: a control."""

    @property
    def by_threshold(self) -> bool:
        return self.kind != "topk"


@dataclass(frozen=True)
class Origin:
    """Where the activations come from."""

    model: str = ""
    model_sha256: str = ""
    """Of the weights; empty where it is not known."""
    site: str = ""
    pattern: str = ""
    """Module path with {layer}, perhaps with `:input` or `:neurons` (neurons/sites.py)."""
    layer: int = 0
    context: int = 0
    data: str = ""

    @property
    def hook_name(self) -> str:
        return self.pattern.replace("{layer}", str(self.layer))


class SparseCoder(nn.Module):
    """A sparse autoencoder as it is used: the code of a token depends on that token alone.

    Decoder rows start random with norm 1 and the encoder equal to them (Gao et al. 2024, appendix A.1), biases at 0.
    Where half of the features are active at first (relu, jumprelu) the encoder is the smaller by 2 d / m, so that they
    reconstruct x together, and not x many times over.
    """

    def __init__(self, config: CoderConfig, origin: Origin = Origin(), seed: int = 0) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.config, self.origin = config, origin
        rows = torch.randn(config.width, config.d_in, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=1, keepdim=True)
        all_active = config.kind in ("relu", "jumprelu")
        self.encoder = nn.Parameter(rows * min(1.0, 2 * config.d_in / config.width) if all_active else rows)
        self.encoder_bias = nn.Parameter(torch.zeros(config.width))
        self.decoder = nn.Parameter(rows.clone(), requires_grad=not config.frozen)
        self.bias = nn.Parameter(torch.zeros(config.d_in))
        self.threshold = nn.Parameter(torch.zeros(config.width), requires_grad=config.kind == "jumprelu")

    def features(self, x: Float[Tensor, "*b d"]) -> Float32[Tensor, "*b m"]:
        """What each feature sees, before the sparse part: E (x - b) + c."""
        return (x.float() - self.bias) @ self.encoder.T + self.encoder_bias

    def encode(self, x: Float[Tensor, "*b d"]) -> Float32[Tensor, "*b m"]:
        """The code: non-negative, and mostly zeros."""
        seen = self.features(x)
        if self.config.by_threshold:
            return seen.relu() * (seen > self.threshold)
        largest = seen.relu().topk(self.config.k, dim=-1, sorted=False)
        return torch.zeros_like(seen).scatter(-1, largest.indices, largest.values)

    def decode(self, z: Float[Tensor, "*b m"]) -> Float32[Tensor, "*b d"]:
        """The activation that a code, perhaps an edited one, stands for."""
        return z.float() @ self.decoder + self.bias

    def forward(self, x: Float[Tensor, "*b d"]) -> Float32[Tensor, "*b d"]:
        """The reconstruction."""
        return self.decode(self.encode(x))

    @classmethod
    @torch.no_grad()
    def of_axes(cls, axes: Float[Tensor, "d d"], bias: Float[Tensor, " d"], origin: Origin) -> SparseCoder:
        """A control that learns nothing and loses nothing: both directions of orthonormal axes, as 2 d features (relu).

        z = relu(+-Q (x - b)), so z D + b = x. Of the identity and b = 0 the first d features are x where x > 0.
        """
        d = len(bias)
        coder = cls(CoderConfig("relu", d, 2 * d), origin)
        rows = torch.cat([axes, -axes])
        for place, value in ((coder.encoder, rows), (coder.decoder, rows), (coder.bias, bias)):
            place.copy_(value)
        return coder

    @torch.no_grad()
    def only(self, features: Int64[Tensor, " n"]) -> SparseCoder:
        """A coder of some features alone, each with the codes that it has here.

        Not for topk, where the other features decide which are the largest.
        """
        found = SparseCoder(dataclasses.replace(self.config, width=len(features), prefixes=()), self.origin)
        found.bias.copy_(self.bias)
        for name in ("encoder", "encoder_bias", "decoder", "threshold"):
            getattr(found, name).copy_(getattr(self, name)[features])
        return found

    @torch.no_grad()
    def fold(self, mean: Float[Tensor, " d"], scale: float) -> None:
        """Make a coder of (x - mean) * scale into one of x; codes come out in the units of x, so divided by scale.

        encode(x) afterwards is encode((x - mean) * scale) / scale before, thresholds included; decode likewise.
        """
        self.bias.copy_(self.bias / scale + mean)
        self.encoder_bias.div_(scale)
        self.threshold.div_(scale)

    @torch.no_grad()
    def unit_rows(self) -> None:
        """Scale decoder rows to norm 1 and codes by what they lose; reconstructions stay as they are.

        Not for topk, where scaling the features would change which are the largest.
        """
        norm = self.decoder.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        self.decoder.div_(norm[:, None])
        self.encoder.mul_(norm[:, None])
        for row in (self.encoder_bias, self.threshold):
            row.mul_(norm)


def explained_variance(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """1 - |x - y|^2 / |x - mean of x|^2, sums over tokens and dimensions: 0 for the mean, 1 for a perfect y."""
    x, y = x.double(), y.double()
    return 1 - float((x - y).square().sum() / (x - x.mean(0)).square().sum())


def save_coder(folder: Path, coder: SparseCoder) -> None:
    """Write a coder as SAELens does, atomically; all but topk and relu as `jumprelu`, with their thresholds."""
    ours = dataclasses.asdict(coder.config) | {"origin": dataclasses.asdict(coder.origin)}
    kind = ARCHITECTURES.get(coder.config.kind, "jumprelu")
    about: dict[str, Any] = {
        "architecture": kind,
        **{"d_in": coder.config.d_in, "d_sae": coder.config.width, "dtype": "float32", "device": "cpu"},
        **{"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"},
        **({"k": coder.config.k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}),
        "metadata": {
            **{"model_name": coder.origin.model, "model_class_name": "AutoModelForCausalLM"},
            **{"hook_name": coder.origin.hook_name, "hook_head_index": None},
            **{"context_size": coder.origin.context, "prepend_bos": False, "dataset_path": coder.origin.data},
            "cratescope": ours,
        },
    }
    weights = {"W_enc": coder.encoder.T, "b_enc": coder.encoder_bias, "W_dec": coder.decoder, "b_dec": coder.bias}
    if kind == "jumprelu":
        weights["threshold"] = coder.threshold
    with atomic_folder(folder) as new:
        write_json(new / CONFIG, about)
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, new / WEIGHTS)
        mark_whole(new)


OURS: Shape = {
    **{"kind": str, "d_in": int, "width": int, "k": int, "prefixes": [int]},
    **dict.fromkeys(("penalty", "bandwidth", "aux"), float),
    "frozen?": bool,
    "origin": {
        **dict.fromkeys(("model", "model_sha256", "site", "pattern", "data"), str),
        **{"layer": int, "context": int},
    },
}
MAKER = "`cratescope sae`"


def load_coder(folder: Path) -> SparseCoder:
    """A coder that `save_coder` wrote, on the CPU; those of other tools come in by sae/foreign.py.

    Raises:
        UserError: no coder there, or a file in it is damaged or not of one coder.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no sparse autoencoder there (no {CONFIG}); make one with {MAKER}")
    check_whole(folder)
    return build_coder(*read_config(folder), read_weights(folder / WEIGHTS), folder / WEIGHTS)


def read_config(folder: Path) -> tuple[CoderConfig, Origin]:
    """What the coder in a folder is, and of which activations, without its weights. UserError: a damaged file."""
    path = folder / CONFIG
    ours = read_json(path, {"metadata": {"cratescope": OURS}}, MAKER)["metadata"]["cratescope"]
    if ours["kind"] not in get_args(Kind):
        raise UserError(f"{path}: kind = {ours['kind']!r:.50}; there are {', '.join(get_args(Kind))}")
    known = {option.name: ours[option.name] for option in dataclasses.fields(CoderConfig) if option.name in ours}
    config = CoderConfig(**known | {"prefixes": tuple(ours["prefixes"])})
    origin = Origin(**{option.name: ours["origin"][option.name] for option in dataclasses.fields(Origin)})
    return config, origin


def coder_folder(run: Run, name: str, layer: int) -> Path:
    """Folder of one layer's coder."""
    return run.saes(name) / f"layer-{layer:02d}"


def coder_of(run: Run, name: str, layer: int) -> SparseCoder:
    """A run's coder of one layer, on the CPU.

    Raises:
        UserError: no such coder, a damaged one, or one that was trained on another model.
    """
    folder = coder_folder(run, name, layer)
    if not folder.exists():
        made = sorted(path.name for path in (run.root / "saes").glob("*") if (path / folder.name).is_dir())
        there = f"layer {layer} has {', '.join(made)}" if made else f"make one with {MAKER}"
        raise UserError(f"{folder}: no such sparse autoencoder; {there}")
    coder = load_coder(folder)
    if coder.origin.model_sha256 != run.fingerprint():
        raise UserError(f"{folder}: trained on another model than {run.root}'s; train one here with {MAKER}")
    return coder


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises UserError: no such file, or a damaged one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; copy the whole folder again")
    with as_user_error(f"{path}: damaged", "copy it again, or make it again"):
        return load_file(path)


@torch.no_grad()
def build_coder(config: CoderConfig, origin: Origin, weights: dict[str, Tensor], path: Path) -> SparseCoder:
    """A coder of tensors named and shaped as in SAELens' files; without `threshold` thresholds are 0.

    Raises:
        UserError: a tensor is missing, has another shape, or holds NaN or infinite numbers; or k is above the width.
            Names it and `path`.
    """
    m, d = config.width, config.d_in
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,), "threshold": (m,)}
    weights = {"threshold": torch.zeros(weights["b_enc"].shape)} | weights if "b_enc" in weights else weights
    for name, shape in shapes.items():
        if name not in weights:
            raise UserError(f"{path}: the tensor {name} is missing; it is not a whole sparse autoencoder")
        if (found := tuple(weights[name].shape)) != shape:
            raise UserError(f"{path}: {name} has shape {found}, its configuration says {shape}; copy the folder again")
        if not weights[name].isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite numbers; take a sparse autoencoder without them")
    if config.kind == "topk" and not 1 <= config.k <= m:
        raise UserError(f"{path.parent}: k = {config.k} of {m} features; k is from 1 to their number")
    coder = SparseCoder(config, origin)
    places = (coder.encoder.T, coder.encoder_bias, coder.decoder, coder.bias, coder.threshold)
    for place, name in zip(places, shapes, strict=True):
        place.copy_(weights[name])
    return coder
