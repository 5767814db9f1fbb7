"""Components: compiled, absent, or of another family."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, get_peft_model_state_dict

from bitdance_diffusers import BitDanceClassPipeline, BitDancePipeline, BitDanceTokenizer

CALLS = {
    BitDancePipeline: {"prompt": "a fox", "height": 8, "width": 8},
    BitDanceClassPipeline: {"class_labels": 1},
}
QUICK = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "latent"}


def draw(pipeline, **call):
    pipeline.set_progress_bar_config(disable=True)
    call = CALLS[type(pipeline)] | QUICK | call
    return pipeline(**call, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(params=["t2i", "class"])
def pipeline_path(request, t2i_pipeline_path, class_pipeline_path):
    return t2i_pipeline_path if request.param == "t2i" else class_pipeline_path("class_p4")


@pytest.fixture
def load(pipeline_path):
    """`load(**kwargs)`: a pipeline of either kind."""
    kind = BitDancePipeline if (pipeline_path / "tokenizer").exists() else BitDanceClassPipeline
    return lambda **kwargs: kind.from_pretrained(pipeline_path, **kwargs)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_compiled_component_is_a_component(load, name):
    """A compiled module has no truth value. (test_compile.py draws with a compiled transformer.)"""
    pipeline = load()
    setattr(pipeline, name, torch.compile(getattr(pipeline, name), backend="eager"))
    kind = type(pipeline)
    for other in (
        kind.from_pipe(pipeline),
        kind(**pipeline.components),
        load(**{name: getattr(pipeline, name)}),
    ):
        assert getattr(other, name) is getattr(pipeline, name)
    if name == "vae":
        torch.testing.assert_close(draw(other, output_type="pt"), draw(load(), output_type="pt"), atol=1e-5, rtol=0)


def test_a_lora_fits_a_compiled_transformer(t2i_pipeline, tmp_path):
    trained = t2i_pipeline().transformer
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    BitDancePipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(trained))
    pipeline = t2i_pipeline()
    compiled = torch.compile(pipeline.transformer, backend="eager")
    pipeline.transformer = compiled
    pipeline.load_lora_weights(tmp_path, adapter_name="fox")
    assert pipeline.transformer is compiled and compiled.active_adapters() == ["fox"]


def test_a_scheduler_of_another_family_is_refused(load):
    message = "`scheduler` is a DDIMScheduler; it has to be a BinaryDiffusionScheduler"
    with pytest.raises(TypeError, match=message):
        load(scheduler=DDIMScheduler())
    pipeline = load()
    with pytest.raises(TypeError, match=message):
        type(pipeline)(**pipeline.components | {"scheduler": DDIMScheduler()})


def test_without_a_vae_codes_have_the_size_that_was_asked_for(load):
    """And a picture is refused before anything is drawn."""
    expected = draw(load())
    pipeline = load(vae=None)
    assert torch.equal(draw(pipeline), expected)
    pipeline.transformer.register_forward_pre_hook(lambda *args: pytest.fail("a weight was touched"))
    with pytest.raises(ValueError, match="`output_type` is 'pil'; without a `vae` only 'latent' is allowed"):
        draw(pipeline, output_type="pil")


def test_the_shipped_model_says_what_its_tokens_measure():
    shipped = Path(__file__).parents[2] / "examples" / "pretrained" / "icons-64"
    scale = json.loads((shipped / "model_index.json").read_text())["vae_scale_factor"]
    assert scale == BitDanceTokenizer.from_pretrained(shipped / "vae").spatial_compression_ratio


def test_pixels_have_no_meaning_where_no_scale_is_known(t2i_pipeline):
    pipeline = BitDancePipeline(**t2i_pipeline().components | {"vae": None})
    with pytest.raises(ValueError, match="its config has no `vae_scale_factor`"):
        draw(pipeline)
    pipeline = BitDancePipeline(**pipeline.components, vae_scale_factor=4)
    assert draw(pipeline).shape[-2:] == (2, 2)


def test_from_pipe_keeps_the_defaults_of_the_checkpoint(t2i_pipeline, class_pipeline):
    for pipeline, defaults in (
        (t2i_pipeline(default_height=8, default_width=16, default_guidance_scale=2.0), ("height", "width")),
        (class_pipeline("class_p4", default_guidance_schedule="constant"), ("guidance_schedule",)),
    ):
        names = [f"default_{name}" for name in ("num_inference_steps", "guidance_scale", *defaults)]
        kept = type(pipeline).from_pipe(pipeline).config
        assert [kept[name] for name in names] == [pipeline.config[name] for name in names]


def test_slicing_and_tiling_of_the_vae(load):
    pipeline = load()
    for name in ("slicing", "tiling"):
        for verb, state in (("enable", True), ("disable", False)):
            getattr(pipeline, f"{verb}_vae_{name}")()
            assert getattr(pipeline.vae, f"use_{name}") is state


@pytest.mark.parametrize("name", ["transformer", "scheduler"])
def test_a_missing_component_is_named(load, name):
    with pytest.raises(ValueError, match=f"built without its `{name}`"):
        draw(load(**{name: None}))


class TestEmbeddingsWithoutComponents:
    def test_encoding_a_text(self, t2i_pipeline):
        for name in ("transformer", "tokenizer"):
            with pytest.raises(ValueError, match=f"built without its `{name}`"):
                t2i_pipeline(**{name: None}).encode_prompt("a fox")

    def test_embeddings_need_the_tokenizer_too(self, t2i_pipeline):
        """For the tokens that announce the picture."""
        pipeline = t2i_pipeline()
        embeds, mask, negative_embeds, negative_mask = pipeline.encode_prompt("a fox")
        given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}
        pipeline = t2i_pipeline(tokenizer=None)
        assert torch.equal(pipeline.encode_prompt(**given)[0], embeds)
        with pytest.raises(ValueError, match="built without its `tokenizer`"):
            draw(pipeline, prompt=None, **given)
