"""Write a `BitDancePipeline` or a `BitDanceClassPipeline` back in the original's layout.

Without a cast every tensor keeps its bits; a cast to a narrower dtype rounds. The original has no place for a
pipeline's defaults: sizes, steps, guidance and names of classes.

Text to image: the language model's output layer (`lm_head.weight`) is in the export only if it is in the pipeline,
that is, if the conversion kept it with `--keep_lm_head`.

Class to image: `bitdance.pt`, `ae.pt` and `ae_ddconfig.json`. A pipeline holds one set of weights, which is both
`model` and `ema` of `bitdance.pt`; the optimizer's state, the number of epochs (written as 0) and all of `args` that a
conversion does not read are gone. The original keeps the number of attention heads in the name of the model alone, so
that converting the export of another than BitDance-B, -L or -H takes `--num_attention_heads`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from ..models.autoencoder_bitdance import BitDanceTokenizer
from ..models.transformer_bitdance import BitDanceTransformer
from ..models.transformer_bitdance_class import BitDanceClassTransformer
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler
from .checkpoint_files import (
    Checkpoint,
    StoredTensor,
    check_count,
    check_output_path,
    copy_tokenizer,
    largest_file,
    match_tensors,
    naming,
    open_safetensors_folder,
    output_folder,
    read_json,
    read_settings,
    read_tensor,
    state_dict_shapes,
    write_json,
    write_tensors,
)
from .original_names import (
    autoencoder_config_to_original,
    autoencoder_key_to_original,
    class_args_to_original,
    class_tensor_to_original,
    class_transformer_key_to_original,
    language_model_config_to_original,
    transformer_key_to_original,
    vision_head_config_to_original,
)

# Config fields for the number of blocks, by what stands before it in the names of a transformer's tensors.
_TRANSFORMER_COUNTS = {
    "layers": "num_layers",
    "head.blocks": "head_num_layers",
    "head.modulations": "head_num_modulations",
}


def open_component(cls: type, folder: Path, counts: dict[str, str]) -> tuple[torch.nn.Module, Checkpoint]:
    """
    Open a saved model by its config and headers.

    Args:
        counts: The config's field for the number of blocks, by what stands before it in the names of the tensors.

    Returns:
        `tuple`: the model without memory (on the meta device), and its tensors.

    Raises:
        ValueError: the config contradicts itself or the tensors.
    """
    checkpoint = open_safetensors_folder(folder, "diffusion_pytorch_model")
    settings = read_settings(folder / "config.json")
    with naming(folder / "config.json"):
        for prefix, name in counts.items():
            check_count(checkpoint, prefix, name, settings.get(name))
        with torch.device("meta"):
            model = cls.from_config(settings)
    match_tensors(checkpoint, {key: (key, shape) for key, shape in state_dict_shapes(model).items()})
    return model, checkpoint


def export_original(pipeline_path: Path, output_path: Path, dtype: torch.dtype | None = None) -> list[str]:
    """
    Write a saved [`BitDancePipeline`] or [`BitDanceClassPipeline`] as the original keeps it. What is lost stands at
    the top of this file.

    Args:
        pipeline_path: What `save_pretrained` or a converter wrote.
        output_path: A new folder.
        dtype: Cast every tensor, which rounds; `None` keeps them bit for bit.

    Returns:
        `list[str]`: names of the tensors that the original's file has and this export lacks: `["lm_head.weight"]` for
        a text-to-image pipeline without it. The export then draws the same pictures, but loads with a random output
        layer for text.

    Raises:
        ValueError: the output exists, the pipeline is damaged or incomplete, contradicts its configs, does what the
            original does not, or holds a NaN or an infinity. Nothing is then left at `output_path`.
    """
    check_output_path(output_path)
    index = pipeline_path / "model_index.json"
    class_name = read_json(index).get("_class_name")
    if class_name == "BitDancePipeline":
        return _export_text_to_image(pipeline_path, output_path, dtype)
    if class_name == "BitDanceClassPipeline":
        _export_class_to_image(pipeline_path, output_path, dtype)
        return []
    raise ValueError(
        f"{index}: `_class_name` is {class_name!r}; only a 'BitDancePipeline' or a 'BitDanceClassPipeline' can be "
        "exported."
    )


def _export_text_to_image(pipeline_path: Path, output_path: Path, dtype: torch.dtype | None) -> list[str]:
    """
    A `Qwen3ForCausalLM` (in shards where it exceeds the pipeline's largest), projector, head, autoencoder, their
    configs and the text tokenizer's files.
    """
    transformer, transformer_checkpoint = open_component(
        BitDanceTransformer, pipeline_path / "transformer", _TRANSFORMER_COUNTS
    )
    scheduler_file = pipeline_path / "scheduler" / "scheduler_config.json"
    with naming(scheduler_file):
        scheduler = BinaryDiffusionScheduler.from_config(read_settings(scheduler_file))
        vision_head_config = vision_head_config_to_original(transformer.config, scheduler.config)
    _, autoencoder, autoencoder_config = _open_autoencoder(pipeline_path)

    parts = {"language_model": {}, "projector": {}, "vision_head": {}}
    for key, tensor in transformer_checkpoint.tensors.items():
        part, original = transformer_key_to_original(key, transformer.config.head_use_swiglu)
        parts[part][original] = tensor
    language_model_dtype = dtype or parts["language_model"]["model.embed_tokens.weight"].dtype

    with output_folder(output_path) as folder:
        tokenizer = copy_tokenizer(pipeline_path / "tokenizer", folder)
        language_model_config = language_model_config_to_original(
            transformer.config, str(language_model_dtype).removeprefix("torch."), tokenizer.eos_token_id
        )
        write_json(folder / "config.json", language_model_config)
        write_json(folder / "vision_head_config.json", vision_head_config)
        write_json(folder / "ae_config.json", autoencoder_config)
        write_tensors(
            folder, "model", parts["language_model"], dtype, largest_file(transformer_checkpoint.tensors.values())
        )
        # The original reads each of these from one file.
        write_tensors(folder, "projector", parts["projector"], dtype)
        write_tensors(folder, "vision_head", parts["vision_head"], dtype)
        write_tensors(folder, "ae", autoencoder, dtype)
    return [] if transformer.config.use_lm_head else ["lm_head.weight"]


def _export_class_to_image(pipeline_path: Path, output_path: Path, dtype: torch.dtype | None) -> None:
    """
    A training pickle without optimizer, and the autoencoder, which is in it too as the original writes it (`vae.*`). A
    pickle is written from memory: the model (4.4 GB for BitDance-H in float32) has to fit.
    """
    transformer, checkpoint = open_component(
        BitDanceClassTransformer, pipeline_path / "transformer", _TRANSFORMER_COUNTS
    )
    scheduler_file = pipeline_path / "scheduler" / "scheduler_config.json"
    with naming(scheduler_file):
        scheduler = BinaryDiffusionScheduler.from_config(read_settings(scheduler_file))
    vae, autoencoder, autoencoder_config = _open_autoencoder(pipeline_path)
    with naming(pipeline_path):
        args = class_args_to_original(transformer.config, scheduler.config, vae.spatial_compression_ratio)

    keys_of = {}  # the parts of every tensor of the original, in the order of its rows
    for key in state_dict_shapes(transformer):
        original, part, _ = class_transformer_key_to_original(key)
        keys_of.setdefault(original, {})[part] = key
    num_attention_heads = transformer.config.num_attention_heads
    weights = {}
    for original, keys in keys_of.items():
        parts = {key: read_tensor(checkpoint.tensors[key], dtype) for _, key in sorted(keys.items())}
        weights[original] = class_tensor_to_original(parts, num_attention_heads)
    autoencoder_weights = {key: read_tensor(tensor, dtype) for key, tensor in autoencoder.items()}
    weights.update({f"vae.{key}": tensor for key, tensor in autoencoder_weights.items()})

    with output_folder(output_path) as folder:
        training = {"model": weights, "ema": weights, "epochs": 0, "args": argparse.Namespace(**args)}
        torch.save(training, folder / "bitdance.pt")  # tensors that occur twice are in the file once
        torch.save({"state_dict": autoencoder_weights}, folder / "ae.pt")
        write_json(folder / "ae_ddconfig.json", autoencoder_config["ddconfig"])


def _open_autoencoder(pipeline_path: Path) -> tuple[BitDanceTokenizer, dict[str, StoredTensor], dict[str, Any]]:
    """The pipeline's `vae`, its tensors by the original's names, and the original's settings of it."""
    vae, checkpoint = open_component(
        BitDanceTokenizer, pipeline_path / "vae", {"encoder.down_blocks.0.resnets": "layers_per_block"}
    )
    with naming(pipeline_path / "vae" / "config.json"):
        config = autoencoder_config_to_original(vae.config)
    levels = len(vae.config.block_out_channels)
    return vae, {autoencoder_key_to_original(key, levels): value for key, value in checkpoint.tensors.items()}, config
