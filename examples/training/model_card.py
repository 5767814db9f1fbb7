"""The README.md of what was trained: what it is made from, how, what it draws, and how it is used."""

import argparse
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

HYPERPARAMETERS = (
    "rank", "lora_alpha", "lora_dropout", "lora_layers", "base_dtype", "base_int8", "bnb_quantization_config_path",
    "instance_prompt", "class_prompt", "num_class_images", "prior_loss_weight", "resolution", "train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "optimizer",
    "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "mixed_precision", "use_ema", "ema_decay", "bit_flip_probability", "diff_batch_mul", "proportion_empty_prompts",
    "text_loss_weight", "label_dropout", "random_flip", "center_crop", "reward", "reward_arguments", "num_prompts",
    "num_images_per_prompt", "rollout_steps", "rollout_guidance_scale", "rollout_noise", "trained_steps",
    "window_size", "stochastic_steps", "kl_weight", "clip_range", "ratio_level", "advantage_scale", "num_inner_epochs",
    "seed",
)  # fmt: skip


def save_model_card(
    args: argparse.Namespace,
    description: str,
    tags: list[str],
    usage: str,
    learnt_from: str,
    num_steps: int,
    num_processes: int,
    samples: Path | None = None,
    sample_rows: list[str] | None = None,
) -> None:
    """
    Write `README.md` into `--output_dir`.

    Args:
        description (`str`): a sentence on what this is.
        tags (list of `str`): of the Hub, beside those of every model.
        usage (`str`): the code that loads and uses it.
        learnt_from (`str`): what the steps of the run are on, see [`name_pictures`].
        num_steps, num_processes (`int`): of the run.
        samples (`Path`, *optional*): a grid of pictures inside the folder, and ...
        sample_rows (list of `str`, *optional*): ... what each of its rows was drawn from.
    """
    base_model = args.pretrained_model_name_or_path
    is_repository = base_model is not None and not Path(base_model).exists()
    dataset = getattr(args, "dataset_name", None)
    data = ModelCardData(
        library_name="diffusers",
        base_model=base_model if is_repository else None,
        license=args.license or find_license(base_model),
        datasets=dataset if dataset and not Path(dataset).exists() else None,
        tags=["bitdance", "diffusers-training", *tags],
    )
    folder = args.output_dir
    parts = [f"---\n{data.to_yaml()}\n---", f"# {folder.resolve().name}", description]
    if base_model is not None:
        parts.append(f"Base model: [{base_model}](https://huggingface.co/{base_model})." if is_repository else
                     f"Base model: `{Path(base_model).name}`.")  # fmt: skip
    if samples is not None:
        rows = "\n".join(f"{i}. {row}" for i, row in enumerate(sample_rows, start=1))
        parts.append(f"![Pictures that it drew]({samples.relative_to(folder).as_posix()})\n\nThe rows are:\n\n{rows}")
    parts.append(f"## Use\n\n```python\n{usage}\n```")
    parts.append(
        f"## Training\n\n{num_steps} steps on {learnt_from}, in {num_processes} "
        f"process{'es' if num_processes > 1 else ''}:\n\n```bash\n{args.command}\n```"
    )
    given = {name: getattr(args, name, None) for name in HYPERPARAMETERS}
    if given["class_prompt"] is None:
        del given["num_class_images"], given["prior_loss_weight"]
    if given["lr_scheduler"] == "constant":
        del given["lr_warmup_steps"]
    if not given["use_ema"]:
        del given["ema_decay"]
    table = "\n".join(f"| {name} | {value} |" for name, value in given.items() if value not in (None, False))
    parts.append(f"| | |\n|---|---|\n{table}")
    partial = folder / ".README.md.partial"
    ModelCard("\n\n".join(parts) + "\n").save(partial)
    partial.replace(folder / "README.md")


def name_pictures(args: argparse.Namespace, num_pictures: int) -> str:
    """How many pictures of what a run learns from."""
    sources = ("train_data_dir", "instance_data_dir", "dataset_name", "icons")
    (source,) = (name for name in sources if getattr(args, name, None) is not None)
    where = {"dataset_name": args.dataset_name, "icons": "the icon world"}.get(source) or getattr(args, source).name
    return f"{num_pictures} pictures of {where}"


def find_license(base_model: str | None) -> str | None:
    """The licence in a model's own card, if that is on this machine."""
    if base_model is None:
        return None
    card = Path(base_model) / "README.md"
    if not card.is_file():
        if Path(base_model).exists():
            return None
        cached = try_to_load_from_cache(base_model, "README.md")
        if not isinstance(cached, str):
            return None
        card = Path(cached)
    return ModelCard.load(card, ignore_metadata_errors=True).data.license
