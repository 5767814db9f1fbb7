"""Draw pictures from prompts.

python examples/generate.py                                              # a grid from the small model that ships
python examples/generate.py "a red fish and a blue crown" --seed 3
python examples/generate.py --model runs/BitDance-14B-16x --prompt_file prompts.txt --output pictures
"""

import argparse
import os
import re
from pathlib import Path

import torch
from PIL import Image

from bitdance_diffusers import BitDancePipeline
from drawing.models import SHIPPED_MODEL, add_model_arguments, load_pipeline
from drawing.pictures import make_grid, save_image

# Two prompts of each of the icon world's six kinds, none of which the shipped model was trained on but the first two.
SHIPPED_PROMPTS = [
    "a crown",
    "a moon",
    "a fish and a crown",
    "a tree and a moon",
    "three hearts",
    "four keys",
    "an orange fish",
    "a blue moon",
    "a car above a tree",
    "a heart left of a house",
    "a purple star and a yellow heart",
    "a blue star and an orange car",
]


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts from the command line or the file, one a line; those of the shipped model where there are neither.

    Raises:
        ValueError: for prompts in both places or in neither, or a file that is missing, empty or not UTF-8.
    """
    if args.prompt and args.prompt_file:
        raise ValueError("`prompt` and `prompt_file` are both given; give one of them.")
    if args.prompt_file:
        try:
            lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"`prompt_file` cannot be read: {args.prompt_file}: {error}") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"`prompt_file` has no prompts: {args.prompt_file}")
        return prompts
    if not args.prompt and Path(args.model) != SHIPPED_MODEL:
        raise ValueError("`prompt` is missing; give prompts or a `--prompt_file`.")
    return args.prompt or SHIPPED_PROMPTS


def check_output(output: Path) -> None:
    """
    Raises:
        ValueError: if the output can be neither a picture nor a folder of pictures.
    """
    folder = output
    if is_picture(output):
        writable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
        if output.suffix.lower() not in writable:
            raise ValueError(f"`output` has to end in .png, .jpg, .webp, ... or be a folder's name, but is {output}.")
        folder = output.parent
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"`output` is {output}, but {nearest} is no folder that can be written to.")


def is_picture(output: Path) -> bool:
    """Whether `output` names a picture; otherwise it names a folder."""
    return output.suffix != "" and not output.is_dir()


def draw(pipe: BitDancePipeline, prompts: list[str], args: argparse.Namespace) -> list[Image.Image]:
    """One picture for each prompt; picture k comes from a generator of its own with the seed `args.seed` + k."""
    images = []
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        pipe.set_progress_bar_config(desc=f"pictures {start + 1}-{start + len(batch)} of {len(prompts)}")
        images += pipe(
            prompt=batch,
            negative_prompt=args.negative_prompt,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + start + index) for index in range(len(batch))],
        ).images
    return images


def save(images: list[Image.Image], prompts: list[str], output: Path) -> list[Path]:
    """Write the pictures: one, or a grid of several, where `output` is a picture's name; each by itself in a folder.

    Returns:
        the files that were written.
    """
    if is_picture(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        save_image(images[0] if len(images) == 1 else make_grid(images, prompts), output)
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        words = re.sub(r"\W+", "-", prompt).strip("-")[:40]
        paths.append(output / f"{index:03d}-{words}.png")
        save_image(image, paths[-1])
    return paths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw pictures from prompts.")
    parser.add_argument("prompt", nargs="*", help="one picture for each; without any, a few for the shipped model")
    parser.add_argument("--prompt_file", type=Path, help="a text file with a prompt on each line")
    parser.add_argument("--negative_prompt", help="what guidance leads away from, for all prompts")
    add_model_arguments(parser)
    parser.add_argument("--height", type=int, help="in pixels; the model's own default where it is not given")
    parser.add_argument("--width", type=int, help="in pixels; the model's own default where it is not given")
    parser.add_argument("--num_inference_steps", type=int, help="per patch; the model's own default if not given")
    parser.add_argument("--guidance_scale", type=float, help="the model's own default where it is not given")
    parser.add_argument("--num_images_per_prompt", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=12, help="pictures that are drawn at once")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next seed")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/bitdance.png"),
        help="a picture's name (several pictures become a grid), or a folder's name (each becomes a file of its own)",
    )
    args = parser.parse_args(arguments)
    try:
        for name in ("num_images_per_prompt", "batch_size"):
            if getattr(args, name) < 1:
                raise ValueError(f"`{name}` has to be at least 1, but is {getattr(args, name)}.")
        if not 0 <= args.seed < 2**32:
            raise ValueError(f"`seed` has to be from 0 to {2**32 - 1}, but is {args.seed}.")
        check_output(args.output)
        prompts = [prompt for prompt in read_prompts(args) for _ in range(args.num_images_per_prompt)]
        pipe = load_pipeline(args.model, args.dtype, args.device)
        images = draw(pipe, prompts, args)
    except ValueError as error:
        parser.error(str(error))
    for path in save(images, prompts, args.output):
        print(path)


if __name__ == "__main__":
    main()
