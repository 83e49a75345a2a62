from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infra.errors import SettingsError
from tests.bench import plain_pixnerd as plain
from tests.bench.bench_model import SMALL, Bench, Make, authors_make, our_make, plain_make
from training.model.published import reference

TINY = SMALL.model_copy(
    update={
        "image_size": 32,
        "hidden": 32,
        "heads": 2,
        "blocks": 1,
        "text_blocks": 1,
        "text_dim": 8,
        "text_tokens": 4,
        "field_blocks": 1,
        "field_channels": 8,
    }
)

# A checkout in the authors' layout, with the names that the bench asks for; its network is the plain twin.
CHECKOUT = {
    "models/transformer/pixnerd_t2i.py": """
from tests.bench.plain_pixnerd import PlainPixNerd
from training.model import ModelConfig

class PixNerDiT(PlainPixNerd):
    def __init__(self, in_channels, num_groups, hidden_size, decoder_hidden_size, num_encoder_blocks,
                 num_decoder_blocks, num_text_blocks, patch_size, txt_embed_dim, txt_max_length):
        super().__init__(ModelConfig(
            image_size=32, patch_size=patch_size, hidden=hidden_size, heads=num_groups, blocks=num_encoder_blocks,
            text_blocks=num_text_blocks, text_dim=txt_embed_dim, text_tokens=txt_max_length,
            field_blocks=num_decoder_blocks, field_channels=decoder_hidden_size, coordinate_code="cosine",
            field_norm="fc1"))
""",
    "diffusion/flow_matching/training.py": """
import torch

class FlowMatchingTrainer:
    def __init__(self, scheduler, lognorm_t, timeshift, null_condition_p):
        self.shift = timeshift

    def __call__(self, net, ema_net, solver, x, condition, uncondition):
        t = torch.randn(len(x)).sigmoid()
        t = (t / (t + (1 - t) * self.shift))
        noise, t4 = torch.randn_like(x), t.view(-1, 1, 1, 1)
        out = net(t4 * x + (1 - t4) * noise, t, condition)
        return {"loss": ((out - (x - noise)) ** 2).mean() * FACTOR}
""",
    "diffusion/flow_matching/adam_sampling.py": """
from tests.bench import plain_pixnerd
from training.diffusion.samplers import timesteps

class AdamLMSampler:
    def __init__(self, order, timeshift, guidance_interval_min, guidance_interval_max, num_steps, guidance,
                 guidance_fn, scheduler):
        self.rest = timesteps(num_steps, timeshift), guidance, (guidance_interval_min, guidance_interval_max)

    def __call__(self, net, noise, condition, uncondition):
        return plain_pixnerd.sample(net, noise, condition, uncondition, *self.rest)[0]
""",
    "diffusion/flow_matching/scheduling.py": "class LinearScheduler: pass",
    "diffusion/base/guidance.py": "def simple_guidance_fn(out, cfg): ...",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        monkeypatch.delitem(sys.modules, name)
    return write(tmp_path / "right", factor=1.0)


def write(folder: Path, factor: float) -> Path:
    for name, text in CHECKOUT.items():
        path = folder / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("FACTOR", str(factor)))
    return folder


def bench(makes: dict[str, Make], *sides: str) -> Bench:
    return Bench(TINY, "cpu", torch.float32, 1, makes, list(sides))


def test_the_twin_is_the_network_and_is_timed_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    both = bench({"plain": plain_make(), "ours": our_make()}, "plain, eager", "ours, eager")
    both.check()
    assert "plain, eager: off ours by network" in capsys.readouterr().out
    times = both.train(2)
    assert set(times) == {"plain, eager", "ours, eager"}
    assert all(len(found) == 1 for found in times.values())


def test_a_checkout_of_the_authors_code_runs_beside_ours(checkout: Path) -> None:
    makes = {"authors": authors_make(checkout), "ours": our_make()}
    both = bench(makes, "authors, eager", "ours, eager")
    both.check()
    assert set(both.train(2)) == set(both.sample(1, 2)) == {"authors, eager", "ours, eager"}
    nets = both.networks()
    theirs = nets["authors, eager"].state_dict()
    assert isinstance(nets["authors, eager"], plain.PlainPixNerd)
    for name, tensor in reference.to_reference(nets["ours, eager"].state_dict(), TINY).items():
        assert torch.equal(theirs[name], tensor), "the two sides have other weights"


def test_what_computes_something_else_is_not_timed(checkout: Path, tmp_path: Path) -> None:
    makes = {"authors": authors_make(write(tmp_path / "right", factor=1.1)), "ours": our_make()}
    with pytest.raises(SettingsError, match="its loss is another than ours"):
        bench(makes, "authors, eager", "ours, eager").check()


def test_a_folder_without_the_code_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"pixnerd_t2i\.py is not there"):
        authors_make(tmp_path)
