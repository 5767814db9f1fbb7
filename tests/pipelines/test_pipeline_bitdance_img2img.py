"""Image to image."""

import pytest
import torch

from bitdance_diffusers import BitDanceImg2ImgPipeline
from bitdance_diffusers.patch_order import grid_to_patches, patches_to_grid

IMAGES = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(5))  # 2 x 4 tokens, two patches of 2 x 2
PROMPTS = ["a fox", "two yellow stars left of a circle"]
QUICK = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def text_to_image(t2i_pipeline):
    return t2i_pipeline()


@pytest.fixture
def pipeline(text_to_image):
    pipeline = BitDanceImg2ImgPipeline.from_pipe(text_to_image)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TestStrength:
    @pytest.mark.parametrize("generators", [lambda: seeded(3)[0], lambda: seeded(3, 4, 5, 6)])
    def test_1_gives_the_bits_of_text_to_image(self, pipeline, text_to_image, generators):
        call = {**QUICK, "num_images_per_prompt": 2}
        found = pipeline(PROMPTS, IMAGES, strength=1, generator=generators(), **call).images
        expected = text_to_image(PROMPTS, height=8, width=16, generator=generators(), **call).images
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("strength", [0, 0.19])  # a step is a fifth
    def test_without_a_step_it_gives_the_source(self, pipeline, strength):
        pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: pytest.fail("the head drew") if "noisy_code" in kwargs else None,
            with_kwargs=True,
        )
        code = pipeline(PROMPTS, IMAGES, strength=strength, **QUICK).images
        expected = torch.cat([pipeline.vae.encode(2 * one[None] - 1).code for one in IMAGES])
        assert torch.equal(code, expected)
        picture = pipeline(PROMPTS, IMAGES, strength=strength, **QUICK | {"output_type": "pt"}).images
        with torch.no_grad():
            torch.testing.assert_close(picture, (pipeline.vae.decode(expected).sample / 2 + 0.5).clamp(0, 1))

    def test_steps_that_are_run(self, pipeline):
        evaluations, times = [], []

        def record(module, args, kwargs):
            evaluations.append("noisy_code" in kwargs)
            if kwargs.get("timestep") is not None:
                times.extend(kwargs["timestep"].tolist())

        pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(5)
        for strength, steps in ((1.0, 5), (0.6, 3), (0.59, 2), (0.2, 1)):
            evaluations.clear()
            times.clear()
            pipeline("a fox", IMAGES[:1], strength=strength, **QUICK)
            assert sum(evaluations) == 2 * (steps + 1)  # of two patches
            assert times == 2 * scheduler.timesteps[-1 - steps :].tolist()


def test_parallel_evaluations_draw_the_same_bits(pipeline):
    rows = []

    def count(module, args, kwargs):
        rows.append(len(kwargs["noisy_code"]) if "noisy_code" in kwargs else 0)

    pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
    expected = pipeline(PROMPTS, IMAGES, generator=seeded(3, 4), **QUICK).images
    assert max(rows) == 4
    found = pipeline(
        PROMPTS, IMAGES, generator=seeded(3, 4), parallel_evaluations=3, parallel_tolerance=1e-4, **QUICK
    ).images
    assert torch.equal(found, expected) and max(rows) == 3 * 4


def test_default_strength(pipeline):
    found, expected = (
        pipeline(PROMPTS, IMAGES, generator=seeded(0, 1), **QUICK, **more).images for more in ({}, {"strength": 0.6})
    )
    assert torch.equal(found, expected)


def test_one_source_for_all_prompts(pipeline):
    call = {**QUICK, "num_images_per_prompt": 2}
    found = pipeline(PROMPTS, IMAGES[:1], generator=seeded(0, 1, 2, 3), **call).images
    expected = pipeline(PROMPTS, IMAGES[[0, 0]], generator=seeded(0, 1, 2, 3), **call).images
    assert torch.equal(found, expected)


def test_a_code_is_a_source(pipeline):
    found = pipeline(PROMPTS, pipeline.encode_image(IMAGES), generator=seeded(0, 1), **QUICK).images
    assert torch.equal(found, pipeline(PROMPTS, IMAGES, generator=seeded(0, 1), **QUICK).images)


def test_sources_are_resized(pipeline):
    tall = pipeline("a fox", IMAGES[:1], height=16, width=8, **QUICK).images
    assert tall.shape == (1, 8, 4, 2)
    ragged = torch.nn.functional.pad(IMAGES[:1], (0, 7, 0, 7))
    assert pipeline("a fox", ragged, **QUICK).images.shape == (1, 8, 2, 4)  # its own size, in whole patches


def test_decoded_patches_are_kept(pipeline):
    begun = -grid_to_patches(pipeline.encode_image(IMAGES), 2)
    begun[:, 1:] = 0
    found = pipeline(PROMPTS, IMAGES, latents=patches_to_grid(begun, 2, 4), generator=seeded(0, 1), **QUICK).images
    found = grid_to_patches(found, 2)
    assert torch.equal(found[:, 0], begun[:, 0]) and (found != 0).all()


def test_a_run_goes_on_elsewhere(pipeline):
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": 0.6}
    whole = pipeline(PROMPTS, IMAGES, generator=seeded(0, 1), **QUICK).images
    begun = pipeline.prepare_generation(PROMPTS, IMAGES, generator=seeded(0, 1), **call)
    begun.advance()
    resumed = pipeline.prepare_generation(PROMPTS, 1 - IMAGES, generator=seeded(7, 8), **call)
    resumed.load_state_dict(begun.state_dict())  # the sources are part of it
    for _ in resumed:
        pass
    assert torch.equal(resumed.code, whole)
