import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_t2i
from bitdance_diffusers import BitDancePipeline, BitDanceTransformer
from bitdance_diffusers.prompt import picture_start_ids
from bitdance_diffusers.training.initialization import initialize_weights
from bitdance_diffusers.training.objective import RandomDraws, text_to_image_loss
from data.cached_codes import describe_pictures
from icon_world.dataset import IconDataset
from icon_world.world import IconWorld
from tests.examples.training_runs import (
    assert_equal_checkpoints,
    assert_equal_states,
    kill_in_a_checkpoint,
    record,
    run_here,
    to_flags,
    write_pictures,
)


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
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "report_to": "none",
        }
        return to_flags({**defaults, **more})

    return arguments


@pytest.fixture
def train(arguments, workplace):
    def train(output, **more):
        run_here(train_t2i, arguments(output, **more))
        return workplace / output

    return train


@pytest.fixture
def scratch(workplace, t2i_pipeline_path):
    """Arguments of a training from scratch, of a transformer like the case's but narrow."""
    config = json.loads((t2i_pipeline_path / "transformer" / "config.json").read_text(encoding="utf-8"))
    config |= {"head_hidden_size": 64, "head_attention_head_dim": 32, "intermediate_size": 64}
    (workplace / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {
        "pretrained_model_name_or_path": None,
        "transformer_config": workplace / "config.json",
        "vae_path": t2i_pipeline_path / "vae",
        "tokenizer_path": t2i_pipeline_path / "tokenizer",
    }


def weights(folder):
    files = (folder / "transformer").glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "random_flip": True, "diff_batch_mul": 2, "distill_guidance_scale": 3},
        {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "lr_scheduler": "cosine"},
        {"optimizer": "muon", "cache_codes": True, "center_crop": True, "lr_decay_steps": 3},
    ],
)
def test_killed_and_resumed_equals_unbroken(workplace, arguments, train, options):
    unbroken = train("unbroken", **options)
    kill_in_a_checkpoint(train_t2i, arguments("killed", **options))
    folder = workplace / "killed"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-2/*")}
    resumed = train("killed", resume_from_checkpoint="latest", **options)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-2/*")} == before

    assert_equal_states(weights(unbroken), weights(resumed))
    assert_equal_checkpoints(unbroken / "checkpoint-6", resumed / "checkpoint-6")
    assert [p.name for p in sorted(resumed.glob(".*"))] == []


def test_fine_tuning_leaves_a_pipeline(train, t2i_pipeline_path):
    folder = train(
        "out", use_ema=True, ema_decay=0.5, checkpoints_total_limit=1, validation_prompt=["a red fox", "two"],
        validation_steps=4, num_validation_images=3, num_inference_steps=2, guidance_scale=2.5,
        report_to="tensorboard", save_dtype="bfloat16",
    )  # fmt: skip
    before, after = weights(t2i_pipeline_path), weights(folder)
    assert before.keys() == after.keys()
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert not torch.equal(before["head.proj_out.weight"].bfloat16(), after["head.proj_out.weight"])
    averaged = load_file(folder / "checkpoint-6" / "ema.safetensors")
    assert torch.equal(averaged["0"].bfloat16(), after["embed_tokens.weight"])
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-6"]
    grids = sorted(p.name for p in (folder / "validation").iterdir())
    assert grids == ["validation-000004.png", "validation-000006.png"]
    assert Image.open(folder / "validation" / grids[0]).size == (3 * 16, 2 * 16)
    assert "library_name: diffusers" in (folder / "README.md").read_text(encoding="utf-8")
    assert list((folder / "logs").rglob("events.out.tfevents*"))

    pipeline = BitDancePipeline.from_pretrained(folder)
    assert pipeline.config.default_guidance_scale == 2.5 and pipeline.config.default_num_inference_steps == 2
    image = pipeline("a red fox", height=16, width=16).images[0]
    assert image.size == (16, 16)


def test_what_is_saved_is_what_was_trained(train):
    """Without an average, in float32: the last checkpoint's weights."""
    folder = train("out")
    assert_equal_states(weights(folder), load_file(folder / "checkpoint-6" / "model.safetensors"))


def test_from_scratch_on_cached_codes(train, scratch, workplace):
    options = {**scratch, "cache_codes": workplace / "codes", "center_crop": True, "max_train_steps": 4}
    cached = train("cached", **options)
    pipeline = BitDancePipeline.from_pretrained(cached)
    assert (pipeline.config.default_height, pipeline.config.supported_sizes) == (16, [[16, 16]])
    assert pipeline("a red fox", num_inference_steps=2).images[0].size == (16, 16)
    codes = np.load(workplace / "codes" / "codes.npy")
    assert codes.shape == (10, 4, 4, 1) and codes.dtype == np.uint8

    encoded = train("encoded", **{**options, "cache_codes": None})
    assert_equal_states(weights(cached), weights(encoded))

    Image.new("RGB", (20, 16)).save(workplace / "pictures" / "3.png")
    with pytest.raises(ValueError, match="made with other pictures"):
        train("stale", **options)
    (workplace / "pictures" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="metadata.jsonl do not exist"):
        train("stale", **options)


def test_icons_are_drawn_by_weight(train, scratch, workplace):
    train(
        "out", **scratch, train_data_dir=None, icons=6, icon_weights=["colors=1", *(
            f"{name}=0" for name in ("single_object", "two_object", "counting", "position", "color_attr"))],
        cache_codes=workplace / "codes", max_train_steps=1,
    )  # fmt: skip
    texts = json.loads((workplace / "codes" / "captions.json").read_text(encoding="utf-8"))
    assert len(texts) == 6 and all(len(text.split()) == 3 for text in texts)


def test_two_processes_equal_one(workplace, arguments):
    options = {
        "max_train_steps": 20,
        "checkpointing_steps": 100,
        "diff_batch_mul": 2,
        "lr_scheduler": "constant",
        "learning_rate": 1e-4,
    }
    one, two = (
        record(train_t2i, arguments(f"out-{n}", train_batch_size=8 // n, **options), n, workplace / f"recorded-{n}")
        for n in (1, 2)
    )
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert len(one["losses"]) == 20
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-4)


def test_bf16_mixed_precision(train):
    exact, mixed = weights(train("exact")), weights(train("mixed", mixed_precision="bf16"))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in mixed.values())
    assert not torch.equal(mixed["norm_out.weight"], exact["norm_out.weight"])
    torch.testing.assert_close(mixed["norm_out.weight"], exact["norm_out.weight"], atol=2e-2, rtol=0)


def test_cached_icons_of_another_held_out_rule_are_refused(monkeypatch):
    dataset = IconDataset(50, 0, {"mixed": 4})
    described = describe_pictures(dataset)
    assert describe_pictures(IconDataset(50, 0, {"mixed": 4})) == described
    monkeypatch.setattr(IconWorld, "_any_held_out", lambda self, *texts: False)
    assert describe_pictures(IconDataset(50, 0, {"mixed": 4})) != described


def test_compiled_blocks_train_and_save_the_same(train, monkeypatch):
    graphs = []
    compile_blocks = BitDanceTransformer.compile_repeated_blocks

    def compile_and_count(self, **options):
        compile_blocks(self, **options, backend=lambda graph, inputs: graphs.append(graph) or graph)

    monkeypatch.setattr(BitDanceTransformer, "compile_repeated_blocks", compile_and_count)
    plain = weights(train("plain", use_ema=True))
    assert not graphs
    compiled = weights(train("compiled", use_ema=True, compile=True))
    assert graphs
    assert_equal_states(plain, compiled)


def test_text_loss_trains_the_output_layer(train, scratch):
    config = json.loads(scratch["transformer_config"].read_text(encoding="utf-8")) | {"use_lm_head": True}
    scratch["transformer_config"].write_text(json.dumps(config), encoding="utf-8")
    first = weights(train("first", **scratch, max_train_steps=1))
    second = weights(train("second", **scratch, max_train_steps=2))
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    first = weights(train("third", **scratch, max_train_steps=1, text_loss_weight=0))
    second = weights(train("fourth", **scratch, max_train_steps=2, text_loss_weight=0))
    assert torch.equal(first["lm_head.weight"], second["lm_head.weight"])


def test_gradient_checkpointing_changes_nothing(train):
    plain, checkpointed = (weights(train(str(flag), gradient_checkpointing=flag)) for flag in (None, True))
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


def test_guided_predictions_of_the_weights_at_the_start_are_learnt(
    train, monkeypatch, workplace, arguments, t2i_pipeline
):
    seen = []

    def record_targets(transformer, *args):
        *args, reference, rows = args
        assert rows is None

        def recorded(**inputs):
            seen.append((inputs, reference(**inputs)))
            return seen[-1][1]

        return text_to_image_loss(transformer, *args, recorded, rows)

    monkeypatch.setattr(train_t2i, "text_to_image_loss", record_targets)
    options = {"distill_guidance_scale": 4, "text_loss_weight": 0}
    folder = train("out", max_train_steps=3, proportion_empty_prompts=0, **options)
    assert BitDancePipeline.from_pretrained(folder).config.default_guidance_scale == 1

    pipeline = t2i_pipeline()
    unconditional = train_t2i.PromptFrames(
        pipeline.tokenizer, picture_start_ids(pipeline.tokenizer, 4, 4, 2)
    ).unconditional
    for inputs, targets in seen:
        predict = partial(
            pipeline.transformer, **{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        )
        batch, length = inputs["input_ids"].shape
        row = torch.tensor([0] * (length - len(unconditional)) + unconditional).expand(batch, -1)
        mask = torch.arange(length).expand(batch, -1) >= length - len(unconditional)
        with torch.no_grad():
            with_prompt = predict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).sample
            without = predict(input_ids=row, attention_mask=mask).sample
        assert (with_prompt - without).abs().max() > 0.1
        torch.testing.assert_close(targets, (4 * with_prompt - 3 * without).clamp(-1, 1), atol=1e-3, rtol=0)

    # Without a prompt guidance changes nothing: such rows are to stay as they are
    recorded = record(
        train_t2i,
        arguments("empty", max_train_steps=1, proportion_empty_prompts=1, **options),
        1,
        workplace / "rec.pt",
    )
    assert recorded["losses"] == [0]


def test_a_loss_that_is_not_finite_reaches_no_checkpoint(train, workplace):
    with pytest.raises(FloatingPointError):
        train("out", learning_rate=1e30, checkpointing_steps=1, max_train_steps=20, max_skipped_steps=5)
    assert not (workplace / "out" / "model_index.json").exists()
    assert list((workplace / "out").glob("checkpoint-*"))
    for file in (workplace / "out").glob("checkpoint-*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_prompts_stand_in_their_frames(t2i_pipeline):
    frames = train_t2i.PromptFrames(t2i_pipeline().tokenizer, [5, 6])
    batch = frames(
        [{"text": "a red fox", "packed_code": torch.tensor(1)}, {"text": "", "packed_code": torch.tensor(2)}]
    )
    assert batch["packed_code"].tolist() == [1, 2] and "text" not in batch
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert mask[0].all() and not mask[1, 0]
    assert ids[0].tolist() == frames.framed("a red fox") and ids[1][mask[1]].tolist() == frames.framed("")
    assert batch["unconditional_ids"][batch["unconditional_mask"]].tolist() == frames.unconditional
    assert ids[:, -2:].tolist() == [[5, 6]] * 2


def overfit(pipeline, num_steps):
    """Train on four pictures' codes with four captions; returns codes, captions and the mean of the last losses."""
    transformer = pipeline.transformer.train()
    code = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).sign()
    texts = ["a red fox", "a blue umbrella", "two", "sleeping under it"]
    patch_size = transformer.config.patch_size
    frames = train_t2i.PromptFrames(pipeline.tokenizer, picture_start_ids(pipeline.tokenizer, 8, 8, patch_size))
    prompts = frames([{"text": text} for text in texts])
    input_ids, mask = prompts["input_ids"], prompts["attention_mask"]
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3, betas=(0.9, 0.95))
    losses = []
    for step in range(num_steps):
        draws = RandomDraws(torch.Generator().manual_seed(step))
        losses_of_step = text_to_image_loss(
            transformer, pipeline.scheduler, input_ids, mask, code, patch_size, draws, 0.1, 4
        )
        losses_of_step.loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - (step + 1) / num_steps))
        losses.append(losses_of_step.loss.item())
    transformer.eval()
    return code, texts, float(np.mean(losses[-20:]))


@pytest.fixture
def fresh_pipeline(t2i_pipeline):
    """The case's pipeline with a narrower transformer that has learnt nothing."""
    pipeline = t2i_pipeline()
    config = dict(pipeline.transformer.config) | {"head_hidden_size": 64, "head_attention_head_dim": 32}
    transformer = BitDanceTransformer.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    initialize_weights(transformer, torch.Generator().manual_seed(0))
    pipeline.transformer = transformer
    return pipeline


def test_four_pictures_are_learnt(fresh_pipeline):
    """The bits are random, so that only caption, place and what came before can tell them."""
    *_, loss = overfit(fresh_pipeline, num_steps=120)
    assert loss < 0.27  # 0.20; 0.34 to 1.5 with the mask, the order, either position or the condition broken


@pytest.mark.slow
def test_four_pictures_are_reproduced(fresh_pipeline):
    code, texts, _ = overfit(fresh_pipeline, num_steps=1000)
    generator = torch.Generator().manual_seed(0)
    drawn = fresh_pipeline(
        texts,
        height=32,
        width=32,
        num_inference_steps=20,
        guidance_scale=1.0,
        generator=generator,
        output_type="latent",
    ).images
    assert (drawn == code).float().mean() >= 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "missing is --transformer_config, --vae_path, --tokenizer_path"),
        ({"vae_path": "vae"}, "excludes --vae_path"),
        (
            {
                "pretrained_model_name_or_path": None,
                "transformer_config": "c",
                "vae_path": "v",
                "tokenizer_path": "t",
                "distill_guidance_scale": 3,
            },
            "--distill_guidance_scale needs a model that is guided",
        ),
        ({"icons": 4}, "--train_data_dir, --icons"),
        ({"icon_weights": "counting=2"}, "--icons, which is not given"),
        ({"train_data_dir": None, "icons": 4, "icon_weights": "counting"}, "CATEGORY=WEIGHT"),
        ({"cache_codes": True}, "needs --center_crop"),
        ({"cache_codes": True, "center_crop": True, "random_flip": True}, "excludes --random_flip"),
        ({"lr_scheduler": "cosine", "lr_decay_steps": 2}, "needs a constant --lr_scheduler, not cosine"),
        ({"proportion_empty_prompts": 1.5}, "--proportion_empty_prompts has to be in"),
        ({"bit_flip_probability": -1}, "--bit_flip_probability"),
        ({"diff_batch_mul": 0}, "--diff_batch_mul has to be at least 1 but is 0"),
        ({"text_loss_weight": -1}, "--text_loss_weight"),
        ({"distill_guidance_scale": 1}, "--distill_guidance_scale has to be greater than 1 and finite but is 1.0"),
        (
            {"with_prior_preservation": True, "class_prompt": "two", "distill_guidance_scale": 3},
            "--distill_guidance_scale and --with_prior_preservation exclude each other",
        ),
    ],
)
def test_bad_arguments(arguments, capsys, options, message):
    with pytest.raises(SystemExit):
        train_t2i.parse_args(arguments("out", **options))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 20}, "--resolution 20 has to be a multiple of 8: 4 pixels a token, 2 tokens"),
        ({"max_sequence_length": 5}, "caption of .*0.png.* --max_sequence_length allows 5"),
        ({"text_loss_weight": 0.1}, "--text_loss_weight 0.1 needs a transformer with an `lm_head`"),
        ({"caption_column": "caption"}, "has no column 'caption'"),
        ({"train_data_dir": "absent"}, "absent does not exist"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "checkpoint-3 is not a checkpoint"),
    ],
)
def test_bad_arguments_that_only_the_files_show(train, workplace, options, message):
    with pytest.raises(ValueError, match=message):
        train("out", **options)
    assert not (workplace / "out").exists()


def test_a_text_tokenizer_larger_than_the_vocabulary(train, scratch):
    config = json.loads(scratch["transformer_config"].read_text(encoding="utf-8"))
    scratch["transformer_config"].write_text(json.dumps(config | {"vocab_size": 100}), encoding="utf-8")
    with pytest.raises(ValueError, match="`vocab_size` is 100"):
        train("out", **scratch)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "3.png", "text": 3}', "'text' has to be text but is 3"),
        ('{"file_name": "absent.png", "text": "a"}', "absent.png cannot be read"),
        ('{"file_name": "broken.png", "text": "a"}', "broken.png cannot be read"),
        (
            json.dumps({"file_name": "3.png", "text": "a " * 1025}),
            "3.png, 'a a .*: it is .* tokens .*_length allows 1024",
        ),
    ],
)
def test_bad_captions_and_pictures(train, workplace, line, message):
    (workplace / "pictures" / "broken.png").write_bytes(b"no picture")
    with (workplace / "pictures" / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + line)
    with pytest.raises(ValueError, match=message):
        train("out")


def test_another_run_in_the_output_folder(train):
    train("out", max_train_steps=2)
    with pytest.raises(ValueError, match="holds another run"):
        train("out", max_train_steps=2)
    with pytest.raises(ValueError, match="another configuration .*learning_rate"):
        train("out", max_train_steps=4, learning_rate=2e-3, resume_from_checkpoint="latest")


def test_going_on_from_an_earlier_checkpoint_loses_nothing(train):
    folder = train("out", max_train_steps=3, checkpointing_steps=1, resume_from_checkpoint="latest")  # a new run
    train("out", max_train_steps=2, checkpointing_steps=1, checkpoints_total_limit=1,
          resume_from_checkpoint="checkpoint-1")  # fmt: skip
    names = sorted(path.name for path in folder.glob("*checkpoint*"))
    assert names == ["checkpoint-2", "checkpoint-2.set-aside", "checkpoint-3.set-aside"]
    assert_equal_states(weights(folder), load_file(folder / "checkpoint-2" / "model.safetensors"))
    assert_equal_checkpoints(folder / "checkpoint-2.set-aside", folder / "checkpoint-2")


def test_the_repository_is_there_before_the_training_and_a_failed_upload_loses_nothing(train, workplace, hub):
    _, answers = hub
    options = {"push_to_hub": True, "hub_model_id": "foxes", "hub_token": "secret", "max_train_steps": 1}
    with pytest.raises(ValueError, match="--push_to_hub: the repository foxes cannot be written to: .*403"):
        train("out", **options)
    assert not (workplace / "out").exists()

    answers |= {"/api/repos/create": (200, {}), "/api/models/owner/foxes/auth-check/write": (200, {})}
    with pytest.raises(RuntimeError, match="the upload to owner/foxes failed: .*403(.|\n)*hf upload owner/foxes"):
        train("out", report_to="tensorboard", **options)
    BitDancePipeline.from_pretrained(workplace / "out")
    assert not [path for path in (workplace / "out").rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
