"""Pictures while they are drawn."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch

from bitdance_diffusers import BitDanceTokenizer


def seeded():
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


@pytest.fixture(params=["text", "class"])
def pipeline_and_call(request, t2i_pipeline, class_pipeline):
    """A pipeline with a stochastic decoder and the arguments of a quick stream of two pictures."""
    if request.param == "text":
        pipeline, call = t2i_pipeline(), {"prompt": ["a fox", "two"], "height": 16, "width": 32}
    else:
        pipeline, call = class_pipeline("class_p4"), {"class_labels": [1, 2]}
    torch.manual_seed(0)
    vae = BitDanceTokenizer.from_config({**pipeline.vae.config, "stochastic_decoder": True})
    return type(pipeline)(**pipeline.components | {"vae": vae}), call | {
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
    }


def test_a_stream_shows_every_patch_and_ends_with_the_calls_pictures(pipeline_and_call):
    pipeline, call = pipeline_and_call
    codes = []
    expected = pipeline(
        **call,
        generator=seeded(),
        callback_on_step_end=lambda pipeline, index, step, tensors: codes.append(tensors["latents"].clone()),
    ).images
    items = list(pipeline.stream(**call, generator=seeded()))
    assert [item.num_done for item in items] == list(range(1, len(codes) + 1))
    assert all(torch.equal(item.code, code) for item, code in zip(items, codes, strict=True))
    assert items[-1].finished and not items[-2].finished
    for _ in range(2):  # asked twice, drawn once
        for picture, other in zip(items[-1].decode(), expected, strict=True):
            assert picture.tobytes() == other.tobytes()


def test_previews_change_no_draw(pipeline_and_call):
    pipeline, call = pipeline_and_call
    expected = pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
    for item in pipeline.stream(**call, generator=torch.Generator().manual_seed(0)):
        pictures = item.decode("pt")
    assert torch.equal(pictures, expected)


def test_a_stream_of_every_nth_patch(pipeline_and_call):
    pipeline, call = pipeline_and_call
    items = list(pipeline.stream(**call, generator=seeded(), every=3))
    num_patches = items[0].num_patches
    assert [item.num_done for item in items] == [*range(3, num_patches, 3), num_patches]


def test_who_stops_asking_stops_the_work(pipeline_and_call):
    pipeline, call = pipeline_and_call
    calls = []
    stream = pipeline.stream(**call, generator=seeded())
    pipeline.transformer.register_forward_hook(lambda *args: calls.append(args))
    assert not calls
    next(stream)
    num_calls = len(calls)
    assert 0 < num_calls and stream.generation.pictures[0].index == 1
    for _ in stream:
        break
    assert stream.generation.pictures[0].index == 2 and len(calls) < 3 * num_calls


def test_a_preview_is_near_a_whole_decode_and_decodes_a_part(pipeline_and_call, monkeypatch):
    pipeline, call = pipeline_and_call
    decoded = []
    decode_region = BitDanceTokenizer.decode_region

    def watched(self, code, rows, columns, *args):
        decoded.append((rows, columns))
        return decode_region(self, code, rows, columns, *args)

    monkeypatch.setattr(BitDanceTokenizer, "decode_region", watched)
    ratio, patch = pipeline.vae_scale_factor, pipeline.transformer.config.patch_size
    for item in pipeline.stream(**call, generator=seeded()):
        preview = item.decode("pt")
        if item.finished:
            break
        known = (item.code != 0).all(dim=1, keepdim=True)
        known = known.repeat_interleave(ratio, dim=2).repeat_interleave(ratio, dim=3).expand_as(preview)
        assert (preview[~known] == 0.5).all()
        with torch.no_grad():
            noise = [torch.Generator().manual_seed(0) for _ in range(2)]
            whole = pipeline.decode_latents(item.code, "pt", noise)
        assert (preview - whole)[known].abs().mean() < 0.1
        assert torch.equal(item.decode("pt"), preview)
    assert len(decoded) == item.num_patches - 1  # a preview that nothing changed since is not decoded again
    first, width = item.num_patches // 2, item.code.shape[3]
    (top, bottom), (left, right) = decoded[first]
    assert bottom - top <= patch + 4 and right - left <= min(width, patch + 4)


@pytest.mark.parametrize("num_patches", [1, 3])
def test_a_stream_that_is_saved_goes_on_in_another_process(t2i_pipeline, t2i_pipeline_path, tmp_path, num_patches):
    call = {"prompt": "a fox", "height": 16, "width": 16, "num_inference_steps": 3}

    def start():
        return t2i_pipeline().stream(**call, generator=[torch.Generator().manual_seed(3)])

    stream = start()
    for _ in range(num_patches):
        next(stream)
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    program = f"""
import io, sys, torch
from bitdance_diffusers import BitDancePipeline
pipeline = BitDancePipeline.from_pretrained({str(t2i_pipeline_path)!r})
state = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
for item in pipeline.stream(**{call!r}, generator=[torch.Generator()], state=state):
    pass
torch.save(item.code, {str(tmp_path / "code.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], input=file.getvalue(), check=True)
    *_, last = start()
    assert torch.equal(torch.load(tmp_path / "code.pt", weights_only=True), last.code)


def test_bad_input_is_named_before_the_first_patch(pipeline_and_call):
    pipeline, call = pipeline_and_call
    with pytest.raises(ValueError, match="`every` is 0"):
        pipeline.stream(**call, every=0)
    with pytest.raises(ValueError, match="`num_inference_steps` is 0"):
        pipeline.stream(**call | {"num_inference_steps": 0})
    state = pipeline.stream(**call, generator=seeded()).state_dict()
    with pytest.raises(ValueError, match="`state` and this generation differ"):
        pipeline.stream(**call, generator=torch.Generator(), state=state)


def test_regions_with_enough_margin_are_those_of_the_whole(pipeline_and_call):
    vae = pipeline_and_call[0].vae
    code = torch.randn(2, vae.config.latent_channels, 6, 6, generator=torch.Generator().manual_seed(0)).sign()
    with torch.no_grad():
        whole = vae.decode(code, generator=seeded()).sample
        part = vae.decode_region(code, (1, 3), (2, 6), 6, seeded())
    ratio = vae.spatial_compression_ratio
    expected = whole[:, :, ratio : 3 * ratio, 2 * ratio :]
    assert np.allclose(part, expected, atol=1e-6) and part.shape == expected.shape
