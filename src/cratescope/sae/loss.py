"""What sparse autoencoders learn from, as plain equations; sae/step.py has the same gradients without dense products.

Letters as in models/sae.py; B tokens in a batch, x centred and scaled to a mean squared norm of d, e = y - x.

    relu        mean |e|^2 + penalty mean |z|_1                            Bricken et al. 2023; decoder rows have norm 1
    topk        mean |e|^2 + aux AuxK, z the k largest of each token       Gao et al. 2024
    batchtopk   the same, z the B k largest of the batch                   Bussmann et al. 2024
    matryoshka  batchtopk, and mean |e_p|^2 for each prefix of p features  Bussmann et al. 2025: one choice for all p
    jumprelu    mean |e|^2 + penalty mean |z|_0, z = a where a > theta     Rajamanoharan et al. 2024

AuxK (Gao et al. 2024, appendix A.2): the dead features with the largest a, at most d / 2 a token, have to reconstruct
the error. s mean |a D_dead - (x - y)|^2, where x - y is taken as constant, b is not added again, and s is 1, or less
where fewer than d / 2 are dead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cratescope.models.sae import CoderConfig, SparseCoder


@dataclass(frozen=True)
class Losses:
    """The parts of a batch's loss, scalars, and its reconstruction (B, d)."""

    reconstruction: Tensor
    """mean |e|^2, over all prefixes."""
    penalty: Tensor
    aux: Tensor
    y: Tensor
    z: Tensor

    @property
    def total(self) -> Tensor:
        return self.reconstruction + self.penalty + self.aux


def levels(config: CoderConfig) -> list[int]:
    """Ends of the groups of features that reconstruct one after the other: the prefixes, and all."""
    return sorted({*config.prefixes, config.width}) if config.kind == "matryoshka" else [config.width]


def losses(
    coder: SparseCoder, x: Float[Tensor, "b d"], dead: Bool[Tensor, " m"], penalty_weight: float | None = None
) -> Losses:
    """The loss of a batch, to be differentiated by autograd. penalty_weight: the configuration's unless given."""
    config, seen = coder.config, coder.features(x)
    z, penalty = code_of_batch(coder, seen)
    penalty = penalty * (config.penalty if penalty_weight is None else penalty_weight)
    y, reconstruction = coder.bias.expand_as(x), x.new_zeros(())
    for low, high in zip([0, *levels(config)], levels(config), strict=False):
        y = y + z[:, low:high] @ coder.decoder[low:high]
        reconstruction = reconstruction + (y - x).square().sum(1).mean()
    return Losses(reconstruction, penalty, _aux(coder, seen, (x - y).detach(), dead), y, z)


def code_of_batch(coder: SparseCoder, seen: Float[Tensor, "b m"]) -> tuple[Float[Tensor, "b m"], Tensor]:
    """The code as it is while learning, and what is penalised: its mean L1 norm (relu) or its L0 (jumprelu)."""
    config = coder.config
    if config.kind == "jumprelu":
        z = _JumpReLU.apply(seen, coder.threshold, config.bandwidth)
        return z, _Step.apply(seen, coder.threshold, config.bandwidth).sum(1).mean()
    z = seen.relu()
    if config.kind == "relu":
        return z, z.sum(1).mean()
    rows = z if config.kind == "topk" else z.view(1, -1)
    largest = rows.topk(config.k * (len(z) // len(rows)), dim=1, sorted=False)
    return torch.zeros_like(rows).scatter(1, largest.indices, largest.values).view_as(z), z.new_zeros(())


def n_aux(config: CoderConfig, n_dead: int) -> int:
    """Dead features that reconstruct a token's error."""
    return min(config.d_in // 2, n_dead) if config.kind in ("topk", "batchtopk", "matryoshka") else 0


def aux_weight(config: CoderConfig, n_dead: int) -> float:
    return config.aux * min(n_dead / (config.d_in // 2), 1.0)


def _aux(
    coder: SparseCoder, seen: Float[Tensor, "b m"], error: Float[Tensor, "b d"], dead: Bool[Tensor, " m"]
) -> Tensor:
    n_dead = int(dead.sum())
    if not n_aux(coder.config, n_dead):
        return seen.new_zeros(())
    a = seen[:, dead]
    largest = a.topk(n_aux(coder.config, n_dead), dim=1, sorted=False)
    chosen = torch.zeros_like(a).scatter(1, largest.indices, largest.values)
    return aux_weight(coder.config, n_dead) * (chosen @ coder.decoder[dead] - error).square().sum(1).mean()


def in_window(a: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Where a threshold learns from a: the rectangle kernel of Rajamanoharan et al. 2024, section 4."""
    return (a - threshold).abs() < bandwidth / 2


class _Step(torch.autograd.Function):
    """1 where a > theta; d/d theta is taken as -rectangle / bandwidth, d/da as 0 (equation 12)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(a, threshold)
        ctx.bandwidth = bandwidth
        return (a > threshold).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        a, threshold = ctx.saved_tensors
        near = in_window(a, threshold, ctx.bandwidth)
        return None, -(grads[0] * near).sum(0) / ctx.bandwidth, None


class _JumpReLU(torch.autograd.Function):
    """a where a > theta, else 0; d/d theta is taken as -theta rectangle / bandwidth (equation 11)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(a, threshold)
        ctx.bandwidth = bandwidth
        return a * (a > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a, threshold = ctx.saved_tensors
        near = in_window(a, threshold, ctx.bandwidth)
        return grads[0] * (a > threshold), -threshold * (grads[0] * near).sum(0) / ctx.bandwidth, None
