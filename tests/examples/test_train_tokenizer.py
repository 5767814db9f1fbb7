import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_tokenizer
from bitdance_diffusers import BitDanceTokenizer
from data.crops import to_pixel_values
from tests.examples.training_runs import (
    assert_equal_checkpoints,
    assert_equal_states,
    kill_in_a_checkpoint,
    run_here,
)

CONFIG = {
    "latent_channels": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "patch_size": 2,
}


@pytest.fixture
def workplace(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(pictures / f"{i}.png")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return tmp_path


def arguments(workplace, output, **more):
    defaults = {
        "tokenizer_config": workplace / "config.json",
        "train_data_dir": workplace / "pictures",
        "output_dir": workplace / output,
        "resolution": 24,
        "train_batch_size": 3,
        "num_validation_images": 2,
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "validation_steps": 3,
        "learning_rate": 1e-3,
        "report_to": "none",
        "num_codebooks": 2,
    }
    flags = []
    for name, value in {**defaults, **more}.items():
        values = [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
        flags += [] if value is None else [f"--{name}", *values]
    return flags


def train(workplace, output, **more):
    run_here(train_tokenizer, arguments(workplace, output, **more))
    return workplace / output


@pytest.mark.parametrize(
    "options",
    [
        {"gan_weight": 0.1, "gan_start_step": 1, "random_flip": True, "random_scale": (0.5, 2)},
        {
            "use_ema": True,
            "gradient_accumulation_steps": 2,
            "dataloader_num_workers": 2,
            "lr_scheduler": "cosine",
            "bit_flip": 0.1,
        },
    ],
)
def test_killed_and_resumed_equals_unbroken(workplace, options):
    unbroken = train(workplace, "unbroken", **options)
    kill_in_a_checkpoint(train_tokenizer, arguments(workplace, "killed", **options))
    folder = workplace / "killed"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-2/*")}
    resumed = train(workplace, "killed", resume_from_checkpoint="latest", **options)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-2/*")} == before

    for file in ("diffusion_pytorch_model.safetensors", "checkpoint-6/model.safetensors"):
        assert_equal_states(load_file(unbroken / file), load_file(resumed / file))
    assert_equal_checkpoints(unbroken / "checkpoint-6", resumed / "checkpoint-6")
    assert [p.name for p in sorted(resumed.glob(".*"))] == []


def test_trains_and_leaves_a_tokenizer(workplace):
    folder = train(
        workplace, "out", max_train_steps=60, learning_rate=3e-3, center_crop=True, checkpoints_total_limit=2,
        checkpointing_steps=20, use_ema=True, ema_decay=0.8, l2_weight=5, report_to="tensorboard", validation_steps=30,
    )  # fmt: skip
    tokenizer = BitDanceTokenizer.from_pretrained(folder).eval()
    pictures = [Image.open(path).resize((30, 24)).crop((3, 0, 27, 24)) for path in sorted(workplace.glob("*/*.png"))]
    values = torch.stack([to_pixel_values(picture) for picture in pictures[:8]])
    with torch.no_grad():
        decoded = tokenizer(values).sample
    assert (decoded - values).square().mean() < 0.6 * values.var()
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-40", "checkpoint-60"]
    grids = sorted(p.name for p in (folder / "validation").iterdir())
    assert grids == ["reconstruction-000030.png", "reconstruction-000060.png"]
    assert Image.open(folder / "validation" / grids[0]).size == (48, 48)
    assert "library_name: diffusers" in (folder / "README.md").read_text(encoding="utf-8")
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    averaged = load_file(folder / "checkpoint-60" / "ema.safetensors")
    assert torch.equal(averaged["0"], next(tokenizer.parameters()))

    # Going on from it: another run, with the weights of the first.
    again = train(
        workplace, "again", tokenizer_config=None, pretrained_model_name_or_path=folder, max_train_steps=1,
        learning_rate=1e-12,
    )  # fmt: skip
    torch.testing.assert_close(next(BitDanceTokenizer.from_pretrained(again).parameters()), averaged["0"])


def test_a_loss_that_is_not_finite_reaches_no_checkpoint(workplace):
    with pytest.raises(FloatingPointError):
        train(workplace, "out", learning_rate=1e30, checkpointing_steps=1, max_train_steps=20, max_skipped_steps=5)
    folder = workplace / "out"
    assert not (folder / "config.json").exists()
    for file in folder.glob("checkpoint-*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_bit_flips_reach_the_decoder_and_pass_no_gradient():
    torch.manual_seed(0)
    tokenizer = BitDanceTokenizer(**CONFIG)
    seen = []
    tokenizer.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model = train_tokenizer.Autoencoder(tokenizer, bit_flip=0.3)
    _, logits = model(torch.rand(2, 3, 16, 16), torch.Generator().manual_seed(0))
    flipped = (seen[0] > 0) != (logits > 0)
    assert 0.2 < flipped.float().mean() < 0.4
    (gradient,) = torch.autograd.grad(seen[0].sum(), logits)
    assert torch.equal(gradient, (~flipped).float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_dir": None}, "exactly one of --train_data_dir"),
        ({"icons": 5}, "--train_data_dir, --icons"),
        ({"tokenizer_config": None}, "exactly one of --tokenizer_config"),
        ({"train_batch_size": 0}, "--train_batch_size"),
        ({"learning_rate": -1}, "--learning_rate"),
        ({"bit_flip": 0.5}, "--bit_flip"),
        ({"commitment_weight": -1}, "--commitment_weight"),
        ({"lpips_weight": 1}, "--lpips_weights go together"),
        ({"gan_weight": 1, "resolution": 20}, "--gan_weight needs"),
        ({"ema_decay": 1}, "--ema_decay"),
        ({"random_scale": (2, 1)}, "--random_scale"),
        ({"hub_token": "x"}, "--push_to_hub"),
    ],
)
def test_bad_arguments(workplace, capsys, options, message):
    with pytest.raises(SystemExit):
        train_tokenizer.parse_args(arguments(workplace, "out", **options))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 26}, "--resolution 26 has to be a multiple of .* 4 pixels"),
        ({"num_codebooks": 3}, "--num_codebooks 3"),
        ({"num_validation_images": 10}, "leaves none of 10 pictures"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "checkpoint-3 is not a checkpoint"),
        ({"train_data_dir": "absent"}, "absent does not exist"),
    ],
)
def test_bad_arguments_that_only_the_files_show(workplace, options, message):
    with pytest.raises(ValueError, match=message):
        train(workplace, "out", **options)
    assert not (workplace / "out").exists()


def test_another_run_in_the_output_folder(workplace):
    train(workplace, "out", max_train_steps=2)
    with pytest.raises(ValueError, match="holds another run"):
        train(workplace, "out", max_train_steps=2)
    with pytest.raises(ValueError, match="another configuration .*learning_rate"):
        train(workplace, "out", max_train_steps=4, learning_rate=2e-3, resume_from_checkpoint="latest")


def test_the_repository_is_there_before_the_training_and_a_failed_upload_loses_nothing(workplace, hub):
    _, answers = hub
    options = {"push_to_hub": True, "hub_model_id": "codes", "hub_token": "secret", "max_train_steps": 1}
    with pytest.raises(ValueError, match="--push_to_hub: the repository codes cannot be written to: .*403"):
        train(workplace, "out", **options)
    assert not (workplace / "out").exists()

    answers |= {"/api/repos/create": (200, {}), "/api/models/owner/codes/auth-check/write": (200, {})}
    with pytest.raises(RuntimeError, match="the upload to owner/codes failed: .*403"):
        train(workplace, "out", **options)
    BitDanceTokenizer.from_pretrained(workplace / "out")
