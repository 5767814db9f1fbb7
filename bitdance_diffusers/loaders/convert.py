"""Convert the original's checkpoints into folders that Diffusers loads, one tensor at a time.

It stands above the pipelines, whose configs it writes; nothing else of the package imports it. The commands are in
`conversion/`.
"""

from pathlib import Path

import torch

from ..models.autoencoder_bitdance import BitDanceTokenizer
from ..pipelines.pipeline_bitdance import BitDancePipeline
from ..pipelines.pipeline_bitdance_class import BitDanceClassPipeline
from ..prompt import check_tokenizer
from .checkpoint_files import check_output_path, copy_tokenizer, largest_file, naming, output_folder, write_tensors
from .original_autoencoder import open_autoencoder
from .original_class_to_image import open_class_to_image
from .original_text_to_image import SUPPORTED_SIZES, find_layout, open_scheduler, open_transformer, open_vae


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
    if layout is None:
        raise ValueError(
            f"`--checkpoint_path` {checkpoint_path} has to be a folder with the original's `vision_head_config.json` "
            "or the community port's `diffusion_head`."
        )
    transformer, transformer_tensors = open_transformer(layout, keep_lm_head)
    scheduler = open_scheduler(layout)
    vae, vae_tensors = open_vae(layout)
    max_file_size = largest_file((*transformer_tensors.values(), *vae_tensors.values()))

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
        vae_path, vae_config: The autoencoder and its settings, as in [`open_autoencoder`].
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
    opened = open_class_to_image(checkpoint_path, num_attention_heads)
    vae, vae_tensors = open_autoencoder(BitDanceTokenizer, vae_path, vae_config)
    opened.check_autoencoder(vae, str(vae_path))
    defaults = opened.pipeline_defaults(label_names)
    pipeline = BitDanceClassPipeline(vae, opened.transformer, opened.scheduler, **defaults)
    with output_folder(output_path) as folder:
        pipeline.save_config(folder)
        opened.scheduler.save_pretrained(folder / "scheduler")
        opened.transformer.save_config(folder / "transformer")
        write_tensors(folder / "transformer", "diffusion_pytorch_model", opened.tensors, dtype)
        vae.save_config(folder / "vae")
        write_tensors(folder / "vae", "diffusion_pytorch_model", vae_tensors, dtype)


def convert_tokenizer(
    checkpoint_path: Path, output_path: Path, config_path: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """
    Convert an original autoencoder into a folder that `BitDanceTokenizer.from_pretrained` loads.

    Args:
        checkpoint_path, config_path: As in [`open_autoencoder`].
        output_path: A new folder.
        dtype: Cast the tensors; `None` keeps them bit for bit.

    Raises:
        ValueError: the output exists, or the checkpoint is damaged, incomplete, contradicts its settings, is more than
            plain tensors or holds a NaN or an infinity. Nothing is then left at `output_path`.
    """
    check_output_path(output_path)
    model, tensors = open_autoencoder(BitDanceTokenizer, checkpoint_path, config_path)
    with output_folder(output_path) as folder:
        model.save_config(folder)
        write_tensors(folder, "diffusion_pytorch_model", tensors, dtype)
