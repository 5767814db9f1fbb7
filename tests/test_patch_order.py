import torch

from bitdance_diffusers.patch_order import grid_to_patches, patch_positions, patches_to_grid


def test_patches_and_tokens_follow_raster_order():
    grid = torch.arange(24).reshape(1, 1, 4, 6)  # each token holds its own raster index
    patches = grid_to_patches(grid, patch_size=2)
    assert patches[0, :, :, 0].tolist() == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
        [12, 13, 18, 19],
        [14, 15, 20, 21],
        [16, 17, 22, 23],
    ]


def test_positions_are_the_row_and_column_of_each_token():
    positions = patch_positions(4, 6, patch_size=2)
    assert positions[1].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert positions[3, 0].tolist() == [2, 0]


def test_grid_is_restored():
    grid = torch.randn(2, 3, 8, 12)
    for patch_size in (1, 2, 4):
        assert torch.equal(patches_to_grid(grid_to_patches(grid, patch_size), 8, 12), grid)
