"""Draw as many pictures of a class-conditional model as a score takes: for the FID on ImageNet, 50,000.

python examples/sample_class.py --model runs/bitdance-b-4x --output_dir samples
accelerate launch --num_processes 8 examples/sample_class.py --model runs/bitdance-b-4x --output_dir samples
python examples/evaluate.py fid samples/samples.npz VIRTUAL_imagenet256_labeled.npz

Picture i is `{i:06d}.png` in the output folder; at the end all are in one `.npz` too, as the ADM evaluator reads them:
`arr_0` the pictures, `arr_1` their labels. A run that was killed goes on with the same command, on any number of
processes: pictures that are there are kept. Batches are cut by the pictures' indices and every picture has a
generator of its own, so that on one kind of device (and, on a CPU, with one number of threads) a picture has the same
bits however many processes drew the set, and however often they were killed. The settings that bits depend on, the
number of pictures among them since it cuts the last batch, are kept in the folder's `settings.json`, and a run with
others is refused there. The model is told by its path: other weights under the same path are not noticed.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm

from bitdance_diffusers import BitDanceClassPipeline
from bitdance_diffusers.pipelines.patchwise import check_guidance_scale, check_positive_integer
from bitdance_diffusers.pipelines.pipeline_bitdance_class import GUIDANCE_SCHEDULES
from drawing.models import DTYPES, check_model, load_pipeline
from drawing.pictures import save_image
from scores.picture_sets import write_npz
from training.randomness import random_generator

SETTINGS = "settings.json"


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for an argument that is wrong whatever the model, naming it.
    """
    for name in ("num_images", "batch_size"):
        check_positive_integer(name, getattr(args, name))
    if args.seed < 0:
        raise ValueError(f"`seed` has to be at least 0, but is {args.seed}.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"`output_dir` has to be a folder, but is {args.output_dir}.")
    if args.npz is not None and args.npz.suffix != ".npz":
        raise ValueError(f"`npz` has to end in .npz, but is {args.npz}.")
    if args.npz is not None and not args.npz.absolute().parent.is_dir():
        raise ValueError(f"`npz` is {args.npz}, but there is no folder {args.npz.parent}.")


def read_settings(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All that the pictures' bits depend on, with the model's own defaults in place of what was not given.

    Raises:
        ValueError: if the model is no class-conditional pipeline, or for a number of steps or a guidance scale out of
            range.
    """
    check_model(args.model)
    try:
        config = BitDanceClassPipeline.load_config(args.model)
    except OSError as error:
        raise ValueError(f"`model` cannot be loaded: {error}") from error
    if config["_class_name"] != BitDanceClassPipeline.__name__:
        raise ValueError(f"`model` has to be a BitDanceClassPipeline, but {args.model} is a {config['_class_name']}.")
    settings = {
        "model": str(Path(args.model).resolve()) if Path(args.model).exists() else args.model,
        "device": device.type,
        "dtype": args.dtype or ("float32" if device.type == "cpu" else "bfloat16"),
        "compile": args.compile,
        "labels": args.labels,
        "seed": args.seed,
        "num_images": args.num_images,
        "batch_size": args.batch_size,
    }
    for name in ("num_inference_steps", "guidance_scale", "guidance_schedule"):
        given = getattr(args, name)
        settings[name] = config[f"default_{name}"] if given is None else given
    check_positive_integer("num_inference_steps", settings["num_inference_steps"])
    check_guidance_scale("guidance_scale", settings["guidance_scale"])
    return settings


def check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if the folder holds pictures of other settings, naming those, or of unknown ones.
    """
    if not (output_dir / SETTINGS).exists():
        if next(output_dir.glob("*.png"), None) is not None:
            raise ValueError(f"`output_dir` {output_dir} holds pictures but no {SETTINGS}; choose another folder.")
        return
    saved = json.loads((output_dir / SETTINGS).read_text(encoding="utf-8"))
    differ = [
        f"{name}: {saved.get(name)!r} there, {settings.get(name)!r} here"
        for name in sorted({*saved, *settings})
        if saved.get(name) != settings.get(name)
    ]
    if differ:
        raise ValueError(
            f"`output_dir` {output_dir} holds pictures of other settings ({'; '.join(differ)}); choose another folder."
        )


def prepare_folder(output_dir: Path, settings: dict[str, Any]) -> None:
    """Make the folder, write its settings, and remove pictures that a killed process left half written."""
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = output_dir / f".partial-{SETTINGS}"
    partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    partial.replace(output_dir / SETTINGS)
    for path in output_dir.glob(".partial-*.png"):
        path.unlink()


def make_labels(kind: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """The label of every picture, int64 (N,): i modulo the number of classes, or drawn from (seed, i)."""
    if kind == "balanced":
        return np.arange(num_images) % num_classes
    return np.array([np.random.default_rng((seed, i)).integers(num_classes) for i in range(num_images)])


def draw(
    pipe: BitDanceClassPipeline,
    settings: dict[str, Any],
    labels: np.ndarray,
    batches: list[list[int]],
    paths: list[Path],
    progress: tqdm,
) -> None:
    """Draw batches of indices, each as a whole, and write those of their pictures that are not there."""
    with ThreadPoolExecutor() as pool:
        for batch in batches:
            images = pipe(
                class_labels=labels[batch].tolist(),
                num_inference_steps=settings["num_inference_steps"],
                guidance_scale=settings["guidance_scale"],
                guidance_schedule=settings["guidance_schedule"],
                generator=[random_generator(settings["seed"], i) for i in batch],
            ).images
            missing = [k for k, i in enumerate(batch) if not paths[i].exists()]
            list(pool.map(save_image, [images[k] for k in missing], [paths[batch[k]] for k in missing]))
            progress.update(len(batch))


def sample(args: argparse.Namespace) -> None:
    """Draw this process's pictures; the main process then writes the `.npz`.

    Raises:
        ValueError: for bad arguments, a model that does not load, or a folder of other pictures.
    """
    check_arguments(args)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        # A process that is done waits for the slowest at the end, with no limit that would matter.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    settings = read_settings(args, accelerator.device)
    check_settings(args.output_dir, settings)
    paths = [args.output_dir / f"{i:06d}.png" for i in range(args.num_images)]
    starts = range(0, args.num_images, args.batch_size)
    batches = [list(range(start, min(start + args.batch_size, args.num_images))) for start in starts]
    unfinished = [not all(paths[i].exists() for i in batch) for batch in batches]
    num_missing = sum(len(batch) for batch, drawn_anew in zip(batches, unfinished, strict=True) if drawn_anew)
    mine = [
        batches[b] for b in range(accelerator.process_index, len(batches), accelerator.num_processes) if unfinished[b]
    ]
    if accelerator.is_main_process:
        prepare_folder(args.output_dir, settings)
    accelerator.wait_for_everyone()  # no picture is written before all have counted, and the settings are there

    pipe = load_pipeline(settings["model"], settings["dtype"], str(accelerator.device), BitDanceClassPipeline)
    pipe.set_progress_bar_config(disable=True)
    if settings["compile"]:
        pipe.transformer.compile()
    labels = make_labels(args.labels, args.num_images, pipe.transformer.config.num_classes, args.seed)
    start = time.perf_counter()
    with tqdm(
        total=sum(map(len, mine)),
        unit="picture",
        desc=f"process 1 of {accelerator.num_processes}",
        disable=not accelerator.is_main_process,
    ) as progress:
        draw(pipe, settings, labels, mine, paths, progress)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seconds = time.perf_counter() - start
        print(
            f"{num_missing} of {args.num_images} pictures drawn in {seconds:.1f} s, {num_missing / seconds:.3g} "
            f"pictures/s, by {accelerator.num_processes} process(es)"
        )
        npz = args.npz or args.output_dir / "samples.npz"
        write_npz(npz, paths, labels)
        print(npz)
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw many pictures of a class-conditional model.")
    parser.add_argument("--model", required=True, help="a BitDanceClassPipeline's folder, or its name on the Hub")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder for the pictures")
    parser.add_argument("--npz", type=Path, help="a file for all pictures; by default samples.npz in --output_dir")
    parser.add_argument("--num_images", type=int, default=50_000)
    parser.add_argument(
        "--labels",
        choices=["balanced", "random"],
        default="balanced",
        help="picture i is of class i modulo the number of classes, or of one drawn from (seed, i)",
    )
    parser.add_argument("--num_inference_steps", type=int, help="per patch; the model's own default if not given")
    parser.add_argument("--guidance_scale", type=float, help="the model's own default where it is not given")
    parser.add_argument("--guidance_schedule", choices=GUIDANCE_SCHEDULES, help="the model's own default if not given")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures that a process draws at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; float32 on a CPU, else bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the transformer")
    args = parser.parse_args(arguments)
    try:
        sample(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
