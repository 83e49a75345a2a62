"""Where the weights of GenEval's judge are published, for messages about missing files."""

from __future__ import annotations

MASK2FORMER_URL = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
)
MASK2FORMER = f"download {MASK2FORMER_URL} (its sha256 begins with 743b7d99, as its name tells)"
INSTEAD = f"use Mask2Former on Swin from mmdetection, version 2: {MASK2FORMER_URL}"
CLIP_URL = "https://huggingface.co/timm/vit_large_patch14_clip_224.openai/resolve/main/open_clip_model.safetensors"
CLIP = f"download {CLIP_URL} (the report tells its sha256), and set judge.clip to the file"
