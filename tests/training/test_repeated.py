"""Blocks that are computed anew backwards, and blocks that are compiled one kind at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.training.test_model import inputs, network
from training.model import PixNerd, Text
from training.model.compiled import compile_blocks, set_execution
from training.model.repeated import recompute


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(prepare: Callable[[PixNerd], None], blocks: int = 4) -> dict[str, Tensor]:
    net = network(blocks=blocks).requires_grad_(True)
    prepare(net)
    x, t, y = inputs(2, 16, 16, "text")
    out = net(x, t, Text(y, torch.tensor([[1, 1, 0, 0, 0], [1] * 5])))
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def unchanged(net: PixNerd) -> None: ...


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_the_same_to_the_bit(every: int):
    kept, anew = gradients(unchanged), gradients(partial(recompute, every=every))
    assert kept.keys() == anew.keys()
    assert all(torch.equal(kept[name], anew[name]) for name in kept)


def test_each_so_manieth_block_is_computed_twice():
    calls: list[int] = []

    def noted(number: int) -> Callable[..., None]:
        return lambda *_: calls.append(number)

    def counted(net: PixNerd) -> None:
        for number, block in enumerate(net.trunk):
            block.get_submodule("attn").register_forward_hook(noted(number))
        recompute(net, 2)

    gradients(counted)
    assert sorted(calls) == [0, 1, 1, 2, 3, 3]


def test_all_blocks_of_a_stack_share_a_graph():
    few, many = list[int](), list[int]()
    for blocks, made in ((2, few), (5, many)):
        torch._dynamo.reset()
        counters.clear()
        eager, compiled = gradients(unchanged, blocks), gradients(compile_blocks, blocks)
        for name in eager:
            torch.testing.assert_close(compiled[name], eager[name], rtol=1e-3, atol=1e-4)
        made.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert few == many


@pytest.mark.parametrize("compile_", [True, "blocks"])
def test_blocks_are_compiled_and_computed_anew(compile_: Any):
    eager, lightened = gradients(unchanged), gradients(partial(set_execution, compile_=compile_, recomputed=1))
    assert not counters["graph_break"]
    for name in eager:
        torch.testing.assert_close(lightened[name], eager[name], rtol=1e-3, atol=1e-4)
