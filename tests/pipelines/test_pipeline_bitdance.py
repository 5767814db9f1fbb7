import json
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoModel, AutoPipelineForText2Image, DiffusionPipeline
from diffusers.utils import hub_utils
from huggingface_hub import RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file

from bitdance_diffusers import (
    BinaryDiffusionScheduler,
    BitDancePipeline,
    BitDanceTokenizer,
    BitDanceTransformer,
    image_sizes,
)
from bitdance_diffusers import generation as generation_module
from bitdance_diffusers.patch_order import grid_to_patches, patches_to_grid
from bitdance_diffusers.pipelines import text_conditioned

SIZE = {"height": 8, "width": 16}  # 2 x 4 tokens, two patches of 2 x 2
QUICK = {**SIZE, "num_inference_steps": 3, "output_type": "latent"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class TestReferenceCase:
    """The original's own numbers (bits exactly, conditions within 1e-4, predictions within 2e-4, pictures 1e-4)."""

    @pytest.fixture
    def case(self, case_path):
        folder = case_path("t2i_p4")
        return json.loads((folder / "case.json").read_text()), load_file(folder / "expected.safetensors")

    @pytest.fixture(params=["guided", "unguided"])
    def run(self, request, case):
        info, expected = case
        guided = request.param == "guided"
        call = {name: info[name] for name in ("prompt", "height", "width", "num_inference_steps")}
        call["guidance_scale"] = info["guidance_scale"] if guided else 1.0
        call["num_images_per_prompt"] = info["num_images"] if guided else 1
        prefix = "" if guided else "unguided_"
        return call, expected[f"{prefix}tokens"], expected[f"{prefix}image"]

    def test_bits_and_picture(self, t2i_pipeline, case, run, tmp_path):
        t2i_pipeline().save_pretrained(tmp_path)
        pipeline = BitDancePipeline.from_pretrained(tmp_path)
        call, tokens, image = run
        code = pipeline(**call, generator=seeded(case[0]["seed"]), output_type="latent").images
        assert torch.equal(grid_to_patches(code, 2).flatten(1, 2), tokens)
        picture = pipeline(**call, generator=seeded(case[0]["seed"]), output_type="pt").images
        torch.testing.assert_close(picture, (image / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("num_tokens", [1, 100])
    def test_bits_do_not_depend_on_how_many_modulations_are_formed_at_once(
        self, t2i_pipeline, case, run, monkeypatch, num_tokens
    ):
        monkeypatch.setattr(generation_module, "MODULATED_TOKENS", num_tokens)
        call, tokens, _ = run
        code = t2i_pipeline()(**call, generator=seeded(case[0]["seed"]), output_type="latent").images
        assert torch.equal(grid_to_patches(code, 2).flatten(1, 2), tokens)

    def test_conditions_and_predictions(self, t2i_pipeline, case, monkeypatch):
        info, expected = case
        pipeline = t2i_pipeline()
        conditions, predictions = [], []
        pipeline.transformer.register_forward_hook(
            lambda module, args, output: conditions.append(getattr(output, "condition", None))
        )
        denoise = generation_module.denoise_patch
        monkeypatch.setattr(
            generation_module, "denoise_patch", lambda *args: predictions.append(denoise(*args)) or predictions[-1]
        )
        pipeline(
            info["prompt"],
            height=info["height"],
            width=info["width"],
            num_inference_steps=info["num_inference_steps"],
            guidance_scale=info["guidance_scale"],
            num_images_per_prompt=info["num_images"],
            generator=seeded(info["seed"]),
            output_type="latent",
        )
        conditions = [condition[:, 0] for condition in conditions if condition is not None]
        conditions[0] = conditions[0].repeat_interleave(info["num_images"], dim=0)  # each text is read once
        for found, name in ((conditions[0], "cond0"), (conditions[-1], "condl")):
            torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=0)
        for found, name in ((predictions[0], "pred0"), (predictions[-1], "predl")):
            torch.testing.assert_close(found.repeat(2, 1, 1), expected[name], atol=2e-4, rtol=0)

    def test_head(self, t2i_pipeline, case):
        expected = case[1]
        with torch.no_grad():
            found = t2i_pipeline().transformer.head(
                expected["head_x"], timestep=expected["head_t"][:, None], condition=expected["head_cond"]
            )
        # The original's value itself is 1.2e-5 from that of float64
        torch.testing.assert_close(found, expected["head_out"], atol=2e-5, rtol=0)


def test_every_text_is_read_once(t2i_pipeline):
    """However many pictures it has; the unconditional one is the same for all."""
    pipeline = t2i_pipeline()
    rows = []

    def record(module, args, kwargs):
        if kwargs.get("kv_cache") is not None:
            rows.append(len(kwargs["code"] if "code" in kwargs else kwargs["inputs_embeds"]))

    pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    call = {**QUICK, "guidance_scale": 3.0, "num_images_per_prompt": 3}
    pipeline(["a fox", "a star"], **call)
    assert rows == [3, 12]
    rows.clear()
    pipeline(["a fox", "a star"], ["", "blurry"], **call)
    assert rows == [4, 12]


def test_embeddings_may_be_padded_further(t2i_pipeline):
    pipeline = t2i_pipeline()
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(["a fox", "a longer prompt"], None)
    call = {**QUICK, "generator": None, "prompt": None}

    def draw(width):
        return pipeline(
            prompt_embeds=torch.nn.functional.pad(embeds, (0, 0, width, 0)),
            prompt_embeds_mask=torch.nn.functional.pad(mask, (width, 0)),
            negative_prompt_embeds=negative,
            negative_prompt_embeds_mask=negative_mask,
            **{**call, "generator": seeded(0)},
        ).images

    assert torch.equal(draw(5), draw(0))


class TestBatches:
    PROMPTS = [
        "a",
        "two yellow stars left of a circle and a long tail of words",
        "fox <|im_end|>\n fox",
        "\n\nsnow 雪",
    ]
    NEGATIVES = ["", "blurry", "a negative prompt that is longer than most, with commas", "x"]

    def test_prompts_together_equal_each_alone(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        call = {**QUICK, "num_inference_steps": 5, "guidance_scale": 4.0}
        forwards = []
        pipeline.transformer.register_forward_pre_hook(lambda *args: forwards.append(1))

        together = pipeline(self.PROMPTS, self.NEGATIVES, generator=[seeded(i) for i in range(4)], **call).images
        counts = {len(forwards)}
        for i in range(4):
            forwards.clear()
            alone = pipeline(self.PROMPTS[i], self.NEGATIVES[i], generator=seeded(i), **call).images
            assert torch.equal(alone[0], together[i])
            counts.add(len(forwards))
        assert len(counts) == 1

        backwards = pipeline(
            self.PROMPTS[::-1], self.NEGATIVES[::-1], generator=[seeded(i) for i in (3, 2, 1, 0)], **call
        ).images
        assert torch.equal(backwards.flip(0), together)

    def test_pictures_do_not_depend_on_their_neighbours(self, t2i_pipeline):
        """Nor do their pixels, with a generator for each."""
        pipeline = t2i_pipeline()
        call = {**QUICK, "output_type": "pt"}
        together = pipeline(["a", "b c d", "e"], generator=[seeded(i) for i in range(3)], **call).images
        for i, prompt in enumerate(["a", "b c d", "e"]):
            alone = pipeline(prompt, generator=[seeded(i)], **call).images[0]
            torch.testing.assert_close(alone, together[i], atol=1e-6, rtol=0)

    def test_images_of_a_prompt_equal_repeated_prompts(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        generators = lambda: [seeded(i) for i in range(4)]  # noqa: E731
        several = pipeline(["a", "b c d"], num_images_per_prompt=2, generator=generators(), **QUICK).images
        repeated = pipeline(["a", "a", "b c d", "b c d"], generator=generators(), **QUICK).images
        assert torch.equal(several, repeated)

    def test_negative_prompt(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        runs = [
            pipeline("a", negative_prompt=negative, generator=seeded(0), **QUICK).images
            for negative in (None, "", "blurry")
        ]
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

    def test_embeddings_in_place_of_prompts(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        from_text = pipeline(["a", "b c d"], ["", "x"], generator=seeded(0), **QUICK).images
        with torch.no_grad():
            embeds, mask, negative_embeds, negative_mask = pipeline.encode_prompt(["a", "b c d"], ["", "x"])
        from_embeds = pipeline(
            prompt_embeds=embeds,
            prompt_embeds_mask=mask,
            negative_prompt_embeds=negative_embeds,
            negative_prompt_embeds_mask=negative_mask,
            generator=seeded(0),
            **QUICK,
        ).images
        assert torch.equal(from_text, from_embeds)


class TestOutputs:
    def test_output_types(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        call = {**SIZE, "num_inference_steps": 2}
        images = {
            kind: pipeline("a", generator=seeded(0), output_type=kind, **call).images
            for kind in ("pil", "np", "pt", "latent")
        }
        assert isinstance(images["pil"][0], PIL.Image.Image) and images["pil"][0].size == (16, 8)
        assert images["np"].shape == (1, 8, 16, 3) and images["np"].min() >= 0 and images["np"].max() <= 1
        assert images["pt"].shape == (1, 3, 8, 16)
        np.testing.assert_allclose(images["pt"][0].permute(1, 2, 0), images["np"][0])
        assert images["latent"].shape == (1, 8, 2, 4) and set(images["latent"].unique().tolist()) == {-1.0, 1.0}
        code = images["latent"]
        assert torch.equal(pipeline.vae.unpack(pipeline.vae.pack(code)).to(code.dtype), code)

    def test_tuple(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        found = pipeline("a", generator=seeded(0), return_dict=False, **QUICK)
        assert isinstance(found, tuple) and torch.equal(found[0], pipeline("a", generator=seeded(0), **QUICK).images)

    def test_defaults_come_from_the_config(self, t2i_pipeline_path, tmp_path):
        pipeline = BitDancePipeline.from_pretrained(
            t2i_pipeline_path,
            default_height=8,
            default_width=24,
            default_num_inference_steps=2,
            default_guidance_scale=1.0,
        )
        pipeline.save_pretrained(tmp_path)
        pipeline = BitDancePipeline.from_pretrained(tmp_path)
        assert pipeline("a", output_type="latent").images.shape == (1, 8, 2, 6)
        assert not pipeline.do_classifier_free_guidance
        assert pipeline.prepare_generation("a").pictures[0].settings.num_inference_steps == 2

    def test_size_that_was_not_trained_warns_once(self, t2i_pipeline_path, monkeypatch):
        pipeline = BitDancePipeline.from_pretrained(t2i_pipeline_path, supported_sizes=[[8, 8]])
        messages = []
        monkeypatch.setattr(text_conditioned.logger, "handle", lambda record: messages.append(record.getMessage()))
        for height, width in ((8, 8), (16, 8), (16, 8)):
            pipeline("a", height=height, width=width, num_inference_steps=1, output_type="latent")
        assert len(messages) == 1 and messages[0].startswith("16 x 8 is not a size")


class TestCodeSoFar:
    def test_decoded_patches_are_kept(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        whole = grid_to_patches(pipeline("a", generator=seeded(0), **QUICK).images, 2)
        begun = -whole
        begun[:, 1:] = 0
        resumed = pipeline("a", latents=patches_to_grid(begun, 2, 4), generator=seeded(1), **QUICK).images
        resumed = grid_to_patches(resumed, 2)
        assert torch.equal(resumed[:, 0], begun[:, 0]) and (resumed != 0).all()

    def test_resuming_gives_what_an_unbroken_run_gives(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        generator = seeded(0)
        states = []

        def remember(pipe, step, timestep, kwargs):
            states.append((kwargs["latents"].clone(), generator.get_state()))
            return {}

        whole = pipeline("a", generator=generator, callback_on_step_end=remember, **QUICK).images
        latents, state = states[0]
        generator.set_state(state)
        assert torch.equal(pipeline("a", latents=latents, generator=generator, **QUICK).images, whole)


class TestCallbacks:
    def test_once_per_patch(self, t2i_pipeline):
        pipeline = t2i_pipeline()
        steps = []

        def callback(pipe, step, timestep, kwargs):
            decoded = int((grid_to_patches(kwargs["latents"], 2) != 0).all(dim=(2, 3)).sum())
            steps.append((step, decoded, kwargs["latents"].shape))
            return kwargs

        pipeline("a", callback_on_step_end=callback, **QUICK)
        assert steps == [(0, 1, (1, 8, 2, 4)), (1, 2, (1, 8, 2, 4))] and pipeline.num_timesteps == 2

    def test_latents_that_it_returns_are_used(self, t2i_pipeline):
        pipeline = t2i_pipeline()

        def zero_at_the_end(pipe, step, timestep, kwargs):
            if step == pipe.num_timesteps - 1:
                kwargs["latents"] = torch.zeros_like(kwargs["latents"])
            return kwargs

        assert pipeline("a", callback_on_step_end=zero_at_the_end, **QUICK).images.abs().sum() == 0

        def flip_first(pipe, step, timestep, kwargs):
            return {"latents": -kwargs["latents"]} if step == 0 else {}

        flipped = pipeline("a", callback_on_step_end=flip_first, generator=seeded(0), **QUICK).images
        plain = pipeline("a", generator=seeded(0), **QUICK).images
        first, second = grid_to_patches(flipped, 2).unbind(1), grid_to_patches(plain, 2).unbind(1)
        assert torch.equal(first[0], -second[0]) and not torch.equal(first[1], second[1])  # it was fed back

    def test_guidance_scale_is_read_at_every_patch(self, t2i_pipeline):
        pipeline = t2i_pipeline()

        def raise_guidance(pipe, step, timestep, kwargs):
            pipe._guidance_scale += 20.0
            return kwargs

        raised = pipeline("a", guidance_scale=2.0, callback_on_step_end=raise_guidance, generator=seeded(0), **QUICK)
        assert pipeline.guidance_scale == 42.0
        plain = pipeline("a", guidance_scale=2.0, generator=seeded(0), **QUICK)
        first, second = (grid_to_patches(run.images, 2) for run in (raised, plain))
        assert torch.equal(first[:, 0], second[:, 0]) and not torch.equal(first[:, 1], second[:, 1])

    def test_interrupt(self, t2i_pipeline):
        pipeline = t2i_pipeline()

        def stop(pipe, step, timestep, kwargs):
            pipe._interrupt = True
            return kwargs

        code = grid_to_patches(pipeline("a", callback_on_step_end=stop, **QUICK).images, 2)
        assert (code[:, 0] != 0).all() and (code[:, 1] == 0).all()


class TestSaveAndLoad:
    def test_every_way_to_load_gives_the_same_bits(self, t2i_pipeline, tmp_path):
        pipeline = t2i_pipeline()
        expected = pipeline("a fox", generator=seeded(0), **QUICK).images
        pipeline.save_pretrained(tmp_path / "saved")
        folder = str(tmp_path / "saved")
        index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
        assert index["_class_name"] == "BitDancePipeline"
        assert index["vae"] == ["bitdance_diffusers", "BitDanceTokenizer"]
        assert index["transformer"] == ["bitdance_diffusers", "BitDanceTransformer"]
        assert index["scheduler"] == ["bitdance_diffusers", "BinaryDiffusionScheduler"]
        assert [name for name in index if isinstance(index[name], list)][:4] == [
            "scheduler",
            "tokenizer",
            "transformer",
            "vae",
        ]
        parts = {
            "vae": BitDanceTokenizer.from_pretrained(folder, subfolder="vae"),
            "transformer": AutoModel.from_pretrained(folder, subfolder="transformer"),
            "scheduler": BinaryDiffusionScheduler.from_pretrained(folder, subfolder="scheduler"),
            "tokenizer": pipeline.tokenizer,
        }
        assert isinstance(parts["transformer"], BitDanceTransformer)
        for loaded in (
            BitDancePipeline.from_pretrained(folder),
            DiffusionPipeline.from_pretrained(folder),
            AutoPipelineForText2Image.from_pretrained(folder),
            BitDancePipeline.from_pretrained(folder, device_map="balanced") if torch.cuda.is_available() else pipeline,
            BitDancePipeline(**parts),
            BitDancePipeline.from_pipe(pipeline),
        ):
            assert type(loaded) is BitDancePipeline
            loaded.set_progress_bar_config(disable=True)
            assert torch.equal(loaded("a fox", generator=seeded(0), **QUICK).images, expected)

    def test_variant_and_dtype_per_component(self, t2i_pipeline, tmp_path):
        t2i_pipeline().to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
        dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
        pipeline = BitDancePipeline.from_pretrained(tmp_path, variant="bf16", torch_dtype=dtypes)
        assert pipeline.transformer.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
        picture = pipeline("a", **SIZE, num_inference_steps=2, output_type="pt").images
        assert picture.dtype == torch.float32 and picture.isfinite().all()

    def test_push_to_hub_uploads_the_whole_folder(self, t2i_pipeline, tmp_path, monkeypatch):
        """Against the hub client's own calls, kept from the network: what is uploaded loads."""
        pipeline = t2i_pipeline()

        def no_card(*args, **kwargs):
            raise EntryNotFoundError("no model card yet")

        def copy(repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / repo_id)

        monkeypatch.setattr(hub_utils, "create_repo", lambda *args, **kwargs: RepoUrl("a/bitdance"))
        monkeypatch.setattr(hub_utils.ModelCard, "load", no_card)
        monkeypatch.setattr(hub_utils, "upload_folder", copy)
        pipeline.push_to_hub("bitdance")
        uploaded = BitDancePipeline.from_pretrained(tmp_path / "a" / "bitdance")
        uploaded.set_progress_bar_config(disable=True)
        expected = pipeline("a", generator=seeded(0), **QUICK).images
        assert torch.equal(uploaded("a", generator=seeded(0), **QUICK).images, expected)

    def test_components_of_different_checkpoints(self, t2i_pipeline):
        parts = t2i_pipeline().components
        parts["vae"] = BitDanceTokenizer(block_out_channels=(32, 32), latent_channels=4, layers_per_block=1)
        with pytest.raises(ValueError, match="`vae` writes 4 bits a token .* reads 8"):
            BitDancePipeline(**parts)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"default_height": 0}, "`default_height` is 0"),
        ({"default_num_inference_steps": "3"}, "`default_num_inference_steps` is '3'"),
        ({"default_guidance_scale": "x"}, "`default_guidance_scale` is 'x'"),
        ({"supported_sizes": [3]}, r"`supported_sizes` is \[3\]"),
    ],
)
def test_contradicting_defaults_are_refused_at_load(t2i_pipeline_path, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        BitDancePipeline.from_pretrained(t2i_pipeline_path, **changes)


def test_a_text_tokenizer_of_another_checkpoint_is_refused(t2i_pipeline):
    parts = t2i_pipeline().components
    parts["transformer"].register_to_config(patch_size=4)
    with pytest.raises(ValueError, match="query_4"):
        BitDancePipeline(**parts)


class TestFewerEvaluations:
    """
    `guidance_interval`, `early_stop_threshold` and `parallel_evaluations`: off by default, and no picture depends on
    its neighbours.
    """

    CALL = {**QUICK, "num_inference_steps": 19, "guidance_scale": 4.0}

    @pytest.fixture
    def drawn(self, t2i_pipeline):
        """`drawn(prompts, seeds, **call)`: the code, and the head's rows at each evaluation of the last patch."""
        pipeline = t2i_pipeline()
        pipeline.scheduler = BinaryDiffusionScheduler.from_config(
            pipeline.scheduler.config, solver_type="exponential_2m"
        )

        def draw(prompts, seeds, **call):
            rows = []

            def count(module, args, kwargs):
                if "noisy_code" in kwargs:
                    rows.append(len(kwargs["noisy_code"]))
                elif "code" in kwargs:  # the next patch
                    rows.clear()

            hook = pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
            code = pipeline(prompts, generator=[seeded(i) for i in seeds], **{**self.CALL, **call}).images
            hook.remove()
            return code, rows

        return draw

    def test_guidance_interval(self, drawn):
        plain, rows = drawn("a", [0])
        assert rows == [2] * 20
        everywhere, rows = drawn("a", [0], guidance_interval=(0, 1))
        assert rows == [2] * 20 and torch.equal(everywhere, plain)
        # The times are 0, 0.05, ... 0.95 in float32: 0.6 is above it there, 0.5 and 0.7 below.
        _, rows = drawn("a", [0], guidance_interval=(0.25, 0.7))
        assert rows == [1] * 5 + [2] * 10 + [1] * 5
        _, rows = drawn("a", [0], guidance_interval=(0.5, 0.6))
        assert rows == [1] * 10 + [2] * 3 + [1] * 7
        nowhere, rows = drawn("a", [0], guidance_interval=(0.99, 1))
        assert rows == [1] * 20 and torch.equal(nowhere, drawn("a", [0], guidance_scale=1.0)[0])

    def test_early_stop(self, drawn):
        plain, _ = drawn("a", [0])
        near, rows = drawn("a", [0], early_stop_threshold=1 - 1e-6)  # nothing is as certain as that
        assert len(rows) == 20 and torch.equal(near, plain)
        _, rows = drawn("a", [0], early_stop_threshold=1e-9)
        assert len(rows) == 2  # everything is at the first, which is looked at after the second

    def test_parallel_evaluations(self, drawn):
        plain, _ = drawn("a", [0])
        for tolerance, most_calls in ((0, 20), (1e-3, 16)):
            parallel, rows = drawn("a", [0], parallel_evaluations=4, parallel_tolerance=tolerance)
            assert torch.equal(parallel, plain)
            assert set(rows) == {4 * 2} and len(rows) <= most_calls

    @pytest.mark.parametrize(
        "call",
        [
            {"guidance_interval": (0.1, 0.6)},
            {"early_stop_threshold": 0.15},
            {"parallel_evaluations": 4, "parallel_tolerance": 1e-2},
            {"parallel_evaluations": 4, "early_stop_threshold": 0.15, "guidance_interval": (0.1, 0.6)},
        ],
    )
    def test_together_equal_each_alone(self, drawn, call):
        prompts = ["a", "two yellow stars", "b c d"]
        together, rows_together = drawn(prompts, range(3), **call)
        rows_alone = []
        for i, prompt in enumerate(prompts):
            alone, rows = drawn(prompt, [i], **call)
            assert torch.equal(alone[0], together[i])
            rows_alone.append(len(rows))
        assert len(rows_together) == max(rows_alone)
        if "early_stop_threshold" in call:
            assert min(rows_alone) < len(rows_together)


class TestBadInput:
    """A ValueError or TypeError that names the argument, before any weight is touched."""

    @pytest.fixture
    def pipeline(self, t2i_pipeline):
        pipeline = t2i_pipeline()

        def refuse(*args):
            raise AssertionError("a weight was touched")

        for module in (*pipeline.transformer.modules(), *pipeline.vae.modules()):
            module.register_forward_pre_hook(refuse)
        return pipeline

    LATENTS = torch.ones(1, 8, 2, 4)

    @pytest.mark.parametrize(
        "error, message, call",
        [
            (ValueError, "`height` is 0; .* multiple of 8 from 8 to 1024", {"height": 0}),
            (ValueError, "`height` is -8", {"height": -8}),
            (ValueError, "`width` is 12", {"width": 12}),
            (ValueError, "`width` is 1032", {"width": 1032}),
            (TypeError, "`width` is 16.0", {"width": 16.0}),
            (ValueError, "`num_inference_steps` is 0", {"num_inference_steps": 0}),
            (ValueError, "`num_inference_steps` is -1", {"num_inference_steps": -1}),
            (TypeError, "`num_inference_steps` is 2.5", {"num_inference_steps": 2.5}),
            (ValueError, "`num_images_per_prompt` is 0", {"num_images_per_prompt": 0}),
            (ValueError, "`guidance_scale` is nan", {"guidance_scale": float("nan")}),
            (TypeError, "`guidance_scale` is 'high'", {"guidance_scale": "high"}),
            (TypeError, "`guidance_interval` is 0.5", {"guidance_interval": 0.5}),
            (TypeError, "`guidance_interval` is \\(0, '1'\\)", {"guidance_interval": (0, "1")}),
            (ValueError, "`guidance_interval` is \\(0.7, 0.2\\)", {"guidance_interval": (0.7, 0.2)}),
            (ValueError, "`guidance_interval` is \\(0, 1000\\)", {"guidance_interval": (0, 1000)}),
            (TypeError, "`early_stop_threshold` is True", {"early_stop_threshold": True}),
            (ValueError, "`early_stop_threshold` is 1", {"early_stop_threshold": 1}),
            (TypeError, "`parallel_evaluations` is 2.5", {"parallel_evaluations": 2.5}),
            (ValueError, "`parallel_evaluations` is 1; .* at least 2", {"parallel_evaluations": 1}),
            (ValueError, "`parallel_evaluations` is -3", {"parallel_evaluations": -3}),
            (TypeError, "`parallel_tolerance` is None", {"parallel_tolerance": None}),
            (ValueError, "`parallel_tolerance` is -0.1", {"parallel_tolerance": -0.1}),
            (ValueError, "`parallel_tolerance` is inf", {"parallel_tolerance": float("inf")}),
            (ValueError, "`prompt` is an empty list", {"prompt": []}),
            (TypeError, "`prompt` is 3", {"prompt": 3}),
            (TypeError, "`prompt` holds 3", {"prompt": ["a", 3]}),
            (ValueError, "`prompt` and `prompt_embeds` are both None", {"prompt": None}),
            (ValueError, "`prompt` and `prompt_embeds` are both given", {"prompt_embeds": torch.zeros(1, 3, 64)}),
            (
                ValueError,
                r"`prompt_embeds` has shape \(1, 3, 5\)",
                {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 5)},
            ),
            (
                ValueError,
                "padding .0. has to stand on the left",
                {
                    "prompt": None,
                    "prompt_embeds": torch.zeros(1, 3, 64),
                    "prompt_embeds_mask": torch.tensor([[1, 1, 0]]),
                },
            ),
            (ValueError, "`negative_prompt` holds 2 texts for 1 prompts", {"negative_prompt": ["a", "b"]}),
            (ValueError, "`generator` is a list of 2; .* 1 images", {"generator": [seeded(0), seeded(1)]}),
            (TypeError, "`generator` holds 0", {"generator": [0]}),
            (ValueError, "`max_sequence_length` allows 8", {"prompt": "a long prompt", "max_sequence_length": 8}),
            (
                ValueError,
                "`negative_prompt` is .* tokens long",
                {"negative_prompt": "b " * 99, "max_sequence_length": 60},
            ),
            (ValueError, "lone surrogate", {"prompt": "\udc00"}),
            (ValueError, "`output_type` is 'jpeg'; allowed are 'pil'", {"output_type": "jpeg"}),
            (ValueError, r"`latents` has shape \(1, 8, 4, 4\)", {"latents": torch.ones(1, 8, 4, 4)}),
            (ValueError, "`latents` holds 0.5", {"latents": LATENTS * 0.5}),
            (ValueError, "partly decoded", {"latents": LATENTS * torch.tensor([1.0, 0, 0, 0])}),
            (ValueError, "names \\['bits'\\]", {"callback_on_step_end_tensor_inputs": ["bits"]}),
            (
                TypeError,
                "`callback_on_step_end_tensor_inputs` is 'latents'",
                {"callback_on_step_end_tensor_inputs": "latents"},
            ),
            (TypeError, "`callback_on_step_end` is 3", {"callback_on_step_end": 3}),
            (TypeError, "`attention_kwargs` is 'x'", {"attention_kwargs": "x"}),
            (TypeError, "`latents` is of list", {"latents": [[1]]}),
            (TypeError, "`latents` is of torch.bool", {"latents": LATENTS > 0}),
            (TypeError, "`prompt_embeds` is a list", {"prompt": None, "prompt_embeds": [1]}),
            (ValueError, "`prompt_embeds_mask` is given without", {"prompt_embeds_mask": torch.ones(1, 3)}),
            (ValueError, "`negative_prompt` holds a lone surrogate", {"negative_prompt": "\udc00"}),
        ],
    )
    def test_refused(self, pipeline, error, message, call):
        with pytest.raises(error, match=message):
            pipeline(**({"prompt": "a", **QUICK} | call))


def test_a_long_prompt_is_drawn_where_allowed(t2i_pipeline):
    pipeline = t2i_pipeline()
    code = pipeline("word " * 1500, max_sequence_length=10_000, guidance_scale=1.0, **QUICK).images
    assert (code.abs() == 1).all()


def test_longest_side_is_that_of_the_size_tokens():
    image_sizes.check_size(1024, 8, vae_scale_factor=4, patch_size=2)
    with pytest.raises(ValueError, match="`height` is 1032"):
        image_sizes.check_size(1032, 8, vae_scale_factor=4, patch_size=2)


def test_import_touches_no_device():
    code = "import torch, bitdance_diffusers; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
