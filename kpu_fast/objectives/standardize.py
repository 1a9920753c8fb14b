"""Teacher features to a common scale before they are targets, and the way back into the student's heads.

    meanstd   y = (x - mu) / sigma                        channel by channel
    phi_s     y = alpha H U^T (x - mu)                     PHI-S (arXiv 2410.01680): covariance U Lambda U^T,
              alpha = 1 / sqrt(mean(Lambda))               H a Hadamard matrix / sqrt(C)

Both are y = A (x - mu). After phi_s every channel has variance 1, as every element of H has the same magnitude, and the
features were only rotated and scaled: angles between centred features and ratios of their distances stay as they were.
mu and A are buffers: they are in every checkpoint. What is our choice: docs/objectives.md.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from kpu_fast.kernels import Moments, moments
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.projector import FeatureHeads
from kpu_fast.objectives.cells import grid, valid_cells

_ROWS = 1 << 16  # tokens whose float64 copy exists at once


class Standardizer(nn.Module):
    """y = A (x - mu) on the last axis of x (..., C); the identity until `fit`.

    kind "meanstd" keeps A's diagonal (C,), "phi_s" all of A (C, C). Computes in float32 or wider, returns x's dtype.
    Raises ValueError where there is no Hadamard matrix for phi_s.
    """

    def __init__(self, channels: int, kind: str):
        super().__init__()
        if kind == "phi_s":
            hadamard(channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels) if kind == "phi_s" else torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x.to(torch.promote_types(x.dtype, self.mean.dtype)) - self.mean
        y = centred * self.matrix if self.matrix.dim() == 1 else centred @ self.matrix.T
        return y.to(x.dtype)

    def fit(self, seen: "Seen") -> None:
        """Take mu and A from statistics. Raises ValueError for features that are not finite or do not vary."""
        var = seen.moments.var
        if not bool(torch.isfinite(var).all()):
            raise ValueError("are not finite")
        spread = var.mean().sqrt()
        # Below this the variance is rounding: float64 sums of squares keep 16 digits of the mean's square.
        if float(spread) <= 1e-7 * float(seen.moments.mean.abs().max()):
            raise ValueError(f"do not vary: {int(seen.moments.count)} tokens are the same")
        if seen.products is None:
            std = seen.moments.std  # a channel that never varied may do so later: it is scaled as all are on average
            matrix = 1 / torch.where(std > 1e-6 * spread, std, spread)
        else:
            mean = seen.moments.mean
            covariance = seen.products / seen.moments.count - torch.outer(mean, mean)
            values, vectors = torch.linalg.eigh(covariance.cpu())
            matrix = hadamard(len(mean)) @ vectors.T / values.mean().sqrt()
        self.mean.copy_(seen.moments.mean)
        self.matrix.copy_(matrix)
        if distributed.is_available() and distributed.is_initialized():
            # Ranks may run on processors of different makes, whose eigenvectors differ in sign.
            distributed.broadcast(self.mean, 0)
            distributed.broadcast(self.matrix, 0)

    def undone(self, last: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of `last` followed by x = A^-1 y + mu: one Linear whose output is not standardised."""
        matrix, weight, bias = self.matrix.double(), last.weight.detach().double(), last.bias.detach().double()
        inverse = torch.linalg.inv(matrix.diag() if matrix.dim() == 1 else matrix)
        weight, bias = inverse @ weight, inverse @ bias + self.mean
        return weight.to(last.weight.dtype), bias.to(last.bias.dtype)


class FeatureStandardizer(nn.Module):
    """A Standardizer for x and one for each map of a teacher: Features → Features, each part on the common scale.

    name: the teacher's, for messages. Raises ValueError, naming it, for channels that phi_s has no matrix for.
    """

    def __init__(self, name: str, spec: FeatureSpec, kind: str):
        super().__init__()
        self.name, self.kind = name, kind
        try:
            self.x = None if spec.x_dim is None else Standardizer(spec.x_dim, kind)
            self.maps = nn.ModuleList(Standardizer(channels, kind) for channels in spec.map_dims)
        except ValueError as error:
            raise ValueError(f"objective.standardize: teachers.{name} has features of {error}") from None

    def forward(self, features: Features) -> Features:
        x = None if self.x is None else self.x(features.x)
        return Features(x, tuple(one(v) for one, v in zip(self.maps, features.maps, strict=True)))

    @torch.no_grad()
    def look(self, batches: Iterable[tuple[Features, Tensor | None]]) -> "list[Seen]":
        """Statistics of x, if there is one, and of each map, over this rank's batches.

        batches: at least one; features with the mask of pixels (B, H, W), or None. Cells of padding do not count.
        """
        return functools.reduce(
            merged, ([_see(part, cells, self.kind) for part, cells in _tokens(*batch)] for batch in batches)
        )

    @torch.no_grad()
    def fit(self, seen: "list[Seen]") -> None:
        """Take the statistics of all ranks together; each rank calls this. Raises ValueError, on all ranks alike."""
        names = [*(["x"] if self.x is not None else []), *(f"map {i}" for i in range(len(self.maps)))]
        for one, statistics, part in zip(self._ones(), seen, names, strict=True):
            try:
                one.fit(statistics.all_reduce())
            except ValueError as error:
                raise ValueError(
                    f"objective.standardize: teachers.{self.name}: the features of {part} {error}"
                ) from None

    def undone(self, heads: FeatureHeads) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
        """The last Linear of each of `heads`, with the weight and bias that end in the teacher's own space."""
        return {head.fc2: one.undone(head.fc2) for one, head in zip(self._ones(), heads.projectors(), strict=True)}

    def _ones(self) -> list[Standardizer]:
        return [*([self.x] if self.x is not None else []), *self.maps]


def merged(seen: "list[Seen]", more: "list[Seen]") -> "list[Seen]":
    """What `look` found in some batches and in others → in all of them."""
    return [one.merge(other) for one, other in zip(seen, more, strict=True)]


class Seen(NamedTuple):
    """Statistics of one kind of feature: per channel, and for phi_s the sum of x xᵀ, (C, C) float64."""

    moments: Moments
    products: Tensor | None

    def merge(self, other: "Seen") -> "Seen":
        """Of both sets of features together."""
        products = None if self.products is None else self.products + other.products
        return Seen(self.moments.merge(other.moments), products)

    def all_reduce(self) -> "Seen":
        """Over all ranks; without a process group these same."""
        if self.products is not None and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.products)
        return Seen(self.moments.all_reduce(), self.products)


def hadamard(order: int) -> Tensor:
    """(order, order) float64 Hadamard matrix over sqrt(order): orthogonal, all elements of one magnitude.

    Sylvester's doubling of the matrices of order 1, q + 1 (prime q, 3 mod 4) and 2 (q + 1) (prime q, 1 mod 4) of Paley.
    Raises ValueError for an order that none of these reaches.
    """
    halvings = 0
    while True:
        if order >> halvings << halvings != order or not order:
            raise ValueError(
                f'{order} channels, for which "phi_s" has no Hadamard matrix; every multiple of 64 up to 2048 has one. '
                'Use "meanstd"'
            )
        smallest = _paley(order >> halvings)
        if smallest is not None:
            break
        halvings += 1
    for _ in range(halvings):
        smallest = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), smallest)
    return smallest / order**0.5


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of ±1 by one of Paley's two constructions (or of order 1); None where neither applies."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -1.0)
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(q, 1.0), signs) + torch.kron(
            torch.eye(q + 1, dtype=torch.float64), torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        )
    return None


def _bordered(q: int, column: float) -> Tensor:
    """(q + 1, q + 1): 0, a row of 1, a column of `column`, and whether i - j is a square modulo the prime q (±1, 0)."""
    numbers = torch.arange(q)
    square = torch.full((q,), -1.0, dtype=torch.float64)
    square[numbers**2 % q] = 1.0
    square[0] = 0.0
    found = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    found[0, 1:], found[1:, 0] = 1.0, column
    found[1:, 1:] = square[(numbers[:, None] - numbers) % q]
    return found


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def _tokens(features: Features, valid: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """x and the maps, each with its mask of cells that count."""
    if features.x is not None:
        yield features.x, None
    for v in features.maps:
        yield v, valid_cells(valid, grid(v))


def _see(x: Tensor, cells: Tensor | None, kind: str) -> Seen:
    channels = x.shape[-1]
    products = None
    if kind == "phi_s":
        products = x.new_zeros(channels, channels, dtype=torch.float64)
        kept = x if cells is None else torch.where(cells[..., None], x, 0)  # no product: padding may hold NaN
        for rows in kept.reshape(-1, channels).split(_ROWS):
            rows = rows.double()
            products.addmm_(rows.T, rows)
    return Seen(moments(x, valid=cells), products)
