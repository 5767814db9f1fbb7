"""Codes as files."""

import copy
import hashlib
import json
import random
import struct

import pytest
import torch

from bitdance_diffusers import BitDanceTokenizer
from bitdance_diffusers.code_files import HEADER, read_code, read_header, write_code, write_state

FINGERPRINT = "5a" * 32


def random_code(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).sign()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.bits"


def forge(path, **fields):
    """Change header fields of a file and make its checksum fit."""
    names = ["magic", "version", "kind", "bits", "h", "w", "height", "width", "fingerprint", "state"]
    content = path.read_bytes()
    header = dict(zip(names, HEADER.unpack(content[: HEADER.size]), strict=True)) | fields
    body = HEADER.pack(*header.values()) + content[HEADER.size : -32]
    path.write_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize("shape", [(32, 64, 64), (1, 1, 1), (3, 5, 7), (16, 8, 8)])
def test_every_bit_comes_back(path, shape):
    code = random_code(*shape)
    write_code(path, code, FINGERPRINT, (shape[1] * 8, shape[2] * 8 - 3))
    file = read_code(path, FINGERPRINT)
    assert torch.equal(file.code, code.to(torch.int8)) and file.state is None
    assert file.header == read_header(path)
    assert file.header.image_size == (shape[1] * 8, shape[2] * 8 - 3) and file.header.fingerprint == FINGERPRINT
    assert path.stat().st_size == 88 + -(-code.numel() // 8)
    assert [one.name for one in path.parent.iterdir()] == ["a.bits"]


def test_a_picture_of_1024_pixels_takes_16_kib(path):
    write_code(path, random_code(32, 64, 64), FINGERPRINT, (1024, 1024))
    assert read_header(path).code_bytes == 16 * 1024


def test_the_packed_bits_are_the_tokenizers(path):
    vae = BitDanceTokenizer(block_out_channels=(4, 4), latent_channels=16, layers_per_block=1, norm_num_groups=2)
    code = random_code(16, 3, 5)
    write_code(path, code, FINGERPRINT, (6, 10))
    assert path.read_bytes()[HEADER.size : -32] == vae.pack(code[None]).numpy().tobytes()


def test_flips_truncations_and_foreign_files_are_refused(path):
    write_code(path, random_code(16, 8, 8), FINGERPRINT, (64, 64))
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(64):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            read_code(path, FINGERPRINT)
    for length in (0, 5, 8, HEADER.size - 1, HEADER.size, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{path} is (truncated|no code file)"):
            read_code(path, FINGERPRINT)
    for foreign in (b"\x89PNG\r\n\x1a\n" + bytes(200), whole + b"x", b"BD" * 100):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match=f"{path} is (no code file|too long)"):
            read_code(path, FINGERPRINT)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="of another tokenizer"):
        read_code(path, "00" * 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"h": 65535, "w": 65535, "bits": 65535, "height": 65535, "width": 65535}, "65535 bits"),
        ({"h": 65535, "height": 65535}, "65535 x 8 tokens"),
        ({"h": 4096, "w": 4096, "bits": 1024, "height": 4096, "width": 4096}, "a code of 2147483648"),
        ({"state": 2**32 - 1}, "its kind is 0 with a state"),
        ({"state": 2**32 - 1, "kind": 1}, "a state of 4294967295"),
        ({"kind": 2}, "its kind is 2"),
        ({"h": 0}, "0 x 8 tokens"),
        ({"bits": 0}, "0 bits"),
        ({"height": 3}, "are 3 x 64 pixels"),
        ({"h": 4000, "height": 4000}, "is truncated"),
        ({"version": 2}, "version 2"),
    ],
)
def test_a_hostile_header_is_refused_before_anything_is_read(path, fields, message, monkeypatch):
    write_code(path, random_code(16, 8, 8), FINGERPRINT, (64, 64))
    forge(path, **fields)
    monkeypatch.setattr("bitdance_diffusers.code_files._unpack", None)  # no code is unpacked
    monkeypatch.setattr("bitdance_diffusers.code_files.hashlib", None)  # nor all of the file read
    for read in (read_header, read_code):
        with pytest.raises(ValueError, match=message):
            read(path)


def test_what_is_no_code_is_not_written(path):
    for code in (torch.zeros(2, 3, 3), random_code(1, 2, 3, 3)):
        with pytest.raises(ValueError, match="`code` has shape"):
            write_code(path, code, FINGERPRINT, (9, 9))
    with pytest.raises(ValueError, match="3 x 3 tokens are 2 x 9 pixels"):
        write_code(path, random_code(2, 3, 3), FINGERPRINT, (2, 9))
    assert not path.exists()


@pytest.fixture(params=["text", "linear", "text, partly given"])
def start(request, t2i_pipeline, class_pipeline):
    """`start()`: two pictures of four patches or more before their first patch."""
    seeds = (1, 2)
    if request.param == "linear":
        pipeline, call = class_pipeline("class_p4"), {"class_labels": [1, 2], "guidance_schedule": "linear"}
    else:
        pipeline, call = t2i_pipeline(), {"prompt": ["a fox", "two"], "height": 16, "width": 16}
        call |= {"guidance_interval": (0.1, 0.8), "early_stop_threshold": 0.99, "parallel_evaluations": 2}
    if "given" in request.param:
        call["latents"] = torch.zeros(2, pipeline.transformer.config.in_channels, 4, 4)
        call["latents"][:, :, 2:, :2] = 1
    return lambda: pipeline.prepare_generation(
        **call,
        guidance_scale=2.5,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )


def test_a_half_drawn_picture_goes_on_from_its_file(start, tmp_path):
    generation = start()
    generation.advance()
    generation.advance()
    paths = [tmp_path / f"{i}.bits" for i in range(2)]
    for path, state in zip(paths, generation.state_dict()["pictures"], strict=True):
        write_state(path, state, FINGERPRINT, (64, 64))
    files = [read_code(path, FINGERPRINT) for path in paths]
    assert torch.equal(torch.stack([file.code for file in files]).float(), generation.code)
    resumed = start()
    resumed.load_state_dict({"pictures": [file.state for file in files], "generator": None})
    for run in (generation, resumed):
        for _ in run:
            pass
    assert torch.equal(resumed.code, generation.code)


def test_a_forged_state_is_refused(start, path):
    generation = start()
    generation.advance()
    write_state(path, generation.state_dict()["pictures"][0], FINGERPRINT, (64, 64))
    content = path.read_bytes()
    code_end = HEADER.size + read_header(path).code_bytes
    state = json.loads(content[code_end:-32])

    def write(text):
        body = content[: HEADER.size - 4] + struct.pack("<I", len(text)) + content[HEADER.size : code_end] + text
        path.write_bytes(body + hashlib.sha256(body).digest())

    def change(**fields):
        changed = copy.deepcopy(state)
        for name, value in fields.items():
            (changed["settings"] if name in changed["settings"] else changed)[name] = value
        return json.dumps(changed).encode()

    write(change())
    assert read_code(path).state["index"] == generation.pictures[0].index
    without = {name: value for name, value in state.items() if name != "generator"}
    for text in (
        b"{}",
        b"[1, 2]",
        b"\xff",
        b"[" * 100_000,
        json.dumps(without).encode(),
        change(patch_size=3),
        change(patch_size=0),
        change(index=10**9),
        change(index=True),
        change(index=4),  # of which three are not known
        change(num_given=[0]),
        change(num_given="0000"),
        change(known="AA=="),
        change(known="!"),
        change(generator="not base64"),
        change(num_inference_steps=10**9),
        change(num_inference_steps="many"),
        change(guidance_scale=float("nan")),
        change(guidance_interval=[1, 0]),
        change(early_stop_threshold=2),
        change(parallel_evaluations=1),
        change(parallel_tolerance=-1),
        change(first_step=3),
        change(settings={}),
    ):
        write(text)
        with pytest.raises(ValueError, match=f"{path} holds no picture"):
            read_code(path)


def test_a_fingerprint_is_of_weights_and_config_whatever_the_copys_dtype(tmp_path):
    config = {"block_out_channels": (4, 4), "latent_channels": 3, "layers_per_block": 1, "norm_num_groups": 2}
    torch.manual_seed(0)
    vae = BitDanceTokenizer(**config)
    fingerprint = vae.fingerprint()
    vae.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert BitDanceTokenizer.from_pretrained(tmp_path, dtype=dtype).fingerprint() == fingerprint
    other = BitDanceTokenizer(**config | {"norm_num_groups": 4})
    other.load_state_dict(vae.state_dict())
    assert other.fingerprint() != fingerprint
    vae.decoder.conv_out.bias.data += 1
    assert vae.fingerprint() != fingerprint
