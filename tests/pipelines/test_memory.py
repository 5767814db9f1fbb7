"""Memory: what a call allocates; and, on a CPU, offloading and casting, which fail if a weight misses its hook."""

import gc
import weakref

import pytest
import torch
import torchao
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from diffusers import PipelineQuantizationConfig, TorchAoConfig

from bitdance_diffusers import BitDancePipeline
from bitdance_diffusers import generation as generation_module

CALL = {"prompt": "a fox", "height": 8, "width": 16, "num_inference_steps": 3, "output_type": "pt"}
CPU = torch.device("cpu")


def assert_same(picture, expected):
    """To rounding: a convolution may round otherwise where its weights lie elsewhere in memory."""
    torch.testing.assert_close(picture, expected, atol=1e-5, rtol=0)


@pytest.fixture
def draw():
    return lambda pipeline: pipeline(**CALL, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture
def expected(t2i_pipeline, draw):
    return draw(t2i_pipeline())


def test_model_offload_runs_every_call_through_its_hook(t2i_pipeline, draw, expected, monkeypatch):
    """On an accelerator the weights are elsewhere until a hooked forward brings them."""
    onloaded = []
    pre_forward = CpuOffload.pre_forward

    def count(hook, module, *args, **kwargs):
        onloaded.append(type(module).__name__)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", count)
    pipeline = t2i_pipeline()
    pipeline.enable_model_cpu_offload(device="cpu")
    weights = []
    for model, name in ((pipeline.transformer, "BitDanceTransformer"), (pipeline.vae, "BitDanceTokenizer")):
        for module in list(model.modules())[1:]:  # the model's own hooks come before its offload hook
            module.register_forward_pre_hook(lambda module, args, name=name: weights.append(name in onloaded))
    assert_same(draw(pipeline), expected)
    assert set(onloaded) == {"BitDanceTransformer", "BitDanceTokenizer"} and all(weights)


def test_sequential_offload(t2i_pipeline, draw, expected):
    """Every weight is a meta tensor but inside its own module's forward."""
    pipeline = t2i_pipeline()
    for model in (pipeline.transformer, pipeline.vae):
        cpu_offload(model, CPU, offload_buffers=True)
        assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(draw(pipeline), expected)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_to_disk(t2i_pipeline, draw, expected, tmp_path, offload_type):
    """Every weight is NaN until its group's hook reads it from the disk."""
    pipeline = t2i_pipeline()
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipeline.enable_group_offload(
        onload_device=CPU, offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks
    )
    if offload_type == "block_level":  # the head's blocks come and go one by one, as the decoder's layers do
        for block in (*pipeline.transformer.layers, *pipeline.transformer.head.blocks):
            assert block._diffusers_hook.get_hook("group_offloading") is not None
    draw(pipeline)  # every group has been used, and is on the disk
    for model in (pipeline.transformer, pipeline.vae):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    assert_same(draw(pipeline), expected)


def test_layerwise_casting(t2i_pipeline, draw, expected):
    pipeline = t2i_pipeline()
    for model in (pipeline.transformer, pipeline.vae):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert torch.float8_e4m3fn in stored.values()
        for name, dtype in stored.items():
            if any(pattern in name for pattern in model._skip_layerwise_casting_patterns):
                assert dtype == torch.float32, name
    assert pipeline.transformer.head.time_embed.linear_1.weight.dtype == torch.float32
    picture = draw(pipeline)
    assert picture.isfinite().all() and not torch.equal(picture, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_sampler_in_float32(t2i_pipeline, monkeypatch, dtype):
    from bitdance_diffusers import sampling

    dtypes = set()
    update = sampling.update_sample

    def record(sample, prediction, previous, scaled_noise, coefficients):
        result = update(sample, prediction, previous, scaled_noise, coefficients)
        dtypes.update(x.dtype for x in (sample, prediction, scaled_noise, result))
        return result

    monkeypatch.setattr(sampling, "update_sample", record)
    pipeline = t2i_pipeline().to(dtype)
    picture = pipeline(**{**CALL, "num_inference_steps": 2, "height": 8, "width": 8}).images
    assert picture.isfinite().all() and dtypes == {torch.float32}


def test_attention_backend(t2i_pipeline, draw, expected):
    pipeline = t2i_pipeline()
    pipeline.transformer.set_attention_backend("_native_math")
    backends = {processor._attention_backend.value for processor in pipeline.transformer.attn_processors.values()}
    assert backends == {"_native_math"} and len(pipeline.transformer.attn_processors) == 4  # 2 layers, 2 head blocks
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-3, rtol=0)
    pipeline.transformer.reset_attention_backend()
    assert_same(draw(pipeline), expected)


def test_inference_mode(t2i_pipeline, draw, expected):
    with torch.inference_mode():
        picture = draw(t2i_pipeline())
    assert_same(picture, expected)


def test_generation_needs_no_attention_mask(t2i_pipeline, draw, monkeypatch):
    """Flash, sage and cuDNN attention refuse masks and `enable_gqa`."""
    from bitdance_diffusers.models import binary_diffusion_head, block_causal_decoder

    for module in (binary_diffusion_head, block_causal_decoder):
        dispatch = module.dispatch_attention_fn

        def check(*args, dispatch=dispatch, **kwargs):
            assert kwargs.get("attn_mask") is None and not kwargs.get("enable_gqa")
            return dispatch(*args, **kwargs)

        monkeypatch.setattr(module, "dispatch_attention_fn", check)
    draw(t2i_pipeline())


def test_slicing_and_tiling_of_the_vae(t2i_pipeline, draw, expected):
    pipeline = t2i_pipeline()
    pipeline.vae.enable_slicing()
    assert_same(draw(pipeline), expected)
    pipeline.vae.enable_tiling()
    assert draw(pipeline).isfinite().all()


def allocations(call):
    """What `call` allocates on the CPU, in bytes: the most at once, and what is left when its result is gone."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
        gc.collect()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most, total


def test_a_call_needs_its_cache_and_little_else(t2i_pipeline):
    """
    Peak = weights + cache + a constant: a picture 4 times as large adds its share of the cache, and a few copies of
    its code.
    """
    pipeline = t2i_pipeline()
    cache_bytes, peaks, codes = [], [], []
    for height, width in ((16, 32), (32, 64)):

        def draw(height=height, width=width):
            pipeline("a fox", height=height, width=width, num_inference_steps=2, output_type="latent")

        draw()  # what is made once
        peaks.append(allocations(draw)[0])
        config = pipeline.transformer.config
        code_tokens = height // pipeline.vae_scale_factor * (width // pipeline.vae_scale_factor)
        per_token = config.num_layers * 2 * config.num_key_value_heads * config.attention_head_dim * 4
        cache_bytes.append(2 * (code_tokens - config.patch_size**2) * per_token)
        codes.append(code_tokens * config.in_channels * 4)
    grown, cache_grown, code_grown = (after - before for before, after in (peaks, cache_bytes, codes))
    assert cache_grown <= grown <= cache_grown + 8 * code_grown
    assert peaks[1] - cache_bytes[1] < 2**20


def test_modulations_are_let_go_before_the_next_are_formed(t2i_pipeline, draw, expected, monkeypatch):
    monkeypatch.setattr(generation_module, "MODULATED_TOKENS", 1)  # a part is as small as it gets
    pipeline = t2i_pipeline()
    formed, alive = [], []

    def check(module, args, kwargs):
        if "timestep" in kwargs:
            alive.append(sum(reference() is not None for reference in formed))
        elif "noisy_code" in kwargs:
            assert any(reference() is not None for reference in formed)

    def remember(module, args, kwargs, output):
        if "timestep" in kwargs:
            formed.append(weakref.ref(output[0] if output[0]._base is None else output[0]._base))

    pipeline.transformer.register_forward_pre_hook(check, with_kwargs=True)
    pipeline.transformer.register_forward_hook(remember, with_kwargs=True)
    assert_same(draw(pipeline), expected)
    assert alive == [0] * 8  # 2 patches, 4 evaluations


def test_a_hundred_calls_leave_nothing_behind(t2i_pipeline):
    pipeline = t2i_pipeline()

    def draw():
        pipeline("a fox", height=8, width=8, num_inference_steps=1, output_type="latent")

    draw()  # what is made once

    def draw_a_hundred_times():
        for _ in range(100):
            draw()

    _, left = allocations(draw_a_hundred_times)
    assert abs(left) < 1024


@pytest.mark.parametrize("kept", [[], ["head"]])
@pytest.mark.parametrize(
    "name, tensor", [("Int8WeightOnlyConfig", "Int8Tensor"), ("Float8WeightOnlyConfig", "Float8Tensor")]
)
def test_torchao_quantization(t2i_pipeline_path, draw, tmp_path, name, tensor, kept):
    """The transformer in 8 bits, with its head or without it; saved and loaded again."""
    config = TorchAoConfig(getattr(torchao.quantization, name)(), modules_to_not_convert=kept)
    pipeline = BitDancePipeline.from_pretrained(
        t2i_pipeline_path,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config}),
        dtype=torch.float32,
    )
    weights = (pipeline.transformer.layers[0].attn.to_q.weight, pipeline.transformer.head.blocks[0].attn.to_qkv.weight)
    assert [type(weight).__name__ == tensor for weight in weights] == [True, not kept]
    picture = draw(pipeline)
    assert picture.isfinite().all()
    pipeline.save_pretrained(tmp_path)
    assert_same(draw(BitDancePipeline.from_pretrained(tmp_path, dtype=torch.float32)), picture)
