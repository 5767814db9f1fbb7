"""Who may import whom: data flows one way (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import bitdance_diffusers

PACKAGE = Path(bitdance_diffusers.__file__).parent

# What a part of the package, or a file of it, may import from the rest.
ALLOWED = {
    "patch_order": set(),
    "prompt": set(),
    "image_sizes": {"prompt"},
    "sampling": {"schedulers"},
    "generation": {"models", "patch_order", "sampling", "schedulers"},
    "scoring": {"generation", "models", "patch_order", "schedulers"},
    "search": {"generation", "scoring"},
    "code_files": {"generation", "patch_order"},
    "schedulers": set(),
    "models": {"models", "patch_order", "prompt", "image_sizes", "loaders.original_autoencoder"},
    "loaders": {"loaders", "models", "schedulers"},
    # Below the models, whose classes they are given.
    "loaders.checkpoint_files": {"loaders.original_names"},
    "loaders.hub_files": set(),
    "loaders.original_autoencoder": {"loaders.checkpoint_files", "loaders.hub_files", "loaders.original_names"},
    "loaders.original_names": set(),
    "loaders.port_names": set(),
    # Above the pipelines.
    "loaders.convert": {"loaders", "models", "pipelines", "prompt"},
    # Distillation trains a head by the loop that draws.
    "training": {"training", "models", "sampling", "schedulers", "patch_order", "prompt", "image_sizes"},
    "pipelines": {
        "pipelines",
        "generation",
        "scoring",
        "search",
        "models",
        "schedulers",
        "loaders",
        "sampling",
        "patch_order",
        "prompt",
        "image_sizes",
    },
}


def imported_modules(path):
    """Absolute names of all modules that a file of the package imports."""
    parts = ("bitdance_diffusers", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: -node.level]) + "." if node.level else ""
            yield base + (node.module or "")


def test_the_arrows_hold():
    for path in PACKAGE.rglob("*.py"):
        part, *file = path.relative_to(PACKAGE).with_suffix("").parts
        for name in imported_modules(path):
            top, *rest = name.split(".")
            assert top not in ("examples", "conversion", "benchmarks", "tests"), f"{path} imports {name}"
            assert rest != ["loaders", "convert"], f"{path} imports {name}"
            if top == "bitdance_diffusers" and part != "__init__" and rest:
                allowed = ALLOWED.get(".".join([part, *file]), ALLOWED.get(part))
                assert {rest[0], ".".join(rest)} & allowed, f"{path} imports {name}"


def test_import_needs_no_optional_package():
    blocked = ["peft", "datasets", "sentencepiece", "torchvision", "scipy", "flash_attn"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import bitdance_diffusers"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert bitdance_diffusers.__all__ == [
        "BinaryDiffusionScheduler",
        "BitDanceClassPipeline",
        "BitDanceClassTransformer",
        "BitDanceImg2ImgPipeline",
        "BitDanceInpaintPipeline",
        "BitDancePipeline",
        "BitDancePipelineOutput",
        "BitDanceTokenizer",
        "BitDanceTransformer",
    ]
