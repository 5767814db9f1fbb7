"""Peak memory of a conversion against the size of its checkpoint.

    python benchmarks/bench_conversion.py
    python benchmarks/bench_conversion.py --size 8 --shard_size 500 --dtype float32

Writes a text-to-image checkpoint of random weights in the original's layout to a temporary folder, converts it (and
exports it again) in a process of its own each, and prints the largest resident memory of that process, mapped file
pages included, beside the largest files. The claim that it measures: memory is at most the largest shard and 1 GB, and
no output file is larger than the largest input file. Needs about three times `--size` of disk, twice that with a cast
to float32.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import print_record
from safetensors.torch import save_file

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


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, dtype=dtype).normal_(std=0.02) for key, shape in shapes.items()}


def write_checkpoint(folder: Path, size: int, shard_size: int, small_case: Path) -> None:
    """
    A checkpoint of at least `size` bytes, its language model in shards of at most `shard_size` bytes. Text tokenizer
    and autoencoder are those of `small_case`, a checkpoint in the original's layout.
    """
    folder.mkdir()
    for file in small_case.iterdir():
        if file.name not in {"model.safetensors", "projector.safetensors", "vision_head.safetensors"}:
            (folder / file.name).write_bytes(file.read_bytes())

    layer_size = 2 * sum(torch.Size(shape).numel() for shape in layer_shapes(0).values())
    groups = [{"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE)}, {"lm_head.weight": (VOCAB_SIZE, HIDDEN_SIZE)}]
    layers_per_shard = (shard_size - MB) // layer_size
    num_layers = -(-size // layer_size)
    for start in range(0, num_layers, layers_per_shard):
        group = {}
        for index in range(start, min(start + layers_per_shard, num_layers)):
            group |= layer_shapes(index)
        groups.append(group)
    groups[-1]["model.norm.weight"] = (HIDDEN_SIZE,)
    weight_map = {}
    for number, shapes in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(random_tensors(shapes, torch.bfloat16), folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    projector = {"fc1.weight": (HIDDEN_SIZE, BITS), "fc1.bias": (HIDDEN_SIZE,)}
    projector |= {"fc2.weight": (HIDDEN_SIZE, HIDDEN_SIZE), "fc2.bias": (HIDDEN_SIZE,)}
    save_file(random_tensors(projector, torch.float32), folder / "projector.safetensors")
    save_file(random_tensors(head_shapes(), torch.float32), folder / "vision_head.safetensors")

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
    command = [sys.executable, "-c", MEASURE, sys.executable, *arguments, "--output_path", str(output)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a conversion against the size of its checkpoint.")
    parser.add_argument("--size", type=float, default=4.2, help="Of the language model, in GB.")
    parser.add_argument("--shard_size", type=int, default=500, help="Largest shard of the language model, in MB.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="Cast while converting.")
    parser.add_argument("--folder", type=Path, help="Where to make the temporary folder.")
    args = parser.parse_args()

    cast = ["--dtype", args.dtype] if args.dtype else []
    conversion = REPOSITORY / "conversion"
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        original, pipeline, exported = (Path(temporary) / name for name in ("original", "pipeline", "exported"))
        small_case = REPOSITORY / "tests" / "cases" / "t2i_p4" / "original"
        write_checkpoint(original, int(args.size * GB), args.shard_size * MB, small_case)
        convert = [str(conversion / "convert_text_to_image.py"), "--checkpoint_path", str(original), "--keep_lm_head"]
        export = [str(conversion / "export_original.py"), "--pipeline_path", str(pipeline)]
        rows = [run("convert", original, pipeline, convert + cast), run("export", pipeline, exported, export)]

    print(f"{'':38}" + "".join(f"{row['step']:>12}" for row in rows))
    for name in list(rows[0])[1:]:
        print(f"{name:38}" + "".join(f"{row[name]:12.1f}" for row in rows))
    print_record("conversion", dtype=args.dtype, steps=rows)


if __name__ == "__main__":
    main()
