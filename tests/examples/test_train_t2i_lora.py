import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train_t2i_lora
from bitdance_diffusers import BitDancePipeline
from data.folders import ImageFolder
from drawing.models import load_pipeline
from tests.examples.training_runs import (
    assert_equal_checkpoints,
    assert_equal_states,
    kill_in_a_checkpoint,
    record,
    run_here,
    to_flags,
    write_pictures,
)
from training import lora
from training.lora import LORA_WEIGHTS
from training.picture_run import TransformerTraining
from training.randomness import random_generator

CALL = {"prompt": ["a red fox", "two"], "height": 16, "width": 16, "num_inference_steps": 3}


@pytest.fixture
def workplace(tmp_path):
    write_pictures(tmp_path / "pictures")
    return tmp_path


@pytest.fixture
def arguments(workplace, t2i_pipeline_path):
    def arguments(output, **more):
        defaults = {
            "pretrained_model_name_or_path": t2i_pipeline_path,
            "train_data_dir": workplace / "pictures",
            "output_dir": workplace / output,
            "resolution": 16,
            "train_batch_size": 3,
            "max_train_steps": 6,
            "checkpointing_steps": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
        }
        return to_flags({**defaults, **more})

    return arguments


@pytest.fixture
def train(arguments, workplace):
    def train(output, **more):
        run_here(train_t2i_lora, arguments(output, **more))
        return workplace / output

    return train


def draw(pipeline, output_type="latent"):
    pipeline.set_progress_bar_config(disable=True)
    generator = [random_generator(0, i) for i in range(2)]
    return pipeline(**CALL, generator=generator, output_type=output_type).images


def adapter(folder):
    return load_file(folder / LORA_WEIGHTS)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.2, "use_ema": True, "gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "cache_codes": True, "center_crop": True, "class_prompt": ["two", "a fox"],
         "with_prior_preservation": True, "num_class_images": 3},
    ],
)  # fmt: skip
def test_killed_and_resumed_equals_unbroken(workplace, arguments, train, options):
    unbroken = train("unbroken", **options)
    kill_in_a_checkpoint(train_t2i_lora, arguments("killed", **options))
    resumed = train("killed", resume_from_checkpoint="latest", **options)
    assert_equal_states(adapter(unbroken), adapter(resumed))
    assert_equal_checkpoints(unbroken / "checkpoint-6", resumed / "checkpoint-6")


def test_a_fresh_pipeline_draws_what_the_training_drew(train, t2i_pipeline, t2i_pipeline_path):
    folder = train(
        "out", rank=3, lora_alpha=6, validation_prompt=CALL["prompt"], num_validation_images=1, num_inference_steps=3,
        lora_layers="to_q,to_v,down_proj,to_qkv", lora_dropout=0.3,
    )  # fmt: skip
    pipeline = t2i_pipeline()
    unadapted = draw(pipeline)
    pipeline.load_lora_weights(folder)
    grid = np.asarray(Image.open(folder / "validation" / "validation-000006.png"))
    images = draw(pipeline, "np")
    assert (grid == np.concatenate((images * 255).round().astype(np.uint8))).all()
    adapted = draw(pipeline)
    assert (adapted != unadapted).float().mean() > 0.05

    by_command = load_pipeline(str(t2i_pipeline_path), None, "cpu", lora=str(folder))
    assert torch.equal(draw(by_command), adapted)
    with pytest.raises(ValueError, match="`lora` cannot be loaded"):
        load_pipeline(str(t2i_pipeline_path), None, "cpu", lora=str(folder / "absent"))

    # The file says all that there is to it, as does each checkpoint's
    with safe_open(folder / LORA_WEIGHTS, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == 3 and metadata["transformer.lora_alpha"] == 6
    assert_equal_states(adapter(folder), adapter(folder / "checkpoint-6"))
    assert {name.split(".")[-3] for name in adapter(folder)} == {"to_q", "to_v", "down_proj", "to_qkv"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- lora\n" in card and "![Pictures that it drew](validation/validation-000006.png)" in card
    assert "1. a red fox\n2. two" in card and "| lora_alpha | 6.0 |" in card
    assert f'from_pretrained("{t2i_pipeline_path}")\npipe.load_lora_weights("out")' in card
    assert "python examples/" in card and "--rank 3" in card

    # Fused and not, and taken apart again
    before = {name: value.clone() for name, value in t2i_pipeline().transformer.state_dict().items()}
    pipeline.fuse_lora()
    assert (draw(pipeline) != adapted).float().mean() <= 0.01
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-5)


def test_the_base_stays_as_it_is(train, workplace, monkeypatch):
    bases = []
    load_base = train_t2i_lora.load_base
    monkeypatch.setattr(
        train_t2i_lora, "load_base", lambda *arguments: bases.append(load_base(*arguments)) or bases[-1]
    )
    folder = train("out")
    base = bases[0].transformer.state_dict()
    before = BitDancePipeline.from_pretrained(bases[0].config._name_or_path).transformer.state_dict()
    for name, value in before.items():
        name = name if name in base else ".base_layer.".join(name.rsplit(".", 1))
        assert torch.equal(base[name], value)
    names = {path.name for path in (folder / "checkpoint-6").iterdir()}
    assert names == {LORA_WEIGHTS, "optimizer.bin", "random_states_0.pkl", "training_state.json", "SHA256SUMS"}


def test_bfloat16_and_int8_bases(train, arguments, t2i_pipeline):
    """The adapter is float32 all the same, and close to the one of a float32 base."""
    exact = adapter(train("exact", max_train_steps=2))
    for name, options in (("bfloat16", {"base_dtype": "bfloat16"}), ("int8", {"base_int8": True})):
        near = adapter(train(name, max_train_steps=2, **options))
        assert near.keys() == exact.keys() and all(value.dtype == torch.float32 for value in near.values())
        both = [torch.cat([value.flatten() for value in values.values()]) for values in (near, exact)]
        assert 0.8 < torch.cosine_similarity(*both, dim=0) < 0.9999


def test_two_processes_equal_one(workplace, arguments):
    options = {"max_train_steps": 20, "checkpointing_steps": 100, "learning_rate": 1e-3}
    options |= {"with_prior_preservation": True, "class_prompt": "two", "num_class_images": 3}
    one, two = (
        record(
            train_t2i_lora, arguments(f"out-{n}", train_batch_size=8 // n, **options), n, workplace / f"recorded-{n}"
        )
        for n in (1, 2)
    )
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert len(one["losses"]) == 20
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-4)


def test_a_subject_beside_its_class(train, workplace):
    (workplace / "pictures" / "metadata.jsonl").unlink()
    options = {
        "train_data_dir": None, "instance_data_dir": workplace / "pictures", "instance_prompt": "a sks fox",
        "with_prior_preservation": True, "class_prompt": ["a fox", "two"], "num_class_images": 5,
        "class_data_dir": workplace / "class", "sample_batch_size": 2,
    }  # fmt: skip
    weighed = adapter(train("out", max_train_steps=2, **options))
    drawn = ImageFolder(workplace / "class", "text")
    assert [drawn[i]["text"] for i in range(5)] == ["a fox", "two", "a fox", "two", "a fox"]
    before = {path: path.stat().st_mtime_ns for path in (workplace / "class").iterdir()}

    # Without weight they change nothing; the same pictures and draws as above
    unweighed = adapter(train("unweighed", max_train_steps=2, prior_loss_weight=0, **options))
    assert {path: path.stat().st_mtime_ns for path in (workplace / "class").iterdir()} == before
    assert not torch.equal(*(values[next(iter(weighed))] for values in (weighed, unweighed)))
    # Learnt from the base, which the adapter is still equal to, they change nothing in the first step either
    first = {"max_train_steps": 1, "adam_weight_decay": 0, "prior_targets": "predictions"}
    kept, unweighed = (adapter(train(f"kept-{w}", prior_loss_weight=w, **options, **first)) for w in (1, 0))
    for name in unweighed:
        torch.testing.assert_close(kept[name], unweighed[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="holds 5 of --num_class_images 6"):
        train("more", **{**options, "num_class_images": 6})


def test_guidance_of_the_base_is_distilled(workplace, arguments):
    """The base predicts it without the adapter, which is nothing at the start: rows without a prompt have no loss."""
    options = {"distill_guidance_scale": 4, "train_batch_size": 10, "max_train_steps": 20}

    def losses(output, **more):
        return record(train_t2i_lora, arguments(output, **options, **more), 1, workplace / "recorded.pt")["losses"]

    learnt = losses("out", proportion_empty_prompts=0)
    assert np.mean(learnt[-4:]) < 0.8 * np.mean(learnt[:2])
    assert losses("empty", proportion_empty_prompts=1)[0] == 0


def test_epochs_and_repeats(train):
    """10 pictures shown 3 times in an epoch, in batches of 3: 10 steps an epoch."""
    folder = train(
        "out", max_train_steps=None, num_train_epochs=2, repeats=3, checkpointing_steps=20, validation_prompt="two",
        validation_epochs=1, num_validation_images=1, num_inference_steps=1,
    )  # fmt: skip
    grids = sorted(path.name for path in (folder / "validation").iterdir())
    assert grids == ["validation-000010.png", "validation-000020.png"]
    assert (folder / "checkpoint-20").is_dir()


def test_a_step_that_is_not_finite_changes_nothing(train, monkeypatch):
    """The third of six steps: the loss, then the gradients. A step's pictures stay a function of its number."""
    exact = train("exact", checkpointing_steps=1)
    loss_of = train_t2i_lora.train_t2i.text_to_image_loss

    def spoil(how):
        calls = []

        def loss(*arguments):
            losses = loss_of(*arguments)
            calls.append(None)
            if len(calls) == 3:
                losses.loss = how(losses.loss)
            return losses

        monkeypatch.setattr(train_t2i_lora.train_t2i, "text_to_image_loss", loss)

    def not_a_gradient(loss):
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    for name, how in (("loss", lambda loss: loss * float("nan")), ("gradient", not_a_gradient)):
        spoil(how)
        folder = train(name, checkpointing_steps=1)
        assert_equal_states(adapter(exact / "checkpoint-2"), adapter(folder / "checkpoint-2"))
        assert_equal_states(adapter(folder / "checkpoint-2"), adapter(folder / "checkpoint-3"))
        assert not torch.equal(*(next(iter(adapter(folder / f"checkpoint-{i}").values())) for i in (3, 4)))
        state = json.loads((folder / "checkpoint-6" / "training_state.json").read_text(encoding="utf-8"))
        assert (state["step"], state["skipped"], state["skipped_in_a_row"]) == (6, 1, 0)
        assert all(value.isfinite().all() for value in adapter(folder).values())


def test_the_codes_free_the_autoencoder(train, monkeypatch):
    moved = []
    run = TransformerTraining
    monkeypatch.setattr(run, "finish", lambda self, *args: moved.append(self.vae.device.type))
    train("out", cache_codes=True, center_crop=True)
    assert moved == ["cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "Give --pretrained_model_name_or_path."),
        ({"rank": 0}, "--rank has to be at least 1 but is 0"),
        ({"lora_alpha": 0}, "--lora_alpha has to be positive"),
        ({"lora_dropout": 1}, "--lora_dropout has to be in [0, 1)"),
        ({"base_int8": True, "bnb_quantization_config_path": "nf4.json"}, "exclude each other"),
        ({"instance_prompt": "a sks fox"}, "--instance_data_dir and --instance_prompt go together"),
        ({"class_prompt": "a fox"}, "--with_prior_preservation and --class_prompt go together"),
        ({"class_data_dir": "class"}, "--class_data_dir without --with_prior_preservation has no effect"),
        ({"prior_loss_weight": -1}, "--prior_loss_weight"),
        ({"prior_targets": "predictions"}, "--prior_targets predictions without --with_prior_preservation"),
        ({"repeats": 0}, "--repeats has to be at least 1"),
        ({"max_skipped_steps": 0}, "--max_skipped_steps has to be at least 1"),
    ],
)
def test_bad_arguments(arguments, capsys, options, message):
    with pytest.raises(SystemExit):
        train_t2i_lora.parse_args(arguments("out", **options))
    assert message in capsys.readouterr().err


def test_bad_arguments_that_only_the_files_show(train, workplace):
    with pytest.raises(ValueError, match="no linear layer's name ends in 'to_x', but in .*down_proj.*to_out.0"):
        train("out", lora_layers="to_q,to_x")
    config = workplace / "nf4.json"
    with pytest.raises(ValueError, match="--bnb_quantization_config_path .*nf4.json cannot be read"):
        train("out", bnb_quantization_config_path=config)
    config.write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": 7}', encoding="utf-8")
    with pytest.raises(ValueError, match="--bnb_quantization_config_path .*nf4.json cannot be read"):
        train("out", bnb_quantization_config_path=config)
    assert not (workplace / "out").exists()


def test_packages_that_are_missing_or_want_a_gpu(train, workplace, monkeypatch):
    """They are not there, or without a GPU of no use: a message that names the argument either way."""
    config = workplace / "nf4.json"
    config.write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}', encoding="utf-8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--bnb_quantization_config_path"):
            train("out", bnb_quantization_config_path=config)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="--use_8bit_adam needs bitsandbytes"):
        train("out", use_8bit_adam=True)
    assert not (workplace / "out").exists()


def test_the_base_has_the_checkpoints_dtype_on_an_accelerator(t2i_pipeline, tmp_path):
    transformer = t2i_pipeline().transformer.to(torch.bfloat16)
    transformer.save_pretrained(tmp_path)
    assert lora.stored_dtype(tmp_path) == torch.bfloat16
