"""The original's ImageNet models: the pickle that its training writes.

Its settings are read off the tensors' shapes and the pickled `args`; the number of attention heads is known for the
released models (BitDance-B, -L and -H) and otherwise asked for.

The names of the 1000 classes in `imagenet_labels.txt` are the lemmas of WordNet 3.0 (Princeton University), one line a
class in the order of ILSVRC 2012, synonyms separated by ", ".
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from ..models.autoencoder_bitdance import BitDanceTokenizer
from ..models.transformer_bitdance_class import BitDanceClassTransformer
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler
from .checkpoint_files import (
    Checkpoint,
    StoredTensor,
    check_dtype,
    checkpoint_from_state_dict,
    load_tensors,
    match_tensors,
    naming,
    read_pickle,
    state_dict_shapes,
)
from .hub_files import pop_hub_arguments, resolve_file
from .original_names import (
    class_config_from_original,
    class_tensor_from_original,
    class_tensor_shape_to_original,
    class_transformer_key_to_original,
)

IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.txt")
# The guidance scale of the paper's best FID, by the released model and the tokens P of a patch.
RELEASED_GUIDANCE_SCALES = {
    ("BitDance-B", 1): 3.2,
    ("BitDance-B", 4): 3.9,
    ("BitDance-B", 16): 6.1,
    ("BitDance-L", 1): 4.0,
    ("BitDance-H", 1): 4.55,
}


def open_training_pickle(file: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """
    Open the pickle that the original's training writes.

    Returns:
        `tuple`: the averaged weights, or the trained ones where there are none, without the autoencoder (`vae.*`); and
        the settings in `args`.

    Raises:
        ValueError: the file is damaged, its pickle asks for another class than `argparse.Namespace`, or it holds no
            weights or no settings.
    """
    content = read_pickle(file, allowed=(argparse.Namespace,))
    if not isinstance(content, dict):
        raise ValueError(f"{file} has to hold a dictionary but holds a {type(content).__name__}.")
    weights = content.get("ema")
    if weights is None or weights == {}:
        weights = content.get("model")
    if not isinstance(weights, dict):
        raise ValueError(f'{file} has to hold a dictionary of tensors under "ema" or "model".')
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f'{file} has to hold an argparse.Namespace under "args" but holds a {type(args).__name__}.')
    weights = {key: value for key, value in weights.items() if not str(key).startswith("vae.")}
    return checkpoint_from_state_dict(file, weights), vars(args)


@dataclass(frozen=True)
class OpenedClassModel:
    """
    An original class-conditional model whose weights have not been read.

    Args:
        file: The pickle.
        args: Its settings.
        transformer: Without memory (on the meta device).
        tensors: Of the transformer, by their names in it.
        scheduler: As its settings ask for.
    """

    file: Path
    args: dict[str, Any]
    transformer: BitDanceClassTransformer
    tensors: dict[str, StoredTensor]
    scheduler: BinaryDiffusionScheduler

    def check_autoencoder(self, vae: BitDanceTokenizer, name: str) -> None:
        """Raises a `ValueError` where `vae`, which messages call `name`, cannot be this model's autoencoder."""
        config, ratio = self.transformer.config, vae.spatial_compression_ratio
        if vae.config.latent_channels != config.in_channels:
            raise ValueError(
                f"{name} is an autoencoder of {vae.config.latent_channels} bits a token, but the model in "
                f"{self.file} has {config.in_channels} (`proj_in.w1.weight`)."
            )
        sizes = {"down_size": ratio, "image_size": config.sample_size * ratio}
        for field, size in sizes.items():
            if self.args.get(field, size) != size:
                raise ValueError(
                    f"{self.file}: `args.{field}` is {self.args[field]!r}, but with the autoencoder in {name} of "
                    f"{ratio} pixels a token, `pos_for_diff.weight` of shape "
                    f"{(config.sample_size**2, config.hidden_size)} says {size}."
                )

    def pipeline_defaults(self, label_names: Path | None = None) -> dict[str, Any]:
        """
        What the pipeline adds: the released model's guidance scale, and the names of the classes.

        Args:
            label_names: As in [`read_label_names`]; `None` is ImageNet-1k's for 1000 classes, and none for any other.
        """
        config, defaults = self.transformer.config, {}
        guidance_scale = RELEASED_GUIDANCE_SCALES.get((self.args.get("model"), config.patch_size**2))
        if guidance_scale is not None:
            defaults["default_guidance_scale"] = guidance_scale
        if label_names is None and config.num_classes == 1000:
            label_names = IMAGENET_LABELS
        if label_names is not None:
            defaults["label_names"] = read_label_names(label_names, config.num_classes)
        return defaults


def open_class_to_image(file: Path, num_attention_heads: int | None) -> OpenedClassModel:
    """
    Open the pickle of an original class-conditional model, settings first.

    Args:
        num_attention_heads: Of the transformer; `None` asks `args.model` for a released model.

    Raises:
        ValueError: as [`open_training_pickle`] and [`class_config_from_original`], or tensors are missing, unknown or
            of other shapes.
    """
    checkpoint, args = open_training_pickle(file)
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    with naming(file):
        transformer_config, scheduler_config = class_config_from_original(shapes, args, num_attention_heads)
        scheduler = BinaryDiffusionScheduler(**scheduler_config)
        with torch.device("meta"):
            transformer = BitDanceClassTransformer(**transformer_config)
    return OpenedClassModel(file, args, transformer, _match_transformer(transformer, checkpoint), scheduler)


def _match_transformer(transformer: BitDanceClassTransformer, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Match the original's tensors whole, then name what of each belongs to a tensor of the transformer."""
    shapes = state_dict_shapes(transformer)
    expected = {}
    for key, shape in shapes.items():
        original, _, _ = class_transformer_key_to_original(key)
        expected[original] = (original, class_tensor_shape_to_original(key, shape))
    originals = match_tensors(checkpoint, expected)

    def take(key: str, original: StoredTensor) -> StoredTensor:
        return replace(
            original,
            shape=shapes[key],
            read=lambda: class_tensor_from_original(key, original.read(), transformer.config.num_attention_heads),
        )

    return {key: take(key, originals[class_transformer_key_to_original(key)[0]]) for key in shapes}


def read_label_names(file: Path, num_classes: int) -> list[str]:
    """
    Read the names of the classes, one a line.

    Raises:
        ValueError: the file does not exist, is not UTF-8, or does not have one name for every class.
    """
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`--label_names` {file} cannot be read: {error}") from error
    if len(names) != num_classes:
        raise ValueError(f"`--label_names` {file} has {len(names)} lines, but the model has {num_classes} classes.")
    if "" in names:
        raise ValueError(f"`--label_names` {file}: line {names.index('') + 1} is empty.")
    return names


class OriginalClassToImageMixin:
    """Goes before `DiffusionPipeline` in the bases of a class-conditional pipeline."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        vae: str | Path | BitDanceTokenizer,
        vae_config: str | Path | None = None,
        num_attention_heads: int | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        Load an original ImageNet checkpoint: the averaged weights (`ema`) of the pickle that the original's training
        writes, or `model` where it has none. The pickle may hold plain tensors, containers and an `argparse.Namespace`
        only.

        Args:
            pretrained_model_link_or_path: A file, or the link of one on the Hub
                (https://huggingface.co/OWNER/REPOSITORY/blob/main/FILE).
            vae: The autoencoder, or a file (or link) of one, as in [`BitDanceTokenizer.from_single_file`].
            vae_config: The settings of an autoencoder's file, as `config` there.
            num_attention_heads: Of the transformer; needed unless the checkpoint says that it is BitDance-B, -L or -H.
            dtype: Of the weights, float32 by default. An autoencoder that is given keeps its own.
            kwargs: `cache_dir`, `force_download`, `local_files_only`, `token` and `revision` of a download, and
                arguments of the pipeline (`scheduler`, `label_names`, `default_guidance_scale`, ...).

        Raises:
            ValueError, TypeError: for a file that is damaged, incomplete, contradicts its settings or the other one or
                holds more than is allowed, and for a wrong argument.
            OSError: a file cannot be downloaded.
        """
        hub_arguments = pop_hub_arguments(kwargs)
        check_dtype("dtype", dtype)
        expected, optional = cls._get_signature_keys(cls)
        unknown = [name for name in kwargs if name not in {*expected, *optional} - {"transformer"}]
        if unknown:
            raise TypeError(f"`{unknown[0]}` is not an argument of `from_single_file`.")
        if not isinstance(vae, (str, Path, BitDanceTokenizer)):
            raise TypeError(f"`vae` is {vae!r}; it has to be a BitDanceTokenizer or the file of one.")
        if isinstance(vae, BitDanceTokenizer) and vae_config is not None:
            raise ValueError(f"`vae_config` is {vae_config!r}, but `vae` is no file that has settings.")

        file = resolve_file(pretrained_model_link_or_path, **hub_arguments)
        opened = open_class_to_image(file, num_attention_heads)
        name = "`vae`" if isinstance(vae, BitDanceTokenizer) else str(vae)
        if not isinstance(vae, BitDanceTokenizer):
            vae = BitDanceTokenizer.from_single_file(vae, config=vae_config, dtype=dtype, **hub_arguments)
        opened.check_autoencoder(vae, name)
        arguments = {"scheduler": opened.scheduler, **opened.pipeline_defaults(), **kwargs}
        pipeline = cls(vae=vae, transformer=opened.transformer, **arguments)
        load_tensors(opened.transformer, opened.tensors, dtype or torch.float32)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_link_or_path))
        return pipeline
