"""The model's own score of a picture."""

import PIL.Image
import pytest
import torch

from bitdance_diffusers.patch_order import grid_to_patches
from bitdance_diffusers.scoring import draw_score_noise
from bitdance_diffusers.training.objective import diffusion_loss

PROMPTS = ["a fox", "a longer prompt about a fox", "b"]


def random_code(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sign()


@pytest.fixture
def t2i(t2i_pipeline):
    """A pipeline and codes (2, C, 4, 8) that it takes."""
    pipeline = t2i_pipeline()
    return pipeline, random_code(2, pipeline.transformer.config.in_channels, 4, 8)


def test_it_is_minus_the_training_loss(t2i):
    pipeline, code = t2i
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    score = pipeline.score(code, PROMPTS[:2], num_times=3, num_draws=1)

    patches = grid_to_patches(code, 2)  # (B, M, P, C)
    noise = draw_score_noise(3, 1, *patches.shape[1:])
    expected = 0
    for timestep, draw in zip(scheduler.training_timestep_quantiles(3), noise[:, 0], strict=True):
        for row, prompt in enumerate(PROMPTS[:2]):
            generation = pipeline.prepare_generation(prompt, height=16, width=32, guidance_scale=1.0)
            one, times = patches[row : row + 1], timestep.expand(1, patches.shape[1])
            sample = transformer(
                inputs_embeds=generation.prefix.inputs["inputs_embeds"],
                code=one[:, :-1],
                code_positions=generation.pictures[0].positions[:-1],
                condition_positions=generation.pictures[0].positions,
                noisy_code=scheduler.add_noise(one, draw[None], times),
                timestep=times,
            ).sample
            loss = diffusion_loss(scheduler, sample, one, times).mean(dim=-1)  # (1, M)
            expected = expected - torch.cat([loss * (row == other) for other in range(2)]) / 3
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


def test_scoring_times_split_the_training_times_evenly(t2i):
    scheduler = t2i[0].scheduler
    drawn = scheduler.sample_training_timesteps((40_000,), torch.Generator().manual_seed(0))
    for share, timestep in zip([0.125, 0.375, 0.625, 0.875], scheduler.training_timestep_quantiles(4), strict=True):
        assert abs((drawn < timestep).float().mean() - share) < 0.01


@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_pair_does_not_depend_on_its_neighbours(t2i, class_pipeline, kind):
    if kind == "text":
        (pipeline, code), conditions = t2i, PROMPTS[:2]
    else:
        pipeline, conditions = class_pipeline("class_p4"), [1, 3]
        config = pipeline.transformer.config
        code = random_code(2, config.in_channels, config.sample_size, config.sample_size)
    options = {"num_times": 2, "num_passes": 2, "bit_flip_probability": 0.1}
    pairs = pipeline.score(code, conditions, **options)
    for row in range(2):
        alone = pipeline.score(code[row : row + 1], conditions[row], **options)
        torch.testing.assert_close(alone[0], pairs[row], rtol=1e-4, atol=1e-5)
    one_picture = pipeline.score(code[:1], conditions, **options)
    one_condition = pipeline.score(code, conditions[0], **options)
    torch.testing.assert_close(one_picture[0], pairs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one_condition[1:], pipeline.score(code[1:], conditions[0], **options))
    assert not torch.allclose(one_picture[1], pairs[1]) and not torch.allclose(one_condition[1], pairs[1])


def test_flipped_bits_change_what_later_patches_are_judged_by_and_not_the_first(t2i):
    pipeline, code = t2i
    clean = pipeline.score(code, "a fox", num_times=2)
    flipped = pipeline.score(code, "a fox", num_times=2, bit_flip_probability=0.4)
    torch.testing.assert_close(flipped[:, 0], clean[:, 0])
    assert not torch.isclose(flipped[:, -1], clean[:, -1]).any()


@pytest.mark.parametrize("kind", ["text", "class"])
def test_pictures_are_scored_as_their_codes(t2i, class_pipeline, kind):
    pipeline, condition = (t2i[0], "a fox") if kind == "text" else (class_pipeline("class_p4"), 2)
    side = 16 if kind == "text" else pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    picture = PIL.Image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy())
    with torch.no_grad():
        code = pipeline.vae.encode(pipeline.image_processor.preprocess(picture)).code
    expected = pipeline.score(code, condition, num_times=1)
    torch.testing.assert_close(pipeline.score(picture, condition, num_times=1), expected)
    torch.testing.assert_close(pipeline.score([picture] * 2, condition, num_times=1)[1:], expected)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_confidence_is_a_map_of_the_tokens(t2i, class_pipeline, kind):
    if kind == "text":
        pipeline, code = t2i
        confidence = pipeline.confidence(code, "a fox", num_times=2)
    else:
        pipeline = class_pipeline("class_p4")
        side = pipeline.transformer.config.sample_size
        code = random_code(2, pipeline.transformer.config.in_channels, side, side)
        confidence = pipeline.confidence(code, 1, num_times=2)
    assert confidence.shape == (2, *code.shape[2:])
    assert ((confidence >= 0) & (confidence <= 1)).all() and confidence.std() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_times": 0}, ValueError, "`num_times` is 0"),
        ({"num_draws": 1.5}, TypeError, "`num_draws` is 1.5"),
        ({"num_passes": -1}, ValueError, "`num_passes` is -1"),
        ({"bit_flip_probability": 0.5}, ValueError, "`bit_flip_probability` is 0.5"),
        ({"prompt": PROMPTS}, ValueError, "2 pictures for 3 prompts"),
        ({"prompt": None}, ValueError, "`prompt`"),
        ({"image": "a.png"}, TypeError, "`image` holds 'a.png'"),
    ],
)
def test_bad_input_is_named(t2i, arguments, error, message):
    pipeline, code = t2i
    with pytest.raises(error, match=message):
        pipeline.score(**{"image": code, "prompt": "a fox"} | arguments)


def test_bad_input_of_classes_is_named(class_pipeline):
    pipeline = class_pipeline("class_p4")
    config = pipeline.transformer.config
    code = random_code(2, config.in_channels, config.sample_size, config.sample_size)
    with pytest.raises(ValueError, match="2 pictures for 3 labels"):
        pipeline.score(code, [0, 1, 2])
    with pytest.raises(ValueError, match="`image` is a code of shape"):
        pipeline.score(code[..., :-1], 1)


def test_noise_is_always_the_same_and_comes_in_pairs_of_opposite_sign():
    noise = draw_score_noise(2, 3, 4, 5, 6)
    assert noise.shape == (2, 3, 4, 5, 6) and torch.equal(noise, draw_score_noise(2, 3, 4, 5, 6))
    assert torch.equal(noise[:, 2], -noise[:, 0]) and not torch.equal(noise[:, 1].abs(), noise[:, 0].abs())
