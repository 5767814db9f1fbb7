"""Dtypes that meet in a call: `torch.autocast` around it, and embeddings of another dtype than the model's."""

import pytest
import torch

QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
SIZE = {"height": 8, "width": 16}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["t2i", "class"])
def test_a_call_inside_autocast(t2i_pipeline, class_pipeline, kind):
    """As training scripts validate: the projections' dtype in the cache, float32 in the sampler."""
    if kind == "t2i":  # two texts of other lengths
        pipeline, call = t2i_pipeline(), {"prompt": ["a fox", "a large brown dog"], **SIZE}
    else:
        pipeline, call = class_pipeline("class_p4"), {"class_labels": [1, 7]}
    caches, noisy = set(), set()

    def record(module, args, kwargs):
        if kwargs.get("kv_cache") is not None:
            caches.update(
                tensor.dtype for layer in kwargs["kv_cache"].layers for pair in layer.groups for tensor in pair
            )
        if "noisy_code" in kwargs:
            noisy.add(kwargs["noisy_code"].dtype)

    pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)

    def draw():
        caches.clear()
        return pipeline(**call, **QUICK, generator=seeded()).images

    expected = draw()
    assert caches == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = draw()
        assert caches == {torch.bfloat16}
        assert first.isfinite().all() and torch.equal(draw(), first)
        assert pipeline(**call, **QUICK | {"output_type": "pil"}).images
    assert noisy == {torch.float32}
    assert torch.equal(draw(), expected)


def test_autocast_changes_a_condition_by_rounding_only(t2i_pipeline):
    transformer = t2i_pipeline().transformer
    ids = torch.arange(12)[None]
    positions = torch.zeros(1, 4, 2, dtype=torch.int64)

    @torch.no_grad()
    def read():
        kv_cache = transformer.allocate_kv_cache([12], 0, torch.float32, torch.device("cpu"))
        kv_cache.extend(12)
        return transformer(input_ids=ids, condition_positions=positions, kv_cache=kv_cache).condition

    expected = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read()
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sides", [("prompt",), ("negative_prompt",), ("prompt", "negative_prompt")])
def test_embeddings_of_another_dtype(t2i_pipeline, sides, dtype):
    """Of bfloat16 they are what they are, rounded."""
    pipeline = t2i_pipeline()
    names = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")
    embeds = dict(zip(names, pipeline.encode_prompt("a fox", "blurry"), strict=True))

    def draw(cast):
        call = {"prompt": "a fox", "negative_prompt": "blurry"}
        for side in sides:
            del call[side]
            call |= {
                f"{side}_embeds": cast(embeds[f"{side}_embeds"]),
                f"{side}_embeds_mask": embeds[f"{side}_embeds_mask"],
            }
        return pipeline(**call, **SIZE, **QUICK, generator=seeded()).images

    assert torch.equal(draw(lambda tensor: tensor.to(dtype)), draw(lambda tensor: tensor.to(dtype).float()))


def test_embeddings_of_float32_for_a_model_in_bfloat16(t2i_pipeline):
    pipeline = t2i_pipeline(dtype=torch.bfloat16)
    embeds, _, negative_embeds, _ = pipeline.encode_prompt("a fox")
    given = {"prompt_embeds": embeds.float(), "negative_prompt_embeds": negative_embeds.float()}
    drawn = pipeline(**given, **SIZE, **QUICK, generator=seeded()).images
    assert torch.equal(drawn, pipeline("a fox", **SIZE, **QUICK, generator=seeded()).images)
