import pytest
import torch
from accelerate import Accelerator

from training.optimization import Steps


def read(steps, step, loss, norm=1.0):
    steps.add({"loss": torch.tensor(loss)})
    return steps.read(step, {"gradient_norm": torch.tensor(norm)})


def test_values_of_a_step_are_means_over_its_batches():
    steps = Steps(Accelerator(cpu=True), 3)
    steps.add({"loss": torch.tensor(1.0), "part": torch.tensor(5.0)})
    steps.add({"loss": torch.tensor(2.0), "part": torch.tensor(7.0)})
    values, finite = steps.read(0, {"gradient_norm": torch.tensor(4.0)})
    assert values == {"loss": 1.5, "part": 6.0, "gradient_norm": 4.0} and finite
    assert read(steps, 1, 3.0)[0]["loss"] == 3.0


def test_steps_that_are_not_finite_are_counted_and_end_the_run():
    steps = Steps(Accelerator(cpu=True), 3)
    nan, infinite = float("nan"), float("inf")
    assert not read(steps, 0, nan)[1] and not read(steps, 1, 1.0, infinite)[1]
    assert read(steps, 2, 1.0)[1]
    assert steps.state_dict() == {"skipped": 2, "skipped_in_a_row": 0}
    assert not read(steps, 3, nan)[1]
    resumed = Steps(Accelerator(cpu=True), 3)
    resumed.load_state_dict(steps.state_dict())
    assert not read(resumed, 4, infinite)[1]
    with pytest.raises(FloatingPointError, match=r"at step 5 \(loss nan\), as in 3 steps in a row"):
        read(resumed, 5, nan)
