"""Group offloading with streams, without an accelerator: weights are NaN until their copy has been waited for."""

import collections

import pytest
import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, ModuleGroup
from peft import LoraConfig, get_peft_model_state_dict

CPU = torch.device("cpu")


class Stream:
    """Of copies to the device: they arrive when the host waits for them, and no sooner."""

    def __init__(self):
        self.copies = []

    def synchronize(self):
        for tensor, weights in self.copies:
            tensor.data = weights
        self.copies.clear()


@pytest.fixture
def loads(monkeypatch):
    """How often each tensor was loaded. Loading and offloading are Diffusers' own but for the copies themselves."""
    loads, weights = collections.Counter(), {}

    def tensors(group):
        of_modules = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
        return dict.fromkeys((*of_modules, *group.parameters, *group.buffers))  # some stand in both

    def onload(group):
        if group.stream is not None:
            group.stream.synchronize()
        for tensor in tensors(group):
            loads[tensor] += 1
            if group.stream is not None and group.non_blocking:
                group.stream.copies.append((tensor, weights[tensor]))
            else:
                tensor.data = weights[tensor]

    def offload(group):
        for tensor in tensors(group):
            weights.setdefault(tensor, tensor.data)
            tensor.data = torch.full_like(tensor, float("nan"))

    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", onload)
    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", offload)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return loads


def offload(model, **kwargs):
    """`enable_group_offload` with a stream, to a device that is the CPU in the end. Returns the stream."""
    model.enable_group_offload(torch.device("cuda"), use_stream=True, **kwargs)
    for hook in hooks(model).values():
        hook.config.onload_device = hook.group.onload_device = CPU
        hook.config.offload_device = hook.group.offload_device = torch.device("meta")  # where no weight is
    return next(iter(hooks(model).values())).config.stream


def hooks(model):
    registries = {module: module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")}
    found = {module: registry.get_hook(_GROUP_OFFLOADING) for module, registry in registries.items()}
    return {module: hook for module, hook in found.items() if hook is not None}


@pytest.fixture(params=["t2i", "class"])
def pipeline_and_draw(request, t2i_pipeline, class_pipeline):
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    if request.param == "t2i":
        pipeline, call = t2i_pipeline(), call | {"prompt": "a fox", "height": 8, "width": 16}
    else:
        pipeline, call = class_pipeline("class_p4"), call | {"class_labels": 1}
    return pipeline, lambda: pipeline(**call, generator=torch.Generator().manual_seed(0)).images


LEVELS = [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("record_stream", [False, True])
def test_every_weight_is_there_when_it_is_used_and_loaded_no_more_often(
    pipeline_and_draw, loads, level, record_stream
):
    pipeline, draw = pipeline_and_draw
    expected = draw()
    offload(pipeline.transformer, **level, record_stream=record_stream)
    runs = collections.Counter()
    for module in hooks(pipeline.transformer):
        module.register_forward_pre_hook(lambda module, args: runs.update([module]))
    for _ in range(2):  # Diffusers takes other ways in the first forward
        loads.clear()
        runs.clear()
        assert torch.equal(draw(), expected)
        for module, hook in hooks(pipeline.transformer).items():
            for tensor in (*(p for part in hook.group.modules for p in part.parameters()), *hook.group.parameters):
                assert loads[tensor] == runs[module] > 0
    if hasattr(pipeline.transformer, "embed_tokens"):
        assert loads[pipeline.transformer.embed_tokens.weight] == 3  # the text, the negative one, the picture's start
    registries = [m._diffusers_hook for m in pipeline.transformer.modules() if hasattr(m, "_diffusers_hook")]
    assert not any(registry.get_hook(_LAYER_EXECUTION_TRACKER) for registry in registries)  # they would keep each run


def test_the_next_layer_is_on_its_way_while_one_runs(pipeline_and_draw, loads):
    pipeline, draw = pipeline_and_draw
    stream = offload(pipeline.transformer, **LEVELS[1])
    for stack in (pipeline.transformer.layers, pipeline.transformer.head.blocks):
        first, second = stack[0], stack[1]

        def check(module, args, second=second):
            copied = {id(tensor) for tensor, _ in stream.copies}
            assert copied == {id(parameter) for parameter in second.parameters()}

        first.norm1.register_forward_pre_hook(check)
    draw()


@pytest.mark.parametrize("level", LEVELS)
def test_every_weight_of_the_vae_is_there(t2i_pipeline, loads, level):
    vae = t2i_pipeline().vae
    images = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @torch.no_grad()
    def reconstruct():
        code = vae.encode(images).code
        return code, vae.decode(code).sample

    expected = reconstruct()
    offload(vae, **level)
    for _ in range(2):
        for found, wanted in zip(reconstruct(), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_a_lora_is_loaded_into_an_offloaded_transformer(t2i_pipeline, loads, level, tmp_path):
    """Diffusers then applies group offloading again."""
    trained = t2i_pipeline().transformer
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_qkv"]))
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    layers = get_peft_model_state_dict(trained)
    t2i_pipeline().save_lora_weights(tmp_path, layers)

    def draw(pipeline):
        call = {"height": 8, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
        return pipeline("a fox", **call, generator=torch.Generator().manual_seed(0)).images

    pipeline = t2i_pipeline()
    plain = draw(pipeline)
    pipeline.load_lora_weights(tmp_path)
    expected = draw(pipeline)
    assert not torch.equal(expected, plain)
    pipeline = t2i_pipeline()
    offload(pipeline.transformer, **level)
    assert torch.equal(draw(pipeline), plain)
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipeline), expected) and torch.equal(draw(pipeline), expected)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), plain)
