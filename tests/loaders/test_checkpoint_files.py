import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_diffusers.loaders.checkpoint_files import (
    Checkpoint,
    StoredTensor,
    match_tensors,
    open_safetensors,
    open_safetensors_folder,
    output_folder,
    write_tensors,
)


def stored(file, tensors):
    save_file(tensors, file)
    return open_safetensors(file).tensors


def test_written_files_hold_the_same_bits_and_are_no_larger_than_asked(tmp_path):
    torch.manual_seed(0)
    tensors = {f"a{i}": torch.randn(7, 3).bfloat16() for i in range(5)}
    tensors |= {f"b{i}": torch.randn(11) for i in range(9)} | {"scalar": torch.tensor(3.0).half()}
    source = stored(tmp_path / "in.safetensors", tensors)
    for limit, sharded in ((None, False), (10_000, False), (450, True)):
        folder = tmp_path / f"out-{limit}"
        folder.mkdir()
        write_tensors(folder, "model", source, max_file_size=limit)
        files = sorted(folder.glob("*.safetensors"))
        assert (len(files) > 1) == sharded == (folder / "model.safetensors.index.json").exists()
        assert all(file.stat().st_size <= (limit or 10_000) for file in files)
        written = open_safetensors_folder(folder, "model").tensors
        assert written.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert written[key].dtype == tensor.dtype
            assert torch.equal(written[key].read(), tensor)


def test_tensors_start_at_multiples_of_their_item_size(tmp_path):
    tensors = {"a": torch.ones(3).half(), "b": torch.ones(5), "c": torch.ones(1).bfloat16(), "d": torch.ones(2)}
    source = {
        key: StoredTensor(tmp_path, key, tuple(value.shape), value.dtype, lambda value=value: value)
        for key, value in tensors.items()
    }
    write_tensors(tmp_path, "model", source)
    content = (tmp_path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    assert all(header[key]["data_offsets"][0] % value.itemsize == 0 for key, value in tensors.items())


def test_a_tensor_above_the_limit_has_a_file_of_its_own(tmp_path):
    source = stored(tmp_path / "in.safetensors", {"a": torch.ones(2), "b": torch.ones(1000), "c": torch.ones(2)})
    write_tensors(tmp_path, "model", source, max_file_size=500)
    sizes = {file.name: set(load_file(file)) for file in tmp_path.glob("model-*")}
    assert sorted(map(sorted, sizes.values())) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), None), (float("-inf"), torch.float32), (1e20, torch.half)]
)
def test_numbers_that_cannot_be_kept_are_refused(tmp_path, value, dtype):
    source = stored(tmp_path / "in.safetensors", {"good": torch.ones(3), "bad": torch.tensor([0.0, value])})
    with pytest.raises(ValueError, match="in.safetensors: `bad` holds"):
        write_tensors(tmp_path, "model", source, dtype)


def test_every_piece_of_a_large_tensor_is_checked_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr("bitdance_diffusers.loaders.checkpoint_files._PIECE", 10)
    tensor = torch.randn(7, 9)
    source = stored(tmp_path / "in.safetensors", {"a": tensor})
    write_tensors(tmp_path, "model", source, torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor.bfloat16())
    tensor[-1, -1] = float("nan")
    source = stored(tmp_path / "nan.safetensors", {"a": tensor})
    with pytest.raises(ValueError, match="`a` holds a NaN"):
        write_tensors(tmp_path, "other", source)


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="in.safetensors: `a` is stored as I64; allowed are float32, bfloat16, float16"
    ):
        stored(tmp_path / "in.safetensors", {"a": torch.ones(2, dtype=torch.int64)})


def test_headers_tell_what_is_wrong_without_the_data(tmp_path):
    def read():
        raise AssertionError("a tensor was read")

    tensors = {key: StoredTensor(tmp_path / "in", key, (2, 3), torch.float32, read) for key in ("a", "b", "c")}
    checkpoint = Checkpoint(tmp_path / "in", tensors)
    with pytest.raises(
        ValueError, match=r"in: `a` is of shape \(2, 3\), the config asks for \(3, 2\); `d` is missing"
    ):
        match_tensors(checkpoint, {"A": ("a", (3, 2)), "D": ("d", (1,)), "B": ("b", (2, 3))}, unused=("c",))
    with pytest.raises(ValueError, match="in: `c` is unknown"):
        match_tensors(checkpoint, {"A": ("a", (2, 3)), "B": ("b", (2, 3))})
    assert match_tensors(checkpoint, {"A": ("a", (2, 3))}, unused=("b", "c")) == {"A": tensors["a"]}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_failed_or_interrupted_conversion_leaves_nothing(tmp_path, error):
    output = tmp_path / "new" / "output"
    with pytest.raises(error), output_folder(output) as folder:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text("{}")
        assert not output.exists()
        raise error
    assert list(output.parent.iterdir()) == []


def test_a_conversion_appears_whole_and_with_the_usual_permissions(tmp_path):
    output, usual = tmp_path / "output", tmp_path / "usual"
    usual.mkdir()
    with output_folder(output) as folder:
        (folder / "file").write_text("content")
    assert (output / "file").read_text() == "content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "usual"]
    assert output.stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    file = tmp_path / "in.safetensors"
    save_file({"a": torch.ones(10)}, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="in.safetensors is not a whole safetensors file"):
        open_safetensors(file)


def test_a_header_beyond_the_file_is_refused(tmp_path):
    file = tmp_path / "in.safetensors"
    file.write_bytes(struct.pack("<Q", 2**50) + b"{}")
    with pytest.raises(ValueError, match="in.safetensors is not a whole safetensors file"):
        open_safetensors(file)
