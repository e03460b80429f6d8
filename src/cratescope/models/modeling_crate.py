"""CRATE, a causal language model whose feed-forward block is a sparse-coding step (paper section 2), and its variants.

Letters are the paper's. Tensors: Z tokens (B, T, d); V projected tokens (B, K, T, d/K); A codes (B, T, h).
Weights: U subspaces (d, d) of all K heads; W output matrix (d, d); D dictionary, stored (h, d), an atom a row.
Scalars: t steps, eta step size, lam sparsity penalty.

A block's attention is called `mssa` and its feed-forward block `ista` whichever variant they are, with the neurons at
`ista.codes`, so that what reads one model reads all.

Self-contained: this file and configuration_crate.py are all a published checkpoint needs.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_crate import CrateConfig


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(Q K^T scaling + mask) V in plain operations; returns ((B, T, K, d/K), weights (B, K, T, S))."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1)
    return (weights @ value).transpose(1, 2), weights


class ResidualOutput(nn.Linear):
    """A linear map whose output is added to the residual stream; its weights start smaller the deeper the model."""


class Lag(nn.Module):
    """Mix into query and key of a token those of the token before it.

    query_i + alpha (query_{i-1} - query_i), key_j + beta (key_{j-1} - key_j), with alpha and beta per head. As they
    start, of every four heads one compares tokens with tokens, one asks what the token before would ask, and two look
    for what came after tokens like this one. Before the first token of a text there is nothing: 0 is mixed in.
    """

    def __init__(self, config: CrateConfig):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(config.n_head))
        self.beta = nn.Parameter(torch.empty(config.n_head))

    def forward(self, query, key, place):
        """query, key (B, K, S, d/K) of all tokens seen -> those of the tokens now (B, K, T, d/K), and all keys."""
        mix = LagFunction.apply if self.training and torch.is_grad_enabled() else self.mixed
        query, key = mix(query, self.alpha, place.starts), mix(key, self.beta, place.starts)
        return (query if place.rows is None else query.index_select(2, place.rows)), key

    @staticmethod
    def mixed(X, share, starts):
        """X (B, K, S, d/K), 0 at padding; share (K,); starts (B, S) or None -> (B, K, S, d/K)."""
        before = F.pad(X, (0, 0, 1, -1))
        if starts is not None:
            before = before.masked_fill(starts[:, None, :, None], 0)
        return X + share.to(X.dtype).view(-1, 1, 1) * (before - X)


class LagFunction(torch.autograd.Function):
    """Lag.mixed for training, with its gradient by hand, in fewer passes over memory.

    With G the gradient by the output, that by X_i is G_i - share G_i + share G_{i+1}.
    """

    @staticmethod
    def forward(ctx, X, share, starts):
        """As of Lag.mixed."""
        ctx.dtype = share.dtype
        # Whole rows of a head, as they stand in memory: faster than a number per head.
        share = share.to(X.dtype).view(-1, 1, 1).repeat(1, 1, X.shape[-1])
        starts = None if starts is None else starts[:, None, :, None]
        change = -X
        change[:, :, 1:] += X[:, :, :-1]
        if starts is not None:
            change = torch.where(starts, -X, change)
        ctx.save_for_backward(change, share, starts)
        return torch.addcmul(X, change, share)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        change, share, starts = ctx.saved_tensors
        passed = G * share
        grad_X = G - passed
        if starts is not None:
            passed = passed.masked_fill(starts, 0)
        grad_X[:, :, :-1] += passed[:, :, 1:]
        return grad_X, (G * change).sum((0, 2)).sum(-1, dtype=ctx.dtype), None


class Bilinear(nn.Module):
    """Let a head compare tokens by V_i^T (I + N) V_j + b^T V_j instead of V_i^T V_j, with N and b learned, 0 at first.

    Values stay, and so does the one projection: what is compared is still what a token is in the head's subspace.
    """

    def __init__(self, config: CrateConfig):
        super().__init__()
        head_dim = config.n_embd // config.n_head
        self.N = nn.Parameter(torch.empty(config.n_head, head_dim, head_dim))
        self.b = nn.Parameter(torch.empty(config.n_embd))  # one dimension: no weight decay

    def forward(self, query):
        """(B, K, T, d/K) -> the same shape."""
        return query + query @ self.N.to(query.dtype) + self.b.to(query.dtype).view(-1, 1, query.shape[-1])


@dataclass(frozen=True)
class Place:
    """Where the T tokens of a forward pass stand, for `Lag`.

    rows (T,): among those in the cache; None without one. real (B, T): 0 at padding; None where there is none. starts
    (B, T): which begin a text, where position_ids say so: several texts may follow each other in a row.
    """

    rows: torch.Tensor | None = None
    real: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    @classmethod
    def of(cls, Z, past, attention_mask, position_ids):
        """Z (B, T, d); past: tokens in a cache, None without one; mask (2 or 4 dimensions) and positions as given."""
        rows = torch.arange(Z.shape[1], device=Z.device) + (0 if past is None else past)
        real = None if attention_mask is None else attention_mask.index_select(-1, rows)
        if real is not None and real.ndim == 4:  # which tokens see which: padding does not even see itself
            real = real[:, 0].diagonal(dim1=1, dim2=2)
            real = real if real.dtype == torch.bool else real == 0
        if past is not None:
            return cls(rows, real)
        return cls(None, real, None if position_ids is None else position_ids == 0)


class MSSA(nn.Module):
    """Multi-head subspace self-attention: V_k = U_k^T Z; W concat_k softmax(causal(V_k V_k^T / sqrt(d/K))) V_k.

    One projection serves as query, key and value (paper section 2), so one tensor a layer is all there is to cache.
    """

    projections = 1

    def __init__(self, config: CrateConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.n_embd // config.n_head
        self.U = nn.Linear(config.n_embd, self.projections * config.n_embd, bias=self.projections > 1)
        self.W = ResidualOutput(config.n_embd, config.n_embd, bias=True)
        self.lag = Lag(config) if config.lag else None
        self.bilinear = Bilinear(config) if config.bilinear else None

    def forward(
        self, Z, attention_mask=None, past_key_values: Cache | None = None, place: Place | None = None, **kwargs
    ):
        """(B, T, d) -> ((B, T, d), attention weights where the attention implementation gives them)."""
        B, T, d = Z.shape
        place = place or Place()
        V = self.U(Z)
        if self.lag is not None and place.real is not None:  # what comes after padding comes after nothing
            V = V * place.real[:, :, None].to(V.dtype)
        seen = [part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in V.split(d, -1)]
        query = seen[0]
        if past_key_values is not None:
            seen = self.recall(past_key_values, seen)
        key, value = seen[-2:] if self.projections > 1 else (seen[0], seen[0])
        if self.lag is not None:
            query, key = self.lag(seen[0], key, place)
        if self.bilinear is not None:
            query = self.bilinear(query)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attend(
            self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs
        )
        return self.W(out.reshape(B, T, d)), weights

    def recall(self, cache, now):
        """Keep what the tokens `now` project to, a list of (B, K, T, d/K), and give that of all tokens so far."""
        # The library's caches hold a key and a value; ours are the same tensor, so the value kept has no columns.
        return [cache.update(now[0], now[0][..., :0], self.layer_idx)[0]]


class MHSA(MSSA):
    """GPT-2's attention: query, key and value of a head are three projections with biases, U (3 d, d)."""

    projections = 3

    def recall(self, cache, now):
        """As of MSSA. Only with lag are queries asked for again, and then kept beside the keys."""
        query, key, value = now
        if self.lag is None:
            return [query, *cache.update(key, value, self.layer_idx)]
        both, value = cache.update(torch.cat([query, key], -1), value, self.layer_idx)
        return [*both.chunk(2, -1), value]


class ISTA(nn.Module):
    """t proximal gradient steps on the non-negative lasso min_A ||X - D A||^2 / 2 + lam ||A||_1, A >= 0.

    A_0 = 0;  A_{k+1} = relu(A_k + eta D^T (X - D A_k) - eta lam);  output D A_t (paper section 2).

    The neurons are the entries of A_t. `codes` and `first_codes` do nothing but give hooks a place to read or edit
    A_t and A_1.
    """

    def __init__(self, config: CrateConfig):
        super().__init__()
        self.t, self.lam = config.ista_steps, config.ista_lambda
        self.eta = nn.Parameter(torch.empty(1)) if config.ista_step_learned else config.ista_step_size
        self.D = nn.Parameter(torch.empty(config.n_atoms, config.n_embd))
        self.D_out = None if config.ista_tied else nn.Parameter(torch.empty(config.n_atoms, config.n_embd))
        self.gain = nn.Parameter(torch.empty(config.n_atoms)) if config.ista_gain else None
        self.first_codes = nn.Identity()
        self.codes = nn.Identity()
        self.reconstruction_weight = config.reconstruction_weight
        self.sums = None  # where a list: gets the penalty of all tokens of every pass of training, with its gradient

    def atoms(self):
        """D (h, d) as it is used; `read` and `write` are the products with it."""
        return self.D

    def read(self, R):
        """R (..., d) -> D^T R (..., h)."""
        return F.linear(R, self.D)

    def write(self, A):
        """A (..., h) -> D A (..., d)."""
        return A @ self.D

    def threshold(self):
        """lam, for all atoms or per atom (h,)."""
        return self.lam

    def step(self, X, A=None):
        """One proximal gradient step from A (B, T, h), or from zero; X (B, T, d)."""
        residual = X if A is None else X - self.write(A)
        ascent = self.eta * self.read(residual) - self.eta * self.threshold()
        return F.relu(ascent if A is None else A + ascent)

    def encode(self, X):
        """X (B, T, d) -> A_t (B, T, h)."""
        A = self.first_codes(self.step(X))
        for _ in range(self.t - 1):
            A = self.step(X, A)
        return self.codes(A)

    def decode(self, A):
        """A (..., h) -> the output (..., d)."""
        if self.D_out is not None:
            return A @ self.D_out
        return self.write(A if self.gain is None else A * self.gain)

    def decoder(self):
        """(h, d): row i is what the output gets of atom i's code."""
        if self.D_out is not None:
            return self.D_out
        return self.atoms() if self.gain is None else self.gain[:, None] * self.atoms()

    def forward(self, X):
        """X (B, T, d) -> D A_t (B, T, d)."""
        learning = self.training and torch.is_grad_enabled()
        if learning and not is_used(self.first_codes) and not is_used(self.codes):
            decoder = None if self.D_out is None and self.gain is None else self.decoder()
            out, A, total = self.fused(X, decoder, summed=self.sums is not None)
        else:
            A = self.encode(X)
            out, total = self.decode(A), A.sum(dtype=torch.float32)
        if learning:
            self.watch(A.detach())
            if self.sums is not None:
                self.sums.append(total + self.unexplained(X) if self.reconstruction_weight else total)
        return out

    def unexplained(self, X):
        """reconstruction_weight / 2 ||X - D A_t||^2, summed over tokens, for X as it is.

        Its gradient stops at X: if tokens could give way they would become easier to code, and tell less.
        """
        X = X.detach()
        reconstructed, _, _ = self.fused(X, None, summed=False)
        return (X - reconstructed).square().sum(dtype=torch.float32) * (self.reconstruction_weight / 2)

    def watch(self, A):
        """See the codes (..., h) of every pass of training."""

    def fused(self, X, decoder, summed):
        """A_t decoder, codes A_t (without gradient) and their sum as one operation, for training; no hook sees codes.

        decoder: (h, d), or None for the dictionary. summed: whether the sum is wanted; None stands for it otherwise.
        """
        device, parts = X.device.type, [X.reshape(-1, X.shape[-1]), self.atoms(), decoder, self.threshold()]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            parts = [part.to(dtype) if torch.is_tensor(part) else part for part in parts]
        *matrices, lam = parts
        out, A, total = ISTAFunction.apply(*matrices, self.t, self.eta, lam, summed)
        return out.view(X.shape), A, total


# PyTorch converts every number for operations on bfloat16 on a CPU, and the whole tensor for sums in float32; both take
# longer than the products, which are native. Numbers that are not negative are ordered as their bits are.


def is_converted(A):
    """Whether operations on A convert its numbers."""
    return A.device.type == "cpu" and A.element_size() == 2


def are_positive(A):
    """1 where A > 0 and else 0, for a bfloat16 or float16 A that is not negative: int16 of the same shape."""
    return A.view(torch.int16).clamp(0, 1)


def keep_where_positive(G, A):
    """G where A > 0 and else 0, for A that is not negative; G may be overwritten."""
    if not is_converted(A):
        return torch.ops.aten.threshold_backward(G, A, 0)
    G.view(torch.int16).mul_(are_positive(A))
    return G


def count_positive(A):
    """On how many rows each column of A (n, h), not negative, is positive: float32 (h,), exact to 2^24 rows."""
    if not is_converted(A):
        return A.sign().sum(0, dtype=torch.float32)
    counts = [are_positive(part).sum(0, dtype=torch.int16) for part in cached_parts(A)]
    return torch.stack(counts).sum(0, dtype=torch.float32)


def sum_of_all(A):
    """The sum of A (n, h), in float32."""
    if not is_converted(A):
        return A.sum(dtype=torch.float32)
    return torch.stack([part.sum(dtype=torch.float32) for part in cached_parts(A)]).sum()


def cached_parts(A):
    """A (n, h) in parts of rows of which a core's cache holds a copy."""
    return A.split(max(1, min(2**15 - 1, 2**17 // A.shape[1])))


def is_used(place):
    """Whether somebody reads or edits what passes this module, which does nothing itself."""
    hooks = (place._forward_hooks, place._forward_pre_hooks, place._backward_hooks, place._backward_pre_hooks)
    return any(hooks) or type(place) is not nn.Identity


class ISTAFunction(torch.autograd.Function):
    """ISTA.forward as one operation with its gradient by hand: 2 t products forward, 4 t backward, no copy of them.

    Its outputs are D A_t, the codes A_t without gradient, and the sum of all of them for a penalty, where wanted.
    Of every step k only the residual R_k = X - D A_k and the codes A_{k+1} are kept; where a code is zero its gradient
    is, so no masks are needed. With G the gradient by the output and H_k that by the argument of the k-th relu:
    H_k = [A_{k+1} > 0] (gradient by A_{k+1}), gradient by R_k = eta H_k D, by A_k = H_k - (gradient by R_k) D^T. Where
    H_k is not zero, A_{k+1} - A_k is eta times what a learned eta is multiplied with.
    """

    @staticmethod
    def forward(ctx, X, D, D_out, t, eta, lam, summed):
        """X (n, d), D, D_out (h, d) or None for D, lam a number or (h,) -> output (n, d), codes (n, h), their sum.

        summed: whether the sum is wanted; it is None otherwise.
        """
        eta = float(eta)
        shrink = -eta * lam if torch.is_tensor(lam) else X.new_full((), -eta * lam)
        residuals, codes = [X], [torch.addmm(shrink, X, D.t(), alpha=eta).relu_()]
        for _ in range(t - 1):
            residuals.append(torch.addmm(X, codes[-1], D, alpha=-1))
            codes.append(codes[-1].addmm(residuals[-1], D.t(), alpha=eta).add_(shrink).relu_())
        ctx.eta, ctx.untied = eta, D_out is not None
        ctx.save_for_backward(D, D_out, *residuals, *codes)
        ctx.mark_non_differentiable(codes[-1])
        ctx.set_materialize_grads(False)
        return codes[-1] @ (D if D_out is None else D_out), codes[-1], sum_of_all(codes[-1]) if summed else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G, _, by_total):
        D, D_out, *saved = ctx.saved_tensors
        eta, t = ctx.eta, len(saved) // 2
        residuals, codes = saved[:t], saved[t:]
        G = torch.zeros_like(residuals[0]) if G is None else G
        # Products over tokens are taken transposed: a tenth faster in bfloat16 on a CPU.
        grad_out = G.t() @ codes[-1]
        grad_D = torch.zeros_like(grad_out) if ctx.untied else grad_out
        back = (D_out if ctx.untied else D).t()
        grad_A = G @ back if by_total is None else torch.addmm(by_total.to(G.dtype), G, back)
        grad_X, grad_eta = torch.zeros_like(G), None
        for k in reversed(range(t)):
            H = keep_where_positive(grad_A, codes[k])
            if ctx.needs_input_grad[4]:
                grown = codes[k] - codes[k - 1] if k else codes[k]
                by_step = (H * grown).sum(dtype=torch.float32).view(1) / (eta or 1.0)
                grad_eta = by_step if grad_eta is None else grad_eta + by_step
            grad_D.addmm_(residuals[k].t(), H, alpha=eta)
            if not k:
                if ctx.needs_input_grad[0]:
                    grad_X.addmm_(H, D, alpha=eta)
                break
            grad_R = (H @ D).mul_(eta)
            grad_X.add_(grad_R)
            grad_D.addmm_(grad_R.t(), codes[k - 1], alpha=-1)
            grad_A = H.addmm_(grad_R, D.t(), alpha=-1)
        return grad_X, grad_D.t(), grad_out.t() if ctx.untied else None, None, grad_eta, None, None


class LISTA(ISTA):
    """ISTA with atoms of norm 1 and thresholds theta_i that training regulates; untied and with skip, "learned" ISTA.

    D^_i = D_i / ||D_i||;  A_{k+1} = relu(A_k + eta D^^T (X - D^ A_k) - eta theta);  output P A_t, or D^ A_t if tied.

    The LayerNorm before it has no gain, so that ||X||^2 = d, and theta is in standard deviations of what a random atom
    sees. Homeostasis (`regulate`, once after each optimiser step), with p_i the share of its tokens on which A_i > 0:
    theta_i += pace rate (clip(ln(p_i / high), 0, 1) - clip(ln(low / p_i), 0, 1)).
    """

    theta: torch.Tensor

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.low, self.high, self.rate = config.density_low, config.density_high, config.homeostasis_rate
        self.register_buffer("theta", torch.empty(config.n_atoms))
        # No buffers: DDP would overwrite those of a process by those of the first.
        self.active, self.seen = None, 0

    def atoms(self):
        """D^ (h, d)."""
        return F.normalize(self.D, dim=-1)

    # Outside of training D is only read: to write D^ for a few tokens would take longer than all else here.

    def norms(self):
        """||D_i|| (h,)."""
        return torch.linalg.vector_norm(self.D, dim=-1).clamp_min(1e-12)

    def read(self, R):
        """R (..., d) -> D^^T R (..., h)."""
        return F.linear(R, self.D) / self.norms()

    def write(self, A):
        """A (..., h) -> D^ A (..., d)."""
        return (A / self.norms()) @ self.D

    def decode(self, A):
        """A (..., h) -> the output (..., d)."""
        if self.D_out is None or not is_gathered(A, self.D_out):
            return super().decode(A)
        return gather(A.flatten(0, -2), self.D_out).view(*A.shape[:-1], self.D_out.shape[1])

    def threshold(self):
        """theta (h,)."""
        return self.theta

    def watch(self, A):
        """Count on how many tokens each atom is active; A (..., h). Padding, if there is any, counts as tokens do."""
        active = count_positive(A.flatten(0, -2))
        self.active = active if self.active is None else self.active + active
        self.seen += A.numel() // A.shape[-1]

    @torch.no_grad()
    def regulate(self, total, pace):
        """Move the thresholds by what was counted since the last time; `total` sums a tensor over processes."""
        if self.active is None:
            return
        counts = total(torch.cat([self.active, self.active.new_tensor([self.seen])]).double())
        self.active, self.seen = None, 0
        p = counts[:-1] / counts[-1]
        rise, fall = (p / self.high).log().clamp(0, 1), (self.low / p).log().clamp(0, 1)
        self.theta += pace * self.rate * (rise - fall)


FEW_TOKENS, MANY_WEIGHTS, SPARSE = 4, 2**20, 0.05
"""Where `gather` was measured to be about twice as fast as the product or more (benchmarks/sparse.py): up to so many
tokens, from so many weights, up to such a share of active codes, on a CPU."""


def is_gathered(A, P):
    """Whether the rows of P (h, d) that the codes A (..., h) need are had faster than the whole product."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or A.device.type != "cpu" or A.dtype != torch.float32:
        return False
    if A.numel() > FEW_TOKENS * len(P) or P.numel() < MANY_WEIGHTS:
        return False
    return bool(A.count_nonzero() <= SPARSE * A.numel())


def gather(A, P):
    """A P of A (n, h), P (h, d), reading only the rows of P where A is not 0."""
    tokens, atoms = A.nonzero(as_tuple=True)
    ends = torch.bincount(tokens, minlength=len(A)).cumsum(0)
    how = {"mode": "sum", "per_sample_weights": A[tokens, atoms], "include_last_offset": True}
    return F.embedding_bag(atoms, P, F.pad(ends, (1, 0)), **how)


class MLP(nn.Module):
    """GPT-2's feed-forward block with ReLU: A = relu(D X + b), output P A + c. `codes` and `sums` are as of ISTA."""

    def __init__(self, config: CrateConfig):
        super().__init__()
        self.D = nn.Linear(config.n_embd, config.n_atoms)
        self.P = ResidualOutput(config.n_atoms, config.n_embd)
        self.codes = nn.Identity()
        self.sums = None

    def forward(self, X):
        """(B, T, d) -> (B, T, d)."""
        A = self.codes(F.relu(self.D(X)))
        if self.training and self.sums is not None and torch.is_grad_enabled():
            self.sums.append(A.sum(dtype=torch.float32))
        return self.P(A)


ATTENTION = {"mssa": MSSA, "mhsa": MHSA}
FEED_FORWARD = {"ista": ISTA, "lista": LISTA, "mlp": MLP}


class CrateBlock(GradientCheckpointingLayer):
    """Z' = Z + MSSA(LN(Z));  Z_next = ISTA(LN(Z')), with the skip connection around MSSA only (paper section 2)."""

    def __init__(self, config: CrateConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mssa = ATTENTION[config.attention](config, layer_idx)
        affine = config.feed_forward != "lista"
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, elementwise_affine=affine)
        self.ista = FEED_FORWARD[config.feed_forward](config)
        self.skip = config.ista_skip

    def forward(self, Z, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        """(B, T, d) -> (B, T, d)."""
        Z = Z + self.mssa(self.ln_1(Z), attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)[0]
        out = self.ista(self.ln_2(Z))
        return Z + out if self.skip else out


class CratePreTrainedModel(PreTrainedModel):
    """Weight initialisation of paper section 2, and what the library may do with this model."""

    config_class = CrateConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrateBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CrateBlock, "attentions": OutputRecorder(MSSA, layer_name=".mssa", index=1)}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        small = std / math.sqrt(2 * self.config.n_layer)
        if isinstance(module, ResidualOutput):
            init.normal_(module.weight, mean=0.0, std=small)
        elif isinstance(module, LISTA):
            init.normal_(module.D, mean=0.0, std=std)
            if module.D_out is not None:
                init.normal_(module.D_out, mean=0.0, std=small)
            init.constant_(module.theta, module.lam)
        elif isinstance(module, ISTA):
            for dictionary in (module.D, module.D_out):
                if dictionary is not None:
                    init.kaiming_uniform_(dictionary, a=0.0, nonlinearity="relu")
        elif isinstance(module, Lag):
            # One of every four heads has the query of the token before, two its key.
            kind = torch.arange(self.config.n_head, device=module.alpha.device) % 4
            init.copy_(module.alpha, (kind == 1).to(module.alpha.dtype))
            init.copy_(module.beta, (kind >= 2).to(module.beta.dtype))
        elif isinstance(module, Bilinear):
            init.zeros_(module.N)
            init.zeros_(module.b)
        if isinstance(module, ISTA) and torch.is_tensor(module.eta):
            init.constant_(module.eta, self.config.ista_step_size)
        if isinstance(module, ISTA) and module.gain is not None:  # what is added to a token starts small
            init.constant_(module.gain, small * math.sqrt(self.config.n_embd) if self.config.ista_skip else 1.0)

    def regulate(self, total=lambda counts: counts, pace=1.0):
        """Homeostasis of `LISTA`, for the trainer to call once after each optimiser step.

        total: sums a tensor of counts over the processes, where there are several.
        pace: the learning rate by its peak. Thresholds that move on when weights no longer follow cost loss.
        """
        for module in self.modules():
            if isinstance(module, LISTA):
                module.regulate(total, pace)


class CrateModel(CratePreTrainedModel):
    """Token and position embeddings, L blocks, final LayerNorm."""

    _input_embed_layer = "wte"

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([CrateBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) or inputs_embeds (B, T, d); attention_mask (B, past + T) with 0 at padding.

        With lag, texts that follow each other in a row have to be told apart by position_ids, each from 0, and
        use_cache=False: what is in a cache is one text.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        Z = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if self.config.lag:
            cached = None if past_key_values is None else past
            kwargs["place"] = Place.of(Z, cached, attention_mask, position_ids)
        if position_ids is None:
            if not torch.is_tensor(past) and past + Z.shape[1] > self.config.n_positions:
                raise ValueError(
                    f"{past + Z.shape[1]} tokens are more than this model's context of {self.config.n_positions}"
                )
            position_ids = (torch.arange(Z.shape[1], device=Z.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=Z,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        Z = Z + self.wpe(position_ids)
        for block in self.h:
            Z = block(
                Z,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(Z), past_key_values=past_key_values if use_cache else None
        )


class CrateForCausalLM(CratePreTrainedModel, GenerationMixin):
    """CrateModel with an output head tied to the token embedding, without bias."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.transformer = CrateModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """labels (B, T) are shifted inside; -100 is left out. logits_to_keep: only the last n positions, 0 for all."""
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        Z = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(Z[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["CrateForCausalLM", "CrateModel", "CratePreTrainedModel"]
