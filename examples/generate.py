"""Draw pictures from prompts.

python examples/generate.py                                              # a grid from the small model that ships
python examples/generate.py "a red fish and a blue crown" --seed 3
python examples/generate.py --model runs/BitDance-14B-16x --prompt_file prompts.txt --output pictures
"""

import argparse
import math
import os
import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageDraw, ImageFont

from bitdance_diffusers import BitDancePipeline

SHIPPED_MODEL = Path(__file__).parent / "pretrained" / "icons-64"
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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN_CELL_PX = 192  # pictures of a grid are enlarged by a whole factor up to at least this side, so that captions fit


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_pipeline` takes."""
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help="a pipeline's folder, or its name on the Hub")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; float32 on a CPU, else bfloat16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; the first accelerator where there is one")


def load_pipeline(
    model: str, dtype: str | None, device: str | None, pipeline_class: type[DiffusionPipeline] = BitDancePipeline
) -> DiffusionPipeline:
    """Load a pipeline onto a device.

    Args:
        model: a folder that `save_pretrained` wrote, or the name of a repository on the Hub.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on a CPU and bfloat16 elsewhere.
        device: what `torch.device` takes; None is the accelerator where there is one, else the CPU.
        pipeline_class: the pipeline that the model has to be.

    Raises:
        ValueError: for a device that torch does not know or this machine lacks, a model that is neither a pipeline's
            folder nor a repository's name, or a checkpoint that does not load.
    """
    torch_device = find_device(device)
    check_model(model)
    weights_dtype = DTYPES[dtype or ("float32" if torch_device.type == "cpu" else "bfloat16")]
    try:
        pipe = pipeline_class.from_pretrained(model, dtype=weights_dtype).to(torch_device)
    except OSError as error:  # what Diffusers raises for a repository or a file that is not there
        raise ValueError(f"`model` cannot be loaded: {error}") from error
    return pipe


def check_model(model: str) -> None:
    """
    Raises:
        ValueError: if the model is neither a pipeline's folder nor the name of a repository.
    """
    folder = Path(model)
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"`model` has to be a pipeline's folder, but {model} has no model_index.json.")
        return
    parts = model.split("/")
    if len(parts) != 2 or Path(parts[0]).is_dir():  # a path, rather than a repository's owner and name
        raise ValueError(f"`model` has to be a pipeline's folder or a repository's owner/name, but is {model!r}.")
    validate_repo_id(model)


def find_device(device: str | None) -> torch.device:
    """The device of that name; None is the accelerator where there is one, else the CPU.

    Raises:
        ValueError: for a device that torch does not know or this machine lacks.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return accelerator or torch.device("cpu")
    available = ["cpu"] + ([accelerator.type] if accelerator else [])
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` has to be one of {', '.join(available)}, but is {device!r}.") from error
    number = torch.accelerator.device_count() if accelerator and found.type == accelerator.type else 1
    if found.type not in available or (found.index or 0) >= number:
        raise ValueError(f"`device` has to be on this machine, which has {', '.join(available)}, but is {device!r}.")
    return found


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


def make_grid(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """The pictures with their captions below them, as nearly square as their number allows."""
    factor = math.ceil(MIN_CELL_PX / images[0].width)
    width, height = images[0].width * factor, images[0].height * factor
    font = ImageFont.load_default(size=12)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        while font.getlength(caption) > width - 8:
            caption = caption.rstrip("…")[:-1] + "…"
        cell = Image.new("RGB", (width + 8, height + 28), "white")
        cell.paste(image.resize((width, height), Image.Resampling.NEAREST), (4, 4))
        ImageDraw.Draw(cell).text((4 + width / 2, height + 8), caption, fill="black", font=font, anchor="ma")
        cells.append(cell)
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    cells += [Image.new("RGB", cells[0].size, "white")] * (rows * columns - len(cells))
    return make_image_grid(cells, rows, columns)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture under a temporary name, and rename it."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    image.save(partial)
    partial.replace(path)


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
