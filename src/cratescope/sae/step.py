"""The gradients of sae/loss.py where only the encoder's forward product is dense.

A token has some tens of active features of thousands. Once they are known, the reconstruction is a weighted sum of
their decoder rows, and the gradients are sums over the tokens where a feature is active (n active entries in all):

    y_i = b + sum_j z_ij D_j            gathers n rows of D
    dz_ij = g_i D_j                     n dot products, g = 2 e / B
    dD_j = sum_i z_ij g_i               gathers n rows of g
    dE_j = sum_i da_ij (x_i - b)        gathers n rows of x - b;  da = dz where a is active

instead of four dense products of B m d multiply-adds each.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from cratescope.models.sae import CoderConfig, SparseCoder
from cratescope.sae.loss import aux_weight, in_window, levels, losses, n_aux

DENSE = 1 / 16
"""Share of active entries from which dense products are faster: a coder by L1 or thresholds starts with half."""
GROUP = 32
"""Entries of which the largest is found first."""
FULL = 0.9
"""Share of groups with an active entry from which more than DENSE entries are expected to be."""


@dataclass(frozen=True)
class Step:
    """What a batch showed besides the gradients, which are in the parameters' .grad."""

    reconstruction: float
    """mean |e|^2, over all prefixes."""
    penalty: float
    aux: float
    error: Float[Tensor, "b d"]
    """y - x."""
    fired: Bool[Tensor, " m"]
    """Features that were active on any token."""
    l0: float
    """Active features per token."""
    smallest: float
    """Smallest active value, of which batchtopk's threshold is the mean; 0 where nothing was active."""

    @property
    def loss(self) -> float:
        return self.reconstruction + self.penalty + self.aux


@dataclass(frozen=True)
class Entries:
    """Active entries (row, column, what the feature sees) of a batch of tokens, ordered by row."""

    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    a: Float[Tensor, " n"]

    def keep(self, chosen: Tensor) -> Entries:
        return Entries(self.rows[chosen], self.columns[chosen], self.a[chosen])


@torch.no_grad()
def gradients(
    coder: SparseCoder,
    x: Float[Tensor, "b d"],
    dead: Bool[Tensor, " m"],
    dtype: torch.dtype = torch.float32,
    growth: float = 1.0,
) -> Step:
    """Set the gradients of a batch's loss.

    dtype: of the dense products; all sums and weights are float32. growth: share of the penalty's weight.
    """
    batch = _Batch(coder, x, x - coder.bias, dead, dtype, growth * coder.config.penalty)
    entries = _entries(batch)
    return _dense(batch) if entries is None else _sparse(batch, entries)


@dataclass(frozen=True)
class _Batch:
    """What all parts of a step are given."""

    coder: SparseCoder
    x: Float[Tensor, "b d"]
    centred: Float[Tensor, "b d"]
    dead: Bool[Tensor, " m"]
    dtype: torch.dtype
    penalty: float


def _dense(batch: _Batch) -> Step:
    coder, x = batch.coder, batch.x
    mixed = torch.autocast(x.device.type, batch.dtype, enabled=batch.dtype != torch.float32)
    with torch.enable_grad(), mixed:
        found = losses(coder, x, batch.dead, batch.penalty)
        wanted = [weight for weight in coder.parameters() if weight.requires_grad]
        for weight, grad in zip(wanted, torch.autograd.grad(found.total, wanted), strict=True):
            weight.grad = grad
    reconstruction, penalty, aux = (float(part.detach()) for part in (found.reconstruction, found.penalty, found.aux))
    active = found.z.detach() > 0
    return Step(reconstruction, penalty, aux, found.y.detach() - x, active.any(0), int(active.sum()) / len(x), 0.0)


def _sparse(batch: _Batch, entries: Entries) -> Step:
    coder, config, n = batch.coder, batch.coder.config, len(batch.x)
    active = entries.a > (coder.threshold[entries.columns] if config.kind == "jumprelu" else 0)
    z = entries.a * active
    error, upstream, dz, reconstruction = _reconstruct(coder, batch.x, entries, z)
    da = dz * active
    if config.kind == "relu":
        da += active * (batch.penalty / n)
    if config.kind == "jumprelu":
        coder.threshold.grad = _threshold_grad(batch, entries, dz)
    by_feature = _ByFeature(entries, config.width)
    coder.decoder.grad = _decoder_grad(config, by_feature, z, upstream)
    coder.encoder.grad = by_feature.sums(da, batch.centred)
    coder.encoder_bias.grad = torch.zeros_like(coder.encoder_bias).index_add_(0, entries.columns, da)
    coder.bias.grad = upstream[0].sum(0) - coder.encoder_bias.grad @ coder.encoder
    aux = _aux(batch, error)
    n_active = int(active.sum())
    penalty = {"relu": float(z.sum()), "jumprelu": n_active}.get(config.kind, 0) * batch.penalty / n
    fired = torch.zeros_like(batch.dead)
    fired[entries.columns[active]] = True
    smallest = float(z[active].min()) if n_active else 0.0
    return Step(reconstruction, penalty, aux, error, fired, n_active / n, smallest)


def _entries(batch: _Batch) -> Entries | None:
    """The entries that are active, and for jumprelu those from which thresholds learn; None if they are many."""
    coder, config = batch.coder, batch.coder.config
    shift: Tensor = coder.encoder_bias
    if config.kind == "jumprelu":  # all thresholds at 0, for the search
        shift = shift - coder.threshold
    seen = torch.addmm(shift.to(batch.dtype), batch.centred.to(batch.dtype), coder.encoder.to(batch.dtype).T)
    if config.kind == "topk":
        return _largest_of_each(seen, config.k)
    if config.kind in ("relu", "jumprelu"):
        found = _above_if_few(seen, 0.0 if config.kind == "relu" else -config.bandwidth / 2)
        if found and config.kind == "jumprelu":
            return Entries(found.rows, found.columns, found.a + coder.threshold[found.columns])
        return found
    return _largest(seen, config.k * len(seen))


def _largest_of_each(seen: Float[Tensor, "b m"], k: int) -> Entries:
    largest = seen.topk(k, dim=1, sorted=False)
    rows = torch.arange(len(seen), device=seen.device).repeat_interleave(k)
    entries = Entries(rows, largest.indices.flatten(), largest.values.flatten().float())
    return entries.keep(entries.a > 0)


def _largest(seen: Float[Tensor, "b m"], n: int) -> Entries:
    """The n largest entries above 0 of a whole batch.

    The n-th largest of the groups' maxima is no larger than the n-th largest entry, and nearly as large.
    """
    maxima = _group_maxima(seen)
    flat = maxima.flatten().float()
    bound = float(flat.topk(n, sorted=False).values.min()) if n <= len(flat) else 0.0
    # The largest number below the bound: entries equal to it are among the n, too.
    below = torch.nextafter(torch.tensor(bound).to(seen.dtype), torch.tensor(-torch.inf).to(seen.dtype))
    found = _above(seen, maxima, max(float(below), 0.0))
    if len(found.a) <= n:
        return found
    return found.keep(found.a.topk(n, sorted=False).indices.sort().values)


def _group_maxima(seen: Float[Tensor, "b m"]) -> Float[Tensor, "b g"]:
    """Largest of every group of columns; a group's columns are g, g + m/size, ..., which vectorises."""
    size = next(size for size in (GROUP, 16, 8, 4, 2, 1) if seen.shape[1] % size == 0)
    return seen.view(len(seen), size, -1).amax(1)


def _above_if_few(seen: Float[Tensor, "b m"], bound: float) -> Entries | None:
    maxima = _group_maxima(seen)
    if int((maxima > bound).sum()) > FULL * maxima.numel():
        return None
    found = _above(seen, maxima, bound)
    return found if len(found.a) <= DENSE * seen.numel() else None


def _above(seen: Float[Tensor, "b m"], maxima: Float[Tensor, "b g"], bound: float) -> Entries:
    """Entries above a bound, found in the groups whose maximum is."""
    rows, groups = (maxima > bound).nonzero(as_tuple=True)
    m, n_groups = seen.shape[1], maxima.shape[1]
    places = (rows * m + groups)[:, None] + torch.arange(0, m, n_groups, device=seen.device)
    values = seen.view(-1)[places]
    chosen = values > bound
    places = places[chosen]
    return Entries(places // m, places % m, values[chosen].float())


def _reconstruct(
    coder: SparseCoder, x: Tensor, entries: Entries, z: Tensor
) -> tuple[Tensor, list[Tensor], Tensor, float]:
    """Error of all features, gradient (B, d) that each level's features get, dz per entry, and the loss.

    The features of a level reconstruct together with those before them, so they get the gradients of their own
    level's error and of all later ones'.
    """
    y, upstream, loss, parts = coder.bias.expand_as(x), [], 0.0, _levels(coder.config, entries)
    error = y - x
    for part in parts:
        y = y + _weighted_sums(entries.rows[part], entries.columns[part], z[part], coder.decoder, len(x))
        error = y - x
        upstream.append(error * (2 / len(x)))
        loss += float(error.square().sum()) / len(x)
    for level in reversed(range(len(upstream) - 1)):
        upstream[level] += upstream[level + 1]
    dz = torch.empty_like(z)
    for part, grad in zip(parts, upstream, strict=True):
        dz[part] = _dots(entries.rows[part], entries.columns[part], grad, coder.decoder)
    return error, upstream, dz, loss


def _levels(config: CoderConfig, entries: Entries) -> list[slice | Tensor]:
    """The entries of each level."""
    ends = levels(config)
    if len(ends) == 1:
        return [slice(None)]
    level = torch.bucketize(entries.columns, torch.tensor(ends, device=entries.columns.device), right=True)
    return [(level == number).nonzero().squeeze(1) for number in range(len(ends))]


def _offsets(sorted_rows: Int[Tensor, " n"], n_rows: int) -> Int[Tensor, " r"]:
    return F.pad(torch.bincount(sorted_rows, minlength=n_rows).cumsum(0), (1, 0))


def _weighted_sums(
    rows: Int[Tensor, " n"],
    columns: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    table: Float[Tensor, "m d"],
    n_rows: int,
) -> Float[Tensor, "b d"]:
    """Row i is the sum of weights times table rows `columns` of the entries with row i; entries ordered by row."""
    given = {"mode": "sum", "per_sample_weights": weights, "include_last_offset": True}
    return F.embedding_bag(columns, table, _offsets(rows, n_rows), **given)  # type: ignore[arg-type]


def _dots(
    rows: Int[Tensor, " n"], columns: Int[Tensor, " n"], left: Float[Tensor, "b d"], right: Float[Tensor, "m d"]
) -> Float[Tensor, " n"]:
    """left[row] . right[column] for every entry, ordered by row."""
    with warnings.catch_warnings():  # PyTorch calls its sparse tensors beta
        warnings.simplefilter("ignore")
        places = torch.sparse_csr_tensor(
            _offsets(rows, len(left)), columns, torch.zeros_like(columns, dtype=left.dtype), (len(left), len(right))
        )
        return torch.sparse.sampled_addmm(places, left, right.T, beta=0.0).values()


class _ByFeature:
    """The entries in order of their features."""

    def __init__(self, entries: Entries, width: int) -> None:
        self.order = torch.argsort(entries.columns, stable=True)
        self.columns, self.rows, self.width = entries.columns[self.order], entries.rows[self.order], width

    def sums(self, weights: Float[Tensor, " n"], table: Float[Tensor, "b d"]) -> Float[Tensor, "m d"]:
        """Per feature the sum of weights times the table's rows of its tokens."""
        return _weighted_sums(self.columns, self.rows, weights[self.order], table, self.width)


def _decoder_grad(config: CoderConfig, by_feature: _ByFeature, z: Tensor, upstream: list[Tensor]) -> Tensor:
    ends = levels(config)
    if len(ends) == 1:
        return by_feature.sums(z, upstream[0])
    cuts = torch.searchsorted(by_feature.columns, torch.tensor([0, *ends], device=z.device)).tolist()
    z, found = z[by_feature.order], []
    for low, high, start, end, grad in zip([0, *ends], ends, cuts, cuts[1:], upstream, strict=False):
        columns, rows = by_feature.columns[start:end] - low, by_feature.rows[start:end]
        found.append(_weighted_sums(columns, rows, z[start:end], grad, high - low))
    return torch.cat(found)


def _threshold_grad(batch: _Batch, entries: Entries, dz: Tensor) -> Tensor:
    """Both straight-through estimates of sae/loss.py, for the entries near their threshold."""
    coder, config = batch.coder, batch.coder.config
    own = coder.threshold[entries.columns]
    near = in_window(entries.a, own, config.bandwidth)
    pull = near * (own * dz + batch.penalty / len(batch.x)) / -config.bandwidth
    return torch.zeros_like(coder.threshold).index_add_(0, entries.columns, pull)


def _aux(batch: _Batch, error: Tensor) -> float:
    """Add the gradients of AuxK, by dense products with the dead features alone; returns the loss."""
    coder, dtype, which = batch.coder, batch.dtype, batch.dead.nonzero().squeeze(1)
    k, x = n_aux(coder.config, len(which)), batch.centred.to(dtype)
    if not k:
        return 0.0
    encoder, decoder = coder.encoder[which], coder.decoder[which].to(dtype)
    a = torch.addmm(coder.encoder_bias[which].to(dtype), x, encoder.to(dtype).T)
    chosen = torch.ones_like(a, dtype=torch.bool)
    if k < len(which):
        chosen = torch.zeros_like(chosen).scatter_(1, a.topk(k, dim=1, sorted=False).indices, True)
    a = a * chosen
    left = (a @ decoder).float() + error  # the error that they are to reconstruct is x - y
    weight = aux_weight(coder.config, len(which))
    g = (left * (2 * weight / len(x))).to(dtype)
    da = (g @ decoder.T) * chosen
    grads = (coder.decoder.grad, coder.encoder.grad, coder.encoder_bias.grad, coder.bias.grad)
    assert all(grad is not None for grad in grads)
    coder.decoder.grad[which] += (a.T @ g).float()  # type: ignore[index]
    coder.encoder.grad[which] += (da.T @ x).float()  # type: ignore[index]
    bias = da.float().sum(0)
    coder.encoder_bias.grad[which] += bias  # type: ignore[index]
    coder.bias.grad -= bias @ encoder  # type: ignore[operator]
    return weight * float(left.square().sum()) / len(x)
