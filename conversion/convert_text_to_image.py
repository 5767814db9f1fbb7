"""Convert an original text-to-image checkpoint into a `BitDancePipeline`.

    python conversion/convert_text_to_image.py --checkpoint_path BitDance-14B-16x --output_path bitdance-14b-16x

Reads the original's folder, whose language model may be sharded, and the folder of the community's port to Diffusers.
`BitDancePipeline.from_pretrained` loads the output.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from command_line import add_dtype_argument, run_command

from bitdance_diffusers.loaders.checkpoint_files import DTYPES
from bitdance_diffusers.loaders.convert import convert_text_to_image


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
