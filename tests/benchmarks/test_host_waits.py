import pytest
import torch
from host_waits import MetaWaits, count_waits


def test_what_counts_as_a_wait():
    tensor, here = torch.ones(2, device="meta"), torch.ones(2)
    with MetaWaits() as waits:
        here.tolist(), here.sum().item(), (tensor * 2).sum()
        here.to("meta", non_blocking=True)
        assert waits.count == 0
        tensor.sum().item(), tensor.tolist(), bool(tensor[0]), tensor.cpu(), here.to("meta")
        assert waits.count == 5


@pytest.mark.parametrize("options", [[], ["--use_ema", "--gradient_accumulation_steps", "2"]])
def test_a_step_waits_once(t2i_pipeline_path, tmp_path, options):
    arguments = ["--pretrained_model_name_or_path", str(t2i_pipeline_path), "--icons", "20", "--resolution", "16"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--train_batch_size", "2", "--max_train_steps", "3"]
    assert count_waits([*arguments, *options]) == [1, 1]
