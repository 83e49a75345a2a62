"""Tiny models in local folders, as a hub would hold them, and a captioning server on the loopback interface.

The pool's workers import this: torch and its like are imported where they are used.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from data_prep.scores import Sample, job
from data_prep.scores.job import ScoreSettings
from infra.config import parse
from infra.store import FileStore
from tests.data_prep import zoo

# CLIP

CLIP_WIDTH = 16
CONTEXT = 16  # tokens


def build_clip(folder: Path, seed: int = 0) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {
        "embed_dim": CLIP_WIDTH,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embedding" not in name:
                torch.nn.init.normal_(weight, std=0.2)  # so that pictures and captions differ from one another
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


# Vision-language models

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH = 8


def build_vlm(folder: Path, kind: str, scale: int = 1) -> None:
    """A `qwen2_5` or `qwen3`, whose generation_config.json asks for sampling, as the published ones do.

    `scale` times as wide, and for images with so many times the side.
    """
    import torch
    import transformers as t

    tokenizer = ascii_tokenizer()
    named = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32 * scale,
        "intermediate_size": 64 * scale,
        "num_hidden_layers": 2,
        "num_attention_heads": 2 * scale,
        "num_key_value_heads": scale,
        "max_position_embeddings": 512 * scale**2,
        "bos_token_id": None,
        "eos_token_id": named["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 16 * scale,
        "intermediate_size": 32 * scale,
        "num_heads": 2 * scale,
    }
    vision |= {"patch_size": PATCH, "out_hidden_size": 32 * scale}
    ids = {
        f"{name}_token_id": named[f"<|{token}|>"] for name, token in (("image", "image_pad"), ("video", "video_pad"))
    } | {f"{name}_token_id": named[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    if kind == "qwen3":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        config = t.Qwen3VLConfig(text_config=text | {"head_dim": 16}, vision_config=vision, **ids)
        network, processor, video = t.Qwen3VLForConditionalGeneration, t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor
    else:
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
        config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        network, processor = t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLProcessor
        video = t.Qwen2VLVideoProcessor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = network(config)
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3 / scale**0.5)
    ends = [named["<|im_end|>"], named["<|endoftext|>"]]
    model.generation_config = t.GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=1.5, eos_token_id=ends, pad_token_id=ends[1]
    )
    model.save_pretrained(folder)
    pictures = t.Qwen2VLImageProcessor(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 256, "longest_edge": 64 * 64 * scale**2},
    )
    processor(
        image_processor=pictures, tokenizer=tokenizer, video_processor=video(patch_size=PATCH), chat_template=TEMPLATE
    ).save_pretrained(folder)


def ascii_tokenizer() -> Any:
    """Printable ASCII, a token a character, so that what a random network says can be read and compared."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])


# Samples


def sample(number: int, height: int = 40, width: int = 40, **captions: str) -> Sample:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = coarse[np.arange(height)[:, None] * 4 // height, np.arange(width)[None] * 4 // width]
    said = [{"kind": kind, "text": text} for kind, text in captions.items()]
    return Sample(f"{number:020d}", said, zoo.saved(pixels, ("JPEG", "PNG", "WEBP")[number % 3]))


# A server of OpenAI's protocol

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def said(text: Any, status: int = 200) -> web.Response:
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]}, status=status)


@contextmanager
def serve(handler: Handler) -> Iterator[str]:
    """The server's base URL, as a user would set it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def answer(request: web.Request) -> web.StreamResponse:
        return await handler(request, await request.json())

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    async def stop() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # handlers that hang would hold the clean-up back
        await runner.cleanup()

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# Workers of the pool


def endpoint(url: str, **changes: Any) -> ScoreSettings:
    asks = [{"kind": "recaption", "prompt": "Describe.", "max_tokens": 100}]
    scorer = {"kind": "endpoint", "url": url, "model": "a/vlm", "asks": asks, "backoff": 0.01, "concurrency": 2}
    return parse(ScoreSettings, {"scorer": scorer, "workers": 1} | changes)


class DiesOnce(job._Worker):
    """Killed at the worst moment of shard 2: its table is stored, its record is not."""

    always = False

    def do(self, number: int) -> job.Done:
        assert isinstance(self.store, FileStore)
        marker = self.store.root / ".tmp" / "marker"
        if number == 2 and (self.always or not marker.exists()):
            marker.parent.mkdir(exist_ok=True)
            marker.touch()
            vars(job)["recorded"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return super().do(number)


class DiesAlways(DiesOnce):
    always = True
