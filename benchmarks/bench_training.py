"""Speed of examples/train_t2i.py, and where the time of its steps goes, by its own timers.

    python benchmarks/bench_training.py
    python benchmarks/bench_training.py --steps 200 -- --mixed_precision bf16 --attention_backend _native_math

Fine-tunes the pipeline of examples/pretrained/icons-64 on drawn pictures, with cached codes and 2 data workers, by
AdamW, by AdamW with an average of the weights, and by Muon with it; what stands after `--` is passed to the script. A
layout is processes x threads of each; they share a batch of --batch_size. Runs take turns, and the medians count.

Pictures a second are those of the steps after the first --warmup_steps, from the script's TensorBoard log; the shares
of data, forward and backward, and optimizer are its last line, over all steps. `roofline` is the least time of the
operations, a backward pass being two forward ones, at the peak of all processes' threads in the products' dtype.

`waits` is how often an optimizer step waits for the device (`host_waits.py`); on a CPU it says how often one would. A
lap ends where the host does: on CUDA forward and backward end with the wait, which includes the last optimizer's work.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import print_record, print_table
from roofline import decoder_pass, find_machine, head_evaluation, head_modulations
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from bitdance_diffusers import BitDanceTransformer
from bitdance_diffusers.prompt import picture_start_ids, prompt_ids

REPOSITORY = Path(__file__).parents[1]
PIPELINE = REPOSITORY / "examples" / "pretrained" / "icons-64"
RESOLUTION, PIXELS_PER_TOKEN = 64, 8
RECIPES = {
    "AdamW": [],
    "AdamW, EMA": ["--use_ema"],
    "Muon, EMA": ["--optimizer", "muon", "--use_ema"],
}
LAPS = ("data", "forward_backward", "optimizer")


def count_step_waits(recipe: str, train_arguments: list[str], folder: Path) -> int:
    """The most that a step of a short run waits for the device."""
    command = [
        *(sys.executable, str(REPOSITORY / "benchmarks" / "host_waits.py"), "--"),
        *("--pretrained_model_name_or_path", str(PIPELINE), "--output_dir", str(folder / "waits")),
        *("--icons", "48", "--resolution", str(RESOLUTION), "--train_batch_size", "4", "--max_train_steps", "4"),
        *RECIPES[recipe],
        *train_arguments,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command} failed:\n{result.stderr[-4000:]}")
    return max(json.loads(result.stdout.splitlines()[-1])["waits"])


def layout(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} has to be processes x threads, such as 2x1.")
    return int(match[1]), int(match[2])


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=int, default=2000, help="pictures")
    parser.add_argument("--batch_size", type=int, default=48, help="of all processes together")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--layouts", nargs="+", type=layout, default=[(1, 2), (2, 1)], metavar="PROCESSESxTHREADS")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("train_arguments", nargs="*", help="after --: more arguments of train_t2i.py")
    args = parser.parse_args(arguments)
    for name in ("icons", "batch_size", "warmup_steps", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1 but is {getattr(args, name)}.")
    if args.steps <= args.warmup_steps:
        parser.error(f"--steps {args.steps} has to be more than --warmup_steps {args.warmup_steps}.")
    for processes, _ in args.layouts:
        if args.batch_size % processes:
            parser.error(f"--batch_size {args.batch_size} has to be a multiple of the {processes} processes.")
    return args


def train(args: argparse.Namespace, recipe: str, processes: int, threads: int, folder: Path, run: str) -> dict:
    """One run in `folder / run`: its warm pictures a second and the laps' shares."""
    output = folder / run
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command = [
        *(sys.executable, *launcher, str(REPOSITORY / "examples" / "train_t2i.py")),
        *("--pretrained_model_name_or_path", str(PIPELINE), "--output_dir", str(output)),
        *("--icons", str(args.icons), "--resolution", str(RESOLUTION), "--cache_codes", str(folder / "codes")),
        *("--dataloader_num_workers", "2", "--train_batch_size", str(args.batch_size // processes)),
        *("--max_train_steps", str(args.steps), "--checkpointing_steps", str(args.steps + 1)),
        *RECIPES[recipe],
        *args.train_arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(f"{command} failed:\n{result.stderr[-4000:]}")
    return {
        "pictures_per_second": warm_speed(output / "logs", args.batch_size, args.warmup_steps),
        **read_shares(result.stderr),
    }


def read_shares(log: str) -> dict[str, float]:
    """The shares in the script's `Time:` line."""
    line = next(line for line in reversed(log.splitlines()) if "Time: " in line)
    return {name: float(re.search(rf"\b{name} ([\d.]+)%", line)[1]) / 100 for name in LAPS}


def warm_speed(logs: Path, batch_size: int, warmup_steps: int) -> float:
    """Pictures a second after `warmup_steps`; what the script logs is the mean since its first step."""
    seconds = {}
    for file in logs.rglob("events.out.tfevents*"):
        scalars = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "pictures_per_second" in scalars.Tags()["scalars"]:  # another file has the arguments
            events = scalars.Scalars("pictures_per_second")
            seconds |= {event.step: batch_size * event.step / event.value for event in events}
    last = max(seconds)
    return batch_size * (last - warmup_steps) / (seconds[last] - seconds[warmup_steps])


def operations_of_a_picture(config: dict, texts: list[str], num_draws: int) -> float:
    """Of a forward and a backward pass over the text and all but the last patch, and the head on every patch."""
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    side = RESOLUTION // PIXELS_PER_TOKEN
    start = len(picture_start_ids(tokenizer, side, side, config["patch_size"]))
    text = sum(len(prompt_ids(tokenizer, text)) for text in texts) / len(texts) + start
    num_patches = side**2 // config["patch_size"] ** 2
    tokens = text + side**2 - config["patch_size"] ** 2
    decoder = decoder_pass(config, 1, tokens, tokens / 2, element_size=1)
    rows = num_patches * num_draws
    head = head_modulations(config, rows, 1, element_size=1), head_evaluation(config, rows, element_size=1)
    return 3 * sum(work.flops for work in (decoder, *head))


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    variants = [(recipe, *layout) for recipe in args.recipes for layout in args.layouts]
    results: dict[tuple, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for i in range(args.runs):
            for number, variant in enumerate(variants):
                results[variant].append(train(args, *variant, folder, f"run-{i}-{number}"))
        texts = json.loads((folder / "codes" / "captions.json").read_text(encoding="utf-8"))
        waits = {recipe: count_step_waits(recipe, args.train_arguments, folder / recipe) for recipe in args.recipes}
        model_config = BitDanceTransformer.load_config(PIPELINE / "transformer")

    more = argparse.ArgumentParser(allow_abbrev=False)
    more.add_argument("--mixed_precision", default="no")
    more.add_argument("--diff_batch_mul", type=int, default=1)
    given, _ = more.parse_known_args(args.train_arguments)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(given.mixed_precision, torch.float32)
    flops = operations_of_a_picture(model_config, texts, given.diff_batch_mul)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, records, machines = [], [], {}
    for recipe, processes, threads in variants:
        runs = results[recipe, processes, threads]
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        if processes * threads not in machines:
            torch.set_num_threads(processes * threads)
            machines[processes * threads] = find_machine(device, dtype)
        machine = machines[processes * threads]
        peak = None if machine is None else machine.flops * (processes if device.type == "cuda" else 1)
        share = "" if peak is None else f"{median['pictures_per_second'] * flops / peak:.1%}"
        shares = [f"{median[name]:.1%}" for name in LAPS]
        rows.append(
            [f"{recipe}, {processes} x {threads}", median["pictures_per_second"], *shares, str(waits[recipe]), share]
        )
        record = {"recipe": recipe, "waits_per_step": waits[recipe], "processes": processes, "threads": threads}
        records.append({**record, "median": median, "runs": runs, "peak_flops": peak})
    print_table(["", "pictures/s", *(name.replace("_", " + ") for name in LAPS), "waits", "roofline"], rows)
    print_record(
        "training",
        device,
        icons=args.icons,
        batch_size=args.batch_size,
        steps=args.steps,
        warmup_steps=args.warmup_steps,
        train_arguments=args.train_arguments,
        flops_per_picture=flops,
        variants=records,
    )


if __name__ == "__main__":
    main()
