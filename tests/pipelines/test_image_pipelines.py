"""What every pipeline of Diffusers does, of those that make pictures from others: its pipeline testers' checks."""

import inspect

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict

import bitdance_diffusers
from bitdance_diffusers import BitDanceImg2ImgPipeline, BitDanceInpaintPipeline, BitDancePipeline

IMAGES = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(5))
MASKS = torch.zeros(2, 1, 8, 16)
MASKS[0, :, :4] = MASKS[1, :, :, 6:] = 1
QUICK = {"num_inference_steps": 3, "guidance_scale": 3.0}
AUTO = {BitDanceImg2ImgPipeline: AutoPipelineForImage2Image, BitDanceInpaintPipeline: AutoPipelineForInpainting}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(params=[BitDanceImg2ImgPipeline, BitDanceInpaintPipeline])
def kind(request):
    return request.param


@pytest.fixture
def pipeline(kind, t2i_pipeline_path):
    pipeline = kind.from_pretrained(t2i_pipeline_path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(pipeline, *rows, **more):
    """Of a call for these rows of the batch of two."""
    rows = list(rows)
    call = {"prompt": [["a fox", "two yellow stars left of a circle"][row] for row in rows], "image": IMAGES[rows]}
    if isinstance(pipeline, BitDanceInpaintPipeline):
        call["mask_image"] = MASKS[rows]
    return call | QUICK | {"generator": seeded(*rows), "output_type": "pt"} | more


def test_call_signature(kind):
    parameters = inspect.signature(kind.__call__).parameters
    required = ["prompt", "image", "height", "width", "strength", "guidance_scale", "negative_prompt"]
    required += ["prompt_embeds", "negative_prompt_embeds", "num_inference_steps", "num_images_per_prompt"]
    required += ["generator", "latents", "output_type", "return_dict", "callback_on_step_end", "attention_kwargs"]
    assert set(required) <= set(parameters)
    assert ("mask_image" in parameters) == (kind is BitDanceInpaintPipeline)
    assert all(parameter.default is not parameter.empty for name, parameter in parameters.items() if name != "self")


def test_a_batch_gives_what_each_gives_alone(pipeline):
    together = pipeline(**arguments(pipeline, 0, 1)).images
    for row in range(2):
        torch.testing.assert_close(pipeline(**arguments(pipeline, row)).images[0], together[row], atol=1e-6, rtol=0)


def test_images_of_a_prompt(pipeline):
    several = pipeline(**arguments(pipeline, 0, num_images_per_prompt=2, generator=seeded(0, 1))).images
    repeated = pipeline(**arguments(pipeline, 0, 0, generator=seeded(0, 1))).images
    torch.testing.assert_close(several, repeated, atol=1e-6, rtol=0)


def test_output_types_and_tuples(pipeline):
    images = {
        kind: pipeline(**arguments(pipeline, 0, 1, output_type=kind)).images for kind in ("pil", "np", "pt", "latent")
    }
    assert [image.size for image in images["pil"]] == [(16, 8), (16, 8)] and isinstance(images["pil"], list)
    np.testing.assert_allclose(images["np"], images["pt"].permute(0, 2, 3, 1))
    assert set(images["latent"].unique().tolist()) == {-1.0, 1.0}
    found = pipeline(**arguments(pipeline, 0, 1, return_dict=False))
    assert isinstance(found, tuple) and torch.equal(found[0], images["pt"])


def test_kinds_of_input(pipeline):
    """A picture of 8 bits, however it is given."""
    pixels = (IMAGES[0] * 255).round().to(torch.uint8)
    image, mask = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()), PIL.Image.fromarray(MASKS[0, 0].bool().numpy())
    kinds = [(image, mask), ([image], [mask]), (np.asarray(image), np.asarray(mask)), (pixels, MASKS[:1])]
    call = arguments(pipeline, 0)
    codes = []
    for image, mask in kinds:
        call |= {"image": image, "generator": seeded(0), "output_type": "latent"}
        codes.append(pipeline(**call | ({"mask_image": mask} if "mask_image" in call else {})).images)
    assert all(torch.equal(code, codes[0]) for code in codes)


def test_embeddings_in_place_of_prompts(pipeline):
    """`encode_prompt` works in isolation."""
    call = arguments(pipeline, 0, 1)
    expected = pipeline(**call).images
    with torch.no_grad():
        embeds, mask, negative, negative_mask = pipeline.encode_prompt(call["prompt"])
    given = {"prompt": None, "prompt_embeds": embeds, "prompt_embeds_mask": mask, "generator": seeded(0, 1)}
    given |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
    assert torch.equal(pipeline(**call | given).images, expected)


def test_negative_prompts_and_guidance(pipeline):
    codes = [
        pipeline(**arguments(pipeline, 0, 1, output_type="latent", **more)).images
        for more in ({}, {"negative_prompt": ["blurry", ""]}, {"guidance_scale": 1.0})
    ]
    assert not torch.equal(codes[0][0], codes[1][0]) and torch.equal(codes[0][1], codes[1][1])
    assert not torch.equal(codes[0], codes[2]) and not pipeline.do_classifier_free_guidance


def test_callbacks(pipeline):
    steps = []

    def flip_at_the_end(pipe, step, timestep, kwargs):
        steps.append(step)
        if step == pipe.num_timesteps - 1:
            return {"latents": -kwargs["latents"]}

    plain = pipeline(**arguments(pipeline, 0, 1, output_type="latent")).images
    call = arguments(pipeline, 0, 1, output_type="latent", callback_on_step_end=flip_at_the_end)
    assert torch.equal(pipeline(**call).images, -plain) and steps == [0, 1]


def test_saved_and_loaded(pipeline, kind, tmp_path):
    """As a pipeline of its own kind, of text to image, and by the Auto classes."""
    expected = pipeline(**arguments(pipeline, 0, 1)).images
    pipeline.save_pretrained(tmp_path)
    for loader in (kind, DiffusionPipeline, AUTO[kind]):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is kind
        torch.testing.assert_close(loaded(**arguments(loaded, 0, 1)).images, expected, atol=1e-5, rtol=0)
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path)) is BitDancePipeline


def test_from_pipe(pipeline, kind, t2i_pipeline_path):
    """To and from text to image: the components are shared, and the config is the same."""
    text_to_image = BitDancePipeline.from_pretrained(t2i_pipeline_path, default_guidance_scale=2.5)
    for made in (kind.from_pipe(text_to_image), AUTO[kind].from_pipe(text_to_image)):
        back = (BitDancePipeline.from_pipe(made), AutoPipelineForText2Image.from_pipe(made))
        for one in (made, *back):
            assert one.components == text_to_image.components and one.config.default_guidance_scale == 2.5
        assert type(made) is kind and all(type(one) is BitDancePipeline for one in back)
    made.set_progress_bar_config(disable=True)
    found = made(**arguments(made, 0, 1)).images
    torch.testing.assert_close(found, pipeline(**arguments(pipeline, 0, 1)).images, atol=1e-5, rtol=0)


def test_auto_pipelines_of_a_text_to_image_checkpoint(t2i_pipeline_path):
    for kind, auto in AUTO.items():
        assert type(auto.from_pretrained(t2i_pipeline_path)) is kind
        assert kind.__name__ in bitdance_diffusers.__all__


@pytest.mark.parametrize("how", ["model", "sequential", "group", "casting"])
def test_offloading_and_casting(pipeline, how):
    """Every weight is used within a forward that brings it."""
    expected = pipeline(**arguments(pipeline, 0, 1)).images
    if how == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    elif how == "sequential":
        for model in (pipeline.transformer, pipeline.vae):
            cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    elif how == "group":
        pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    else:
        pipeline.transformer.enable_layerwise_casting(torch.float32, torch.float32)
    found = pipeline(**arguments(pipeline, 0, 1)).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_half_precision(pipeline):
    pipeline.to(dtype=torch.bfloat16)
    images = pipeline(**arguments(pipeline, 0, 1)).images
    assert images.shape == IMAGES.shape and bool(images.isfinite().all())


def test_lora(pipeline, kind, tmp_path):
    transformer = kind.from_pretrained(pipeline.config._name_or_path).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_qkv"]))
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=seeded(0)[0])
    kind.save_lora_weights(tmp_path, get_peft_model_state_dict(transformer))
    call = {"output_type": "latent", "num_inference_steps": 8}
    plain = pipeline(**arguments(pipeline, 0, 1, **call)).images
    pipeline.load_lora_weights(tmp_path)
    assert not torch.equal(pipeline(**arguments(pipeline, 0, 1, **call)).images, plain)
    pipeline.unload_lora_weights()
    assert torch.equal(pipeline(**arguments(pipeline, 0, 1, **call)).images, plain)


class TestBadInput:
    """A ValueError or TypeError that names the argument, before any weight is touched."""

    @pytest.fixture(autouse=True)
    def no_weight_is_touched(self, pipeline):
        def refuse(*args):
            raise AssertionError("a weight was touched")

        for module in (*pipeline.transformer.modules(), *pipeline.vae.modules()):
            module.register_forward_pre_hook(refuse)

    @pytest.mark.parametrize(
        "error, message, call",
        [
            (TypeError, "`image` holds None", {"image": None}),
            (TypeError, "`image` holds 'fox.png'", {"image": "fox.png"}),
            (ValueError, "`image` holds 3 pictures for 2 prompts", {"image": [IMAGES[0]] * 3}),
            (ValueError, "`image` holds 2 pictures for 1 prompts", {"prompt": "a fox", "generator": None}),
            (ValueError, "`image` holds pictures of the sizes", {"image": [IMAGES[0], IMAGES[0, :, :, :8]]}),
            (ValueError, "`image` is a code that holds 0.5", {"image": torch.full((2, 8, 2, 4), 0.5)}),
            (ValueError, "cannot be resized to .* 16 x 16", {"image": torch.ones(2, 8, 2, 4), "height": 16}),
            (ValueError, "`height` is 12; it has to be a multiple of 8", {"height": 12}),
            (ValueError, "`width` is 2048; it has to be", {"image": torch.zeros(1, 3, 8, 2048)}),
            (TypeError, "`strength` is '1'", {"strength": "1"}),
            (ValueError, "`strength` is 1.1; it has to be from 0 to 1", {"strength": 1.1}),
            (ValueError, "`strength` is -0.1", {"strength": -0.1}),
            (ValueError, "`strength` is nan", {"strength": float("nan")}),
            (ValueError, "`prompt` and `prompt_embeds` are both None", {"prompt": None}),
            (ValueError, "`negative_prompt` holds 3 texts for 2 prompts", {"negative_prompt": ["a"] * 3}),
            (ValueError, "`generator` is a list of 1; .* 2 images", {"generator": seeded(0)}),
            (ValueError, r"`latents` has shape \(1, 8, 2, 4\)", {"latents": torch.ones(1, 8, 2, 4)}),
            (ValueError, "`max_sequence_length` allows 8", {"max_sequence_length": 8}),
            (ValueError, "`output_type` is 'jpeg'", {"output_type": "jpeg"}),
        ],
    )
    def test_refused(self, pipeline, error, message, call):
        with pytest.raises(error, match=message):
            pipeline(**arguments(pipeline, 0, 1) | call)

    @pytest.mark.parametrize("kind", [BitDanceInpaintPipeline], indirect=True)
    @pytest.mark.parametrize(
        "error, message, call",
        [
            (TypeError, "`mask_image` holds None", {"mask_image": None}),
            (ValueError, "`mask_image` holds 3 pictures for 2 prompts", {"mask_image": MASKS[[0, 0, 0]]}),
            (ValueError, "`mask_image` is of shape", {"mask_image": torch.zeros(1, 5, 8, 16)}),
            (ValueError, "partly decoded token", {"latents": torch.eye(8)[:2, :, None, None].repeat(1, 1, 2, 4)}),
            (ValueError, "`num_candidates` is 0", {"num_candidates": 0}),
            (TypeError, "`num_candidates` is 1.5", {"num_candidates": 1.5}),
        ],
    )
    def test_refused_by_inpainting(self, pipeline, error, message, call):
        with pytest.raises(error, match=message):
            pipeline(**arguments(pipeline, 0, 1) | call)

    def test_an_absent_vae_is_named(self, pipeline, kind, t2i_pipeline_path):
        pipeline = kind.from_pretrained(t2i_pipeline_path, vae=None)
        with pytest.raises(ValueError, match="built without its `vae`"):
            pipeline(**arguments(pipeline, 0, 1, output_type="latent"))
