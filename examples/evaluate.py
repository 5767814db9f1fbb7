"""Score a model, or pictures that it drew.

    python examples/evaluate.py icons --model examples/pretrained/icons-64     # pictures of held-out prompts
    python examples/evaluate.py icons-tokenizer --vae runs/icons-vae           # reconstructions of drawn pictures
    python examples/evaluate.py icons-edits replace                            # an icon in a picture by another
    python examples/evaluate.py fid samples VIRTUAL_imagenet256_labeled.npz    # pictures against a reference
    python examples/evaluate.py digits                                         # digits that the shipped model draws
    python examples/evaluate.py icon-choices                                   # which prompt a picture is of
    python examples/evaluate.py digit-choices                                  # which digit a real one is

The first two draw or decode pictures of the icon world (`icons.py`) and print the share that its checker finds right,
with 95 % intervals, for each of the six categories and on average over them. `fid` prints FID, Inception score,
precision and recall of a folder or `.npz` of pictures (`sample_class.py` writes both), computed by torch-fidelity.
`digits` prints the share of digits whose class a classifier recognises that learnt from real ones (`digits.py`).
`icon-choices` and `digit-choices` print how often the model's own score (`pipe.score`) of a picture is highest for
what it is of.
"""

import argparse
import inspect
import math
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm import tqdm

from bitdance_diffusers import (
    BitDanceClassPipeline,
    BitDanceImg2ImgPipeline,
    BitDanceInpaintPipeline,
    BitDanceTokenizer,
)
from data.whole_files import write_json
from drawing.models import DTYPES, SHIPPED_MODEL, add_model_arguments, find_device, load_pipeline
from drawing.pictures import save_image
from icon_world.editing import EDITS, make_edits, show_edit
from icon_world.held_out_score import Rated, rate_pictures, read_reference, report, sample_prompts
from icon_world.new_shape import NEW_SHAPES, NewShapeWorld
from icon_world.world import CATEGORIES, IconWorld
from mnist_digits.classifier import classify, train_classifier
from mnist_digits.digits import NUM_CLASSES, is_held_out, read_digits
from scores.inception import find_feature_weights, score_pictures
from scores.picture_sets import open_pictures
from scores.shares import Score, print_scores, wilson_score


def evaluate_icons(args: argparse.Namespace) -> None:
    """Score a text-to-image pipeline on held-out prompts, or on those that its settings are chosen on.

    Raises:
        ValueError: for a model that does not load, or settings that it refuses.
    """
    world = IconWorld() if args.new_shape is None else NewShapeWorld(args.new_shape)
    split = world.validation_prompts if args.split == "validation" else world.held_out_prompts
    prompts = sample_prompts(split, args.pictures_per_category, args.seed)
    prompts = [prompt for prompt in prompts if world.parse(prompt).category in args.categories]
    reference = None if args.against is None else read_reference(args.against)
    pipe = load_pipeline(args.model, args.dtype, args.device, lora=args.lora)
    pipe.set_progress_bar_config(disable=True)
    search = {name: getattr(args, name) for name in ("best_of", "num_candidates_per_row", "num_kept_per_row")}
    steps, guidance = args.num_inference_steps, args.guidance_scale
    settings = {
        "model": args.model,
        "lora": args.lora,
        "new_shape": args.new_shape,
        "split": args.split,
        "num_inference_steps": pipe.config.default_num_inference_steps if steps is None else steps,
        "guidance_scale": pipe.config.default_guidance_scale if guidance is None else guidance,
        "dtype": str(pipe.dtype),
        "device": str(pipe.device),
        "seed": args.seed,
        **search,
    }

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return pipe(
            prompt=prompts,
            height=world.canvas,
            width=world.canvas,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pil",
            **search,
        ).images

    report(rate_pictures(world, prompts, draw, args.seed, args.batch_size), settings, args, reference)


def evaluate_icons_tokenizer(args: argparse.Namespace) -> None:
    """Score what a `BitDanceTokenizer` makes of drawn pictures when it encodes and decodes them.

    Raises:
        ValueError: for a tokenizer that does not load, or a stride that does not divide the pictures.
    """
    world = IconWorld()
    prompts = sample_prompts(world.held_out_prompts, args.pictures_per_category, args.seed)
    device = find_device(args.device)
    folder = args.vae / "vae" if (args.vae / "model_index.json").is_file() else args.vae
    if not (folder / "config.json").is_file():
        raise ValueError(f"`vae` has to be the folder of a BitDanceTokenizer or a pipeline, but is {args.vae}.")
    vae = BitDanceTokenizer.from_pretrained(folder, dtype=DTYPES[args.dtype]).to(device)
    processor = VaeImageProcessor(vae_scale_factor=vae.spatial_compression_ratio, do_resize=False)
    squared_errors = []

    @torch.no_grad()
    def reconstruct(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        drawn = [world.draw(*pair) for pair in zip(prompts, map(np.random.default_rng, seeds), strict=True)]
        code = vae.encode(processor.preprocess(drawn).to(device, vae.dtype)).code
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]  # of a stochastic decoder
        images = processor.postprocess(vae.decode(code, generator=generator).sample.float())
        for before, after in zip(drawn, images, strict=True):
            squared_errors.append(np.mean((np.asarray(before, np.float32) - np.asarray(after, np.float32)) ** 2))
        return images

    rated = rate_pictures(world, prompts, reconstruct, args.seed, args.batch_size)
    psnr = float(np.mean(20 * math.log10(255) - 10 * np.log10(squared_errors)))
    print(f"PSNR {psnr:.2f} dB, the mean over {len(rated)} pictures")
    report(rated, {"vae": str(args.vae), "dtype": args.dtype, "seed": args.seed, "psnr": psnr}, args)


def evaluate_icon_edits(args: argparse.Namespace) -> None:
    """Score the edits of a text-to-image model: what its pictures of the icon world become, and what is kept.

    Raises:
        ValueError: for a model that does not load, or settings that it refuses.
    """
    if args.num_edits < 1:
        raise ValueError(f"`num_edits` has to be at least 1, but is {args.num_edits}.")
    world = IconWorld()
    edits = make_edits(world, args.kind, args.num_edits, args.seed)
    masked = args.kind != "recolor"
    pipeline_class = BitDanceInpaintPipeline if masked else BitDanceImg2ImgPipeline
    pipe = load_pipeline(args.model, args.dtype, args.device, pipeline_class, args.lora)
    pipe.set_progress_bar_config(disable=True)
    strength = args.strength
    if strength is None:
        strength = inspect.signature(pipe.__call__).parameters["strength"].default
    settings = {"model": args.model, "kind": args.kind, "strength": strength, "seed": args.seed}
    if masked:
        settings["num_candidates"] = args.num_candidates

    rated, num_kept = [], 0
    for start in tqdm(range(0, len(edits), args.batch_size), unit="batch"):
        batch = edits[start : start + args.batch_size]
        prompts, sources, masks = ([getattr(edit, name) for edit in batch] for name in ("prompt", "source", "mask"))
        seeds = [args.seed + start + index for index in range(len(batch))]
        call = {
            "prompt": prompts,
            "image": sources,
            "strength": strength,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "latent",
        }
        if masked:
            code = pipe(mask_image=masks, num_candidates=args.num_candidates, **call).images
            source_code = pipe.prepare_generation(prompts, sources, masks).code
            num_kept += int(((code == source_code) | (source_code == 0)).all(dim=(1, 2, 3)).sum())
            images = pipe.decode_onto_source(code, sources, masks)
        else:
            images = pipe.decode_latents(pipe(**call).images, "pil", None)
        for edit, seed, image in zip(batch, seeds, images, strict=True):
            category = world.parse(edit.prompt).category
            reason = world.judge(image, edit.prompt).reason
            rated.append(Rated(category, edit.prompt, seed, show_edit(edit, image), reason))
    report(rated, settings, args)
    if masked:
        print(f"Of {num_kept} of {len(edits)} pictures every bit that was not masked is the source's")


def evaluate_fid(args: argparse.Namespace) -> None:
    """Score pictures against a reference.

    Raises:
        ImportError: if torch-fidelity does not import.
        ValueError: for pictures, statistics or weights that are missing or broken.
    """
    device = find_device(args.device)
    samples, _ = open_pictures(args.samples, "samples")
    if samples is None:
        raise ValueError(f"`samples` has to hold pictures, but {args.samples} holds statistics alone.")
    reference, statistics = open_pictures(args.reference, "reference")
    weights = find_feature_weights(args.feature_weights)
    scores = score_pictures(samples, reference, statistics, weights, device, args.batch_size)
    for name, value in scores.items():
        print(f"{name:<28}{value:>12.6g}")
    num_reference = 0 if reference is None else len(reference)
    compared_to = "the reference's pictures" if statistics is None else "the reference's mu and sigma"
    print(f"{len(samples)} pictures against {num_reference}; the distance is the one to {compared_to}")
    if reference is None:
        print("precision and recall need pictures, and the reference holds statistics alone")
    if args.json:
        settings = {"samples": str(args.samples), "reference": str(args.reference), "feature_weights": str(weights)}
        settings |= {"num_samples": len(samples), "num_reference": num_reference, "distance_to": compared_to}
        write_json(args.json, {"settings": settings, "scores": scores})


def evaluate_digits(args: argparse.Namespace) -> None:
    """Score a class-conditional pipeline whose classes are the digits 0 to 9.

    Raises:
        ImportError: without the package of the real digits.
        ValueError: for a model that does not load or has other classes, or settings that it refuses.
    """
    if args.pictures_per_class < 1:
        raise ValueError(f"`pictures_per_class` has to be at least 1, but is {args.pictures_per_class}.")
    pipe = load_pipeline(args.model, args.dtype, args.device, BitDanceClassPipeline, args.lora)
    if pipe.transformer.config.num_classes != NUM_CLASSES:
        raise ValueError(f"`model` has to have {NUM_CLASSES} classes, but has {pipe.transformer.config.num_classes}.")
    pipe.set_progress_bar_config(disable=True)

    labels = [label for label in range(NUM_CLASSES) for _ in range(args.pictures_per_class)]
    images = []
    for start in tqdm(range(0, len(labels), args.batch_size), unit="batch"):
        batch = labels[start : start + args.batch_size]
        images += pipe(
            batch,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + start + index) for index in range(len(batch))],
        ).images
    classifier, accuracy = train_classifier()
    seen = classify(classifier, images)

    scores = {}
    for label in range(NUM_CLASSES):
        right = [one == label for one, asked in zip(seen, labels, strict=True) if asked == label]
        scores[str(label)] = wilson_score(sum(right), len(right))
    scores["all"] = wilson_score(sum(map(int.__eq__, seen, labels)), len(labels))
    print_scores("class", scores)
    print(f"Of the real digits that were held out the classifier recognises {accuracy:.3f}")
    if args.json:
        settings = {"model": args.model, "dtype": str(pipe.dtype).removeprefix("torch."), "device": str(pipe.device)}
        settings["seed"] = args.seed
        for name in ("num_inference_steps", "guidance_scale"):
            given = getattr(args, name)
            settings[name] = pipe.config[f"default_{name}"] if given is None else given
        result = {"settings": settings, "scores": {name: vars(score) for name, score in scores.items()}}
        write_json(args.json, result | {"accuracy_on_real_digits": accuracy, "seen": seen})
    if args.grid:
        save_image(make_image_grid(images, NUM_CLASSES, args.pictures_per_class), args.grid)
        print(args.grid)


def evaluate_icon_choices(args: argparse.Namespace) -> None:
    """How often the model's own score finds the prompt of a drawn picture among others, which the checker finds wrong.

    Raises:
        ValueError: for a model that does not load, or numbers out of range.
    """
    if args.num_pictures < 1 or args.num_prompts < 2:
        raise ValueError("`num_pictures` has to be at least 1 and `num_prompts` at least 2.")
    world, rng = IconWorld(), np.random.default_rng(args.seed)
    texts = {category: [prompt.text for prompt in world.held_out_prompts[category]] for category in CATEGORIES}
    pipe = load_pipeline(args.model, args.dtype, args.device, lora=args.lora)
    right = {category: [] for category in CATEGORIES}
    for index in tqdm(range(args.num_pictures), unit="picture"):
        category = CATEGORIES[index % len(CATEGORIES)]
        others = texts[category] if args.same_category else [text for same in texts.values() for text in same]
        prompt = str(rng.choice(texts[category]))
        image = world.draw(prompt, rng)
        wrong = [text for text in rng.permutation(others).tolist() if text != prompt and not world.check(image, text)]
        scores = pipe.score(image, [prompt, *wrong[: args.num_prompts - 1]], **score_settings(args)).mean(dim=1)
        right[category].append(int(scores.argmax()) == 0)
    scores = {category: wilson_score(sum(found), len(found)) for category, found in right.items() if found}
    scores["all"] = wilson_score(sum(map(sum, right.values())), args.num_pictures)
    report_choices(scores, {"num_prompts": args.num_prompts, "same_category": args.same_category}, args)


def evaluate_digit_choices(args: argparse.Namespace) -> None:
    """How often the model's own score finds the class of a real digit that was held out.

    Raises:
        ImportError: without the package of the real digits.
        ValueError: for a model that does not load, or numbers out of range.
    """
    pictures, labels = read_digits()
    held_out = np.flatnonzero(is_held_out(labels))
    if not 1 <= args.num_pictures <= len(held_out):
        raise ValueError(f"`num_pictures` is {args.num_pictures}; it has to be from 1 to {len(held_out)}.")
    # As many of every class: the package has the digits in the order of their classes.
    chosen = held_out[np.arange(args.num_pictures) * len(held_out) // args.num_pictures]
    pipe = load_pipeline(args.model, args.dtype, args.device, BitDanceClassPipeline, args.lora)
    seen = []
    for start in tqdm(range(0, len(chosen), args.batch_size), unit="batch"):
        images = [
            Image.fromarray(picture).convert("RGB") for picture in pictures[chosen[start : start + args.batch_size]]
        ]
        with torch.no_grad():
            code = pipe.vae.encode(pipe.image_processor.preprocess(images).to(pipe.device, pipe.dtype)).code
        scores = [pipe.score(code, label, **score_settings(args)).mean(dim=1) for label in range(NUM_CLASSES)]
        seen += torch.stack(scores).argmax(dim=0).tolist()
    scores = {}
    for label in range(NUM_CLASSES):
        found = [one == label for one, asked in zip(seen, labels[chosen], strict=True) if asked == label]
        scores[str(label)] = wilson_score(sum(found), len(found))
    scores["all"] = wilson_score(sum(map(int.__eq__, seen, labels[chosen].tolist())), len(chosen))
    report_choices(scores, {}, args)


def score_settings(args: argparse.Namespace) -> dict[str, int | float]:
    return {name: getattr(args, name) for name in ("num_times", "num_draws", "num_passes", "bit_flip_probability")}


def report_choices(scores: dict[str, Score], settings: dict, args: argparse.Namespace) -> None:
    print_scores("of", scores)
    if args.json:
        settings |= {"model": args.model, "seed": args.seed} | score_settings(args)
        write_json(args.json, {"settings": settings, "scores": {name: vars(score) for name, score in scores.items()}})


def add_score_arguments(parser: argparse.ArgumentParser, num_pictures: int) -> None:
    parser.add_argument("--num_pictures", type=int, default=num_pictures)
    parser.add_argument("--num_times", type=int, default=8, help="times that the score is averaged over")
    parser.add_argument("--num_draws", type=int, default=2, help="draws of noise at each time")
    parser.add_argument("--num_passes", type=int, default=1, help="passes, each with flipped bits of its own")
    parser.add_argument("--bit_flip_probability", type=float, default=0.0, help="of the bits that are fed back")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures and prompts")
    parser.add_argument("--json", type=Path, help="a file for the scores")


def add_report_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument(
        "--pictures_per_category", type=int, default=100, help="or a few more, so that all count alike"
    )
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts and of the first picture")
    parser.add_argument("--json", type=Path, help="a file for the scores and every picture's prompt, seed and fault")
    parser.add_argument("--grid", type=Path, help="a file for a sheet of all the pictures")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score a model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("icons", help="score a text-to-image pipeline of the icon world")
    command.set_defaults(evaluate=evaluate_icons)
    add_model_arguments(command)
    command.add_argument("--num_inference_steps", type=int, help="the model's own default where it is not given")
    command.add_argument("--guidance_scale", type=float, help="the model's own default where it is not given")
    command.add_argument(
        "--split", choices=["held_out", "validation"], default="held_out",
        help="validation: a fifth of the training prompts, to choose guidance, steps or a solver on",
    )  # fmt: skip
    command.add_argument("--new_shape", choices=NEW_SHAPES, help="only prompts that name this shape, which is new")
    command.add_argument("--against", type=Path, help="what an earlier run wrote to --json, to print the difference")
    command.add_argument("--categories", nargs="+", choices=CATEGORIES, default=CATEGORIES, metavar="CATEGORY")
    command.add_argument(
        "--best_of", type=int, default=1, help="candidates of each picture, chosen by the model's score"
    )
    command.add_argument("--num_candidates_per_row", type=int, default=1, help="candidates of each row of patches")
    command.add_argument("--num_kept_per_row", type=int, default=1, help="how many of them go on")
    add_report_arguments(command, batch_size=32)

    command = commands.add_parser("icons-tokenizer", help="score the reconstructions of a BitDanceTokenizer")
    command.set_defaults(evaluate=evaluate_icons_tokenizer)
    command.add_argument("--vae", type=Path, required=True, help="the folder of a BitDanceTokenizer or of a pipeline")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; the first accelerator where there is one")
    add_report_arguments(command, batch_size=64)

    command = commands.add_parser("icons-edits", help="score how a pipeline of the icon world edits pictures")
    command.set_defaults(evaluate=evaluate_icon_edits)
    command.add_argument("kind", choices=EDITS, help="replace an icon, extend downwards, or recolor by image to image")
    add_model_arguments(command)
    command.add_argument("--num_edits", type=int, default=200)
    command.add_argument("--strength", type=float, help="the pipeline's own default where it is not given")
    command.add_argument("--num_candidates", type=int, default=1, help="of which the best is kept; not for recolor")
    command.add_argument("--batch_size", type=int, default=20)
    command.add_argument("--seed", type=int, default=0, help="of the edits and of the first picture")
    command.add_argument("--json", type=Path, help="a file for the scores and every picture's prompt, seed and fault")
    command.add_argument("--grid", type=Path, help="a file for a sheet of the sources and the pictures")

    command = commands.add_parser(
        "fid", help="FID, Inception score, precision and recall of pictures, by torch-fidelity"
    )
    command.set_defaults(evaluate=evaluate_fid, grid=None)
    command.add_argument("samples", type=Path, help="a folder of pictures, or an .npz with them in arr_0")
    command.add_argument(
        "reference",
        type=Path,
        help="a folder of pictures, or an .npz of the ADM evaluator: pictures, mu and sigma of their features (no "
        "precision and recall then), or both (FID is from mu and sigma then)",
    )
    command.add_argument(
        "--feature_weights",
        type=Path,
        help="the Inception network's weights, weights-inception-2015-12-05-6726825d.pth of the releases of "
        "toshas/torch-fidelity on GitHub; by default the file of that name in torch hub's cache; never downloaded",
    )
    command.add_argument("--device", help="cpu, cuda or cuda:1, ...; the first accelerator where there is one")
    command.add_argument("--batch_size", type=int, default=64)
    command.add_argument("--json", type=Path, help="a file for the scores")

    command = commands.add_parser("digits", help="score a class-conditional pipeline of handwritten digits")
    command.set_defaults(evaluate=evaluate_digits)
    add_model_arguments(command)
    command.set_defaults(model=str(SHIPPED_MODEL.parent / "digits-32"))
    command.add_argument("--num_inference_steps", type=int, help="the model's own default where it is not given")
    command.add_argument("--guidance_scale", type=float, help="the model's own default where it is not given")
    command.add_argument("--pictures_per_class", type=int, default=100)
    command.add_argument("--batch_size", type=int, default=100)
    command.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next seed")
    command.add_argument("--json", type=Path, help="a file for the scores and the class seen in every picture")
    command.add_argument("--grid", type=Path, help="a file for a sheet of all the pictures, a row for each class")

    command = commands.add_parser("icon-choices", help="how often the model's score finds a picture's prompt")
    command.set_defaults(evaluate=evaluate_icon_choices, grid=None)
    add_model_arguments(command)
    command.add_argument("--num_prompts", type=int, default=8, help="prompts to choose among, one of them right")
    command.add_argument(
        "--same_category", action="store_true", help="the wrong prompts are of the right one's category"
    )
    add_score_arguments(command, num_pictures=200)

    command = commands.add_parser("digit-choices", help="how often the model's score finds a real digit's class")
    command.set_defaults(evaluate=evaluate_digit_choices, grid=None)
    add_model_arguments(command)
    command.set_defaults(model=str(SHIPPED_MODEL.parent / "digits-32"))
    add_score_arguments(command, num_pictures=500)

    args = parser.parse_args(arguments)
    try:
        if args.batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1, but is {args.batch_size}.")
        for name in ("json", "grid"):
            if (path := getattr(args, name)) is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"`{name}` is {path}, but there is no folder {path.parent}.")
        args.evaluate(args)
    except (ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
