"""Keep pictures as the codes of a tokenizer, and make pictures of codes.

    python examples/codec.py encode photos codes --model runs/BitDance-14B-16x     # photos/a.png -> codes/a.png.bits
    python examples/codec.py decode codes pictures --model runs/BitDance-14B-16x   # codes/a.png.bits -> pictures/a.png
    python examples/codec.py info codes/a.png.bits

A folder is searched with its subfolders, and one file is written for each picture: 16 KiB for 1024 x 1024 pixels by a
tokenizer of 16 x 16 pixels and 32 bits a token (`bitdance_diffusers/code_files.py` says what is in it). Pictures of
any size are encoded, at their full size: their edges are repeated up to a whole token, and cut off again. `encode`
decodes what it wrote and prints PSNR and SSIM, by torchmetrics (`pip install torchmetrics`). A bad file is named, the
others are still done, and the command ends with the exit status 1. With `torchrun --nproc_per_node=N` or `accelerate
launch` every process does its share; set ACCELERATE_USE_CPU=true where that is to be on CPUs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.image_processor import VaeImageProcessor

from bitdance_diffusers import BitDanceTokenizer
from bitdance_diffusers.code_files import read_code, write_code
from data.images import find_images, read_image
from drawing.models import DTYPES, find_device
from drawing.pictures import save_image

SUFFIX = ".bits"
MAX_SIDE = 2**16 - 1  # pixels, of a picture in a file
NOISE_SEED = 0  # of a stochastic decoder


def encode(args: argparse.Namespace) -> bool:
    """Write the codes of pictures, and print how near their decoded pictures come. Returns whether all went well.

    Raises:
        ImportError: if torchmetrics does not import.
        ValueError: for a model that does not load, or no pictures.
    """
    if not args.no_scores:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    pairs = pair_files(args.input, args.output, find_images, lambda name: name + SUFFIX)
    vae, processor = load_tokenizer(args)
    fingerprint, ratio = vae.fingerprint(), vae.spatial_compression_ratio

    @torch.no_grad()
    def encode_one(source: Path, target: Path) -> tuple[int, float, float] | None:
        image = read_image(source)
        if max(image.size) > MAX_SIDE or image.width <= ratio and image.height <= ratio:
            raise ValueError(f"it is {image.width} x {image.height} pixels, too large or small for a code")
        pixels = processor.preprocess(image)  # (1, 3, height, width) in [-1, 1]
        height, width = pixels.shape[-2:]
        padded = torch.nn.functional.pad(pixels, (0, -width % ratio, 0, -height % ratio), mode="replicate")
        code = vae.encode(padded.to(vae.device, vae.dtype)).code
        write_code(target, code[0], fingerprint, (height, width))
        if args.no_scores:
            return None
        decoded = decode_pixels(vae, code)[..., :height, :width].float().cpu().clamp(-1, 1)
        psnr = peak_signal_noise_ratio(decoded, pixels, data_range=(-1.0, 1.0))
        ssim = structural_similarity_index_measure(decoded, pixels, data_range=(-1.0, 1.0))
        return target.stat().st_size, psnr.item(), ssim.item()

    results, num_bad = for_each(pairs, encode_one)
    if results:
        size, psnr, ssim = (sum(values) / len(results) for values in zip(*results, strict=True))
        Accelerator().print(
            f"{len(results)} pictures: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}, {size:.0f} bytes on average"
        )
    return num_bad == 0


def decode(args: argparse.Namespace) -> bool:
    """Write the pictures of codes. What is not drawn yet of a picture is left grey. Returns whether all went well.

    Raises:
        ValueError: for a model that does not load, or no codes.
    """
    pairs = pair_files(args.input, args.output, list_codes, name_picture)
    vae, processor = load_tokenizer(args)
    fingerprint = vae.fingerprint()

    @torch.no_grad()
    def decode_one(source: Path, target: Path) -> None:
        file = read_code(source, fingerprint)
        height, width = file.header.image_size
        pixels = decode_pixels(vae, file.code[None].to(vae.device))
        known = (file.code != 0).all(dim=0).to(pixels)  # (h, w)
        ratio = vae.spatial_compression_ratio
        pixels = pixels * known.repeat_interleave(ratio, dim=0).repeat_interleave(ratio, dim=1)
        save_image(processor.postprocess(pixels[..., :height, :width].float())[0], target)

    return for_each(pairs, decode_one)[1] == 0


def info(args: argparse.Namespace) -> bool:
    """Print what a file holds, after its checksum has been checked.

    Raises:
        ValueError, OSError: for a file that is no code file, or damaged.
    """
    file = read_code(args.input)
    header = file.header
    print(f"picture      {header.image_size[0]} x {header.image_size[1]} pixels")
    print(
        f"code         {header.size[0]} x {header.size[1]} tokens of {header.num_bits} bits, {header.code_bytes} bytes"
    )
    print(f"tokenizer    {header.fingerprint}")
    if file.state is not None:
        print(f"half drawn   {file.state['index']} of {len(file.state['num_given'])} patches")
        print(f"settings     {file.state['settings']}")
    return True


def load_tokenizer(args: argparse.Namespace) -> tuple[BitDanceTokenizer, VaeImageProcessor]:
    """
    Raises:
        ValueError: for a model that does not load, or a device that is not there.
    """
    folder = args.model / "vae" if (args.model / "model_index.json").is_file() else args.model
    if not (folder / "config.json").is_file():
        raise ValueError(f"`model` has to be the folder of a BitDanceTokenizer or a pipeline, but is {args.model}.")
    device = Accelerator().device if args.device is None else find_device(args.device)
    vae = BitDanceTokenizer.from_pretrained(folder, dtype=DTYPES[args.dtype]).to(device)
    return vae, VaeImageProcessor(vae_scale_factor=1, do_resize=False)


def decode_pixels(vae: BitDanceTokenizer, code: torch.Tensor) -> torch.Tensor:
    """The picture (1, 3, H, W) of a code; a stochastic decoder draws the same noise for each."""
    return vae.decode(code, generator=torch.Generator().manual_seed(NOISE_SEED)).sample


def list_codes(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.is_file())


def name_picture(name: str) -> str:
    """A code's name -> its picture's: what was no PNG says so."""
    name = name.removesuffix(SUFFIX)
    return name if name.lower().endswith(".png") else f"{name}.png"


def pair_files(
    source: Path, output: Path, list_files: Callable[[Path], list[Path]], rename: Callable[[str], str]
) -> list[tuple[Path, Path]]:
    """
    What is read and what is written: `output` itself for a file, a file of the same place in it for those of a folder.

    Raises:
        ValueError: if there is nothing to read, or `output` cannot be written to.
    """
    if not source.is_dir():
        if not source.is_file():
            raise ValueError(f"`input` is {source}, which is no file and no folder.")
        if output.is_dir() or not output.absolute().parent.is_dir():
            raise ValueError(f"`output` is {output}; for a file it has to be a file's name in a folder that is there.")
        return [(source, output)]
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` is {output}, a file; for a folder it has to be a folder.")
    files = list_files(source)
    pairs = [(path, output / path.relative_to(source).with_name(rename(path.name))) for path in files]
    if not pairs:
        raise ValueError(f"`input` is {source}, a folder without files to read.")
    if len({target for _, target in pairs}) < len(pairs):
        twice = next(target for i, (_, target) in enumerate(pairs) if target in [one for _, one in pairs[:i]])
        raise ValueError(f"`input` is {source}, of which two files would be written to {twice}.")
    return pairs


def for_each(pairs: list[tuple[Path, Path]], convert: Callable[[Path, Path], tuple | None]) -> tuple[list[tuple], int]:
    """
    Convert this process's share of the files, and name those that are bad. Returns what `convert` returned, and how
    many files were bad, of all processes together.
    """
    accelerator = Accelerator()
    results, num_bad = [], 0
    for source, target in pairs[accelerator.process_index :: accelerator.num_processes]:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            results.append(convert(source, target))
        except (ValueError, OSError) as error:
            num_bad += 1
            print(f"{source}: {error}", file=sys.stderr)
    results, bad = gather_object(results), gather_object([num_bad])
    return [one for one in results if one is not None], sum(bad)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Keep pictures as the codes of a tokenizer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, text, source, target in (
        (encode, "pictures to codes", "a picture, or a folder of pictures", "a code file, or a folder"),
        (decode, "codes to pictures", "a code file, or a folder of them", "a picture (.png), or a folder"),
    ):
        command = commands.add_parser(run.__name__, help=text)
        command.set_defaults(run=run)
        command.add_argument("input", type=Path, help=source)
        command.add_argument("output", type=Path, help=target)
        command.add_argument(
            "--model", type=Path, required=True, help="the folder of a BitDanceTokenizer or a pipeline"
        )
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
        command.add_argument("--device", help="cpu, cuda, mps, ...; the first accelerator where there is one")
        if run is encode:
            command.add_argument("--no_scores", action="store_true", help="do not decode for PSNR and SSIM")
    command = commands.add_parser("info", help="what a code file holds")
    command.set_defaults(run=info)
    command.add_argument("input", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        all_well = args.run(args)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    if not all_well:
        sys.exit(1)


if __name__ == "__main__":
    main()
