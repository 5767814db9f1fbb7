import sys

import pytest
import torch

from training import reconstruction


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 16, 16)
    noisy = x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    torch.testing.assert_close(reconstruction.psnr(x, noisy), torch.tensor([20.0, 40.0]))


def test_ssim():
    x = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(reconstruction.ssim(x, x), torch.ones(2))
    # Two constants differ in luminance alone: (2ab + c1) / (a^2 + b^2 + c1) of values in [0, 1], with c1 = 0.01^2.
    dark, bright = torch.full((1, 3, 16, 16), -0.8), torch.full((1, 3, 16, 16), -0.4)
    expected = (2 * 0.1 * 0.3 + 1e-4) / (0.1**2 + 0.3**2 + 1e-4)
    torch.testing.assert_close(reconstruction.ssim(dark, bright), torch.tensor([expected]), atol=1e-3, rtol=0)
    assert (reconstruction.ssim(x, -x) < 0).all()


def test_use_of_the_code():
    code = torch.ones(1, 4, 2, 2)
    assert reconstruction.bit_balance(code) == 0
    assert reconstruction.codes_used(code, 2) == 0.25
    code[:, 0, 0] = -1  # the first bit is +1 half of the time, and the first group has two of its four codewords
    assert reconstruction.bit_balance(code) == 0.25
    assert reconstruction.codes_used(code, 2) == (0.5 + 0.25) / 2
    assert reconstruction.codes_used(code, 1) == 2 / 16


def test_hinge_loss():
    assert reconstruction.hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])) == (0.5 + 1) / 2


def test_smallest_picture_of_the_discriminator():
    discriminator = reconstruction.PatchDiscriminator(3)
    side = reconstruction.MIN_DISCRIMINATOR_SIDE
    assert discriminator(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 3, side - 1, side - 1))


def test_lpips_without_its_file_or_library(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="absent.safetensors does not exist"):
        reconstruction.load_lpips(tmp_path / "absent.safetensors")
    (tmp_path / "lpips.safetensors").touch()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips"):
        reconstruction.load_lpips(tmp_path / "lpips.safetensors")
