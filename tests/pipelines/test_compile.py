"""Compilation, counted in graphs: everything is compiled, and nothing again for another patch, size or prompt."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bitdance_diffusers import generation as generation_module

SIZE = {"height": 16, "width": 16}  # 4 patches


class Graphs:
    """A `torch.compile` backend that runs a graph as it was traced, and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph


@pytest.fixture(autouse=True)
def several_chunks_of_modulations(monkeypatch):
    """Of the 5 evaluations of a patch 3, then 2."""
    monkeypatch.setattr(generation_module, "MODULATED_TOKENS", 16)


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def draw(pipeline, prompt="a fox", **call):
    call = {**SIZE, "num_inference_steps": 4, "output_type": "latent", **call}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **call).images


@pytest.mark.parametrize("how", ["torch.compile", "compile", "compile_repeated_blocks"])
def test_compiled_once(t2i_pipeline, graphs, how):
    pipeline = t2i_pipeline()
    expected = draw(pipeline)
    expected_long = draw(pipeline, "quite another prompt, and a longer one", height=8, width=32)
    if how == "torch.compile":
        pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, backend=graphs)
    elif how == "compile":
        pipeline.transformer.compile(fullgraph=True, backend=graphs)
    else:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)

    assert torch.equal(draw(pipeline), expected)
    # Token embedding, text, fed-back patch, modulations and denoising; or a layer's two and a block of the head.
    first = graphs.count
    assert first == (3 if how == "compile_repeated_blocks" else 5)
    assert torch.equal(draw(pipeline), expected)
    assert torch.equal(draw(pipeline, "quite another prompt, and a longer one", height=8, width=32), expected_long)
    assert graphs.count == first


def test_class_pipeline_compiled_once(class_pipeline, graphs):
    pipeline = class_pipeline("class_p4")
    call = {"num_inference_steps": 4, "output_type": "latent"}
    expected = [pipeline(label, generator=torch.Generator().manual_seed(0), **call).images for label in (1, 7)]
    pipeline.transformer.compile(fullgraph=True, backend=graphs)
    for _ in range(2):
        for label, code in zip((1, 7), expected, strict=True):
            assert torch.equal(pipeline(label, generator=torch.Generator().manual_seed(0), **call).images, code)
        assert graphs.count == 4  # class, fed-back patch, modulations and denoising


def test_parallel_evaluations_compile_once(t2i_pipeline, graphs):
    pipeline = t2i_pipeline()
    expected = draw(pipeline)
    pipeline.transformer.compile(fullgraph=True, backend=graphs)
    for prompt in ("a fox", "a fox"):
        assert torch.equal(draw(pipeline, prompt, parallel_evaluations=3, parallel_tolerance=1e-4), expected)
        assert graphs.count == 5  # as one after the other


@pytest.mark.parametrize("parallel_evaluations", [None, 2])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_outputs_may_be_overwritten_by_the_next_call(
    t2i_pipeline, class_pipeline, guidance_scale, parallel_evaluations, monkeypatch
):
    """As those of a CUDA graph are: `mode="reduce-overhead"`."""
    monkeypatch.setattr(generation_module, "GRAPH_DEVICES", ("cpu",))
    for pipeline, call in (
        (t2i_pipeline(), {**SIZE, "prompt": "a fox"}),
        (class_pipeline("class_p4"), {"class_labels": 1}),
    ):
        call |= {"num_inference_steps": 4, "guidance_scale": guidance_scale, "output_type": "latent"}
        call |= {"parallel_evaluations": parallel_evaluations}
        pipeline.scheduler.register_to_config(solver_type="exponential_2m")
        expected = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
        returned = []

        def overwrite(module, args, output, returned=returned):
            for tensor in returned:
                tensor.fill_(float("nan"))
            returned[:] = tree_leaves(output)

        pipeline.transformer.register_forward_hook(overwrite)
        assert torch.equal(pipeline(**call, generator=torch.Generator().manual_seed(0)).images, expected)


def test_compiled_with_inductor_agrees_with_eager(t2i_pipeline):
    """The real thing, once: a head evaluation and its modulations through the default backend."""
    transformer = t2i_pipeline().transformer
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(2, 4, transformer.config.hidden_size, generator=generator)
    noisy_code = torch.randn(2, 4, 8, generator=generator)

    def evaluate(transformer):
        modulations = transformer(condition=condition, timestep=torch.tensor([0.1, 0.3])).modulations
        return modulations, transformer(noisy_code=noisy_code, modulations=modulations[1]).sample

    with torch.no_grad():
        eager = evaluate(transformer)
        torch._dynamo.reset()
        compiled = evaluate(torch.compile(transformer, fullgraph=True))
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=0)
