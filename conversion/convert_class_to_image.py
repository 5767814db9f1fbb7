"""Convert an original ImageNet checkpoint and its autoencoder into a `BitDanceClassPipeline`.

    python conversion/convert_class_to_image.py --checkpoint_path BitDance_B_4x.pt --vae_path ae_d16c32.pt \
        --output_path bitdance-b-4x

Of the checkpoint, which is the pickle that the original's training writes, the averaged weights (`ema`) are converted,
or `model` where it has none. Its settings are read off the tensors' shapes and the pickled `args`; the number of
attention heads is known for the released models (BitDance-B, -L and -H) and otherwise asked for by
`--num_attention_heads`. `BitDanceClassPipeline.from_pretrained` loads the output.

The names of the 1000 classes in `imagenet_labels.txt` are the lemmas of WordNet 3.0 (Princeton University), one line a
class in the order of ILSVRC 2012, synonyms separated by ", ".
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    DTYPES,
    Checkpoint,
    StoredTensor,
    add_dtype_argument,
    check_output_path,
    checkpoint_from_state_dict,
    match_tensors,
    naming,
    output_folder,
    read_pickle,
    run_command,
    state_dict_shapes,
    write_tensors,
)
from convert_tokenizer import open_autoencoder
from weights import (
    class_config_from_original,
    class_tensor_from_original,
    class_tensor_shape_to_original,
    class_transformer_key_to_original,
)

from bitdance_diffusers import BinaryDiffusionScheduler, BitDanceClassPipeline, BitDanceClassTransformer

IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.txt")
# The guidance scale of the paper's best FID, by the released model and the tokens P of a patch.
RELEASED_GUIDANCE_SCALES = {
    ("BitDance-B", 1): 3.2,
    ("BitDance-B", 4): 3.9,
    ("BitDance-B", 16): 6.1,
    ("BitDance-L", 1): 4.0,
    ("BitDance-H", 1): 4.55,
}


def open_training_pickle(file: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """
    Open the pickle that the original's training writes.

    Returns:
        `tuple`: the averaged weights, or the trained ones where there are none, without the autoencoder (`vae.*`); and
        the settings in `args`.

    Raises:
        ValueError: the file is damaged, its pickle asks for another class than `argparse.Namespace`, or it holds no
            weights or no settings.
    """
    content = read_pickle(file, allowed=(argparse.Namespace,))
    if not isinstance(content, dict):
        raise ValueError(f"{file} has to hold a dictionary but holds a {type(content).__name__}.")
    weights = content.get("ema")
    if weights is None or weights == {}:
        weights = content.get("model")
    if not isinstance(weights, dict):
        raise ValueError(f'{file} has to hold a dictionary of tensors under "ema" or "model".')
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f'{file} has to hold an argparse.Namespace under "args" but holds a {type(args).__name__}.')
    weights = {key: value for key, value in weights.items() if not str(key).startswith("vae.")}
    return checkpoint_from_state_dict(file, weights), vars(args)


def read_label_names(file: Path, num_classes: int) -> list[str]:
    """
    Read the names of the classes, one a line.

    Raises:
        ValueError: the file does not exist, is not UTF-8, or does not have one name for every class.
    """
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`--label_names` {file} cannot be read: {error}") from error
    if len(names) != num_classes:
        raise ValueError(f"`--label_names` {file} has {len(names)} lines, but the model has {num_classes} classes.")
    if "" in names:
        raise ValueError(f"`--label_names` {file}: line {names.index('') + 1} is empty.")
    return names


def convert_class_to_image(
    checkpoint_path: Path,
    vae_path: Path,
    output_path: Path,
    vae_config: Path | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    label_names: Path | None = None,
) -> None:
    """
    Convert an original ImageNet checkpoint into a folder that `BitDanceClassPipeline.from_pretrained` loads. Memory
    does not grow with the checkpoint: it holds one mapped tensor at a time.

    Args:
        checkpoint_path: The pickle that the original's training writes.
        vae_path, vae_config: The autoencoder and its settings, as in [`convert_tokenizer.open_autoencoder`].
        output_path: A new folder.
        num_attention_heads: Of the transformer; `None` asks `args.model` for a released model.
        dtype: Cast every tensor of every component; `None` keeps them bit for bit, each in the dtype it is stored in.
        label_names: A file with the names of the classes, one a line; `None` is ImageNet-1k's for a model of 1000
            classes, and no names for any other.

    Raises:
        ValueError: the output exists, or a file is damaged, incomplete, more than plain tensors and an
            `argparse.Namespace`, contradicts its settings or the other one, or holds a NaN or an infinity. Nothing is
            then left at `output_path`.
    """
    check_output_path(output_path)

    # 1. Settings, and headers against them.
    checkpoint, args = open_training_pickle(checkpoint_path)
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    with naming(checkpoint_path):
        transformer_config, scheduler_config = class_config_from_original(shapes, args, num_attention_heads)
        scheduler = BinaryDiffusionScheduler(**scheduler_config)
        with torch.device("meta"):
            transformer = BitDanceClassTransformer(**transformer_config)
    transformer_tensors = _match_transformer(transformer, checkpoint)

    vae, vae_tensors = open_autoencoder(vae_path, vae_config)
    ratio = vae.spatial_compression_ratio
    if vae.config.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"{vae_path} is an autoencoder of {vae.config.latent_channels} bits a token, but the model in "
            f"{checkpoint_path} has {transformer.config.in_channels} (`proj_in.w1.weight`)."
        )
    sizes = {"down_size": ratio, "image_size": transformer.config.sample_size * ratio}
    for name, size in sizes.items():
        if args.get(name, size) != size:
            raise ValueError(
                f"{checkpoint_path}: `args.{name}` is {args[name]!r}, but with the autoencoder in {vae_path} of "
                f"{ratio} pixels a token, `pos_for_diff.weight` of shape {shapes['pos_for_diff.weight']} says {size}."
            )

    # 2. What the pipeline adds.
    defaults = {}
    guidance_scale = RELEASED_GUIDANCE_SCALES.get((args.get("model"), transformer.config.patch_size**2))
    if guidance_scale is not None:
        defaults["default_guidance_scale"] = guidance_scale
    if label_names is None and transformer.config.num_classes == 1000:
        label_names = IMAGENET_LABELS
    if label_names is not None:
        defaults["label_names"] = read_label_names(label_names, transformer.config.num_classes)

    # 3. The output.
    pipeline = BitDanceClassPipeline(vae, transformer, scheduler, **defaults)
    with output_folder(output_path) as folder:
        pipeline.save_config(folder)
        scheduler.save_pretrained(folder / "scheduler")
        transformer.save_config(folder / "transformer")
        write_tensors(folder / "transformer", "diffusion_pytorch_model", transformer_tensors, dtype)
        vae.save_config(folder / "vae")
        write_tensors(folder / "vae", "diffusion_pytorch_model", vae_tensors, dtype)


def _match_transformer(transformer: BitDanceClassTransformer, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Match the original's tensors whole, then name what of each belongs to a tensor of the transformer."""
    shapes = state_dict_shapes(transformer)
    expected = {}
    for key, shape in shapes.items():
        original, _, _ = class_transformer_key_to_original(key)
        expected[original] = (original, class_tensor_shape_to_original(key, shape))
    originals = match_tensors(checkpoint, expected)

    def take(key: str, original: StoredTensor) -> StoredTensor:
        return replace(
            original,
            shape=shapes[key],
            read=lambda: class_tensor_from_original(key, original.read(), transformer.config.num_attention_heads),
        )

    return {key: take(key, originals[class_transformer_key_to_original(key)[0]]) for key in shapes}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Convert an original ImageNet checkpoint into a BitDanceClassPipeline."
    )
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="The pickle of the original's training.")
    parser.add_argument("--vae_path", type=Path, required=True, help="The autoencoder: a pickle, or NAME.safetensors.")
    parser.add_argument("--output_path", type=Path, required=True, help="The new folder.")
    parser.add_argument(
        "--vae_config",
        type=Path,
        help="JSON file with the autoencoder's settings. Default: NAME_config.json beside NAME.safetensors, d16c32 "
        "for a pickle.",
    )
    parser.add_argument(
        "--num_attention_heads",
        type=int,
        help="Attention heads of the transformer. Needed unless the checkpoint says that it is BitDance-B, -L or -H.",
    )
    parser.add_argument(
        "--label_names",
        type=Path,
        help="Names of the classes, one a line, synonyms separated by ', '. Default: ImageNet-1k's for 1000 classes.",
    )
    add_dtype_argument(parser)
    args = parser.parse_args(arguments)
    run_command(
        lambda: convert_class_to_image(
            args.checkpoint_path,
            args.vae_path,
            args.output_path,
            args.vae_config,
            args.num_attention_heads,
            DTYPES.get(args.dtype),
            args.label_names,
        )
    )
    print(f"Wrote {args.output_path}")


if __name__ == "__main__":
    main()
