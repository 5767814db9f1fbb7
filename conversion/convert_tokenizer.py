"""Convert an original binary autoencoder into a `BitDanceTokenizer`.

    python conversion/convert_tokenizer.py --checkpoint_path ae_d16c32.safetensors --output_path tokenizer-d16c32

Reads `NAME.safetensors` with `NAME_config.json`, or the ImageNet release's pickle, whose settings are d16c32's unless
`--config` names others. `BitDanceTokenizer.from_pretrained` loads the output.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from command_line import add_dtype_argument, run_command

from bitdance_diffusers.loaders.checkpoint_files import DTYPES
from bitdance_diffusers.loaders.convert import convert_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert an original binary autoencoder into a BitDanceTokenizer.")
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="NAME.safetensors, or a pickle (.pt).")
    parser.add_argument("--output_path", type=Path, required=True, help="The new folder.")
    parser.add_argument(
        "--config",
        type=Path,
        help="JSON file with the settings. Default: NAME_config.json beside NAME.safetensors, d16c32 for a pickle.",
    )
    add_dtype_argument(parser)
    args = parser.parse_args(arguments)
    run_command(lambda: convert_tokenizer(args.checkpoint_path, args.output_path, args.config, DTYPES.get(args.dtype)))
    print(f"Wrote {args.output_path}")


if __name__ == "__main__":
    main()
