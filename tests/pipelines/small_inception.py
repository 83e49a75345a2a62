"""Random weights of torch-fidelity's Inception, in the file that users download."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def write_inception(path: Path) -> Path:
    with tempfile.NamedTemporaryFile(suffix=".pth") as none, torch.random.fork_rng(devices=[]):
        torch.save({}, none.name)
        torch.manual_seed(0)
        with patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None):
            network = FeatureExtractorInceptionV3("random", ["2048"], none.name)
    torch.save(network.state_dict(), path)
    return path
