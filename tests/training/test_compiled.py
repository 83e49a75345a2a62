from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.training.test_model import inputs, network
from training.diffusion.samplers import guided, solver, timesteps
from training.model import PixNerd, Text
from training.model.compiled import compile_network


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_padding": "masked"},
        {"task": "class", "coordinate_code": "dct"},
        {"prediction": "image", "open_gates": True},
        {"fixed_grid": True},
        {"field_blocks": 0, "text_blocks": 0},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_every_network_is_one_graph_and_no_size_is_compiled_twice(changes: dict[str, object], backend: str):
    net = network(**changes)
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=backend)
    for height, width in ((16, 16), (16, 24), (16, 16), (16, 24), (16, 16)):
        x, t, y = inputs(2, height, width, net.config.task)
        condition = Text(y, torch.tensor([[1, 1, 0, 0, 0], [1] * 5])) if net.config.task == "text" else y
        torch.testing.assert_close(compiled(x, t, condition), net(x, t, condition))
        torch.testing.assert_close(compiled(x, t, condition, 1), net(x, t, condition, 1))
    assert made() == 4  # two sizes, each with tapped tokens and without
    assert not counters["graph_break"]


def test_the_compiler_leaves_gradients_as_they_are():
    net, (x, t, y) = network().requires_grad_(True), inputs(2, 16, 16, "text")
    grads: list[dict[str, Tensor]] = []
    for call in (net, torch.compile(net, fullgraph=True, dynamic=False, backend="aot_eager")):
        net.zero_grad()
        call(x, t, y).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(list(net.parameters()))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4)


def test_sampling_compiles_two_graphs_whatever_the_steps_seeds_and_prompts():
    def draw(net: PixNerd, seed: int, steps: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        words = Text(torch.randn(2, 5, 12, generator=g), None, torch.tensor([0, 0, 1, 1]))
        velocity = guided(net, words, Text(torch.randn(1, 5, 12, generator=g)), 4.0, (0.1, 1.0))
        return solver("adams2")(velocity, torch.randn(4, 3, 16, 16, generator=g), timesteps(steps, 3.0))

    eager, net = network(), network()
    compile_network(net, replay=True)
    for seed, steps in ((0, 4), (1, 7), (2, 4)):
        torch.testing.assert_close(draw(net, seed, steps), draw(eager, seed, steps), rtol=1e-3, atol=1e-3)
        assert made() == 2  # with the unconditional pass, and without


def test_names_and_weights_stay_as_they_are():
    net = network()
    names, tensors = list(net.state_dict()), list(net.parameters())
    before = [tensor.clone() for tensor in tensors]
    compile_network(net)
    assert list(net.state_dict()) == names
    assert all(one is other for one, other in zip(net.parameters(), tensors, strict=True)), "an optimiser holds these"
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), before, strict=True))
