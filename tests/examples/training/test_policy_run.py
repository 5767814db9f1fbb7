import numpy as np
import pytest
import torch

from bitdance_diffusers.patch_order import grid_to_patches
from bitdance_diffusers.training.policy import predict_transitions
from bitdance_diffusers.training.rollouts import RolloutScheduler, TransitionRecorder
from training.policy_run import ClassLabels, TextPrompts


@pytest.mark.parametrize("guidance_scale", [None, 4.0])
@pytest.mark.parametrize("kind", ["text", "class"])
def test_recorded_steps_are_the_policys(kind, guidance_scale, t2i_pipeline, class_pipeline):
    """
    What a recorded step has beyond the policy's mean is the noise that its picture's generator drew: the
    teacher-forced forward over the finished pictures predicts what the head did while they were drawn.
    """
    num_steps, trained, guided = 5, [0, 2, 3], guidance_scale is not None
    if kind == "text":
        pipeline, asked = t2i_pipeline(), ["a fox", "two red foxes in the snow"]
        prompts = TextPrompts(pipeline, None, 16, 16)
    else:
        pipeline, asked = class_pipeline("class_p4"), [0, 1]
        prompts = ClassLabels(pipeline)
    pipeline.scheduler = RolloutScheduler(stochastic_steps=trained)
    pipeline.scheduler.set_timesteps(num_steps)
    with TransitionRecorder(pipeline.transformer, 2, num_steps, trained) as recorder:
        code = pipeline(
            **prompts.call_arguments(asked),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale or 1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
            output_type="latent",
        ).images
    assert not pipeline.transformer._forward_pre_hooks
    before, after = recorder.transitions()
    patches, steps = grid_to_patches(code, 2), pipeline.scheduler.gaussian_steps(trained)
    assert before.shape == (3, *patches.shape)
    with torch.no_grad():
        prediction = predict_transitions(
            pipeline.transformer,
            steps,
            before,
            patches,
            prompts.positions,
            prompts.conditioning(asked, guided),
            guidance_scale,
        )
    keep, toward, spread = (x[:, None, None, None, None] for x in (steps.keep, steps.toward, steps.spread))
    noise = (after - keep * before - toward * prediction) / spread
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            torch.stack([torch.randn(patches.shape[2:], generator=generator) for _ in range(num_steps + 1)])
            for _ in range(patches.shape[1])
        ]  # for every patch the start, then one a step
        torch.testing.assert_close(noise[:, seed], torch.stack(drawn, 1)[1:][trained], rtol=0, atol=2e-3)


def test_classes_are_drawn_alike(class_pipeline):
    prompts = ClassLabels(class_pipeline("class_p4"))
    number = len(prompts.labels)
    drawn = prompts.draw(np.random.default_rng(0), 2 * number + 1)
    assert sorted(map(drawn[: 2 * number].count, prompts.labels)) == [2] * number
    assert drawn == prompts.draw(np.random.default_rng(0), 2 * number + 1)
