"""How sure a class-conditional model is of the class that a picture was asked to be, by its own likelihood."""

from functools import cache

import torch
from PIL import Image

from bitdance_diffusers import BitDanceClassPipeline
from bitdance_diffusers.patch_order import grid_to_patches, patch_positions

NUM_DRAWS = 4
LAST_TIME = 0.8  # bits stand four standard deviations apart there, and later ones tell nothing of the class


@cache
def _load(folder: str) -> BitDanceClassPipeline:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return BitDanceClassPipeline.from_pretrained(folder, dtype=torch.float32).to(device)


@torch.no_grad()
def class_posterior(images: list[Image.Image], labels: list[str | int], model: str) -> list[float]:
    """
    The probability of each picture's label among all classes, equally likely beforehand, by the pipeline in the folder
    `model`: a diffusion classifier (arXiv 2303.16203).

    A code x is less likely by a bound of `integral of t / (1 - t)^3 |x - prediction|^2 dt` nats (the variational one,
    arXiv 2107.00630, whose weight is half of what the signal-to-noise ratio `t^2 / (1 - t)^2` grows by). All classes
    are shown the same noise.
    """
    pipe = _load(model)
    config, device = pipe.transformer.config, pipe.transformer.device
    pixels = pipe.image_processor.preprocess(images).to(device)
    patches = grid_to_patches(pipe.vae.encode(pixels).code, config.patch_size)  # (B, M, P, C)
    positions = patch_positions(config.sample_size, config.sample_size, config.patch_size, device)
    indices = torch.arange(config.sample_size**2, device=device).view(len(positions), -1)

    generator = torch.Generator().manual_seed(0)
    shape = (NUM_DRAWS, *patches.shape)
    timestep = LAST_TIME * torch.rand(shape[:3], generator=generator).to(device)  # (R, B, M)
    t = timestep[..., None, None]
    noisy_code = (1 - t) * torch.randn(shape, generator=generator).to(device) + t * patches
    log_likelihoods = []
    for label in range(config.num_classes):
        prediction = pipe.transformer(
            noisy_code=noisy_code.flatten(0, 1),
            timestep=timestep.flatten(0, 1),
            class_labels=torch.full((len(images),), label, device=device),
            code=patches[:, :-1],
            code_positions=positions[:-1],
            condition_indices=indices,
        ).sample.unflatten(0, shape[:2])
        bound = (t / (1 - t) ** 3 * (patches - prediction).square()).sum(dim=(2, 3, 4)).mean(dim=0)  # (B,)
        log_likelihoods.append(-LAST_TIME * bound)
    posterior = torch.stack(log_likelihoods, dim=1).softmax(dim=1)
    ids = torch.tensor(pipe.get_label_ids(labels), device=device)
    return posterior.gather(1, ids[:, None])[:, 0].tolist()
