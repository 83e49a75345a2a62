"""The Inception network of FID, as torch-fidelity has it: TensorFlow's of 2015, with its resizing.

Shapes: B pictures, H and W their rows and columns.
"""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from infra.causes import first_line
from infra.errors import CheckpointError

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
MISSING = f"download {URL}, whose sha256 begins with 6726825d, and set `inception` to the file"
SPATIAL = 7  # channels of the branch that sFID looks at: 7 x 17 x 17 = 2,023 features


class Seen(NamedTuple):
    """What the network sees in pictures, a row for each."""

    features: npt.NDArray[np.float32]  # 2,048, after the last pooling
    spatial: npt.NDArray[np.float32]  # 2,023, of an inner layer whose features have a place
    logits: npt.NDArray[np.float32]  # 1,008, without their bias, as the published Inception Score has them


class Inception:
    def __init__(self, weights: Path, device: str = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The library would unpickle whatever the file holds, so it gets a copy of what is safe to read.
        state = _tensors(weights)
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            torch.save(state, file.name)
            try:
                network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], file.name)
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{weights} does not fit torch-fidelity's Inception ({first_line(error)})", remedy=MISSING
                ) from None
        self._network, self._device, self._inner = network.to(device), device, torch.empty(0)
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: Any, given: Any, made_BCHW: torch.Tensor) -> None:
        self._inner = made_BCHW[:, :SPATIAL]

    @torch.inference_mode()
    def see(self, pictures_BHWC: npt.NDArray[np.uint8]) -> Seen:
        given = torch.from_numpy(np.ascontiguousarray(pictures_BHWC)).permute(0, 3, 1, 2).to(self._device)
        features, logits = self._network(given)
        return Seen(*(part.float().cpu().numpy() for part in (features, self._inner.flatten(1), logits)))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", remedy=MISSING)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and all(isinstance(each, torch.Tensor) for each in state.values())):
            raise ValueError("it holds other things than tensors")
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no file of weights ({first_line(error)})", remedy=MISSING) from None
    return state
