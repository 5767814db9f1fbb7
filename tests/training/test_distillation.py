import math

import pytest
import torch

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.patch_order import grid_to_patches
from bitdance_diffusers.training.distillation import DenoisingRecorder, denoise_from, distillation_loss


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize("kind", ["text", "class"])
def test_recorded_patches_are_drawn_again(kind, guidance_scale, t2i_pipeline, class_pipeline):
    """From its condition and the noise that it started from each patch becomes what it was in the pictures."""
    if kind == "text":
        pipeline, asked = t2i_pipeline(), {"prompt": ["a fox", "two red foxes in the snow"], "height": 16, "width": 16}
    else:
        pipeline, asked = class_pipeline("class_p4"), {"class_labels": [0, 1], "guidance_schedule": "constant"}
    pipeline.scheduler = BinaryDiffusionScheduler(solver_type="probability_flow_2m")
    with DenoisingRecorder(pipeline.transformer, 2, 5) as recorder:
        code = pipeline(
            **asked,
            num_inference_steps=5,
            guidance_scale=guidance_scale or 1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
            output_type="latent",
        ).images
    assert not pipeline.transformer._forward_pre_hooks
    condition, start = recorder.patches()
    patches = grid_to_patches(code, 2)
    halves = 1 if guidance_scale is None else 2
    assert condition.shape[:3] == (2 * halves, patches.shape[1], 4) and start.shape == patches.shape
    # In generation order every picture drew its start, and then the noise of its steps, which is not used
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(6, *patches.shape[2:], generator=generator)[0] for _ in range(patches.shape[1])]
    assert torch.equal(start[1, 0], drawn[0])

    rows = condition.unflatten(0, (halves, 2)).flatten(1, 2).flatten(0, 1)
    pipeline.scheduler.set_timesteps(5)
    with torch.no_grad():
        sample, predictions = denoise_from(
            pipeline.transformer, rows, start.flatten(0, 1), pipeline.scheduler, guidance_scale
        )
    assert len(predictions) == 6 and predictions[0].shape == (len(rows), *patches.shape[2:])
    assert ((sample > 0) == (patches.flatten(0, 1) > 0)).float().mean() > 0.999  # other batches round otherwise


def test_gradients_go_through_all_evaluations(t2i_pipeline):
    transformer = t2i_pipeline().transformer
    scheduler = BinaryDiffusionScheduler(solver_type="probability_flow_2m")
    scheduler.set_timesteps(2)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, transformer.config.in_channels, generator=generator)
    condition = torch.randn(3, 4, transformer.config.hidden_size, generator=generator)
    before = start.clone()
    sample, predictions = denoise_from(transformer, condition, start, scheduler)
    assert torch.equal(sample, predictions[-1]) and torch.equal(start, before)
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
