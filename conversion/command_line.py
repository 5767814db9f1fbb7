"""What the commands of this folder share."""

import argparse
from collections.abc import Callable

from bitdance_diffusers.loaders.checkpoint_files import DTYPES


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="Cast every tensor; by default each keeps the dtype that it is stored in, and no bit changes.",
    )


def run_command(command: Callable[[], None]) -> None:
    """Run a command; what is wrong with its input ends the program with the message alone."""
    try:
        command()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
