"""How well pictures fit their prompts by CLIP (arXiv 2103.00020), as CLIPScore (arXiv 2104.08718) uses it."""

from functools import cache

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel, ProcessorMixin


@cache
def _load(folder: str) -> tuple[CLIPModel, ProcessorMixin]:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def clip_score(images: list[Image.Image], prompts: list[str], folder: str) -> list[float]:
    """The cosine of picture and prompt, in [-1, 1]. `folder` holds a CLIP model and its processor."""
    model, processor = _load(folder)
    inputs = processor(text=prompts, images=images, padding=True, truncation=True, return_tensors="pt")
    output = model(**inputs.to(model.device))
    return torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).tolist()
