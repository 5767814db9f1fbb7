"""Write a `BitDancePipeline` or a `BitDanceClassPipeline` back in the original's layout.

    python conversion/export_original.py --pipeline_path bitdance-14b-16x --output_path BitDance-14B-16x

What is lost stands at the top of `bitdance_diffusers/loaders/export_original.py`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import add_dtype_argument, run_command

from bitdance_diffusers.loaders.checkpoint_files import DTYPES
from bitdance_diffusers.loaders.export_original import export_original


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write a BitDancePipeline or a BitDanceClassPipeline back in the original's layout."
    )
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
