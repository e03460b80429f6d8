"""The authors' nanoGPT-style checkpoints <-> our Hugging Face folders, bit for bit (paper section 2, research code)."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from cratescope.errors import UserError, as_user_error, first_line, last_line
from cratescope.exchange.config import ConvertConfig
from cratescope.files import atomic_folder, atomic_path, mark_whole
from cratescope.models import CrateConfig
from cratescope.models.folder import load_folder
from cratescope.models.presets import CRATE_FIELDS

# Our name -> theirs, inside one block. "*" is weight or bias.
CRATE_BLOCK = {
    "ln_1.*": "prenorm_1.*",
    "mssa.U.weight": "attn.c_attn.weight",
    "mssa.W.*": "attn.c_proj.*",
    "ln_2.*": "prenorm_2.*",
    "ista.D": "ista.weight",
}
_SAME = ("ln_1.*", "attn.c_attn.*", "attn.c_proj.*", "ln_2.*", "mlp.c_fc.*", "mlp.c_proj.*")
GPT2_BLOCK = dict(zip(_SAME, _SAME, strict=True))
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size")
"""Entries of model_args that our configurations call the same."""
OUTER = ("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.*", "lm_head.weight")
COMPILED = "_orig_mod."
"""The prefix torch.compile leaves on the names of a saved model."""
CAUSAL_MASK = re.compile(r"\.attn\.(masked_)?bias$")
"""A buffer of older research code, not a weight."""


def convert(config: ConvertConfig) -> Path:
    """Write a .pt checkpoint as a folder, or a folder as a .pt checkpoint, and return what was written.

    Raises:
        UserError: a missing file, a pickle with code in it, or missing, extra or misshapen tensors.
    """
    source, out = config.source, config.out
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; delete it or give a new name")
    if source.is_dir():
        if out.suffix != ".pt":
            raise UserError(f"{out}: a folder converts to a checkpoint whose name ends in .pt")
        with atomic_path(out) as temporary:
            torch.save(to_reference(load_folder(source)), temporary)
        return out
    if out.suffix == ".pt":
        raise UserError(f"{out}: a .pt checkpoint converts to a folder; give a name without .pt")
    model = from_reference(load_checkpoint(source), source)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        mark_whole(folder)
    return out


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a .pt file with weights_only, so that no code in it runs."""
    _check_sums(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise UserError(f"{path}: not a readable PyTorch checkpoint") from error
        raise UserError(
            f"{path}: refused, because it holds Python objects other than tensors and plain values, which could run "
            "code when loaded; ask its author for a checkpoint with weights only"
        ) from error
    except Exception as error:  # on a foreign file, what torch raises depends on the file's bytes
        raise UserError(f"{path}: not a readable PyTorch checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path}: not a nanoGPT-style checkpoint, which has the entries 'model' and 'model_args'")
    for entry in ("model", "model_args"):
        if not isinstance(checkpoint[entry], dict) or not all(isinstance(name, str) for name in checkpoint[entry]):
            raise UserError(f"{path}: the entry {entry!r} is not a dictionary of names, as nanoGPT writes it")
    for name, tensor in checkpoint["model"].items():
        if wrong := _not_a_weight(tensor):
            fix = "a nanoGPT-style checkpoint holds plain tensors of numbers"
            raise UserError(f"{path}: the tensor {name} {wrong}; {fix}")
    if not _is_count(checkpoint.get("iter_num", 0), 0):
        raise UserError(f"{path}: iter_num = {checkpoint['iter_num']!r} is not a number of steps")
    return checkpoint


def _check_sums(path: Path) -> None:
    """Compare the files inside a .pt with their CRC-32, which torch does not; its format of old has none."""
    if not zipfile.is_zipfile(path):
        return
    with as_user_error(f"{path}: not a readable PyTorch checkpoint", "copy it again"), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path}: damaged (the CRC-32 of {damaged} in it is another); copy it again")


def _not_a_weight(value: Any) -> str | None:
    """Say why a value of a state dict is not a weight."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        return "is sparse, quantised or without values"
    if not (value.dtype.is_floating_point or value.dtype is torch.bool):  # a mask in older research code is bool
        return f"is of {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"claims the shape {tuple(value.shape)}, but the file holds fewer numbers"
    return None


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def from_reference(checkpoint: dict[str, Any], name: Path | str) -> PreTrainedModel:
    """Build our model from the weights of a loaded reference checkpoint; `name` is for error messages.

    A checkpoint without biases (`bias=False`) gets zero biases where transformers' GPT-2 has them, which changes no
    output. The config keeps under `reference` what is needed to write the same checkpoint again.
    """
    compiled = any(key.startswith(COMPILED) for key in checkpoint["model"])
    theirs = {key.removeprefix(COMPILED): tensor for key, tensor in checkpoint["model"].items()}
    theirs = {key: tensor for key, tensor in theirs.items() if not CAUSAL_MASK.search(key)}
    config = _config(checkpoint["model_args"], theirs, name)
    _check_claims(config, theirs, name)
    config.reference = {
        "bias": any(key.endswith(".bias") for key in theirs),
        "prefix": COMPILED if compiled else "",
        "iter_num": int(checkpoint.get("iter_num", 0)),
    }
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names, expected = _names(model), model.state_dict()
    state = {}
    for ours, reference in names.items():
        shape = expected[ours].t().shape if _transposed(model, ours) else expected[ours].shape
        if reference not in theirs and ours.endswith(".bias") and not config.reference["bias"]:
            state[ours] = torch.zeros_like(expected[ours])
        else:
            tensor = _weight(theirs, reference, shape, name)
            state[ours] = tensor.t() if _transposed(model, ours) else tensor
    if not torch.equal(theirs["lm_head.weight"], theirs["transformer.wte.weight"]):
        raise UserError(f"{name}: lm_head.weight and transformer.wte.weight differ, but the models here tie them")
    extra = sorted(theirs.keys() - set(names.values()))
    if extra:
        raise UserError(f"{name}: the tensor {extra[0]} belongs to no CRATE or GPT-2 model of the reference code")
    model.load_state_dict(state)
    return model.eval()


def _weight(theirs: dict[str, Tensor], key: str, shape: tuple[int, ...], name: Path | str) -> Tensor:
    """A tensor of the checkpoint, which has to be a weight of this shape."""
    if key not in theirs:
        raise UserError(f"{name}: the tensor {key} is missing; the checkpoint is not whole")
    tensor = theirs[key]
    if tensor.shape != shape:
        raise UserError(f"{name}: {key} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    if not tensor.is_floating_point():
        raise UserError(f"{name}: {key} is of {tensor.dtype}; a weight has to be of a floating-point format")
    if not tensor.isfinite().all():
        raise UserError(f"{name}: {key} holds NaN or infinite numbers; take a checkpoint from before they came")
    return tensor


def _check_claims(config: CrateConfig | GPT2Config, theirs: dict[str, Tensor], name: Path | str) -> None:
    """Compare model_args with the tensors before allocating memory for a number that may be wrong."""
    layers = {int(found[1]) for key in theirs if (found := re.match(r"transformer\.h\.(\d{1,6})\.", key))}
    if config.n_layer != max(layers, default=-1) + 1:
        raise UserError(f"{name}: model_args say n_layer = {config.n_layer}, the tensors {max(layers, default=-1) + 1}")
    for key, rows in zip(OUTER, (config.vocab_size, config.n_positions), strict=False):
        _weight(theirs, key, (rows, config.n_embd), name)
    if config.n_embd % config.n_head:
        raise UserError(f"{name}: model_args do not fit together (n_embd {config.n_embd}, n_head {config.n_head})")


def to_reference(model: PreTrainedModel) -> dict[str, Any]:
    """The nanoGPT-style checkpoint of one of our models, without optimiser state. UserError if it cannot be one."""
    config = model.config
    if not isinstance(config, CrateConfig | GPT2Config):
        raise UserError(f"a {config.model_type} model: the reference code has CRATE and GPT-2 only")
    if isinstance(config, GPT2Config) and config.activation_function != "relu":
        raise UserError(f"activation_function = {config.activation_function}: the reference code has relu only")
    if isinstance(config, CrateConfig):
        paper = CrateConfig()
        for field in CRATE_FIELDS:
            ours, theirs = getattr(config, field), getattr(paper, field)
            if ours != theirs:
                raise UserError(f"{field} = {ours}: the reference code has {theirs} only")
    reference = getattr(config, "reference", None) or {"bias": True, "prefix": "", "iter_num": 0}
    state = model.state_dict()
    names = _names(model)
    bias = reference["bias"] or any(state[ours].any() for ours in names if ours.endswith(".bias"))
    tensors = {
        reference["prefix"] + theirs: (state[ours].t() if _transposed(model, ours) else state[ours]).contiguous()
        for ours, theirs in names.items()
        if bias or not ours.endswith(".bias")
    }
    arguments = {name: getattr(config, name) for name in SIZES}
    arguments |= {"block_size": config.n_positions, "dropout": 0.0, "bias": bias}
    return {"model": tensors, "model_args": arguments, "iter_num": reference["iter_num"]}


def _config(arguments: dict[str, Any], theirs: dict[str, Tensor], name: Path | str) -> CrateConfig | GPT2Config:
    try:
        shape = {field: arguments[field] for field in SIZES}
        shape["n_positions"] = arguments["block_size"]
    except KeyError as error:
        raise UserError(f"{name}: model_args has no {error.args[0]!r}") from error
    for field, value in shape.items():
        if not _is_count(value, 1):
            reason = f"{field} = {value!r:.50} is not a number of 1 or more"
            raise UserError(f"{name}: model_args do not fit together ({reason})")
    if any(key.endswith("ista.weight") for key in theirs):
        try:
            return CrateConfig(**shape)
        except StrictDataclassError as error:
            raise UserError(f"{name}: model_args do not fit together ({last_line(error)})") from error
    if any(key.endswith("mlp.c_fc.weight") for key in theirs):
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(**shape, activation_function="relu", bos_token_id=None, eos_token_id=None)
    raise UserError(f"{name}: neither a CRATE (ista.weight) nor a GPT (mlp.c_fc.weight) of the reference code")


def _names(model: PreTrainedModel) -> dict[str, str]:
    """Every tensor of our state dict -> its name in the reference code."""
    block = CRATE_BLOCK if isinstance(model.config, CrateConfig) else GPT2_BLOCK
    pairs = dict(zip(OUTER, OUTER, strict=True))
    for layer in range(model.config.n_layer):
        stem = f"transformer.h.{layer}."
        pairs |= {stem + ours: stem + theirs for ours, theirs in block.items()}
    return {
        ours.replace("*", part): theirs.replace("*", part)
        for ours, theirs in pairs.items()
        for part in (("weight", "bias") if "*" in ours else ("",))
    }


def _transposed(model: PreTrainedModel, ours: str) -> bool:
    """transformers' GPT-2 stores its block matrices (in, out), the reference code (out, in)."""
    return isinstance(model.config, GPT2Config) and re.search(r"\.c_(attn|proj|fc)\.weight$", ours) is not None
