import pytest

from tests.examples.training_runs import reset_accelerator


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state for the whole process, where each test is a run of its own."""
    yield
    reset_accelerator()
