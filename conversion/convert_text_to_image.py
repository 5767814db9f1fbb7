"""Convert an original text-to-image checkpoint into a `BitDancePipeline`.

    python conversion/convert_text_to_image.py --checkpoint_path BitDance-14B-16x --output_path bitdance-14b-16x

Reads the original's folder, whose language model may be sharded, and the folder of the community's port to Diffusers.
`BitDancePipeline.from_pretrained` loads the output.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import (
    DTYPES,
    Checkpoint,
    add_dtype_argument,
    check_count,
    check_output_path,
    copy_tokenizer,
    match_tensors,
    naming,
    open_safetensors_folder,
    output_folder,
    read_settings,
    run_command,
    state_dict_shapes,
    write_tensors,
)
from convert_tokenizer import match_autoencoder
from weights import (
    language_model_config_from_original,
    transformer_key_to_original,
    vision_head_config_from_original,
)

from bitdance_diffusers import BinaryDiffusionScheduler, BitDancePipeline, BitDanceTransformer
from bitdance_diffusers.prompt import check_tokenizer

# The sizes (height, width) in pixels that the released models were trained on, by the tokens P of a patch.
_LARGE_SIZES = [[2048, 512], [1920, 512], [1536, 640], [1280, 768], [1152, 896], [1024, 1024]]
_LARGE_SIZES += [[width, height] for height, width in reversed(_LARGE_SIZES[:-1])]
_SMALL_SIZES = [[1024, 256], [896, 256], [640, 384], [512, 512], [384, 640], [256, 896], [256, 1024]]
SUPPORTED_SIZES = {16: _LARGE_SIZES + _SMALL_SIZES, 64: _LARGE_SIZES}


@dataclass(frozen=True)
class Layout:
    """Where the parts of a checkpoint are: configs, and (folder, name before ".safetensors") of the weights."""

    language_model_config: Path
    vision_head_config: Path
    projector_config: Path | None
    autoencoder_config: Path
    tokenizer: Path
    language_model: tuple[Path, str]
    vision_head: tuple[Path, str]
    projector: tuple[Path, str]
    autoencoder: tuple[Path, str]


def find_layout(folder: Path) -> Layout:
    """
    Tell the original's layout from the community port's.

    Raises:
        ValueError: it is neither.
    """
    if (folder / "vision_head_config.json").is_file():
        return Layout(
            language_model_config=folder / "config.json",
            vision_head_config=folder / "vision_head_config.json",
            projector_config=None,
            autoencoder_config=folder / "ae_config.json",
            tokenizer=folder,
            language_model=(folder, "model"),
            vision_head=(folder, "vision_head"),
            projector=(folder, "projector"),
            autoencoder=(folder, "ae"),
        )
    if (folder / "diffusion_head").is_dir():
        return Layout(
            language_model_config=folder / "text_encoder" / "config.json",
            vision_head_config=folder / "diffusion_head" / "config.json",
            projector_config=folder / "projector" / "config.json",
            autoencoder_config=folder / "autoencoder" / "config.json",
            tokenizer=folder / "tokenizer",
            language_model=(folder / "text_encoder", "model"),
            vision_head=(folder / "diffusion_head", "diffusion_pytorch_model"),
            projector=(folder / "projector", "diffusion_pytorch_model"),
            autoencoder=(folder / "autoencoder", "diffusion_pytorch_model"),
        )
    raise ValueError(
        f"`--checkpoint_path` {folder} has to be a folder with the original's `vision_head_config.json` or the "
        "community port's `diffusion_head`."
    )


def convert_text_to_image(
    checkpoint_path: Path, output_path: Path, dtype: torch.dtype | None = None, keep_lm_head: bool = False
) -> None:
    """
    Convert an original text-to-image checkpoint into a folder that `BitDancePipeline.from_pretrained` loads.

    No file of the output is larger than the largest of the checkpoint (unless one tensor, after a cast, is), and
    memory does not grow with the checkpoint: it holds one mapped tensor at a time.

    Args:
        checkpoint_path: A folder in the original's layout or in the community port's.
        output_path: A new folder.
        dtype: Cast every tensor of every component; `None` keeps them bit for bit, each in the dtype it is stored in.
        keep_lm_head: Keep the language model's output layer, which only the text loss of training uses.

    Raises:
        ValueError: the output exists, or the checkpoint is damaged, incomplete, contradicts its configs, asks for what
            the model does not do, or holds a NaN or an infinity. Nothing is then left at `output_path`.
    """
    check_output_path(output_path)
    layout = find_layout(checkpoint_path)

    # 1. Configs, each by itself and against the others.
    language_model_settings = read_settings(layout.language_model_config)
    with naming(layout.language_model_config):
        language_model_config = language_model_config_from_original(language_model_settings)
    with naming(layout.vision_head_config):
        head_config, scheduler_config = vision_head_config_from_original(read_settings(layout.vision_head_config))
        if head_config["hidden_size"] != language_model_config["hidden_size"]:
            raise ValueError(
                f"`ch_cond` is {head_config['hidden_size']}, but `hidden_size` in {layout.language_model_config} is "
                f"{language_model_config['hidden_size']}."
            )
        scheduler = BinaryDiffusionScheduler(**scheduler_config)
    transformer_config = {**language_model_config, **head_config, "use_lm_head": keep_lm_head}
    if layout.projector_config is not None:
        _check_projector_config(layout.projector_config, transformer_config)

    # 2. Headers against the configs.
    parts = {
        name: open_safetensors_folder(*getattr(layout, name))
        for name in ("language_model", "projector", "vision_head")
    }
    check_count(parts["language_model"], "model.layers", "num_hidden_layers", transformer_config["num_layers"])
    check_count(parts["vision_head"], "net.res_blocks", "depth_latent", transformer_config["head_num_layers"])
    check_count(parts["vision_head"], "net.ada_ln_blocks", "depth_adanln", transformer_config["head_num_modulations"])
    with naming(layout.vision_head_config.parent), torch.device("meta"):
        transformer = BitDanceTransformer(**transformer_config)
    tied = language_model_settings.get("tie_word_embeddings", False)
    transformer_tensors = _match_transformer(transformer, parts, tied)

    autoencoder = open_safetensors_folder(*layout.autoencoder)
    autoencoder_settings = read_settings(layout.autoencoder_config)
    with naming(layout.autoencoder_config):
        vae, vae_tensors = match_autoencoder(autoencoder, autoencoder_settings)
        if vae.config.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"`z_channels` is {vae.config.latent_channels}, but `ch_target` in {layout.vision_head_config} is "
                f"{transformer.config.in_channels}."
            )

    # 3. The output.
    max_file_size = max(part.largest_file() for part in (*parts.values(), autoencoder))
    with output_folder(output_path) as folder:
        tokenizer = copy_tokenizer(layout.tokenizer, folder / "tokenizer")
        with naming(layout.tokenizer):
            check_tokenizer(tokenizer, transformer.config.patch_size, transformer.config.vocab_size)
        pipeline = BitDancePipeline(
            tokenizer,
            vae,
            transformer,
            scheduler,
            supported_sizes=SUPPORTED_SIZES.get(transformer.config.patch_size**2),
        )
        pipeline.save_config(folder)
        scheduler.save_pretrained(folder / "scheduler")
        transformer.save_config(folder / "transformer")
        write_tensors(folder / "transformer", "diffusion_pytorch_model", transformer_tensors, dtype, max_file_size)
        vae.save_config(folder / "vae")
        write_tensors(folder / "vae", "diffusion_pytorch_model", vae_tensors, dtype, max_file_size)


def _check_projector_config(file: Path, transformer_config: dict) -> None:
    expected = {
        "in_dim": transformer_config["in_channels"],
        "out_dim": transformer_config["hidden_size"],
        "hidden_act": "gelu_pytorch_tanh",
    }
    settings = read_settings(file)
    for name in {**expected, **settings}:
        if name not in expected or settings.get(name) != expected[name]:
            raise ValueError(f"{file}: `{name}` is {settings.get(name)!r}; allowed is {expected.get(name)!r}.")


def _match_transformer(transformer: BitDanceTransformer, parts: dict[str, Checkpoint], tied: bool) -> dict:
    expected = {part: {} for part in parts}
    for key, shape in state_dict_shapes(transformer).items():
        part, original = transformer_key_to_original(key, transformer.config.head_use_swiglu)
        if original == "lm_head.weight" and tied:
            original = "model.embed_tokens.weight"
        expected[part][key] = (original, shape)
    tensors = {}
    for part, checkpoint in parts.items():
        unused = ("lm_head.weight",) if part == "language_model" else ()
        tensors.update(match_tensors(checkpoint, expected[part], unused))
    return tensors


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Convert an original text-to-image checkpoint into a BitDancePipeline."
    )
    parser.add_argument(
        "--checkpoint_path", type=Path, required=True, help="Folder of the original or of the community's port."
    )
    parser.add_argument("--output_path", type=Path, required=True, help="The new folder.")
    add_dtype_argument(parser)
    parser.add_argument(
        "--keep_lm_head",
        action="store_true",
        help="Keep the language model's output layer, which only the text loss of training uses.",
    )
    args = parser.parse_args(arguments)
    run_command(
        lambda: convert_text_to_image(
            args.checkpoint_path, args.output_path, DTYPES.get(args.dtype), args.keep_lm_head
        )
    )
    print(f"Wrote {args.output_path}")


if __name__ == "__main__":
    main()
