"""Write a `BitDancePipeline` back in the original's layout.

    python conversion/export_original.py --pipeline_path bitdance-14b-16x --output_path BitDance-14B-16x

Without `--dtype` every tensor keeps its bits; a cast to a narrower dtype rounds. The language model's output layer
(`lm_head.weight`) is in the export only if it is in the pipeline, that is, if the conversion kept it with
`--keep_lm_head`.
"""

import argparse
import sys
from collections.abc import Sequence
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
    read_json,
    read_settings,
    run_command,
    state_dict_shapes,
    write_json,
    write_tensors,
)
from weights import (
    autoencoder_config_to_original,
    autoencoder_key_to_original,
    language_model_config_to_original,
    transformer_key_to_original,
    vision_head_config_to_original,
)

from bitdance_diffusers import BinaryDiffusionScheduler, BitDanceTokenizer, BitDanceTransformer


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
    Write a saved [`BitDancePipeline`] as the original keeps it: a `Qwen3ForCausalLM` (in shards where it exceeds the
    pipeline's largest), projector, head, autoencoder, their configs and the text tokenizer's files.

    The original has no place for a pipeline's default and supported sizes, steps and guidance.

    Args:
        pipeline_path: What `save_pretrained` or a converter wrote.
        output_path: A new folder.
        dtype: Cast every tensor, which rounds; `None` keeps them bit for bit.

    Returns:
        `list[str]`: names of the tensors that the original's file has and this export lacks: `["lm_head.weight"]` for
        a pipeline without it. The export then draws the same pictures, but loads with a random output layer for text.

    Raises:
        ValueError: the output exists, the pipeline is damaged or incomplete, contradicts its configs, does what the
            original does not, or holds a NaN or an infinity. Nothing is then left at `output_path`.
    """
    check_output_path(output_path)
    index = pipeline_path / "model_index.json"
    class_name = read_json(index).get("_class_name")
    if class_name != "BitDancePipeline":
        raise ValueError(f"{index}: `_class_name` is {class_name!r}; only a 'BitDancePipeline' can be exported.")
    transformer, transformer_checkpoint = open_component(
        BitDanceTransformer,
        pipeline_path / "transformer",
        {"layers": "num_layers", "head.blocks": "head_num_layers", "head.modulations": "head_num_modulations"},
    )
    vae, vae_checkpoint = open_component(
        BitDanceTokenizer, pipeline_path / "vae", {"encoder.down_blocks.0.resnets": "layers_per_block"}
    )
    scheduler_file = pipeline_path / "scheduler" / "scheduler_config.json"
    with naming(scheduler_file):
        scheduler = BinaryDiffusionScheduler.from_config(read_settings(scheduler_file))
        vision_head_config = vision_head_config_to_original(transformer.config, scheduler.config)
    with naming(pipeline_path / "vae" / "config.json"):
        autoencoder_config = autoencoder_config_to_original(vae.config)

    parts = {"language_model": {}, "projector": {}, "vision_head": {}}
    for key, tensor in transformer_checkpoint.tensors.items():
        part, original = transformer_key_to_original(key, transformer.config.head_use_swiglu)
        parts[part][original] = tensor
    levels = len(vae.config.block_out_channels)
    autoencoder = {autoencoder_key_to_original(key, levels): value for key, value in vae_checkpoint.tensors.items()}
    language_model_dtype = dtype or parts["language_model"]["model.embed_tokens.weight"].dtype

    with output_folder(output_path) as folder:
        tokenizer = copy_tokenizer(pipeline_path / "tokenizer", folder)
        language_model_config = language_model_config_to_original(
            transformer.config, str(language_model_dtype).removeprefix("torch."), tokenizer.eos_token_id
        )
        write_json(folder / "config.json", language_model_config)
        write_json(folder / "vision_head_config.json", vision_head_config)
        write_json(folder / "ae_config.json", autoencoder_config)
        write_tensors(folder, "model", parts["language_model"], dtype, transformer_checkpoint.largest_file())
        # The original reads each of these from one file.
        write_tensors(folder, "projector", parts["projector"], dtype)
        write_tensors(folder, "vision_head", parts["vision_head"], dtype)
        write_tensors(folder, "ae", autoencoder, dtype)
    return [] if transformer.config.use_lm_head else ["lm_head.weight"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a BitDancePipeline back in the original's layout.")
    parser.add_argument("--pipeline_path", type=Path, required=True, help="Folder of the saved pipeline.")
    parser.add_argument("--output_path", type=Path, required=True, help="The new folder.")
    add_dtype_argument(parser)
    args = parser.parse_args(arguments)

    def export() -> None:
        for name in export_original(args.pipeline_path, args.output_path, DTYPES.get(args.dtype)):
            print(
                f"warning: the pipeline has no `{name}` (converted without --keep_lm_head), so the export has none. "
                "It draws the same pictures, but a `Qwen3ForCausalLM` loaded from it starts with a random one.",
                file=sys.stderr,
            )

    run_command(export)
    print(f"Wrote {args.output_path}")


if __name__ == "__main__":
    main()
