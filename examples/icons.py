"""Draw captioned pictures of the icon world (`icon_world/world.py`), a small world to learn in, as an image folder.

    python examples/icons.py --output_dir icons --num_pictures 1000

writes a folder that `train_t2i.py --train_data_dir` and `datasets` read.
"""

import argparse
from pathlib import Path

from icon_world.dataset import write_image_folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write captioned pictures of the icon world as an image folder.")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--num_pictures", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        write_image_folder(args.output_dir, args.num_pictures, args.seed)
    except (ValueError, FileExistsError, ImportError) as error:
        parser.error(str(error))
    print(f"{args.num_pictures} pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
