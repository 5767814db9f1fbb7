"""How sure a class-conditional model is of the class that a picture was asked to be, by its own likelihood."""

from functools import cache

import torch
from PIL import Image

from bitdance_diffusers import BitDanceClassPipeline
from bitdance_diffusers.patch_order import grid_to_patches, patch_positions

NUM_DRAWS = 4


@cache
def _load(folder: str) -> BitDanceClassPipeline:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return BitDanceClassPipeline.from_pretrained(folder, dtype=torch.float32).to(device)


@torch.no_grad()
def class_posterior(images: list[Image.Image], labels: list[str | int], model: str) -> list[float]:
    """
    How much better than by the other classes' labels the pipeline in the folder `model` predicts each picture's code
    by its own: a diffusion classifier (arXiv 2303.16203). A label's logit is minus the squared error of the predicted
    code, summed over its bits, a mean over times and noise that are the same for all labels.

    The mean is plain: weighted by what each time adds to the likelihood, it recognised fewer of the real digits.

    Returns:
        the softmax of the logits at each picture's label, from 0 to 1.
    """
    pipe = _load(model)
    config, device = pipe.transformer.config, pipe.transformer.device
    pixels = pipe.image_processor.preprocess(images).to(device)
    patches = grid_to_patches(pipe.vae.encode(pixels).code, config.patch_size)  # (B, M, P, C)
    positions = patch_positions(config.sample_size, config.sample_size, config.patch_size, device)
    indices = torch.arange(config.sample_size**2, device=device).view(len(positions), -1)

    # One draw for all pictures: none's depends on how many there are
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_DRAWS, 1, *patches.shape[1:])
    timestep = torch.rand(shape[:3], generator=generator).to(device)  # (R, 1, M)
    t = timestep[..., None, None]
    noisy_code = (1 - t) * torch.randn(shape, generator=generator).to(device) + t * patches  # (R, B, M, P, C)
    timestep = timestep.expand(-1, len(images), -1)
    logits = []
    for label in range(config.num_classes):
        prediction = pipe.transformer(
            noisy_code=noisy_code.flatten(0, 1),
            timestep=timestep.flatten(0, 1),
            class_labels=torch.full((len(images),), label, device=device),
            code=patches[:, :-1],
            code_positions=positions[:-1],
            condition_indices=indices,
        ).sample.unflatten(0, noisy_code.shape[:2])
        logits.append(-(patches - prediction).square().sum(dim=(2, 3, 4)).mean(dim=0))  # (B,)
    posterior = torch.stack(logits, dim=1).softmax(dim=1)
    ids = torch.tensor(pipe.get_label_ids(labels), device=device)
    return posterior.gather(1, ids[:, None])[:, 0].tolist()
