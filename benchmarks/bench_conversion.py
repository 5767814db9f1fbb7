"""Peak memory of converting and of loading an original checkpoint, against its size.

    python benchmarks/bench_conversion.py
    python benchmarks/bench_conversion.py --size 8 --shard_size 500 --dtype float32
    python benchmarks/bench_conversion.py --load bfloat16 float32 --size 4 --shard_size 5000

Writes a text-to-image checkpoint of random weights in the original's layout to a temporary folder, converts it (and
exports it again) in a process of its own each, and prints the largest resident memory of that process, mapped file
pages included, beside the largest files. The claim that it measures: memory is at most the largest shard and 1 GB, and
no output file is larger than the largest input file. Needs about three times `--size` of disk, twice that with a cast
to float32.

With `--load` the checkpoint is loaded in each dtype by `BitDancePipeline.from_pretrained` instead, in a process of its
own whose memory is sampled (on Linux): anonymous, which the system cannot have back, and mapped file pages, which it
can. The claim: anonymous memory is at most the model, its largest tensor and 1 GB.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import print_record

from bitdance_diffusers import BitDancePipeline
from bitdance_diffusers.loaders.checkpoint_files import DTYPES, StoredTensor, write_tensors

REPOSITORY = Path(__file__).parents[1]
HIDDEN_SIZE, INTERMEDIATE_SIZE, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 2048, 6144, 16, 8, 128
HEAD_HIDDEN_SIZE, HEAD_LAYERS, VOCAB_SIZE = 1024, 2, 60000
BITS = 8  # of the small case's autoencoder
MB, GB = 10**6, 10**9


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{index}."
    return {
        f"{prefix}input_layernorm.weight": (HIDDEN_SIZE,),
        f"{prefix}self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN_SIZE),
        f"{prefix}self_attn.k_proj.weight": (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN_SIZE),
        f"{prefix}self_attn.v_proj.weight": (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN_SIZE),
        f"{prefix}self_attn.o_proj.weight": (HIDDEN_SIZE, HEADS * HEAD_DIM),
        f"{prefix}self_attn.q_norm.weight": (HEAD_DIM,),
        f"{prefix}self_attn.k_norm.weight": (HEAD_DIM,),
        f"{prefix}post_attention_layernorm.weight": (HIDDEN_SIZE,),
        f"{prefix}mlp.gate_proj.weight": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        f"{prefix}mlp.up_proj.weight": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        f"{prefix}mlp.down_proj.weight": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
    }


def head_shapes() -> dict[str, tuple[int, ...]]:
    width, hidden = HEAD_HIDDEN_SIZE, int(1.5 * HEAD_HIDDEN_SIZE)
    linears = {
        "input_proj": (width, BITS),
        "cond_embed": (width, HIDDEN_SIZE),
        "time_embed.mlp.0": (width, 256),
        "time_embed.mlp.2": (width, width),
        "ada_ln_blocks.0": (6 * width, width),
        "final_layer.ada_ln_modulation": (2 * width, width),
        "final_layer.linear": (BITS, width),
    }
    shapes = {}
    for block in range(HEAD_LAYERS):
        prefix = f"res_blocks.{block}."
        linears |= {f"{prefix}attn.wqkv": (3 * width, width), f"{prefix}attn.wo": (width, width)}
        linears |= {f"{prefix}w1": (2 * hidden, width), f"{prefix}w2": (width, hidden)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"net.{prefix}{norm}.{parameter}": (width,) for parameter in ("weight", "bias")}
    for name, shape in linears.items():
        shapes |= {f"net.{name}.weight": shape, f"net.{name}.bias": shape[:1]}
    return shapes


def write_random(
    folder: Path, stem: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_size: int | None = None
) -> None:
    """Random tensors, one in memory at a time."""
    tensors = {
        key: StoredTensor(folder, key, shape, dtype, lambda s=shape: torch.empty(s, dtype=dtype).normal_(std=0.02))
        for key, shape in shapes.items()
    }
    write_tensors(folder, stem, tensors, max_file_size=shard_size)


def write_checkpoint(folder: Path, size: int, shard_size: int, small_case: Path) -> None:
    """
    A checkpoint of at least `size` bytes, its language model in shards of at most `shard_size` bytes. Text tokenizer
    and autoencoder are those of `small_case`, a checkpoint in the original's layout.
    """
    folder.mkdir()
    for file in small_case.iterdir():
        if file.name not in {"model.safetensors", "projector.safetensors", "vision_head.safetensors"}:
            (folder / file.name).write_bytes(file.read_bytes())

    num_layers = -(-size // (2 * sum(torch.Size(shape).numel() for shape in layer_shapes(0).values())))
    language_model = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE)}
    for index in range(num_layers):
        language_model |= layer_shapes(index)
    language_model |= {"model.norm.weight": (HIDDEN_SIZE,), "lm_head.weight": (VOCAB_SIZE, HIDDEN_SIZE)}
    write_random(folder, "model", language_model, torch.bfloat16, shard_size)
    projector = {"fc1.weight": (HIDDEN_SIZE, BITS), "fc1.bias": (HIDDEN_SIZE,)}
    projector |= {"fc2.weight": (HIDDEN_SIZE, HIDDEN_SIZE), "fc2.bias": (HIDDEN_SIZE,)}
    write_random(folder, "projector", projector, torch.float32)
    write_random(folder, "vision_head", head_shapes(), torch.float32)

    settings = {
        "config.json": {
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": INTERMEDIATE_SIZE,
            "num_hidden_layers": num_layers,
            "layer_types": ["full_attention"] * num_layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEY_VALUE_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB_SIZE,
        },
        "vision_head_config.json": {
            "ch_cond": HIDDEN_SIZE,
            "ch_latent": HEAD_HIDDEN_SIZE,
            "depth_latent": HEAD_LAYERS,
            "depth_adanln": 1,
        },
    }
    for file, changes in settings.items():
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))


# An executed program's peak starts at that of the process that it was forked from, so this small one starts it.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run(step: str, source: Path, output: Path, arguments: list[str]) -> dict[str, float | str]:
    """Run a command in a process of its own: what it took, and the sizes of what it read and wrote."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", MEASURE, sys.executable, str(REPOSITORY / "conversion" / arguments[0])]
    command += [*arguments[1:], "--output_path", str(output)]
    start = time.monotonic()
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds = time.monotonic() - start
    sizes = {
        name: [file.stat().st_size for file in path.rglob("*.safetensors")]
        for name, path in (("input", source), ("output", output))
    }
    peak = int(result.stdout) * (1 if platform.system() == "Darwin" else 1024)
    return {
        "step": step,
        "input_gb": sum(sizes["input"]) / GB,
        "largest_input_file_mb": max(sizes["input"]) / MB,
        "output_gb": sum(sizes["output"]) / GB,
        "largest_output_file_mb": max(sizes["output"]) / MB,
        "peak_memory_mb": peak / MB,
        "memory_beyond_largest_input_file_mb": (peak - max(sizes["input"])) / MB,
        "seconds": seconds,
    }


def resident_memory() -> dict[str, int]:
    """Bytes of this process that are resident: anonymous, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"anonymous": 1024 * int(sizes["RssAnon"]), "mapped": 1024 * int(sizes["RssFile"])}


def load(folder: Path, dtype: torch.dtype) -> dict[str, float | str]:
    """Load a checkpoint in this process, sampling its memory a hundred times a second."""
    samples, done = [resident_memory()], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            samples.append(resident_memory())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.monotonic()
    pipeline = BitDancePipeline.from_pretrained(folder, dtype=dtype)
    seconds = time.monotonic() - start
    done.set()
    sampler.join()
    samples.append(resident_memory())

    weights = [*pipeline.transformer.parameters(), *pipeline.vae.parameters()]
    model, largest = sum(weight.nbytes for weight in weights), max(weight.nbytes for weight in weights)
    anonymous = max(sample["anonymous"] for sample in samples)
    return {
        "step": f"load {str(dtype).removeprefix('torch.')}",
        "largest_input_file_mb": max(file.stat().st_size for file in folder.glob("*.safetensors")) / MB,
        "model_mb": model / MB,
        "largest_tensor_mb": largest / MB,
        "anonymous_before_mb": samples[0]["anonymous"] / MB,
        "peak_anonymous_mb": anonymous / MB,
        "peak_mapped_mb": max(sample["mapped"] for sample in samples) / MB,
        "anonymous_beyond_model_and_largest_tensor_mb": (anonymous - model - largest) / MB,
        "seconds": seconds,
    }


def run_load(folder: Path, dtype: str) -> dict[str, float | str]:
    command = [sys.executable, __file__, "--load_folder", str(folder), "--load", dtype]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of converting and of loading an original checkpoint.")
    parser.add_argument("--size", type=float, default=4.2, help="Of the language model, in GB.")
    parser.add_argument("--shard_size", type=int, default=500, help="Largest shard of the language model, in MB.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="Cast while converting.")
    parser.add_argument("--folder", type=Path, help="Where to make the temporary folder.")
    parser.add_argument("--load", nargs="+", choices=tuple(DTYPES), help="Load it in these dtypes instead.")
    parser.add_argument("--load_folder", type=Path, help="Load this checkpoint, in this process.")
    args = parser.parse_args()
    if args.load and not Path("/proc/self/status").exists():
        parser.error("`--load` reads /proc/self/status, which this system does not have.")
    if args.load_folder:
        print(json.dumps(load(args.load_folder, DTYPES[args.load[0]])))
        return

    cast = ["--dtype", args.dtype] if args.dtype else []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        original, pipeline, exported = (Path(temporary) / name for name in ("original", "pipeline", "exported"))
        small_case = REPOSITORY / "tests" / "cases" / "t2i_p4" / "original"
        write_checkpoint(original, int(args.size * GB), args.shard_size * MB, small_case)
        if args.load:
            rows = [run_load(original, dtype) for dtype in args.load]
        else:
            convert = ["convert_text_to_image.py", "--checkpoint_path", str(original), "--keep_lm_head", *cast]
            export = ["export_original.py", "--pipeline_path", str(pipeline)]
            rows = [run("convert", original, pipeline, convert), run("export", pipeline, exported, export)]

    print(f"{'':46}" + "".join(f"{row['step']:>14}" for row in rows))
    for name in list(rows[0])[1:]:
        print(f"{name:46}" + "".join(f"{row[name]:14.1f}" for row in rows))
    print_record("conversion", dtype=args.dtype, steps=rows)


if __name__ == "__main__":
    main()
