"""CLIP similarity of videos and their prompts, with a CLIP from transformers.

CLIP: Radford et al. 2021, arXiv 2103.00020. The metric is CLIPSIM of GODIVA (arXiv 2104.14806, section 4.2): 100 times
the cosine between the embeddings of a frame and of the prompt, averaged over the frames of a video, then over videos.
CLIPScore (arXiv 2104.08718, eq. 1) is 2.5 max(cosine, 0) of one image. The metric ignores motion. Values from different
CLIP models are not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from sora_train.codec.files import check_complete, read_config, weight_files
from sora_train.codec.folders import find_folder
from sora_train.codec.imports import without_torchao
from sora_train.errors import UserError

KEY = "validation.clip"
FRAMES_AT_ONCE = 32


@dataclass(frozen=True)
class Clip:
    """A CLIP with its tokenizer and image processor."""

    model: Any
    tokenizer: Any
    images: Any


def find_clip(name: str, models: str = "", key: str = KEY) -> Path:
    """Finds the folder of the CLIP that `key` names.

    Raises UserError if the folder is missing or holds something else.
    """
    folder = find_folder(name, key, (), models)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{key}: {folder} has no config.json; name a folder that transformers saved a CLIP to", code="weights"
        )
    if (kind := read_config(folder).get("model_type")) != "clip":
        raise UserError(f"{key}: {folder} holds a {kind!r} model; a CLIP of transformers is needed", code="weights")
    weight_files(folder, key)
    return folder


@without_torchao()
def load_clip(name: str, device: str | torch.device = "cpu", models: str = "", key: str = KEY) -> Clip:
    """Loads the CLIP that `key` names: a folder or a hub id. Safetensors only.

    `models` is a folder that `sora download` filled. Raises UserError, with what to do, if the CLIP can't be loaded.
    """
    import transformers

    folder = find_clip(name, models, key)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.CLIPModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded
        check_complete(info)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        images = transformers.AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{key}: {folder} can't be read as a CLIP: {str(error).splitlines()[0]}", code="weights"
        ) from None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    model.eval().requires_grad_(False).to(device)
    return Clip(model, tokenizer, images)


@torch.inference_mode()
def similarity(clip: Clip, prompt: str, video: np.ndarray) -> float:
    """100 times the mean cosine between a prompt and the frames of a video.

    The prompt is cut to CLIP's 77 tokens. The video is uint8 `F H W 3`.
    """
    device, limit = clip.model.device, clip.model.config.text_config.max_position_embeddings
    words = clip.tokenizer([prompt], truncation=True, max_length=limit, return_tensors="pt").to(device)
    text = torch.nn.functional.normalize(clip.model.get_text_features(**words).pooler_output, dim=-1)
    cosines: list[torch.Tensor] = []
    for start in range(0, len(video), FRAMES_AT_ONCE):
        frames = list(video[start : start + FRAMES_AT_ONCE])
        pixels = clip.images(frames, return_tensors="pt", input_data_format="channels_last").to(device)
        pictures = torch.nn.functional.normalize(clip.model.get_image_features(**pixels).pooler_output, dim=-1)
        cosines.append((pictures @ text.T).flatten().float().cpu())
    return 100 * float(torch.cat(cosines).mean())
