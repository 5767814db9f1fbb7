"""Convert an original ImageNet checkpoint and its autoencoder into a `BitDanceClassPipeline`.

    python conversion/convert_class_to_image.py --checkpoint_path BitDance_B_4x.pt --vae_path ae_d16c32.pt \
        --output_path bitdance-b-4x

Of the checkpoint, which is the pickle that the original's training writes, the averaged weights (`ema`) are converted,
or `model` where it has none. `BitDanceClassPipeline.from_pretrained` loads the output.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from command_line import add_dtype_argument, run_command

from bitdance_diffusers.loaders.checkpoint_files import DTYPES
from bitdance_diffusers.loaders.convert import convert_class_to_image


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
