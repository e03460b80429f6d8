"""One coder while it learns: optimiser, learning rate, dead features, thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cratescope.models.sae import SparseCoder
from cratescope.sae.step import Step, gradients

CLIP = 1.0
"""Largest norm of a gradient, as in SAELens."""
BETAS = (0.9, 0.999)
THRESHOLD_RATE = 0.01
"""Weight of the newest batch in batchtopk's threshold, once there were 100."""
FIRST_THRESHOLD = 0.01
"""Of jumprelu, as in SAELens."""
RESAMPLINGS = 4
"""Times that dead features of relu are replaced, evenly spaced over the first half (Bricken et al. 2023: 4)."""
ENCODER_SHARE = 0.2
"""Norm of a resampled feature's encoder row, of the mean norm of those alive (Bricken et al. 2023)."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn; the same for all coders of a run."""

    steps: int
    learning_rate: float
    warmup: float = 0.05
    """Share of the steps over which learning rate and penalty grow from 0."""
    decay: float = 0.2
    """Share of the steps, the last ones, over which the learning rate falls to 0."""
    dead_after: int = 100
    """Steps without being active after which a feature is dead (topk, batchtopk, matryoshka)."""
    seed: int = 0
    dtype: torch.dtype = torch.float32
    """Of dense products."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        last = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(self.growth(step), last, 1.0)

    def growth(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))

    def resamples(self, step: int) -> bool:
        """Whether features are resampled after this many steps."""
        every = self.steps // (2 * RESAMPLINGS)
        return bool(every) and step % every == 0 and 0 < step <= self.steps // 2


class Learner:
    """A coder, its Adam, and for how many steps each feature has been silent."""

    def __init__(self, coder: SparseCoder, plan: Plan) -> None:
        self.coder, self.plan, self.steps = coder, plan, 0
        self.weights = {name: weight for name, weight in coder.named_parameters() if weight.requires_grad}
        if coder.config.kind == "jumprelu":
            torch.nn.init.constant_(coder.threshold, FIRST_THRESHOLD)
        self.adam = torch.optim.Adam(self.weights.values(), lr=plan.learning_rate, betas=BETAS, fused=True)
        for weight in self.weights.values():  # there from the first checkpoint on
            self.adam.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self.silent = torch.zeros(coder.config.width, dtype=torch.int64, device=coder.bias.device)

    @property
    def dead_share(self) -> float:
        return float((self.silent >= self.dead_after).float().mean())

    @property
    def dead_after(self) -> int:
        """Steps; half of the time between two resamplings for relu, as in Bricken et al. 2023."""
        if self.coder.config.kind != "relu":
            return self.plan.dead_after
        return max(1, self.plan.steps // (4 * RESAMPLINGS))

    @torch.no_grad()
    def step(self, x: Float[Tensor, "b d"]) -> Step:
        """Learn from a batch of activations, centred and scaled to a mean squared norm of d."""
        coder, plan = self.coder, self.plan
        found = gradients(coder, x, self.silent >= self.dead_after, plan.dtype, plan.growth(self.steps))
        self._apply()
        self.silent += 1
        self.silent[found.fired] = 0
        self.steps += 1
        if coder.config.kind in ("batchtopk", "matryoshka") and found.smallest:
            coder.threshold.lerp_(torch.full_like(coder.threshold, found.smallest), max(THRESHOLD_RATE, 1 / self.steps))
        if coder.config.kind == "relu" and plan.resamples(self.steps):
            self._resample(x, found.error)
        return found

    def _apply(self) -> None:
        """One step of Adam that leaves decoder rows at norm 1 (Bricken et al. 2023, Gao et al. 2024).

        What would change their norm only is taken out of the gradient beforehand, so that Adam does not see it.
        """
        coder = self.coder
        grad = coder.decoder.grad
        if grad is not None:  # as it may be where the decoder is frozen
            grad.addcmul_(coder.decoder, torch.linalg.vecdot(grad, coder.decoder)[:, None], value=-1)
        torch.nn.utils.clip_grad_norm_(self.weights.values(), CLIP)
        self.adam.param_groups[0]["lr"] = self.plan.rate(self.steps)
        self.adam.step()
        if not coder.config.frozen:
            coder.decoder.div_(coder.decoder.norm(dim=1, keepdim=True))
        if coder.config.kind == "jumprelu":
            coder.threshold.clamp_(min=0)  # below it negative values would be let through

    def _resample(self, x: Tensor, error: Tensor) -> None:
        """Point dead features at badly reconstructed tokens, drawn by their squared loss (Bricken et al. 2023)."""
        coder, dead = self.coder, (self.silent >= self.dead_after).nonzero().squeeze(1)
        if not len(dead) or len(dead) == coder.config.width:
            return
        chance = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.steps)
        by_loss = error.square().sum(1).square().double().cpu().clamp_min(1e-30)
        chosen = torch.multinomial(by_loss, len(dead), replacement=True, generator=chance).to(x.device)
        rows = torch.nn.functional.normalize(x[chosen] - coder.bias, dim=1)
        alive = self.silent < self.dead_after
        coder.decoder[dead] = rows
        coder.encoder[dead] = rows * (ENCODER_SHARE * coder.encoder[alive].norm(dim=1).mean())
        coder.encoder_bias[dead] = 0
        for weight in (coder.decoder, coder.encoder, coder.encoder_bias):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.adam.state[weight][moment][dead] = 0
        self.silent[dead] = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        found = {f"coder.{name}": tensor for name, tensor in self.coder.state_dict().items()}
        for name, weight in self.weights.items():
            found |= {f"adam.{name}.{moment}": tensor for moment, tensor in self.adam.state[weight].items()}
        return {name: tensor.detach().cpu() for name, tensor in (found | {"silent": self.silent}).items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Become as the learner was whose `state` it is."""
        self.coder.load_state_dict({name: state[f"coder.{name}"] for name in self.coder.state_dict()})
        for name, weight in self.weights.items():
            for moment, tensor in self.adam.state[weight].items():
                tensor.copy_(state[f"adam.{name}.{moment}"])
        self.silent.copy_(state["silent"])
        self.steps = int(next(iter(self.adam.state.values()))["step"])
