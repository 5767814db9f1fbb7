"""Build the text tokenizer of a model of the icon world.

It has the special tokens of the released BitDance models, a token for every word of the world, and the 256 bytes, of
which any other text is made:

    python examples/make_icon_tokenizer.py --patch_size 2 --output_dir runs/icons-tokenizer
"""

import argparse
from pathlib import Path

from data.whole_files import new_folder
from icon_world.text_tokenizer import build_icon_tokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the text tokenizer of a model of the icon world.")
    parser.add_argument("--patch_size", type=int, required=True, help="side of a patch in tokens: 2 where P is 4")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write; it must not exist")
    args = parser.parse_args(arguments)
    try:
        tokenizer = build_icon_tokenizer(args.patch_size)
        with new_folder(args.output_dir) as folder:
            tokenizer.save_pretrained(folder)
    except (ValueError, FileExistsError, ImportError) as error:
        parser.error(str(error))
    print(f"{len(tokenizer)} tokens in {args.output_dir}")


if __name__ == "__main__":
    main()
