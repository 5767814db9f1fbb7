import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_grpo
from bitdance_diffusers import BitDanceClassPipeline
from tests.examples.training_runs import (
    assert_equal_checkpoints,
    assert_equal_states,
    kill_in_a_checkpoint,
    record,
    run_here,
    to_flags,
)

REWARD = """
def brightness(images, prompts, least="0"):
    return [max(sum(image.convert("L").histogram()[128:]) / 256, float(least)) for image in images]


def missing(images, prompts):
    return [1.0]
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "brightness_reward.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a fox\n\ntwo red foxes in the snow\nsnow\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def model(t2i_pipeline_path, class_pipeline_path, tmp_path_factory):
    """`model(kind)`: the folder of a case's pipeline, "text" or "class", which by default draws in a few steps."""
    folder = tmp_path_factory.mktemp("models")
    for kind, path in (("text", t2i_pipeline_path), ("class", class_pipeline_path("class_p4"))):
        pipeline = DiffusionPipeline.from_pretrained(path)
        pipeline.register_to_config(default_num_inference_steps=3, default_guidance_scale=2.0)
        pipeline.save_pretrained(folder / kind)
    return lambda kind: folder / kind


@pytest.fixture
def arguments(workplace, model):
    """Flags of a short run with the text-to-image case, which draws 16 x 16 pixels of 4 patches."""

    def arguments(output, **more):
        defaults = {
            "pretrained_model_name_or_path": model("text"),
            "prompts": workplace / "prompts.txt",
            "height": 16,
            "width": 16,
            "reward": "brightness_reward:brightness",
            "output_dir": workplace / output,
            "num_prompts": 2,
            "num_images_per_prompt": 4,
            "rollout_batch_size": 4,
            "rollout_steps": 4,
            "rollout_guidance_scale": 1,
            "train_batch_size": 4,
            "max_train_steps": 6,
            "checkpointing_steps": 2,
            "validation_steps": 100,
            "num_validation_prompts": 1,
            "num_validation_images": 2,
            "learning_rate": 1e-3,
            "report_to": "none",
        }
        return to_flags({**defaults, **more})

    return arguments


@pytest.fixture
def train(arguments, workplace):
    def train(output, **more):
        run_here(train_grpo, arguments(output, **more))
        return workplace / output

    return train


@pytest.fixture
def of_classes(model):
    """Arguments that put the class-conditional case in the text-to-image one's place."""
    return {"pretrained_model_name_or_path": model("class"), "prompts": None, "height": None, "width": None}


@pytest.mark.parametrize("kind", ["text", "class"])
def test_killed_and_resumed_equals_unbroken(workplace, arguments, train, of_classes, kind):
    options = {
        "text": {"use_ema": True, "gradient_accumulation_steps": 1, "window_size": 2, "stochastic_steps": "window"},
        "class": {
            **of_classes,
            "num_inner_epochs": 2,
            "rollout_guidance_scale": 2,
            "ratio_level": "patch",
            "rank": 2,
            "use_ema": True,
        },
    }[kind]
    unbroken = train("unbroken", **options)
    kill_in_a_checkpoint(train_grpo, arguments("killed", **options))
    folder = workplace / "killed"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = train("killed", resume_from_checkpoint="latest", **options)

    assert_equal_checkpoints(unbroken / "checkpoint-6", resumed / "checkpoint-6")
    for result in ("transformer/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"):
        if (unbroken / result).exists():
            assert_equal_states(load_file(unbroken / result), load_file(resumed / result))


def test_two_processes_equal_one(workplace, arguments):
    def run(name, num_prompts, num_processes):
        options = {"num_prompts": num_prompts, "max_train_steps": 4, "checkpointing_steps": 100, "learning_rate": 1e-6}
        return record(train_grpo, arguments(f"out-{name}", **options), num_processes, workplace / name)

    one, two = run("one", 4, 1), run("two", 2, 2)
    assert any(gradient.abs().max() > 0 for gradient in one["gradients"])
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def read_log(folder):
    log = EventAccumulator(str(folder / "logs" / "train_grpo")).Reload()
    return {name: [event.value for event in log.Scalars(name)] for name in log.Tags()["scalars"]}


def test_pictures_above_the_mean_become_likelier(train, of_classes):
    folder = train(
        "out", **of_classes, num_prompts=1, num_images_per_prompt=32, rollout_batch_size=32, train_batch_size=32,
        trained_steps=[0, 3], num_inner_epochs=2, max_train_steps=6, checkpointing_steps=100, learning_rate=1e-5,
        kl_weight=0, report_to="tensorboard", validation_steps=4, use_ema=True, ema_decay=0.5,
    )  # fmt: skip
    values = read_log(folder)
    gain = -np.array(values["loss"])  # the mean of advantages times ratios: of new pictures 0, then of the same ones
    assert np.abs(gain[::2]).max() < 1e-6 < 1e-3 < gain[1::2].min()
    assert values["kl"][0] == 0 and values["kl"][-1] > 0
    assert 0 < values["diversity"][0] < 0.6
    assert all(0 <= share <= 1 for share in values["clip_fraction"])
    assert len(values["validation_score"]) == len(values["validation_diversity"]) == 3
    grids = sorted(path.name for path in (folder / "validation").iterdir())
    assert grids == ["validation-000000.png", "validation-000004.png", "validation-000006.png"]
    assert "reinforced by `train_grpo.py`" in (folder / "README.md").read_text(encoding="utf-8")
    pipeline = BitDanceClassPipeline.from_pretrained(folder)
    assert pipeline.config.default_num_inference_steps == 3
    assert pipeline.scheduler.config.solver_type == "euler_maruyama"


def test_lora_layers_are_saved_alone(train, t2i_pipeline, t2i_pipeline_path):
    folder = train("out", rank=2, max_train_steps=2)
    assert not (folder / "model_index.json").exists()
    with pytest.raises(ValueError, match="holds another run"):
        train("out", rank=2)
    prompt = {"prompt": "a fox", "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    pipeline = t2i_pipeline()
    before = pipeline.transformer.layers[0].attn.to_q.weight.clone()
    pipeline.load_lora_weights(folder)
    layer = pipeline.transformer.layers[0].attn.to_q
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.lora_B["default_0"].weight.abs().max() > 0
    pipeline(**prompt)
    # What is trained are the layers of the decoder and of the head
    trained = {name.rsplit(".lora_A", 1)[0] for name, _ in pipeline.transformer.named_parameters() if "lora_A" in name}
    linear = torch.nn.Linear
    blocks = (*pipeline.transformer.layers, *pipeline.transformer.head.blocks)
    assert len(trained) == sum(isinstance(module, linear) and "lora" not in name and "default" not in name
                               for block in blocks for name, module in block.named_modules())  # fmt: skip


def test_the_icon_world_and_the_prompts_of_a_file(t2i_pipeline, arguments):
    pipeline = t2i_pipeline()
    args = train_grpo.parse_args(arguments("out"))
    drawn = train_grpo.find_prompts(args, pipeline).draw(np.random.default_rng(0), 3)
    assert sorted(drawn) == ["a fox", "snow", "two red foxes in the snow"]
    args = train_grpo.parse_args(arguments("out", prompts=None, icons=True, icon_weights=["counting=1", *(
        f"{name}=0" for name in ("single_object", "two_object", "colors", "position", "color_attr"))]))  # fmt: skip
    drawn = train_grpo.find_prompts(args, pipeline).draw(np.random.default_rng(0), 20)
    assert all(prompt.split()[0] in ("two", "three", "four") for prompt in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ({"icons": True}, "--prompts and --icons are both given"),
        ({"icon_weights": ["counting=2"]}, "--icon_weights weighs the prompts of --icons"),
        ({"score_arguments": ["a=b"]}, "--score_arguments are of a --score"),
        ({"rank": 0}, "--rank has to be at least 1"),
        ({"num_images_per_prompt": 1}, "--num_images_per_prompt has to be at least 2"),
        ({"clip_range": 0}, "--clip_range has to be between 0 and 1"),
        (
            {"action_noise": "mean", "rollout_noise": "sampler"},
            "--action_noise mean is for --rollout_noise memoryless",
        ),
        ({"kl_weight": -1}, "--kl_weight has to be at least 0"),
        ({"trained_steps": [2, 5]}, "ascending, from 0 to --rollout_steps 4, but is 2 5"),
        ({"window_size": 3, "trained_steps": [0, 2]}, "--window_size 3 is more than the 2"),
        ({"train_batch_size": 3}, "have to be a multiple of the 6"),
        ({"num_inner_epochs": 4}, "--max_train_steps 6 has to be a multiple of the 4"),
    ],
)
def test_bad_arguments(arguments, capsys, options, message):
    with pytest.raises(SystemExit):
        train_grpo.parse_args(arguments("out", **options))
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": None}, "needs --prompts, --icons"),
        ({"prompts": "absent.txt"}, "--prompts absent.txt cannot be read"),
        ({"height": 20}, "`height` is 20"),
        ({"reward": "absent:reward"}, "'absent:reward' has to be module:function"),
        ({"reward": "brightness_reward:absent"}, "'brightness_reward:absent' has to be module:function"),
        ({"reward_arguments": ["most=1"]}, "does not take the arguments {'most': '1'}"),
        ({"reward_arguments": ["least"]}, "have to be KEY=VALUE"),
    ],
)
def test_bad_arguments_that_only_the_files_show(train, workplace, options, message):
    with pytest.raises(ValueError, match=message):
        train("out", **options)
    assert not (workplace / "out").exists()


def test_what_does_not_fit_a_class_model(train, of_classes, workplace):
    with pytest.raises(ValueError, match="--prompts are for a text-to-image pipeline"):
        train("out", **{**of_classes, "prompts": workplace / "prompts.txt"})


def test_a_reward_for_every_picture(train):
    with pytest.raises(ValueError, match="a finite number for each of"):
        train("out", reward="brightness_reward:missing")


def test_the_score_is_of_its_own(train, workplace):
    folder = train(
        "out", score="brightness_reward:brightness", score_arguments=["least=7"], max_train_steps=2,
        report_to="tensorboard", rollout_noise="sampler", trained_steps=[0, 3], advantage_scale="none",
    )  # fmt: skip
    values = read_log(folder)
    assert values["validation_score"] == [7, 7]
    assert max(values["reward"]) < 7
    assert Image.open(folder / "validation" / "validation-000002.png").size == (32, 16)
