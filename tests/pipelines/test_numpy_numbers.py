"""NumPy's integers and floats are numbers, in calls and in configs, which a file has to hold."""

import numpy as np
import pytest
import torch

from bitdance_diffusers import (
    BinaryDiffusionScheduler,
    BitDanceClassPipeline,
    BitDanceClassTransformer,
    BitDancePipeline,
    BitDanceTokenizer,
)


def as_numpy(value, integer, real):
    if isinstance(value, (list, tuple)):
        return type(value)(as_numpy(entry, integer, real) for entry in value)
    return integer(value) if isinstance(value, int) else real(value) if isinstance(value, float) else value


@pytest.mark.parametrize("kinds", [(np.int64, np.float32), (np.uint8, np.float64)])
def test_arguments(t2i_pipeline, class_pipeline, kinds):
    common = {"num_inference_steps": 3, "guidance_scale": 4.5, "early_stop_threshold": 0.25, "output_type": "latent"}
    common |= {"parallel_evaluations": 2, "parallel_tolerance": 0.25}
    sizes = {"height": 8, "width": 16, "num_images_per_prompt": 2, "max_sequence_length": 64}
    for pipeline, call in (
        (t2i_pipeline(), {"prompt": "a fox", "guidance_interval": (0.0, 0.75), **sizes, **common}),
        (class_pipeline("class_p4"), {"class_labels": [1, 7], "num_images_per_label": 1, **common}),
    ):
        expected = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
        call = {name: as_numpy(value, *kinds) for name, value in call.items()}
        assert torch.equal(pipeline(**call, generator=torch.Generator().manual_seed(0)).images, expected)
        assert type(pipeline.guidance_scale) is float


def test_a_growing_guidance_is_that_of_a_plain_number(class_pipeline):
    """Also where a callback sets it: NumPy's float32 would round every patch's."""
    pipeline = class_pipeline("class_p4")

    def draw(kind):
        def set_guidance(pipeline, index, step, tensors):
            pipeline._guidance_scale = kind(3.7)

        call = {"guidance_scale": kind(3.7), "num_inference_steps": 3, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        return pipeline(1, callback_on_step_end=set_guidance, generator=generator, **call).images

    assert torch.equal(draw(np.float32), draw(lambda value: float(np.float32(value))))


def test_defaults_of_a_pipeline(t2i_pipeline, class_pipeline, tmp_path):
    defaults = {
        "default_height": np.int64(8),
        "default_width": np.int64(16),
        "default_num_inference_steps": np.int64(2),
        "default_guidance_scale": np.float32(1.5),
        "supported_sizes": [[np.int64(8), np.int64(16)]],
    }
    BitDancePipeline(**t2i_pipeline().components, **defaults).save_pretrained(tmp_path / "t2i")
    config = BitDancePipeline.from_pretrained(tmp_path / "t2i").config
    assert [config[name] for name in defaults] == [8, 16, 2, 1.5, [[8, 16]]]
    defaults = {name: defaults[name] for name in ("default_num_inference_steps", "default_guidance_scale")}
    BitDanceClassPipeline(**class_pipeline("class_p4").components, **defaults).save_pretrained(tmp_path / "class")
    config = BitDanceClassPipeline.from_pretrained(tmp_path / "class").config
    assert [config[name] for name in defaults] == [2, 1.5]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BinaryDiffusionScheduler, {"shift": 2.5, "logit_mean": 0.25}),
        (BitDanceTokenizer, {"latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4}),
        (
            BitDanceClassTransformer,
            {
                "num_classes": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_layers": 1,
                "num_attention_heads": 2,
                "rope_theta": 1000.0,
                "head_hidden_size": 64,
            },
        ),
    ],
)
def test_configs(kind, config, tmp_path):
    made = kind(**{name: as_numpy(value, np.int64, np.float32) for name, value in config.items()})
    made.save_pretrained(tmp_path)
    loaded = kind.load_config(tmp_path)
    assert {name: loaded[name] for name in config} == config | {
        name: list(value) for name, value in config.items() if isinstance(value, tuple)
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": np.float32(8)}, r"`height` is np.float32\(8.0\)"),
        ({"num_inference_steps": np.bool_(True)}, r"`num_inference_steps` is np.True_"),
        ({"guidance_scale": np.float32("nan")}, "`guidance_scale` is nan"),
    ],
)
def test_other_values_are_refused_as_before(t2i_pipeline, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        t2i_pipeline()("a fox", **{"height": 8, "width": 8, **call})
