"""Run by test_release.py in a process without kd_accel and without network: what open_clip makes of releases.

    HF_HUB_OFFLINE=1 python tests/models/load_release.py INPUT.safetensors CAPTIONS.json RELEASE ...

Writes RELEASE.safetensors with features, tokens and scales, and RELEASE.json with the image preprocessing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file, save_file

pixels, captions = load_file(sys.argv[1])["pixels"], json.loads(Path(sys.argv[2]).read_text())
for folder in map(Path, sys.argv[3:]):
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    with torch.no_grad():
        made = {"image": model.eval().encode_image(pixels), "text": model.encode_text(tokens), "tokens": tokens}
    scales = {name: getattr(model, name) for name in ("logit_scale", "logit_bias")}
    made |= {name: scale.detach().clone() for name, scale in scales.items() if scale is not None}
    save_file(made, folder.with_suffix(".safetensors"))
    folder.with_suffix(".json").write_text(json.dumps(open_clip.get_model_preprocess_cfg(model)))
