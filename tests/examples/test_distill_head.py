from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import distill_head
from bitdance_diffusers import BitDanceClassPipeline, BitDancePipeline
from bitdance_diffusers.loaders.head import HEAD_WEIGHTS
from bitdance_diffusers.training.distillation import denoise_from
from tests.examples.training_runs import (
    assert_equal_checkpoints,
    assert_equal_states,
    kill_in_a_checkpoint,
    record,
    reset_accelerator,
    run_here,
    to_flags,
)
from training.teacher_patches import PatchTeacher, draw_teacher_patches


@pytest.fixture(scope="module")
def model(t2i_pipeline_path, class_pipeline_path, tmp_path_factory):
    """`model(kind)`: the folder of a case's pipeline, "text" or "class", which by default is guided."""
    folder = tmp_path_factory.mktemp("models")
    for kind, path in (("text", t2i_pipeline_path), ("class", class_pipeline_path("class_p4"))):
        pipeline = DiffusionPipeline.from_pretrained(path)
        pipeline.register_to_config(default_guidance_scale=2.0, default_num_inference_steps=3)
        pipeline.save_pretrained(folder / kind)
    return lambda kind: folder / kind


@pytest.fixture
def arguments(tmp_path, model):
    """Flags of a short run with either case, whose pictures have 4 patches."""
    (tmp_path / "prompts.txt").write_text("a fox\ntwo red foxes in the snow\nsnow\n", encoding="utf-8")

    def arguments(output, kind="text", **more):
        of_texts = {"prompts": tmp_path / "prompts.txt", "height": 16, "width": 16}
        defaults = {
            "pretrained_model_name_or_path": model(kind),
            **(of_texts if kind == "text" else {}),
            "output_dir": tmp_path / output,
            "num_pictures": 8,
            "teacher_batch_size": 4,
            "teacher_steps": 3,
            "num_draws": 2,
            "train_batch_size": 8,
            "max_train_steps": 6,
            "optimizer": "adamw",  # the default, Muon, takes its time on a CPU without bfloat16 products
            "learning_rate": 2e-3,
            "checkpointing_steps": 2,
            "validation_steps": 100,
            "num_validation_prompts": 1,
            "num_validation_images": 2,
            "report_to": "none",
        }
        return to_flags({**defaults, **more})

    return arguments


@pytest.fixture
def train(arguments, tmp_path):
    def train(output, **more):
        run_here(distill_head, arguments(output, **more))
        return tmp_path / output

    return train


@pytest.mark.parametrize(("kind", "redraw"), [("text", True), ("class", None)])
def test_killed_and_resumed_equals_unbroken(tmp_path, arguments, train, kind, redraw):
    options = {"kind": kind, "use_ema": True, "redraw": redraw}
    unbroken = train("unbroken", **options)
    kill_in_a_checkpoint(distill_head, arguments("killed", **options))
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = train("killed", resume_from_checkpoint="latest", **options)
    assert_equal_checkpoints(unbroken / "checkpoint-6", resumed / "checkpoint-6")
    assert_equal_states(load_file(unbroken / HEAD_WEIGHTS), load_file(resumed / HEAD_WEIGHTS))


def test_the_student_is_a_pipeline_and_a_head(train, model):
    folder = train("out", num_evaluations=3, save_dtype="bfloat16")
    student, teacher = DiffusionPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(model("text"))
    assert student.scheduler.config.solver_type == "probability_flow_2m"
    assert student.config.default_num_inference_steps == 2 and student.config.default_guidance_scale == 1.0
    call = {"prompt": "a fox", "height": 16, "width": 16, "output_type": "latent"}
    code = student(**call, generator=torch.Generator().manual_seed(0)).images
    trained = student.transformer.state_dict()
    for name, before in teacher.transformer.state_dict().items():
        assert torch.equal(before.bfloat16().float(), trained[name]) is not name.startswith("head."), name
    teacher.load_head(folder)
    assert torch.equal(teacher.transformer.head.proj_in.weight, student.transformer.head.proj_in.weight)
    teacher.transformer.to(torch.bfloat16).to(torch.float32)  # as the student's decoder was saved
    assert torch.equal(teacher(**call, generator=torch.Generator().manual_seed(0)).images, code)
    # A checkpoint holds the head alone, and a run can go on from it
    assert set(load_file(folder / "checkpoint-6" / HEAD_WEIGHTS)) == {
        name.removeprefix("head.") for name in trained if name.startswith("head.")
    }
    assert "distilled by `distill_head.py` to 3 evaluations" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("redraw", [None, True])
def test_two_processes_equal_one(tmp_path, arguments, train, redraw):
    folder = train("first", redraw=redraw) / "patches"

    def run(name, batch_size, num_processes):
        options = {"train_batch_size": batch_size, "max_train_steps": 4, "patches_dir": folder, "learning_rate": 1e-6}
        options["redraw"] = redraw
        return record(distill_head, arguments(f"out-{name}", **options), num_processes, tmp_path / name)

    one, two = run("one", 8, 1), run("two", 4, 2)
    assert len(one["gradients"]) > 0 and all(gradient.abs().max() > 0 for gradient in one["gradients"])
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_the_student_comes_nearer_to_the_teacher(train, arguments, model):
    """On patches of other pictures than it learnt from, by the bits that it shares with the teacher's."""
    folder = train(
        "out", kind="class", num_pictures=64, teacher_batch_size=32, train_batch_size=64, max_train_steps=60,
        checkpointing_steps=100,
    )  # fmt: skip
    args = distill_head.parse_args(arguments("others", kind="class", seed=1, num_pictures=32, teacher_batch_size=32))
    accelerator = distill_head.create_accelerator(args)
    teacher = BitDanceClassPipeline.from_pretrained(model("class"))
    prompts = distill_head.find_prompts(args, teacher)
    patches = draw_teacher_patches(args, accelerator, teacher, prompts, PatchTeacher(args, accelerator, teacher))
    reset_accelerator()
    assert patches.code.abs().min() == 1 and patches.code.shape[:2] == (len(patches.condition), 2)
    student = BitDanceClassPipeline.from_pretrained(folder)
    student.scheduler.set_timesteps(1)
    agreement = []
    for pipeline in (teacher, student):
        with torch.no_grad():
            condition, start = patches.condition[:, 0].float(), patches.start.flatten(0, 1)
            sample, _ = denoise_from(pipeline.transformer, condition, start, student.scheduler)
        agreement.append(float(((sample > 0) == (patches.code.flatten(0, 1) > 0)).float().mean()))
    assert agreement[1] > agreement[0] + 0.02, agreement


def test_who_redraws_keeps_the_head_and_shares_the_rest(arguments, model):
    args = distill_head.parse_args(arguments("out", redraw=True))
    pipeline = BitDancePipeline.from_pretrained(model("text"))
    teacher = PatchTeacher(args, distill_head.create_accelerator(args), pipeline)
    transformer, generator = pipeline.transformer, torch.Generator().manual_seed(0)
    condition = torch.randn(3, 2, 4, transformer.config.hidden_size, generator=generator)
    start = torch.randn(6, 4, transformer.config.in_channels, generator=generator)
    before = teacher.draw(condition, start)
    with torch.no_grad():
        for parameter in transformer.head.parameters():
            parameter.normal_(generator=generator)
    after = teacher.draw(condition, start)
    reset_accelerator()
    assert torch.equal(after, before)
    assert teacher.transformer.layers is transformer.layers


def test_patches_of_another_teacher_are_refused(train, model):
    folder = train("out") / "patches"
    with pytest.raises(ValueError, match="was drawn with another guidance_scale"):
        train("other", patches_dir=folder, teacher_guidance_scale=3)
    with pytest.raises(ValueError, match="was drawn with another teacher, .*prompts"):
        train("other", kind="class", patches_dir=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ({"icons": True}, "--prompts and --icons are both given"),
        ({"num_evaluations": 1}, "--num_evaluations has to be at least 2"),
        ({"num_pictures": 6}, "--num_pictures 6 has to be a multiple of --teacher_batch_size 4"),
        ({"teacher_guidance_scale": -1}, "--teacher_guidance_scale has to be at least 0"),
        ({"num_draws": 0}, "--num_draws has to be at least 1"),
        ({"shift": 0}, "--shift has to be greater than 0"),
    ],
)
def test_bad_arguments(arguments, capsys, options, message):
    with pytest.raises(SystemExit):
        distill_head.parse_args(arguments("out", **options))
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "num_evaluations"), [("digits-32-distilled", 2), ("icons-64-distilled", 4), ("icons-64-distilled-2", 2)]
)
def test_the_shipped_students_evaluate_the_head_a_few_times_for_one_row(name, num_evaluations):
    folder = Path(distill_head.__file__).parent / "pretrained" / name
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 2**24
    pipeline = DiffusionPipeline.from_pretrained(folder)
    rows = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["noisy_code"])) if "noisy_code" in kwargs else None,
        with_kwargs=True,
    )
    asked = {"prompt": "three hearts"} if isinstance(pipeline, BitDancePipeline) else {"class_labels": "3"}
    code = pipeline(**asked, output_type="latent").images
    assert rows == [1] * (num_evaluations * code[0, 0].numel() // pipeline.transformer.config.patch_size**2)
