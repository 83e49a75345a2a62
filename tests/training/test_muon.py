"""Muon's update, and which parameters it is for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training.muon import MOMENTUM, Muon, Piece, orthogonalised
from training.optim import OptimSettings, is_in_a_block, learning_rate, optimiser


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 99))
def test_singular_values_end_near_one_and_singular_vectors_stay(rows: int, columns: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    values = torch.linspace(1.0, 0.2, min(rows, columns))
    turned = orthogonalised((u * values @ vh)[None])[0]
    inner = u.mT @ turned @ vh.mT
    assert (inner.diagonal() > 0.6).all() and (inner.diagonal() < 1.25).all()
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-3)


def test_a_stack_is_turned_as_its_matrices_are_one_by_one():
    stack = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalised(stack), torch.cat([orthogonalised(one[None]) for one in stack]), atol=1e-5)


def test_a_step_is_the_published_one():
    flat = nn.Parameter(torch.randn(12, generator=torch.Generator().manual_seed(1)))
    before, gradients = flat.detach().clone(), torch.randn(2, 12, generator=torch.Generator().manual_seed(2))
    muon = Muon([{"params": [flat], "muon": True, "weight_decay": 0.1}], lr=0.01)
    muon.pieces = {flat: [Piece((3, 4), 0, 12, 0, (0, 12), 0)]}
    momentum = torch.zeros(12)
    for gradient in gradients:
        flat.grad = gradient.clone()
        muon.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        nesterov = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
        moved = orthogonalised(nesterov.view(1, 3, 4)).flatten() * 0.2 * 4**0.5
        before = before * (1 - 0.01 * 0.1) - 0.01 * moved
    assert torch.allclose(flat, before, atol=1e-6)


def test_only_matrices_of_repeated_blocks_are_for_muon():
    module = nn.ModuleDict(
        {"stem": nn.Linear(4, 4), "blocks": nn.ModuleList([nn.Linear(4, 4)]), "text": nn.ModuleList([nn.Linear(4, 4)])}
    )
    groups = optimiser(module.named_parameters(), OptimSettings(matrices="muon", text_lr=0.1)).param_groups
    shares = {group["share"] for group in groups}
    [own] = [group for group in groups if group["muon"] and group["share"] == 1.0]
    assert own["params"] == [module.get_parameter("blocks.0.weight")]
    assert shares == {1.0, 0.1}
    assert not is_in_a_block("stem.weight")


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)])
def test_the_rate_falls_from_warm_up_to_its_final_share(schedule: str, middle: float):
    settings = OptimSettings(lr=2.0, warmup=10, schedule=schedule, final=0.1)
    assert learning_rate(settings, 0, 110) == pytest.approx(0.2)
    assert learning_rate(settings, 10, 110) == 2.0
    assert learning_rate(settings, 60, 110) == pytest.approx(2.0 * middle)
    assert learning_rate(settings, 110, 110) == pytest.approx(2.0 if schedule == "constant" else 0.2)
