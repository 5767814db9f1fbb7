import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from bitdance_diffusers import BitDanceClassPipeline, BitDanceClassTransformer, BitDanceTokenizer
from bitdance_diffusers import generation as generation_module
from bitdance_diffusers.patch_order import grid_to_patches, patches_to_grid

CASES = ["class_p1", "class_p4"]
QUICK = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", CASES)
class TestReferenceCase:
    """The original's own numbers (bits exactly, pictures within 1e-4, predictions within 2e-3)."""

    @pytest.fixture
    def case(self, case_path, name):
        folder = case_path(name)
        return json.loads((folder / "case.json").read_text()), load_file(folder / "expected.safetensors")

    @pytest.mark.parametrize("run", ["linear", "constant", "unguided"])
    def test_bits_and_picture(self, class_pipeline, case, name, run, tmp_path):
        info, expected = case
        class_pipeline(name).save_pretrained(tmp_path)
        pipeline = BitDanceClassPipeline.from_pretrained(tmp_path)
        call = {"class_labels": info["labels"], "num_inference_steps": info["num_inference_steps"]}
        call["guidance_scale"] = 1.0 if run == "unguided" else info["guidance_scale"]
        call["guidance_schedule"] = "constant" if run == "constant" else "linear"
        prefix = "" if run == "linear" else f"{run}_"
        code = pipeline(**call, generator=seeded(info["seed"]), output_type="latent").images
        assert torch.equal(code, expected[f"{prefix}code"])
        picture = pipeline(**call, generator=seeded(info["seed"]), output_type="pt").images
        torch.testing.assert_close(picture, (expected[f"{prefix}image"] / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)

    def test_predictions(self, class_pipeline, case, name, monkeypatch):
        info, expected = case
        predictions = []
        denoise = generation_module.denoise_patch
        monkeypatch.setattr(
            generation_module,
            "denoise_patch",
            lambda *args: predictions.append(denoise(*args)) or predictions[-1],
        )
        class_pipeline(name)(
            info["labels"],
            num_inference_steps=info["num_inference_steps"],
            guidance_scale=info["guidance_scale"],
            generator=seeded(info["seed"]),
            output_type="latent",
        )
        # The first patch of the linear schedule: two halves sampled separately. The others: one, for both.
        first = expected["first_prediction"].view_as(predictions[0])
        torch.testing.assert_close(predictions[0], first, atol=2e-3, rtol=0)
        last = expected["last_prediction"].view(-1, *predictions[-1].shape[1:])
        torch.testing.assert_close(predictions[-1].repeat(2, 1, 1), last, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "savings",
    [{}, {"guidance_interval": (0.2, 0.7)}, {"early_stop_threshold": 0.1}, {"parallel_evaluations": 3}],
)
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_labels_together_equal_each_alone(class_pipeline, schedule, savings):
    pipeline = class_pipeline("class_p4")
    call = {**QUICK, "num_inference_steps": 9, "guidance_schedule": schedule}
    rows = []  # of the head at each evaluation
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["noisy_code"])) if "noisy_code" in kwargs else None,
        with_kwargs=True,
    )
    together = pipeline([1, 7, 3], generator=[seeded(i) for i in range(3)], **call, **savings).images
    assert (sum(rows) < 16 * 10 * 6) == ("parallel_evaluations" not in savings and bool(savings))
    for i, label in enumerate([1, 7, 3]):
        alone = pipeline(label, generator=seeded(i), **call, **savings).images
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_parallel_evaluations_draw_the_same_bits(class_pipeline, schedule):
    """Also in the first patch of the linear schedule, whose two halves are sampled separately."""
    pipeline = class_pipeline("class_p4")
    call = {**QUICK, "num_inference_steps": 9, "guidance_schedule": schedule}
    expected = pipeline([1, 7], generator=seeded(0), **call).images
    parallel = pipeline([1, 7], generator=seeded(0), **call, parallel_evaluations=4, parallel_tolerance=1e-4).images
    assert torch.equal(parallel, expected)


def test_linear_schedule_samples_the_first_patch_in_two_halves(class_pipeline, monkeypatch):
    """The unconditional sequence goes on from a first patch of its own; in "constant" both share it."""
    pipeline = class_pipeline("class_p4")
    fed_back = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: fed_back.append(kwargs["code"]) if kwargs.get("code") is not None else None,
        with_kwargs=True,
    )
    code = pipeline(1, generator=seeded(0), guidance_schedule="linear", **QUICK).images
    halves = [patch.chunk(2) for patch in fed_back]
    assert torch.equal(halves[0][0][:, 0], grid_to_patches(code, 2)[:, 0])
    assert not torch.equal(*halves[0]) and all(torch.equal(*both) for both in halves[1:])
    fed_back.clear()
    pipeline(1, generator=seeded(0), guidance_schedule="constant", **QUICK)
    assert all(torch.equal(*patch.chunk(2)) for patch in fed_back)


def test_linear_schedule_grows_with_the_patch(class_pipeline, monkeypatch):
    scales = []
    denoise = generation_module.denoise_patch
    monkeypatch.setattr(generation_module, "denoise_patch", lambda *args: scales.append(args[4]) or denoise(*args))
    pipeline = class_pipeline("class_p4")  # 16 patches
    pipeline(1, **QUICK)
    assert scales[0] is None and scales[1:] == pytest.approx([1 + 2 * i / 16 for i in range(1, 16)])
    scales.clear()
    pipeline(1, **{**QUICK, "guidance_scale": 1.0})
    assert scales == [None] * 16


def test_a_callback_that_ends_guidance_draws_conditional_rows(class_pipeline, monkeypatch):
    """Guidance that is 1 by itself is no patch of a growing schedule: nothing is sampled in two halves."""
    shapes = []
    draw = generation_module.draw_halves_noise
    monkeypatch.setattr(generation_module, "draw_halves_noise", lambda *args: shapes.append(args) or draw(*args))

    def end_guidance(pipe, index, step, kwargs):
        pipe._guidance_scale = 1.0
        return kwargs

    class_pipeline("class_p4")(1, guidance_schedule="constant", callback_on_step_end=end_guidance, **QUICK)
    assert not shapes


def test_several_images_of_a_label_stand_side_by_side(class_pipeline):
    pipeline = class_pipeline("class_p1")
    call = {**QUICK, "guidance_schedule": "constant"}
    pairs = pipeline([2, 5], num_images_per_label=2, generator=[seeded(i) for i in range(4)], **call).images
    each = pipeline([2, 2, 5, 5], generator=[seeded(i) for i in range(4)], **call).images
    assert torch.equal(pairs, each)


def test_output_types(class_pipeline):
    pipeline = class_pipeline("class_p4")

    def draw(output_type, **kwargs):
        return pipeline(3, num_inference_steps=2, generator=seeded(0), output_type=output_type, **kwargs)

    tensor = draw("pt").images
    assert tensor.shape == (1, 3, 32, 32) and 0 <= tensor.min() and tensor.max() <= 1
    assert draw("np").images.shape == (1, 32, 32, 3) and draw("pil").images[0].size == (32, 32)
    as_tuple = draw("pt", return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], tensor)


class TestCallbacksAndLatents:
    def test_called_once_a_patch_and_changes_nothing_by_itself(self, class_pipeline):
        pipeline = class_pipeline("class_p4")
        seen = []

        def record(pipe, index, step, kwargs):
            seen.append((index, step, pipe.current_timestep, int((kwargs["latents"] != 0).sum())))
            return kwargs

        plain = pipeline([1, 2], generator=seeded(0), **QUICK).images
        assert torch.equal(pipeline([1, 2], generator=seeded(0), callback_on_step_end=record, **QUICK).images, plain)
        assert seen == [(i, i, i, (i + 1) * plain.numel() // 16) for i in range(16)]
        assert pipeline.num_timesteps == 16

    def test_stops_where_a_callback_says_so(self, class_pipeline):
        pipeline = class_pipeline("class_p4")

        def stop(pipe, index, step, kwargs):
            pipe._interrupt = index == 2
            return kwargs

        code = pipeline(1, callback_on_step_end=stop, **QUICK).images
        assert int((grid_to_patches(code, 2) != 0).all(dim=(0, 2, 3)).sum()) == 3

    def test_goes_on_from_latents(self, class_pipeline):
        """In "constant": the code is all that a run goes on from."""
        pipeline = class_pipeline("class_p4")
        call = {**QUICK, "guidance_schedule": "constant", "guidance_scale": 1.0}
        whole = pipeline([1, 2], generator=seeded(0), **call).images
        kept = grid_to_patches(whole, 2).clone()
        kept[:, 15:] = 0
        again = pipeline([1, 2], latents=patches_to_grid(kept, 8, 8), generator=seeded(9), **call).images
        assert torch.equal(grid_to_patches(again, 2)[:, :15], kept[:, :15]) and (again != 0).all()


class TestLabels:
    def test_ids_and_names(self, class_pipeline):
        names = ["tench, Tinca tinca", "crane", "crane", *(f"class {i}" for i in range(3, 10))]
        parts = class_pipeline("class_p4").components
        pipeline = BitDanceClassPipeline(**parts, label_names=names)
        assert pipeline.get_label_ids([0, "tench", "Tinca tinca", "tench, Tinca tinca", "class 9"]) == [0, 0, 0, 0, 9]
        assert pipeline.get_label_ids("class 3") == [3]
        with pytest.raises(ValueError, match=r"'crane', the name of several classes: \[1, 2\]"):
            pipeline.get_label_ids(["tench", "crane"])
        with pytest.raises(ValueError, match="'trout', which is not the name of a class"):
            pipeline.get_label_ids("trout")

    def test_names_are_saved(self, class_pipeline, tmp_path):
        names = [f"class {i}" for i in range(10)]
        parts = class_pipeline("class_p4").components
        BitDanceClassPipeline(**parts, label_names=names, default_guidance_scale=2.5).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["transformer"] == ["bitdance_diffusers", "BitDanceClassTransformer"]
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(loaded) is BitDanceClassPipeline and loaded.get_label_ids("class 4") == [4]
        assert loaded.config.default_guidance_scale == 2.5

    def test_wrong_lists_are_refused(self, class_pipeline):
        parts = class_pipeline("class_p4").components
        for names, message in ((["a"], "`label_names` has 1 entries for 10 classes"), ([1] * 10, "list of strings")):
            with pytest.raises(ValueError, match=message):
                BitDanceClassPipeline(**parts, label_names=names)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"class_labels": 10}, ValueError, "`class_labels` holds 10; the classes are 0 to 9"),
        ({"class_labels": -1}, ValueError, "`class_labels` holds -1"),
        ({"class_labels": [1, 2.5]}, TypeError, "`class_labels` holds 2.5"),
        ({"class_labels": True}, TypeError, "`class_labels` holds True"),
        ({"class_labels": []}, ValueError, "`class_labels` is an empty list"),
        ({"class_labels": "tench"}, ValueError, "this pipeline has no `label_names`"),
        (
            {"guidance_schedule": "cosine"},
            ValueError,
            "`guidance_schedule` is 'cosine'; allowed are 'linear', 'constant'",
        ),
        ({"guidance_scale": -1.0}, ValueError, "`guidance_scale` is -1.0"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` is 0"),
        ({"guidance_interval": 0.5}, TypeError, "`guidance_interval` is 0.5"),
        ({"early_stop_threshold": 0.0}, ValueError, "`early_stop_threshold` is 0.0"),
        ({"parallel_evaluations": 1}, ValueError, "`parallel_evaluations` is 1"),
        ({"parallel_tolerance": "small"}, TypeError, "`parallel_tolerance` is 'small'"),
        ({"num_images_per_label": 1.5}, TypeError, "`num_images_per_label` is 1.5"),
        ({"generator": [seeded(0)] * 2}, ValueError, "`generator` is a list of 2"),
        ({"output_type": "jpg"}, ValueError, "`output_type` is 'jpg'"),
        ({"latents": torch.zeros(1, 8, 4, 4)}, ValueError, r"`latents` has shape \(1, 8, 4, 4\)"),
    ],
)
def test_bad_input_is_refused_before_any_work(class_pipeline, call, error, message):
    pipeline = class_pipeline("class_p4")
    pipeline.transformer.register_forward_pre_hook(lambda *args: pytest.fail("a weight was touched"))
    with pytest.raises(error, match=message):
        pipeline(**{"class_labels": 1, **call})


def test_sequential_offload(class_pipeline):
    """Every weight is a meta tensor but inside its own module's forward."""
    for name in CASES:
        pipeline = class_pipeline(name)
        call = {**QUICK, "num_inference_steps": 2, "output_type": "pt"}
        expected = pipeline(1, generator=seeded(0), **call).images
        for model in (pipeline.transformer, pipeline.vae):
            cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        torch.testing.assert_close(pipeline(1, generator=seeded(0), **call).images, expected, atol=1e-5, rtol=0)


def test_group_offload_of_blocks(class_pipeline, tmp_path):
    """Every weight is NaN until its group's hook reads it from the disk."""
    pipeline = class_pipeline("class_p4")
    expected = pipeline(1, generator=seeded(0), **QUICK).images
    pipeline.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    pipeline(1, generator=seeded(0), **{**QUICK, "output_type": "pt"})
    for model in (pipeline.transformer, pipeline.vae):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    assert torch.equal(pipeline(1, generator=seeded(0), **QUICK).images, expected)


def test_attention_backend_and_casting(class_pipeline):
    pipeline = class_pipeline("class_p4")
    expected = pipeline(1, generator=seeded(0), **QUICK).images
    pipeline.transformer.set_attention_backend("_native_math")
    assert len(pipeline.transformer.attn_processors) == 4  # 2 layers, 2 head blocks
    assert (pipeline(1, generator=seeded(0), **QUICK).images != expected).float().mean() < 0.02
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {parameter.dtype for parameter in pipeline.transformer.parameters()}
    assert torch.float8_e4m3fn in stored
    assert (pipeline(1, generator=seeded(0), **QUICK).images != 0).all()


def test_half_precision(class_pipeline):
    pipeline = class_pipeline("class_p4", dtype=torch.bfloat16)
    picture = pipeline(1, num_inference_steps=2, output_type="pt").images
    assert picture.isfinite().all()


def test_other_sizes_are_other_models():
    """A vae and a transformer of different checkpoints are refused."""
    vae = BitDanceTokenizer(latent_channels=4, block_out_channels=(32, 32), layers_per_block=1)
    transformer = BitDanceClassTransformer(
        num_classes=2, num_class_tokens=2, hidden_size=32, intermediate_size=32, num_layers=1, num_attention_heads=2,
        in_channels=8, patch_size=1, sample_size=4, head_hidden_size=32, head_num_layers=1, head_num_modulations=1,
        head_attention_head_dim=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`vae` writes 4 bits a token .* reads 8"):
        BitDanceClassPipeline(vae=vae, transformer=transformer, scheduler=None)
