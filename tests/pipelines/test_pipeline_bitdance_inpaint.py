"""Inpainting: what is known is kept, what is masked is drawn."""

import pytest
import torch

from bitdance_diffusers import BitDanceInpaintPipeline
from bitdance_diffusers.patch_order import grid_to_patches, patch_positions
from bitdance_diffusers.scoring import score_code

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))  # 4 x 4 tokens, four patches of 2 x 2
PROMPTS = ["a fox", "two yellow stars left of a circle"]
QUICK = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
WHITE, BLACK = torch.ones(1, 16, 16), torch.zeros(1, 16, 16)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def mask_of(*tokens):
    """A mask with one white pixel in each of these tokens (row, column)."""
    mask = torch.zeros(1, 16, 16)
    for row, column in tokens:
        mask[:, 4 * row + 3, 4 * column + 1] = 1
    return mask


@pytest.fixture
def text_to_image(t2i_pipeline):
    return t2i_pipeline()


@pytest.fixture
def pipeline(text_to_image):
    pipeline = BitDanceInpaintPipeline.from_pipe(text_to_image)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TestEnds:
    @pytest.mark.parametrize("generators", [lambda: seeded(3)[0], lambda: seeded(3, 4, 5, 6)])
    def test_an_all_white_mask_gives_text_to_image(self, pipeline, text_to_image, generators):
        call = {**QUICK, "num_images_per_prompt": 2}
        found = pipeline(PROMPTS, IMAGES, WHITE, generator=generators(), **call).images
        expected = text_to_image(PROMPTS, height=16, width=16, generator=generators(), **call).images
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("call", [{"mask_image": BLACK}, {"mask_image": WHITE, "strength": 0}])
    def test_without_anything_to_draw_it_gives_the_source(self, pipeline, call):
        code = pipeline.encode_image(IMAGES)
        assert torch.equal(pipeline(PROMPTS, IMAGES, **call, **QUICK).images, code)
        picture = pipeline(PROMPTS, IMAGES, paste_source=False, **call, **QUICK | {"output_type": "pt"}).images
        torch.testing.assert_close(picture, pipeline.decode_latents(code, "pt", None))

    def test_looking_ahead_of_nothing(self, pipeline):
        found = pipeline(PROMPTS, IMAGES, BLACK, num_candidates=2, **QUICK).images
        assert torch.equal(found, pipeline.encode_image(IMAGES))


class TestWhatIsKept:
    MASKS = torch.stack([mask_of((0, 1), (3, 3)), mask_of((1, 2), (1, 3), (2, 0))])  # patches 0 and 3; 1 and 2

    @pytest.mark.parametrize("look_ahead", [{}, {"num_candidates": 2}])
    def test_every_bit_of_the_other_tokens(self, pipeline, look_ahead):
        generators = seeded(0, 1)
        found = pipeline(PROMPTS, IMAGES, self.MASKS, generator=generators, **look_ahead, **QUICK).images
        drawn = pipeline._grow_to_tokens(self.MASKS).expand_as(found)
        code = pipeline.encode_image(IMAGES)
        assert drawn[:, 0].sum(dim=(1, 2)).tolist() == [2, 3]  # a pixel grows to a token
        assert torch.equal(found[~drawn], code[~drawn])
        assert (found[drawn].abs() == 1).all() and not torch.equal(found[drawn], code[drawn])

    def test_pictures_do_not_depend_on_their_neighbours(self, pipeline):
        """Though other patches of theirs are masked."""
        call = {**QUICK, "num_candidates": 2}
        together = pipeline(PROMPTS, IMAGES, self.MASKS, generator=seeded(0, 1), **call).images
        for i in range(2):
            alone = pipeline(PROMPTS[i], IMAGES[i], self.MASKS[i], generator=seeded(i), **call).images
            assert torch.equal(alone[0], together[i])

    def test_parallel_evaluations_draw_the_same_bits(self, pipeline):
        expected = pipeline(PROMPTS, IMAGES, self.MASKS, generator=seeded(0, 1), **QUICK).images
        call = {**QUICK, "parallel_evaluations": 3}
        assert torch.equal(pipeline(PROMPTS, IMAGES, self.MASKS, generator=seeded(0, 1), **call).images, expected)

    def test_only_what_is_new_costs(self, pipeline):
        """Known patches are read many at once, and the head evaluates the new one alone."""
        image, mask = torch.rand(3, 16, 32), torch.zeros(1, 16, 32)
        mask[:, 8:, 24:] = 1  # the last of 8 patches
        fed, evaluations = [], []

        def record(module, args, kwargs):
            if kwargs.get("code") is not None:
                fed.append(kwargs["code"].shape[1])
            evaluations.append("noisy_code" in kwargs)

        pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
        pipeline("a fox", image, mask, **QUICK)
        assert fed == [4, 2, 1] and sum(evaluations) == 4

    def test_one_source_and_mask_for_all_prompts(self, pipeline):
        mask = self.MASKS[:1]
        found = pipeline(PROMPTS, IMAGES[:1], mask, generator=seeded(0, 1), **QUICK).images
        expected = pipeline(PROMPTS, IMAGES[[0, 0]], mask[[0, 0]], generator=seeded(0, 1), **QUICK).images
        assert torch.equal(found, expected)

    def test_a_code_is_a_source(self, pipeline):
        """So that what was edited can be edited again, and keeps its bits."""
        once = pipeline(PROMPTS, IMAGES, self.MASKS, generator=seeded(0, 1), **QUICK).images
        twice = pipeline(PROMPTS, once, self.MASKS.flip(0), generator=seeded(0, 1), **QUICK).images
        kept = ~pipeline._grow_to_tokens(self.MASKS.flip(0)).expand_as(once)
        assert torch.equal(twice[kept], once[kept])
        picture = pipeline(PROMPTS, once, BLACK, **QUICK | {"output_type": "pt"}).images
        torch.testing.assert_close(picture, pipeline.decode_latents(once, "pt", None))

    def test_resuming_gives_what_an_unbroken_run_gives(self, pipeline):
        generator, states = seeded(0)[0], []

        def remember(pipe, step, timestep, kwargs):
            states.append((kwargs["latents"].clone(), generator.get_state()))

        call = {"prompt": "a fox", "image": IMAGES[0], "mask_image": mask_of((0, 1), (1, 2), (2, 3)), **QUICK}
        whole = pipeline(**call, generator=generator, callback_on_step_end=remember).images
        latents, state = states[0]
        assert len(states) == 3 and (latents == 0).any()
        generator.set_state(state)
        assert torch.equal(pipeline(**call, latents=latents, generator=generator).images, whole)


class TestPaste:
    def test_the_source_s_pixels_come_back(self, pipeline):
        mask = mask_of((1, 1))
        call = {**QUICK, "output_type": "pt"}
        pasted, drawn = (
            pipeline("a fox", IMAGES[0], mask, generator=seeded(0), paste_source=paste, **call).images[0]
            for paste in (True, False)
        )
        rows = torch.arange(16)
        distance = torch.maximum(4 - rows, rows - 7).clamp(min=0)  # from the drawn token's rows (and columns)
        distance = torch.maximum(distance[:, None], distance)
        inside, outside = (distance == 0).expand_as(drawn), (distance > 4).expand_as(drawn)
        assert torch.equal(pasted[inside], drawn[inside])
        torch.testing.assert_close(pasted[outside], IMAGES[0][outside])
        seam = ~inside & ~outside
        low, high = torch.minimum(drawn, IMAGES[0]), torch.maximum(drawn, IMAGES[0])
        assert (pasted[seam] >= low[seam] - 1e-6).all() and (pasted[seam] <= high[seam] + 1e-6).all()
        nearer = (distance == 1).expand_as(drawn)
        assert ((pasted - drawn).abs() < (IMAGES[0] - drawn).abs())[nearer].float().mean() > 0.9

    def test_a_picture_of_eight_bits_comes_back_exactly(self, pipeline):
        pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=seeded(0)[0])
        found = pipeline("a fox", pixels, BLACK, **QUICK | {"output_type": "pil"}).images[0]
        assert found.tobytes() == pixels.permute(1, 2, 0).numpy().tobytes()

    def test_in_half_precision_too(self, pipeline):
        pipeline.to(dtype=torch.bfloat16)
        pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=seeded(0)[0])
        found = pipeline("a fox", pixels, BLACK, **QUICK | {"output_type": "pil"}).images[0]
        assert found.tobytes() == pixels.permute(1, 2, 0).numpy().tobytes()

    def test_as_many_sources_as_codes(self, pipeline):
        code = pipeline.encode_image(IMAGES)
        with pytest.raises(ValueError, match="`image` holds 3 pictures for a code of 2"):
            pipeline.decode_onto_source(code, IMAGES[[0, 0, 1]], WHITE)


class TestLookAhead:
    MASK = mask_of((0, 1), (1, 2))  # patches 0 and 1; two known ones follow

    def score(self, pipeline, code):
        prefix = pipeline.prepare_generation(["a fox"] * len(code), IMAGES[:1], WHITE).prefix
        positions = patch_positions(4, 4, 2)
        places = (prefix, code, positions, "condition_positions", positions)
        return score_code(pipeline.transformer, pipeline.scheduler, *places)

    def draw(self, pipeline, **call):
        return pipeline("a fox", IMAGES[:1], self.MASK, generator=seeded(0), **QUICK | call).images

    def test_the_candidate_is_kept_that_what_is_behind_fits(self, pipeline):
        candidates = []
        best = self.draw(
            pipeline,
            num_candidates=4,
            callback_on_step_end=lambda pipe, step, timestep, kwargs: candidates.append(kwargs["latents"].clone()),
        )
        scores = self.score(pipeline, candidates[-1]).sum(dim=1)  # every patch has known tokens
        assert torch.equal(best[0], candidates[-1][scores.argmax()]) and scores.argmax() != 0

    def test_an_interrupted_call_returns_a_picture_for_each_prompt(self, pipeline):
        def stop(pipe, step, timestep, kwargs):
            pipe._interrupt = True

        code = self.draw(pipeline, num_candidates=3, callback_on_step_end=stop)
        assert code.shape == (1, 8, 4, 4)
        patches = grid_to_patches(code, 2)
        assert (patches[:, 0] != 0).all() and (patches[:, 1] == 0).any()

    def test_one_generator_for_the_batch(self, pipeline):
        call = {**QUICK, "num_candidates": 2}
        runs = [pipeline(PROMPTS, IMAGES, self.MASK, generator=seeded(0)[0], **call).images for _ in range(2)]
        assert torch.equal(*runs)
