import argparse
import collections
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from bitdance_diffusers import BitDanceClassPipeline, BitDancePipeline
from bitdance_diffusers.loaders.checkpoint_files import read_pickle
from bitdance_diffusers.loaders.convert import convert_class_to_image, convert_text_to_image

# Tests run side by side, and fork. Programs that they start follow the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

CASES = Path(__file__).parent / "cases"
ATTENTION_BACKEND, _ = _AttentionBackendRegistry.get_active_backend()
VIEWS = {"view", "unbind", "split", "transpose", "t", "permute", "select", "slice", "expand", "alias"}


class CountOperators(TorchDispatchMode):
    """Counts what runs, views excepted."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def count_operators():
    return CountOperators


@pytest.fixture(autouse=True)
def restore_attention_backend():
    """`set_attention_backend` of a model also sets Diffusers' global one, which later tests' models would follow."""
    yield
    _AttentionBackendRegistry.set_active_backend(ATTENTION_BACKEND)


@pytest.fixture(scope="session")
def case_path():
    """`case_path(name)`: a checkpoint in the original's layout (`original/`) with its inputs and expected outputs."""
    return lambda name: CASES / name


@pytest.fixture(scope="session")
def t2i_pipeline_path(case_path, tmp_path_factory):
    """The text-to-image case as a saved pipeline in float32."""
    path = tmp_path_factory.mktemp("t2i") / "pipeline"
    convert_text_to_image(case_path("t2i_p4") / "original", path, torch.float32)
    return path


@pytest.fixture
def t2i_pipeline(t2i_pipeline_path):
    """`t2i_pipeline(**kwargs)`: that pipeline, loaded anew."""

    def load(**kwargs):
        pipeline = BitDancePipeline.from_pretrained(t2i_pipeline_path, **kwargs)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def class_pipeline_path(case_path, tmp_path_factory):
    """`class_pipeline_path(name)`: a class-conditional case ("class_p1" or "class_p4") as a saved pipeline."""
    folder = tmp_path_factory.mktemp("class")

    def convert(name):
        path = folder / name
        if not path.exists():
            original = case_path(name) / "original"
            case = json.loads((case_path(name) / "case.json").read_text())
            convert_class_to_image(
                original / "bitdance.pt",
                original / "ae.pt",
                path,
                vae_config=original / "ae_ddconfig.json",
                num_attention_heads=case["n_head"],
            )
        return path

    return convert


@pytest.fixture
def class_pipeline(class_pipeline_path):
    """`class_pipeline(name, **kwargs)`: that pipeline, loaded anew."""

    def load(name, **kwargs):
        pipeline = BitDanceClassPipeline.from_pretrained(class_pipeline_path(name), **kwargs)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory):
    """
    `hub_cache(repository, folder)`: a cache as the Hub's client leaves it, in which `repository` has the files of
    `folder`: blobs under names of their own, and links to them in a snapshot.
    """

    def make(repository, folder):
        cache = tmp_path_factory.mktemp("cache")
        root = cache / f"models--{repository.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
            blob = root / "blobs" / f"{number:040x}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.symlink_to(file.resolve())
            link = root / "snapshots" / commit / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)
        return cache

    return make


@pytest.fixture
def original(case_path, tmp_path):
    """A copy of the text-to-image case's checkpoint, whose files are links until a test changes them."""
    folder = tmp_path / "original"
    folder.mkdir()
    for file in (case_path("t2i_p4") / "original").iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture
def port(case_path, tmp_path):
    """The same checkpoint in the layout of the community's port to Diffusers."""
    folder = tmp_path / "port"
    shutil.copytree(case_path("t2i_p4") / "original_bili", folder)
    files = {
        "model.safetensors": "text_encoder/model.safetensors",
        "projector.safetensors": "projector/diffusion_pytorch_model.safetensors",
        "vision_head.safetensors": "diffusion_head/diffusion_pytorch_model.safetensors",
        "ae.safetensors": "autoencoder/diffusion_pytorch_model.safetensors",
        "tokenizer.json": "tokenizer/tokenizer.json",
    }
    for source, destination in files.items():
        (folder / destination).symlink_to(case_path("t2i_p4") / "original" / source)
    return folder


@pytest.fixture
def class_original(case_path, tmp_path):
    """
    `class_original(name)`: a copy of a class-conditional case's checkpoint (`bitdance.pt`, `ae.pt`,
    `ae_ddconfig.json`), whose files are links until a test changes them.
    """

    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in (case_path(name) / "original").iterdir():
            (folder / file.name).symlink_to(file)
        return folder

    return copy


@pytest.fixture(scope="session")
def edit_pickle():
    """`edit_pickle(file, change)` rewrites a pickle with what `change` made of its dictionary."""

    def edit(file, change):
        content = read_pickle(file, allowed=(argparse.Namespace,))
        change(content)
        file.unlink()
        torch.save(content, file)

    return edit


@pytest.fixture(scope="session")
def edit_json():
    """`edit_json(file, name=value, ...)` sets entries of a JSON file; `...` removes one."""

    def edit(file, **changes):
        content = {**json.loads(file.read_text()), **changes}
        file.unlink()
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return edit


@pytest.fixture(scope="session")
def edit_tensors():
    """`edit_tensors(file, change)` rewrites a safetensors file with what `change` made of its tensors."""

    def edit(file, change):
        tensors = load_file(file)
        change(tensors)
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


@pytest.fixture(scope="session")
def shard():
    """`shard(file, count)` splits a safetensors file into shards with an index."""

    def split(file, count):
        tensors = load_file(file)
        weight_map = {}
        for number in range(count):
            part = dict(list(tensors.items())[number::count])
            name = f"{file.stem}-{number + 1:05d}-of-{count:05d}.safetensors"
            save_file(part, file.with_name(name), metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, name))
        file.unlink()
        index = file.with_name(f"{file.name}.index.json")
        index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
        return index

    return split
