"""How large an encoder is, and how much it computes: from its config.json, or known here for published ones.

Nothing is loaded and no hub is asked. Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class TextShape(NamedTuple):
    """A Qwen3 without its output layer, as `TextEncoder` uses it."""

    width: int  # of its features
    layers: int
    query: int  # of all query heads together
    key: int  # of all key heads together; values are as wide
    head: int
    inner: int  # of its feed-forward part
    vocabulary: int

    @property
    def matrices(self) -> int:
        """Parameters of a layer that every token is multiplied with."""
        return self.width * (2 * self.query + 2 * self.key + 3 * self.inner)

    @property
    def parameters(self) -> int:
        return self.vocabulary * self.width + self.layers * self._layer + self.width

    def trained(self, layers: int) -> int:
        """Parameters that are trained with the last `layers`: the final norm too and, with all layers, everything."""
        if layers >= self.layers:
            return self.parameters
        return layers * self._layer + self.width if layers else 0

    @property
    def _layer(self) -> int:
        return self.matrices + 2 * self.head + 2 * self.width

    def forward(self, tokens: int, layers: int | None = None) -> int:
        """FLOP of a caption through so many layers; through all without a number."""
        per_layer = 2 * tokens * self.matrices + 4 * tokens**2 * self.query
        return (self.layers if layers is None else min(layers, self.layers)) * per_layer


NO_TEXT = TextShape(0, 0, 0, 0, 0, 0, 0)  # of a network that draws from labels


class VisionShape(NamedTuple):
    """A DINOv2, as `VisionEncoder` uses it."""

    width: int
    layers: int
    inner: int
    gated: bool  # its feed-forward part is a SwiGLU
    patch_size: int
    image_size: int  # of its table of positions

    @property
    def parameters(self) -> int:
        width, inner = self.width, self.inner
        positions = (self.image_size // self.patch_size) ** 2 + 1
        embeddings = (2 + positions) * width + 3 * self.patch_size**2 * width + width
        biases = 4 * width + (2 if self.gated else 1) * inner + width
        return embeddings + self.layers * (self._matrices + biases + 6 * width) + 2 * width

    @property
    def _matrices(self) -> int:
        return 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.inner

    def forward(self, patches: int) -> int:
        """FLOP of an image that is resized to so many patches."""
        tokens = patches + 1
        per_layer = 2 * tokens * self._matrices + 4 * tokens**2 * self.width
        return self.layers * per_layer + 2 * patches * 3 * self.patch_size**2 * self.width

    def kept(self, patches: int) -> int:
        """Bytes that autograd keeps of an image whose gradient is asked for, of a plain feed-forward part's layers."""
        # Inputs of both norms; q, k and v, and what attention gives; what goes into the activation.
        return 4 * (patches + 1) * (self.layers * (6 * self.width + self.inner) + self.width)


class LpipsShape(NamedTuple):
    """A VGG-16 with LPIPS's weights, as `Lpips` uses it."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions of each block

    @property
    def parameters(self) -> int:
        return sum(9 * before * width + width for before, width, _ in self._layers) + sum(self.widths)

    def forward(self, side: int) -> int:
        """FLOP of a square image."""
        return sum(2 * 9 * before * width * (side >> block) ** 2 for before, width, block in self._layers)

    def kept(self, side: int) -> int:
        """Bytes that autograd keeps: the image, layers' results, blocks' differences, and where their largest were."""
        results = sum(4 * width * (side >> block) ** 2 for _, width, block in self._layers)
        ends = sum(4 * (width + 2) * (side >> block) ** 2 for block, width in enumerate(self.widths))  # and two norms
        pooled = sum(8 * width * (side >> block + 1) ** 2 for block, width in enumerate(self.widths[:-1]))
        return 4 * 3 * side**2 + results + ends + pooled

    @property
    def _layers(self) -> list[tuple[int, int, int]]:
        """Channels before and after each convolution, and its block."""
        blocks = [block for block, depth in enumerate(self.depths) for _ in range(depth)]
        widths = [self.widths[block] for block in blocks]
        return list(zip([3, *widths], widths, blocks, strict=False))


def text_shape(config: Mapping[str, Any]) -> TextShape:
    """From a Qwen3's config.json; raises KeyError, TypeError or ValueError for another file."""
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    head = int(config.get("head_dim") or width // heads)
    return TextShape(
        width=width,
        layers=int(config["num_hidden_layers"]),
        query=heads * head,
        key=int(config.get("num_key_value_heads") or heads) * head,
        head=head,
        inner=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
    )


def vision_shape(config: Mapping[str, Any]) -> VisionShape:
    """From a DINOv2's config.json; raises KeyError, TypeError or ValueError for another file."""
    width, gated = int(config["hidden_size"]), bool(config.get("use_swiglu_ffn", False))
    inner = int(width * config.get("mlp_ratio", 4))
    return VisionShape(
        width=width,
        layers=int(config["num_hidden_layers"]),
        inner=(int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner,
        gated=gated,
        patch_size=int(config["patch_size"]),
        image_size=int(config.get("image_size", 224)),
    )


def tiny_text(hidden: int, layers: int, heads: int, vocab: int) -> TextShape:
    """What `text.build_tiny` makes; its tokenizer may find fewer words than it may have."""
    head = hidden // heads
    return TextShape(hidden, layers, heads * head, max(1, heads // 2) * head, head, 3 * hidden, vocab)


def tiny_vision(hidden: int, layers: int, patch_size: int, image_size: int) -> VisionShape:
    return VisionShape(hidden, layers, 4 * hidden, False, patch_size, image_size)


# From the configurations that are published with the weights.
PUBLISHED_TEXT = {
    "Qwen/Qwen3-0.6B": TextShape(1024, 28, 2048, 1024, 128, 3072, 151936),
    "Qwen/Qwen3-1.7B": TextShape(2048, 28, 2048, 1024, 128, 6144, 151936),
    "Qwen/Qwen3-4B": TextShape(2560, 36, 4096, 1024, 128, 9728, 151936),
}
PUBLISHED_VISION = {
    "facebook/dinov2-small": VisionShape(384, 12, 1536, False, 14, 518),
    "facebook/dinov2-base": VisionShape(768, 12, 3072, False, 14, 518),
    "facebook/dinov2-large": VisionShape(1024, 24, 4096, False, 14, 518),
}
