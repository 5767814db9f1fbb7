import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import codec
from bitdance_diffusers import BitDanceTokenizer
from bitdance_diffusers.code_files import read_code, read_header, write_state
from codec import main
from tests.examples.pictures import make_pictures, write_pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tokenizer of 4 x 4 pixels and 6 bits a token."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "vae"
    BitDanceTokenizer(
        block_out_channels=(4, 4, 4), latent_channels=6, layers_per_block=1, norm_num_groups=2
    ).save_pretrained(folder)
    return folder


def run(capsys, *arguments):
    """The exit status and what was printed."""
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    return status, capsys.readouterr()


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_there_and_back(model, tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures", 3, size=(40, 33))  # 33 is no multiple of 4
    make_pictures(pictures / "more", 2)
    Image.open(pictures / "0.png").save(pictures / "0.jpg")
    arguments = ("--model", model, "--device", "cpu")
    assert run(capsys, "encode", pictures, tmp_path / "codes", "--no_scores", *arguments)[0] == 0
    expected = ["0.jpg", "0.png", "1.png", "2.png", "more/000000.png", "more/000001.png"]
    assert names(tmp_path / "codes") == [f"{name}.bits" for name in expected]
    assert run(capsys, "decode", tmp_path / "codes", tmp_path / "decoded", *arguments)[0] == 0
    assert names(tmp_path / "decoded") == sorted(["0.jpg.png", *expected[1:]])

    vae, processor = BitDanceTokenizer.from_pretrained(model), VaeImageProcessor(do_resize=False)
    for name, padded_height in (("0.png", 36), ("more/000001.png", 12)):
        with Image.open(pictures / name) as image:
            picture = np.asarray(image)
        padded = np.pad(picture, [(0, padded_height - len(picture)), (0, 0), (0, 0)], mode="edge")
        with torch.no_grad():
            code = vae.encode(processor.preprocess(Image.fromarray(padded))).code
            decoded = processor.postprocess(vae.decode(code).sample)[0]
        file = read_code(tmp_path / "codes" / f"{name}.bits", vae.fingerprint())
        assert torch.equal(file.code.float(), code[0])
        assert file.header.image_size == picture.shape[:2]
        with Image.open(tmp_path / "decoded" / name) as image:
            assert np.array_equal(np.asarray(image), np.asarray(decoded)[: len(picture)])

    status, printed = run(capsys, "info", tmp_path / "codes" / "0.png.bits")
    assert status == 0 and "33 x 40 pixels" in printed.out and vae.fingerprint() in printed.out
    assert "9 x 10 tokens of 6 bits, 68 bytes" in printed.out


def test_the_scores_are_of_what_is_decoded(model, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    pictures = make_pictures(tmp_path / "pictures", 2, size=(24, 20))
    status, printed = run(capsys, "encode", pictures, tmp_path / "codes", "--model", model, "--device", "cpu")
    assert status == 0
    run(capsys, "decode", tmp_path / "codes", tmp_path / "decoded", "--model", model, "--device", "cpu")
    psnrs = []
    for name in names(pictures):
        with Image.open(pictures / name) as before, Image.open(tmp_path / "decoded" / name) as after:
            error = np.mean((np.asarray(before, np.float64) - np.asarray(after, np.float64)) ** 2)
        psnrs.append(10 * np.log10(255**2 / error))
    psnr, ssim = re.search(r"2 pictures: PSNR ([\d.]+) dB, SSIM (-?[\d.]+)", printed.out).groups()
    assert float(psnr) == pytest.approx(np.mean(psnrs), abs=0.02) and -1 <= float(ssim) <= 1


def test_bad_files_are_named_and_the_others_done(model, tmp_path, capsys):
    arguments = ("--model", model, "--device", "cpu")
    pictures = make_pictures(tmp_path / "pictures", 2)
    (pictures / "bad.png").write_bytes(b"no picture")
    status, printed = run(capsys, "encode", pictures, tmp_path / "codes", "--no_scores", *arguments)
    assert status == 1 and "bad.png" in printed.err
    codes = tmp_path / "codes"
    assert names(codes) == ["000000.png.bits", "000001.png.bits"]

    damaged = bytearray((codes / "000000.png.bits").read_bytes())
    damaged[60] ^= 1
    (codes / "damaged.bits").write_bytes(damaged)
    (codes / "cut.bits").write_bytes(damaged[:70])
    status, printed = run(capsys, "decode", codes, tmp_path / "decoded", *arguments)
    assert status == 1
    assert "damaged.bits is damaged" in printed.err and "cut.bits is truncated" in printed.err
    assert names(tmp_path / "decoded") == ["000000.png", "000001.png"]

    torch.manual_seed(1)
    other = BitDanceTokenizer(block_out_channels=(4, 4, 4), latent_channels=6, layers_per_block=1, norm_num_groups=2)
    other.save_pretrained(tmp_path / "other")
    code = codes / "000000.png.bits"
    status, printed = run(capsys, "decode", code, tmp_path / "one.png", "--model", tmp_path / "other")
    assert status == 1 and "of another tokenizer" in printed.err and not (tmp_path / "one.png").exists()
    status, printed = run(capsys, "info", codes / "damaged.bits")
    assert status == 2 and "damaged.bits is damaged" in printed.err


def test_a_half_drawn_picture_is_grey_where_it_is_not_drawn(t2i_pipeline, t2i_pipeline_path, tmp_path, capsys):
    pipeline = t2i_pipeline()
    generation = pipeline.prepare_generation(
        "a fox", height=16, width=16, num_inference_steps=1, generator=[torch.Generator().manual_seed(0)]
    )
    generation.advance()
    path, size = tmp_path / "half.bits", tuple(side * pipeline.vae_scale_factor for side in (4, 4))
    write_state(path, generation.state_dict()["pictures"][0], pipeline.vae.fingerprint(), size)
    status, printed = run(capsys, "info", path)
    assert status == 0 and "half drawn   1 of 4 patches" in printed.out
    assert run(capsys, "decode", path, tmp_path / "half.png", "--model", t2i_pipeline_path, "--device", "cpu")[0] == 0
    with Image.open(tmp_path / "half.png") as image:
        pixels = np.asarray(image)
    side = size[0] // 2
    assert (pixels[side:] == 128).all() and (pixels[:, side:] == 128).all() and pixels[:side, :side].std() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "nothing"}, "`input` is nothing"),
        ({"model": "nothing"}, "`model` has to be"),
        ({"input": "empty"}, "a folder without files"),
        ({"output": "pictures/000000.png"}, "a file; for a folder"),
        ({"input": "pictures/000000.png", "output": "pictures"}, "`output` is pictures"),
    ],
)
def test_bad_arguments_are_named(model, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures", 1)
    (tmp_path / "empty").mkdir()
    arguments = {"input": "pictures", "output": "codes", "model": model} | change
    status, printed = run(
        capsys, "encode", arguments["input"], arguments["output"], "--model", arguments["model"], "--no_scores"
    )
    assert status == 2 and message in printed.err and not (tmp_path / "codes").exists()


def test_two_names_that_would_become_one_are_refused(model, tmp_path, capsys):
    codes = tmp_path / "codes"
    codes.mkdir()
    (codes / "a.bits").touch()
    (codes / "a.png.bits").touch()
    status, printed = run(capsys, "decode", codes, tmp_path / "decoded", "--model", model)
    assert status == 2 and "two files would be written to" in printed.err


def test_two_processes_share_the_files(model, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 5)
    (pictures / "000009.png").write_bytes(b"no picture")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [
        codec.__file__,
        "encode",
        pictures,
        tmp_path / "codes",
        "--model",
        model,
        "--no_scores",
    ]
    result = subprocess.run(
        command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0 and "000009.png" in result.stderr
    assert names(tmp_path / "codes") == [f"{i:06d}.png.bits" for i in range(5)]
    assert all(read_header(path).num_bits == 6 for path in (tmp_path / "codes").iterdir())
    assert result.stderr.count("cannot be read") == 1
