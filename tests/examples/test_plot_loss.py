import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import plot_loss


def write_log(folder, values, first_step=1):
    with SummaryWriter(str(folder)) as writer:
        for step, value in enumerate(values, start=first_step):
            writer.add_scalar("loss", value, step)


def test_steps_are_counted_over_runs_and_a_resumed_part_replaces_the_old(tmp_path):
    write_log(tmp_path / "first" / "a", [4.0, 3.0, 9.0])
    write_log(tmp_path / "first" / "b", [2.0, 1.0], first_step=3)
    write_log(tmp_path / "second", [0.5])
    steps, losses = plot_loss.read_losses([tmp_path / "first", tmp_path / "second"], "loss")
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert losses.tolist() == [4.0, 3.0, 2.0, 1.0, 0.5]


def test_curve(tmp_path):
    write_log(tmp_path / "logs", np.linspace(2, 0.1, 40))
    output = tmp_path / "loss.png"
    plot_loss.main([str(tmp_path / "logs"), "--per_step", "8", "--output", str(output)])
    pixels = np.asarray(Image.open(output)).astype(int)
    rows, columns = np.nonzero((np.abs(pixels - plot_loss.LINE) < 40).all(axis=-1))
    left, right = rows[columns < 120].mean(), rows[columns > 600].mean()
    assert right > left + 150  # it falls


def test_a_folder_without_the_value(tmp_path, capsys):
    write_log(tmp_path / "logs", [1.0])
    with pytest.raises(SystemExit):
        plot_loss.main([str(tmp_path / "logs"), "--tag", "psnr", "--output", str(tmp_path / "a.png")])
    assert "no 'psnr'" in capsys.readouterr().err
