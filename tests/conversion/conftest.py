import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_diffusers.loaders.checkpoint_files import read_pickle


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
