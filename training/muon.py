"""Muon for the matrices of repeated blocks, beside AdamW for everything else.

Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) replaces the momentum of a weight
matrix by the nearest matrix with orthonormal rows or columns. The update is scaled by 0.2 sqrt(max(rows, columns)),
which gives it the size of AdamW's (Liu et al., arXiv 2502.16982, section 2.2), so one learning rate serves both.

ZeRO 1 and 2 hand an optimiser flat ranges of all parameters laid end to end. The momentum is elementwise, so a rank
keeps that of its own range only, and a training state is cut anew for other ranks as every other moment is. A matrix
that lies across the border of two ranges is put together by the ranks that share it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the authors': steepest at zero, and no closer to one than about 0.7 to 1.2
_AT_ONCE = 2**26  # elements of matrices that are stacked


def orthogonalised(matrices_KMN: Tensor, steps: int = 5) -> Tensor:
    """U V^T of each matrix U S V^T, nearly, by Newton-Schulz steps X <- (a + b G + c G^2) X with G = X X^T.

    Every step's factor is a polynomial of the first G, so the small products of factors are formed first, and X is
    multiplied once at the end.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices_KMN.shape[-2] > matrices_KMN.shape[-1]
    x = matrices_KMN.mT if tall else matrices_KMN
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = identity
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    turned: Tensor = x.mT if tall else x
    return turned


class Piece(NamedTuple):
    """The part of a matrix that lies in this rank's flat tensor."""

    shape: tuple[int, int]
    start: int  # the part's range of the matrix's own flat vector
    end: int
    offset: int  # where the part lies in the flat tensor
    cuts: tuple[int, ...]  # where in the matrix's vector each of its owners' parts begins, and its length at the end
    first: int  # the first of its owners; they are neighbours

    @property
    def whole(self) -> bool:
        return len(self.cuts) == 2

    @property
    def scale(self) -> float:
        return float(0.2 * max(self.shape) ** 0.5)


class Muon(torch.optim.AdamW):
    """AdamW, except for the groups that say `muon`; `pieces` has the matrices of each of their flat tensors."""

    def __init__(self, groups: Iterable[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self.pieces: dict[Tensor, list[Piece]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if group.get("muon"):
                for flat in group["params"]:
                    self._update(flat, group["lr"], group["weight_decay"])
                    flat.grad = None  # so that AdamW passes it by
        return super().step(closure)

    def _update(self, flat: Tensor, lr: float, weight_decay: float) -> None:
        assert flat.grad is not None
        state = self.state[flat]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(flat)
        momentum = state["exp_avg"]
        momentum.lerp_(flat.grad, 1 - MOMENTUM)
        nesterov = flat.grad.lerp(momentum, MOMENTUM)
        flat.mul_(1 - lr * weight_decay)
        for pieces, matrices_KMN in _stacked(self.pieces[flat], nesterov):
            moved_KE = orthogonalised(matrices_KMN).flatten(1)
            for piece, moved_E in zip(pieces, moved_KE, strict=True):
                own = slice(piece.offset, piece.offset + piece.end - piece.start)
                flat[own].add_(moved_E[piece.start : piece.end], alpha=-lr * piece.scale)


def _stacked(pieces: list[Piece], flat: Tensor) -> Iterable[tuple[list[Piece], Tensor]]:
    """Whole matrices, those of one shape together: a few large products instead of many small ones."""
    shared = _assembled([piece for piece in pieces if not piece.whole], flat)
    by_shape: dict[tuple[int, int], list[tuple[Piece, Tensor]]] = defaultdict(list)
    for piece in pieces:
        matrix = flat[piece.offset : piece.offset + piece.end] if piece.whole else shared[piece]
        by_shape[piece.shape].append((piece, matrix.view(piece.shape)))
    for (rows, columns), members in by_shape.items():
        most = max(1, _AT_ONCE // (rows * columns))
        for first in range(0, len(members), most):
            some = members[first : first + most]
            yield [piece for piece, _ in some], torch.stack([matrix for _, matrix in some])


def _assembled(pieces: list[Piece], flat: Tensor) -> dict[Piece, Tensor]:
    """Matrices of which other ranks have parts: each owner sends its own part to the others."""
    whole, transfers, rank = {}, [], dist.get_rank() if pieces else 0
    for piece in pieces:
        matrix = whole[piece] = flat.new_empty(piece.cuts[-1])
        for owner, (start, end) in enumerate(zip(piece.cuts, piece.cuts[1:], strict=False), start=piece.first):
            if owner == rank:
                matrix[start:end] = flat[piece.offset : piece.offset + end - start]
            else:
                own = flat[piece.offset : piece.offset + piece.end - piece.start]
                transfers.append(dist.P2POp(dist.isend, own, owner))
                transfers.append(dist.P2POp(dist.irecv, matrix[start:end], owner))
    for work in dist.batch_isend_irecv(transfers) if transfers else ():
        work.wait()
    return whole
