import pytest
import torch
from accelerate import Accelerator

from training.optimization import check_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_the_run(value):
    with pytest.raises(FloatingPointError, match="loss at step 3"):
        check_finite(Accelerator(cpu=True), "loss", torch.tensor(value), 3)
