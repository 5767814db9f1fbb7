import torch

from training.randomness import random_generator


def test_random_generators_are_a_function_of_their_position():
    def draw(*position):
        return torch.rand(4, generator=random_generator(*position)).tolist()

    assert draw(0, 5) == draw(0, 5)
    assert len({tuple(draw(*position)) for position in ((0, 5), (5, 0), (0, 6), (0, 5, 1))}) == 4
