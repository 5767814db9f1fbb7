"""The binary autoencoder: images to codes of -1/+1 and back.

Shapes: B images, H x W pixels, C bits per token, h x w tokens with H = h * spatial_compression_ratio.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from ..loaders.original_autoencoder import OriginalAutoencoderMixin
from .checked_loading import CheckedLoadingMixin

NORM_EPS = 1e-6


@dataclass
class BitDanceTokenizerOutput(BaseOutput):
    """
    Output of [`BitDanceTokenizer.encode`].

    Args:
        code (`torch.Tensor` of shape `(B, C, h, w)`):
            -1 or +1, the sign of `logits` (a logit of exactly 0 gives -1). Its gradient is passed to `logits`
            unchanged (straight-through), so that a loss on the decoded code trains the encoder.
        logits (`torch.Tensor` of shape `(B, C, h, w)`):
            The encoder's output before the sign.
    """

    code: torch.Tensor
    logits: torch.Tensor


class BitDanceTokenizer(CheckedLoadingMixin, OriginalAutoencoderMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    Autoencoder with a binary code (BitDance, arXiv 2602.14041): a convolutional encoder whose output's signs are the
    code, and a convolutional decoder whose group norms at the entrance of every level are modulated by the code's own
    mean and deviation.

    Args:
        in_channels (`int`, defaults to 3): Channels of the images that `encode` takes.
        out_channels (`int`, defaults to 3): Channels of the images that `decode` gives.
        latent_channels (`int`, defaults to 32): C, bits per token.
        block_out_channels (`tuple[int, ...]`): Width of each level; every level but the last halves the resolution.
        stem_channels (`int`, *optional*): Width of the encoder's first convolution, `block_out_channels[0]` if `None`.
        layers_per_block (`int`, defaults to 4): Residual blocks per level and between encoder and code.
        stochastic_decoder (`bool`, defaults to `False`):
            Whether the decoder takes a standard-normal noise of the code's shape beside the code.
        norm_num_groups (`int`, defaults to 32): Groups of every group norm; it divides every width.
        patch_size (`int`, defaults to 1):
            Pixels are unshuffled into channels, `patch_size` x `patch_size` at a time, before the first convolution
            and shuffled back after the last one.

    Raises:
        ValueError: where a field is out of range or fields contradict each other; the message names them.
    """

    _supports_gradient_checkpointing = True
    # Modules whose arithmetic joins the outputs of several submodules, and so stay on one device.
    _no_split_modules = ["BitDanceResnetBlock", "BitDanceAdaptiveGroupNorm"]
    _repeated_blocks = None  # the blocks differ in width, so that each would be a graph of its own
    _skip_layerwise_casting_patterns = ["norm"]
    _group_offload_block_modules = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (256, 256, 512, 512, 1024),
        stem_channels: int | None = None,
        layers_per_block: int = 4,
        stochastic_decoder: bool = False,
        norm_num_groups: int = 32,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        _check_config(self.config)
        self.register_to_config(  # what a file can hold, were they numbers of NumPy's
            in_channels=int(in_channels),
            out_channels=int(out_channels),
            latent_channels=int(latent_channels),
            block_out_channels=type(block_out_channels)(int(width) for width in block_out_channels),
            stem_channels=None if stem_channels is None else int(stem_channels),
            layers_per_block=int(layers_per_block),
            norm_num_groups=int(norm_num_groups),
            patch_size=int(patch_size),
        )
        self.encoder = BitDanceEncoder(
            in_channels,
            latent_channels,
            tuple(block_out_channels),
            block_out_channels[0] if stem_channels is None else stem_channels,
            layers_per_block,
            norm_num_groups,
            patch_size,
        )
        self.decoder = BitDanceDecoder(
            2 * latent_channels if stochastic_decoder else latent_channels,
            out_channels,
            latent_channels,
            tuple(block_out_channels),
            layers_per_block,
            norm_num_groups,
            patch_size,
        )

        self.use_slicing = False
        self.use_tiling = False
        tile = max(4, 512 // self.spatial_compression_ratio)
        self._set_tiles(tile, tile, tile - tile // 4, tile - tile // 4)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per token along each side."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        r"""
        Encode and decode images larger than a tile in overlapping tiles, blended linearly where they overlap, so that
        memory does not grow with the image. All sizes are in pixels and multiples of `spatial_compression_ratio`; what
        is `None` stays as it is (at first tiles of 512 x 512 pixels that
        overlap by a quarter).

        The result is an approximation. The adaptive group norms take their modulation from the whole code, tiled or
        not, but every group norm normalises by its own tile, and a tile sees nothing beyond its edge. Measured on
        48 x 48 random tokens of a 5-level tokenizer with untrained weights, whose images span about [-1, 1]: the
        decoded values differ from the untiled ones by 0.017 on average and 0.24 at most with the first tiles of
        32 x 32 tokens, and by 0.14 and 1.04 with tiles of 8 x 8 tokens. Prefer large tiles.

        Raises:
            ValueError: if a size is not a positive multiple of `spatial_compression_ratio`, or a stride exceeds its
                tile.
        """
        ratio = self.spatial_compression_ratio
        tokens = []
        for name, value in (
            ("tile_sample_min_height", tile_sample_min_height),
            ("tile_sample_min_width", tile_sample_min_width),
            ("tile_sample_stride_height", tile_sample_stride_height),
            ("tile_sample_stride_width", tile_sample_stride_width),
        ):
            value = getattr(self, name) if value is None else value
            if value < 1 or value % ratio != 0:
                raise ValueError(f"`{name}` has to be a positive multiple of {ratio} pixels but is {value}.")
            tokens.append(value // ratio)
        for side, tile, stride in (("height", tokens[0], tokens[2]), ("width", tokens[1], tokens[3])):
            if stride > tile:
                raise ValueError(
                    f"`tile_sample_stride_{side}` ({stride * ratio}) has to be at most `tile_sample_min_{side}` "
                    f"({tile * ratio})."
                )
        self._set_tiles(*tokens)
        self.use_tiling = True

    def _set_tiles(self, height: int, width: int, stride_height: int, stride_width: int) -> None:
        """Set the sizes of a tile and the distances between two, in tokens."""
        ratio = self.spatial_compression_ratio
        self.tile_sample_min_height, self.tile_sample_min_width = height * ratio, width * ratio
        self.tile_sample_stride_height, self.tile_sample_stride_width = stride_height * ratio, stride_width * ratio

    @apply_forward_hook
    def encode(self, images: torch.Tensor, return_dict: bool = True) -> BitDanceTokenizerOutput | tuple[torch.Tensor]:
        """
        Encode images.

        Args:
            images (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                Pixels in [-1, 1]; H and W are multiples of `spatial_compression_ratio`.
            return_dict (`bool`, defaults to `True`): `False` gives the tuple `(code, logits)`.

        Raises:
            ValueError: if `images` has another shape.
        """
        self._check_images(images)
        if self.use_slicing and images.shape[0] > 1:
            logits = torch.cat([self._encode(image) for image in images.split(1)])
        else:
            logits = self._encode(images)

        code = torch.where(logits > 0, 1.0, -1.0).to(logits.dtype)
        if logits.requires_grad:
            # The difference is exactly 0: the code stays -1/+1 and its gradient goes to the logits.
            code = code + (logits - logits.detach())

        if not return_dict:
            return code, logits
        return BitDanceTokenizerOutput(code=code, logits=logits)

    @apply_forward_hook
    def decode(
        self,
        code: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decode a code.

        Args:
            code (`torch.Tensor` of shape `(B, C, h, w)`): -1 or +1, cast to the decoder's dtype; h * w is at least 2.
                With `enable_slicing` an image does not depend on its batch neighbours in any bit; without, a backend
                may choose other kernels for another batch size and so round differently.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of a stochastic decoder's noise, one draw of the code's shape in float32; a list has one
                generator per image. Without a stochastic decoder nothing is drawn.
            return_dict (`bool`, defaults to `True`): `False` gives the tuple `(sample,)`.

        Returns:
            [`DecoderOutput`] or `tuple`: `sample` of shape `(B, out_channels, H, W)`, about [-1, 1], not clamped.

        Raises:
            ValueError: if `code` has another shape or the list of generators another length than the batch.
        """
        code, mean, std = self._prepare_code(code, generator)
        if self.use_slicing and code.shape[0] > 1:
            slices = zip(code.split(1), mean.split(1), std.split(1), strict=True)
            sample = torch.cat([self._decode(*one) for one in slices])
        else:
            sample = self._decode(code, mean, std)

        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    @apply_forward_hook
    def decode_region(
        self,
        code: torch.Tensor,
        rows: tuple[int, int],
        columns: tuple[int, int],
        margin: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Decode a part of a code: its tokens of the rows and columns from the first number to before the second.

        The part is decoded with `margin` tokens around it, where there are as many, and cut out. That is an
        approximation of the same part of the whole picture: the adaptive norms take the statistics of the whole code,
        but every group norm normalises by what it sees.

        Args:
            code (`torch.Tensor` of shape `(B, C, h, w)`): as [`~.decode`] takes it.
            rows, columns: in tokens.
            generator: as [`~.decode`] takes it; noise is drawn for the whole code.

        Returns:
            `torch.Tensor`: `(B, out_channels, H, W)` of the part.

        Raises:
            ValueError: if `code` has another shape.
        """
        code, mean, std = self._prepare_code(code, generator)
        (top, bottom), (left, right) = rows, columns
        first_row, first_column = max(0, top - margin), max(0, left - margin)
        part = code[:, :, first_row : bottom + margin, first_column : right + margin]
        sample = self._decode(part, mean, std)
        ratio = self.spatial_compression_ratio
        kept_rows = slice((top - first_row) * ratio, (bottom - first_row) * ratio)
        return sample[:, :, kept_rows, (left - first_column) * ratio : (right - first_column) * ratio]

    def forward(
        self,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Reconstruct images: `decode(encode(sample).code)`, of shape `(B, out_channels, H, W)`. The gradient passes
        straight through the binarisation.
        """
        return self.decode(self.encode(sample).code, generator=generator, return_dict=return_dict)

    def pack(self, code: torch.Tensor) -> torch.Tensor:
        """
        Pack a code into bytes for storage.

        Args:
            code (`torch.Tensor` of shape `(B, C, h, w)`): -1 or +1.

        Returns:
            `torch.Tensor`: uint8 of shape `(B, h, w, ceil(C / 8))`; channel c is bit `c % 8` of byte `c // 8`, set
            where the code is +1.

        Raises:
            ValueError: if `code` has another shape or other values.
        """
        self._check_code(code)
        if not bool((code.abs() == 1).all()):
            raise ValueError("`code` has to hold only -1 and +1.")
        bits = (code > 0).permute(0, 2, 3, 1).to(torch.uint8)
        bits = F.pad(bits, (0, -self.config.latent_channels % 8)).unflatten(-1, (-1, 8))
        return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=-1, dtype=torch.uint8)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """
        Undo [`~BitDanceTokenizer.pack`].

        Args:
            packed (`torch.Tensor` of shape `(B, h, w, ceil(C / 8))`): uint8.

        Returns:
            `torch.Tensor`: the code of shape `(B, C, h, w)`, -1 or +1, in the model's dtype.

        Raises:
            ValueError: if `packed` has another shape or dtype.
        """
        channels = self.config.latent_channels
        if packed.dtype != torch.uint8 or packed.ndim != 4 or packed.shape[-1] != -(-channels // 8):
            raise ValueError(
                f"`packed` has to be uint8 of shape (B, h, w, {-(-channels // 8)}) but is {packed.dtype} of shape "
                f"{tuple(packed.shape)}."
            )
        bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        bits = bits.flatten(-2)[..., :channels].permute(0, 3, 1, 2)
        return bits.to(self.dtype) * 2 - 1

    def fingerprint(self) -> str:
        """
        SHA-256 of weights and config, 64 hexadecimal digits: what a code has to be decoded with. The weights are
        rounded to bfloat16 first, so that a float32 and a bfloat16 copy have the same.
        """
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
        return digest.hexdigest()

    def _check_images(self, images: torch.Tensor) -> None:
        ratio = self.spatial_compression_ratio
        channels = self.config.in_channels
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != channels or min(shape) < 1 or shape[2] % ratio != 0 or shape[3] % ratio != 0:
            raise ValueError(
                f"`images` has to be of shape (B, {channels}, H, W) with H and W positive multiples of {ratio} but is "
                f"of shape {shape}."
            )

    def _check_code(self, code: torch.Tensor) -> None:
        channels = self.config.latent_channels
        shape = tuple(code.shape)
        if len(shape) != 4 or shape[1] != channels or min(shape) < 1:
            raise ValueError(f"`code` has to be of shape (B, {channels}, h, w) but is of shape {shape}.")

    def _prepare_code(
        self, code: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the decoder takes: the checked code, beside it a stochastic decoder's noise; its mean and deviation."""
        self._check_code(code)
        if code.shape[2] * code.shape[3] < 2:
            raise ValueError(
                "`code` has to have at least two tokens, because its variance over the tokens is needed, but is of "
                f"shape {tuple(code.shape)}."
            )
        if isinstance(generator, list) and len(generator) != code.shape[0]:
            raise ValueError(
                f"`generator` has to be one generator or a list of one per image: {len(generator)} generators were "
                f"passed for {code.shape[0]} images."
            )
        code = code.to(self.dtype)
        mean, std = _code_statistics(code)
        if self.config.stochastic_decoder:
            # Drawn at once for the whole batch, so that slices and tiles see what the whole would see.
            noise = randn_tensor(code.shape, generator=generator, device=code.device, dtype=torch.float32)
            code = torch.cat([code, noise.to(code.dtype)], dim=1)
        return code, mean, std

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        if self.use_tiling:
            return self._run_tiled(self.encoder, images, self.spatial_compression_ratio, 1)
        return self.encoder(images)

    def _decode(self, code: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        if self.use_tiling:
            return self._run_tiled(lambda tile: self.decoder(tile, mean, std), code, 1, self.spatial_compression_ratio)
        return self.decoder(code, mean, std)

    def _run_tiled(
        self, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, input_scale: int, output_scale: int
    ) -> torch.Tensor:
        """Run overlapping tiles of `x` and blend the results; the scales are the values per token along a side."""
        ratio = self.spatial_compression_ratio
        height, width = self.tile_sample_min_height // ratio, self.tile_sample_min_width // ratio
        stride_height, stride_width = self.tile_sample_stride_height // ratio, self.tile_sample_stride_width // ratio
        overlap_height, overlap_width = height - stride_height, width - stride_width
        # A tile starts only where it reaches beyond the one before.
        tops = range(0, max(x.shape[2] // input_scale - overlap_height, 1), stride_height)
        lefts = range(0, max(x.shape[3] // input_scale - overlap_width, 1), stride_width)

        rows: list[list[torch.Tensor]] = []
        for top in tops:
            rows.append([])
            for left in lefts:
                rows_in = slice(top * input_scale, (top + height) * input_scale)
                columns_in = slice(left * input_scale, (left + width) * input_scale)
                tile = run(x[:, :, rows_in, columns_in])
                # The blended tiles before this one end with what blends into it.
                if top > 0:
                    tile = _blend(rows[-2][left // stride_width], tile, overlap_height * output_scale, dim=2)
                if left > 0:
                    tile = _blend(rows[-1][-1], tile, overlap_width * output_scale, dim=3)
                rows[-1].append(tile)

        def keep(tile: torch.Tensor, last_row: bool, last_column: bool) -> torch.Tensor:
            bottom = tile.shape[2] if last_row else stride_height * output_scale
            right = tile.shape[3] if last_column else stride_width * output_scale
            return tile[:, :, :bottom, :right]

        kept = [torch.cat([keep(tile, row is rows[-1], tile is row[-1]) for tile in row], dim=3) for row in rows]
        return torch.cat(kept, dim=2)


class BitDanceEncoder(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, C, h, w)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        stem_channels: int,
        num_layers: int,
        num_groups: int,
        patch_size: int,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.unshuffle = nn.PixelUnshuffle(patch_size)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, stem_channels, 3, padding=1, bias=False)
        widths = (stem_channels, *block_out_channels)
        self.down_blocks = nn.ModuleList(
            BitDanceDownBlock(widths[i], widths[i + 1], num_layers, num_groups, downsample=i < len(widths) - 2)
            for i in range(len(widths) - 1)
        )
        self.mid_block = BitDanceMidBlock(widths[-1], num_layers, num_groups)
        self.conv_norm_out = nn.GroupNorm(num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(self.unshuffle(images))  # (B, stem, H / patch_size, W / patch_size)
        for block in (*self.down_blocks, self.mid_block):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, C, h, w)


class BitDanceDecoder(nn.Module):
    """
    Code (B, in_channels, h, w), C bits and beside them a stochastic decoder's C channels of noise, to images
    (B, out_channels, H, W). `mean` and `std`, (B, C), are the statistics of the bits.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        num_layers: int,
        num_groups: int,
        patch_size: int,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        widths = (block_out_channels[-1], *reversed(block_out_channels))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = BitDanceMidBlock(widths[0], num_layers, num_groups)
        self.up_blocks = nn.ModuleList(
            BitDanceUpBlock(
                widths[i], widths[i + 1], latent_channels, num_layers, num_groups, upsample=i < len(widths) - 2
            )
            for i in range(len(widths) - 1)
        )
        self.conv_norm_out = nn.GroupNorm(num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels * patch_size**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(patch_size)

    def forward(self, code: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(code)  # (B, widths[0], h, w)
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        x = self._gradient_checkpointing_func(self.mid_block, x) if checkpointing else self.mid_block(x)
        for block in self.up_blocks:
            x = self._gradient_checkpointing_func(block, x, mean, std) if checkpointing else block(x, mean, std)
        return self.shuffle(self.conv_out(F.silu(self.conv_norm_out(x))))  # (B, out_channels, H, W)


class BitDanceDownBlock(nn.Module):
    """Residual blocks, then a halving of the resolution where one follows."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, num_groups)
        self.downsamplers = nn.ModuleList([BitDanceDownsample(out_channels)] if downsample else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in (*self.resnets, *self.downsamplers):
            x = module(x)
        return x


class BitDanceMidBlock(nn.Module):
    """Residual blocks at the code's resolution."""

    def __init__(self, channels: int, num_layers: int, num_groups: int) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, num_layers, num_groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class BitDanceUpBlock(nn.Module):
    """The code's modulation, residual blocks, then a doubling of the resolution where one follows."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        num_layers: int,
        num_groups: int,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.adaptive_norm = BitDanceAdaptiveGroupNorm(in_channels, latent_channels, num_groups)
        self.resnets = _resnets(in_channels, out_channels, num_layers, num_groups)
        self.upsamplers = nn.ModuleList([BitDanceUpsample(out_channels)] if upsample else [])

    def forward(self, x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        x = self.adaptive_norm(x, mean, std)
        for module in (*self.resnets, *self.upsamplers):
            x = module(x)
        return x


class BitDanceResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(F.silu(self.norm1(x)))
        x = self.conv2(F.silu(self.norm2(x)))
        return x + shortcut


class BitDanceAdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are linear in the code's deviation and mean."""

    def __init__(self, channels: int, latent_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=NORM_EPS, affine=False)
        self.gamma = nn.Linear(latent_channels, channels)
        self.beta = nn.Linear(latent_channels, channels)

    def forward(self, x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        gamma, beta = self.gamma(std), self.beta(mean)  # (B, channels)
        return self.norm(x) * gamma[:, :, None, None] + beta[:, :, None, None]


class BitDanceDownsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class BitDanceUpsample(nn.Module):
    """Convolution to four times the channels, which become 2 x 2 positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The channel index is (row * 2 + column) * channels + channel; pixel_shuffle has the channel outermost.
        x = self.conv(x).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return F.pixel_shuffle(x, 2)


def _resnets(in_channels: int, out_channels: int, num_layers: int, num_groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        BitDanceResnetBlock(in_channels if j == 0 else out_channels, out_channels, num_groups)
        for j in range(num_layers)
    )


def _code_statistics(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (of the unbiased variance) over the tokens, per image and bit: two tensors (B, C)."""
    var, mean = torch.var_mean(code.float(), dim=(2, 3))
    return mean.to(code.dtype), (var + NORM_EPS).sqrt().to(code.dtype)


def _blend(before: torch.Tensor, tile: torch.Tensor, overlap: int, dim: int) -> torch.Tensor:
    """Go over linearly from the last `overlap` lines of `before` to the first ones of `tile`."""
    # The last tile of a row or column may be shorter than a whole one, but never than the overlap.
    start = before.narrow(dim, before.shape[dim] - overlap, overlap)
    shape = [-1 if d == dim else 1 for d in range(4)]
    weight = (torch.arange(overlap, dtype=tile.dtype, device=tile.device) / max(overlap, 1)).view(shape)
    mixed = torch.lerp(start, tile.narrow(dim, 0, overlap), weight)
    return torch.cat([mixed, tile.narrow(dim, overlap, tile.shape[dim] - overlap)], dim=dim)


def _check_config(config: dict[str, Any]) -> None:
    widths = config["block_out_channels"]
    if not isinstance(widths, list | tuple) or len(widths) == 0:
        raise ValueError(f"`block_out_channels` has to be a list with one width per level but is {widths!r}.")
    numbers = {f"block_out_channels[{i}]": width for i, width in enumerate(widths)}
    if config["stem_channels"] is not None:
        numbers["stem_channels"] = config["stem_channels"]
    normalised = dict(numbers)
    for name in (
        "in_channels",
        "out_channels",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "patch_size",
    ):
        numbers[name] = config[name]
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` has to be a positive integer but is {value!r}.")
    for name, width in normalised.items():
        if width % config["norm_num_groups"] != 0:
            raise ValueError(
                f"`{name}` ({width}) has to be divisible by `norm_num_groups` ({config['norm_num_groups']})."
            )
    if not isinstance(config["stochastic_decoder"], bool):
        raise ValueError(f"`stochastic_decoder` has to be true or false but is {config['stochastic_decoder']!r}.")
