import math

import pytest
import torch

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.patch_order import grid_to_patches
from bitdance_diffusers.training.distillation import ConditionRecorder, denoise_from, distillation_loss


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize("kind", ["text", "class"])
def test_recorded_patches_are_drawn_again(kind, guidance_scale, t2i_pipeline, class_pipeline):
    """From its condition and its noise each patch becomes what it was in the pictures, beside another draw of it."""
    if kind == "text":
        pipeline, asked = t2i_pipeline(), {"prompt": ["a fox", "two red foxes in the snow"], "height": 16, "width": 16}
    else:
        pipeline, asked = class_pipeline("class_p4"), {"class_labels": [0, 1], "guidance_schedule": "constant"}
    pipeline.scheduler = BinaryDiffusionScheduler.from_config(
        pipeline.scheduler.config, solver_type="probability_flow_2m"
    )
    with ConditionRecorder(pipeline.transformer, 5) as recorder:
        code = pipeline(
            **asked,
            num_inference_steps=5,
            guidance_scale=guidance_scale or 1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
            output_type="latent",
        ).images
    assert not pipeline.transformer._forward_pre_hooks
    conditions, patches = recorder.conditions(), grid_to_patches(code, 2)  # (R, M, P, D), (2, M, P, C)
    halves, num_patches = 1 if guidance_scale is None else 2, patches.shape[1]
    assert conditions.shape[:3] == (2 * halves, num_patches, 4)

    # In generation order every picture drew its start and the noise of 5 steps; a second draw has other noise
    start = torch.randn(2, num_patches, 2, *patches.shape[2:], generator=torch.Generator().manual_seed(2))
    for picture in range(2):
        generator = torch.Generator().manual_seed(picture)
        for patch in range(num_patches):
            draws = [torch.randn(patches.shape[2:], generator=generator) for _ in range(6)]
            start[picture, patch, 0] = draws[0]
    rows = conditions.unflatten(0, (halves, 2)).flatten(1, 2).flatten(0, 1)
    pipeline.scheduler.set_timesteps(5)
    with torch.no_grad():
        sample, predictions = denoise_from(
            pipeline.transformer, rows, start.flatten(0, 2), pipeline.scheduler, guidance_scale
        )
    assert len(predictions) == 6 and predictions[0].shape == (2 * len(rows), *patches.shape[2:])
    draws = sample.unflatten(0, (2, num_patches, 2))
    assert ((draws[:, :, 0] > 0) == (patches > 0)).float().mean() > 0.999  # other batches round otherwise
    assert ((draws[:, :, 1] > 0) == (patches > 0)).float().mean() < 0.99


def test_gradients_go_through_all_evaluations(t2i_pipeline):
    transformer = t2i_pipeline().transformer
    scheduler = BinaryDiffusionScheduler(solver_type="probability_flow_2m")
    scheduler.set_timesteps(2)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, transformer.config.in_channels, generator=generator)
    condition = torch.randn(3, 4, transformer.config.hidden_size, generator=generator)
    sample, predictions = denoise_from(transformer, condition, start, scheduler)
    assert torch.equal(sample, predictions[-1])
    gradients = torch.autograd.grad(sample.sum(), predictions)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_the_loss_is_that_of_all_evaluations():
    code = torch.tensor([[[1.0, -1.0]]])
    first, last = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.8, 0.8]]])
    loss = distillation_loss([first, last], code, bounded=True)
    expected = -(math.log(0.9) + math.log(0.1)) / 2 - 0.5 * math.log(0.5)
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss = distillation_loss([first, last], code, bounded=False)
    torch.testing.assert_close(loss, torch.tensor((0.2**2 + 1.8**2) / 2 + 0.5))
