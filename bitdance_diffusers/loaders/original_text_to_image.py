"""The original's text-to-image checkpoints, and the same in the layout of the community's port to Diffusers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.utils import logging
from huggingface_hub.utils import validate_hf_hub_args

from ..models.autoencoder_bitdance import BitDanceTokenizer
from ..models.transformer_bitdance import BitDanceTransformer
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler
from .checkpoint_files import (
    TOKENIZER_FILES,
    Checkpoint,
    StoredTensor,
    check_count,
    check_dtype,
    load_tensors,
    load_tokenizer,
    match_tensors,
    naming,
    open_safetensors_folder,
    read_settings,
    state_dict_shapes,
)
from .hub_files import download_files, first_file, pop_hub_arguments
from .original_autoencoder import match_autoencoder
from .original_names import (
    language_model_config_from_original,
    transformer_key_to_original,
    vision_head_config_from_original,
)

logger = logging.get_logger(__name__)

# The sizes (height, width) in pixels that the released models were trained on, by the tokens P of a patch.
_LARGE_SIZES = [[2048, 512], [1920, 512], [1536, 640], [1280, 768], [1152, 896], [1024, 1024]]
_LARGE_SIZES += [[width, height] for height, width in reversed(_LARGE_SIZES[:-1])]
_SMALL_SIZES = [[1024, 256], [896, 256], [640, 384], [512, 512], [384, 640], [256, 896], [256, 1024]]
SUPPORTED_SIZES = {16: _LARGE_SIZES + _SMALL_SIZES, 64: _LARGE_SIZES}

# Arguments of Diffusers' `from_pretrained` for which it would have to load the components itself.
_ONLY_CONVERTED = (
    "quantization_config",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "variant",
    "custom_pipeline",
    "disable_mmap",
    "use_flashpack",
    "use_onnx",
)
# And those that ask for what is done anyway, or that cannot matter here.
_NO_MATTER = ("low_cpu_mem_usage", "trust_remote_code")


@dataclass(frozen=True)
class Layout:
    """Where the parts of a checkpoint are: configs, and (folder, name before ".safetensors") of the weights."""

    language_model_config: Path
    vision_head_config: Path
    projector_config: Path | None
    autoencoder_config: Path
    tokenizer: Path
    language_model: tuple[Path, str]
    vision_head: tuple[Path, str]
    projector: tuple[Path, str]
    autoencoder: tuple[Path, str]

    def file_patterns(self, given: Iterable[str]) -> list[str]:
        """Patterns of the files that are needed where the components in `given` are not."""
        configs, weights, names = [self.vision_head_config], [], []
        if "transformer" not in given:
            configs += [self.language_model_config, self.projector_config]
            weights += [self.language_model, self.vision_head, self.projector]
        if "vae" not in given:
            configs.append(self.autoencoder_config)
            weights.append(self.autoencoder)
        if "tokenizer" not in given:
            names += [self.tokenizer / name for name in TOKENIZER_FILES]
        for folder, stem in weights:
            ends = (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")
            names += [folder / f"{stem}{end}" for end in ends]
        return [path.as_posix() for path in (*configs, *names) if path is not None]


def _original_layout(folder: Path) -> Layout:
    return Layout(
        language_model_config=folder / "config.json",
        vision_head_config=folder / "vision_head_config.json",
        projector_config=None,
        autoencoder_config=folder / "ae_config.json",
        tokenizer=folder,
        language_model=(folder, "model"),
        vision_head=(folder, "vision_head"),
        projector=(folder, "projector"),
        autoencoder=(folder, "ae"),
    )


def _port_layout(folder: Path) -> Layout:
    return Layout(
        language_model_config=folder / "text_encoder" / "config.json",
        vision_head_config=folder / "diffusion_head" / "config.json",
        projector_config=folder / "projector" / "config.json",
        autoencoder_config=folder / "autoencoder" / "config.json",
        tokenizer=folder / "tokenizer",
        language_model=(folder / "text_encoder", "model"),
        vision_head=(folder / "diffusion_head", "diffusion_pytorch_model"),
        projector=(folder / "projector", "diffusion_pytorch_model"),
        autoencoder=(folder / "autoencoder", "diffusion_pytorch_model"),
    )


# Which of them a repository is in, by a file that it has.
_LAYOUTS = {"vision_head_config.json": _original_layout, "diffusion_head/config.json": _port_layout}


def find_layout(folder: Path) -> Layout | None:
    """Tell the original's layout from the community port's; `None` where the folder is in neither."""
    if (folder / "vision_head_config.json").is_file():
        return _original_layout(folder)
    if (folder / "diffusion_head").is_dir():
        return _port_layout(folder)
    return None


def open_transformer(
    layout: Layout, keep_lm_head: bool = False
) -> tuple[BitDanceTransformer, dict[str, StoredTensor]]:
    """
    Open language model, projector and head, configs first.

    Args:
        keep_lm_head: Keep the language model's output layer.

    Returns:
        `tuple`: the model without memory (on the meta device), and its tensors by their names in it.

    Raises:
        ValueError: a file is missing or damaged, contradicts its config or another file, or asks for what the model
            does not do.
    """
    # 1. Configs, each by itself and against the others.
    language_model_settings = read_settings(layout.language_model_config)
    with naming(layout.language_model_config):
        language_model_config = language_model_config_from_original(language_model_settings)
    with naming(layout.vision_head_config):
        head_config, _ = vision_head_config_from_original(read_settings(layout.vision_head_config))
        if head_config["hidden_size"] != language_model_config["hidden_size"]:
            raise ValueError(
                f"`ch_cond` is {head_config['hidden_size']}, but `hidden_size` in {layout.language_model_config} is "
                f"{language_model_config['hidden_size']}."
            )
    config = {**language_model_config, **head_config, "use_lm_head": keep_lm_head}
    if layout.projector_config is not None:
        _check_projector_config(layout.projector_config, config)

    # 2. Headers against the configs.
    parts = {
        name: open_safetensors_folder(*getattr(layout, name))
        for name in ("language_model", "projector", "vision_head")
    }
    check_count(parts["language_model"], "model.layers", "num_hidden_layers", config["num_layers"])
    check_count(parts["vision_head"], "net.res_blocks", "depth_latent", config["head_num_layers"])
    check_count(parts["vision_head"], "net.ada_ln_blocks", "depth_adanln", config["head_num_modulations"])
    with naming(layout.vision_head_config.parent), torch.device("meta"):
        transformer = BitDanceTransformer(**config)
    tied = language_model_settings.get("tie_word_embeddings", False)
    return transformer, _match_transformer(transformer, parts, tied)


def _check_projector_config(file: Path, transformer_config: dict) -> None:
    expected = {
        "in_dim": transformer_config["in_channels"],
        "out_dim": transformer_config["hidden_size"],
        "hidden_act": "gelu_pytorch_tanh",
    }
    settings = read_settings(file)
    for name in {**expected, **settings}:
        if name not in expected or settings.get(name) != expected[name]:
            raise ValueError(f"{file}: `{name}` is {settings.get(name)!r}; allowed is {expected.get(name)!r}.")


def _match_transformer(
    transformer: BitDanceTransformer, parts: dict[str, Checkpoint], tied: bool
) -> dict[str, StoredTensor]:
    expected = {part: {} for part in parts}
    for key, shape in state_dict_shapes(transformer).items():
        part, original = transformer_key_to_original(key, transformer.config.head_use_swiglu)
        if original == "lm_head.weight" and tied:
            original = "model.embed_tokens.weight"
        expected[part][key] = (original, shape)
    tensors = {}
    for part, checkpoint in parts.items():
        unused = ("lm_head.weight",) if part == "language_model" else ()
        tensors.update(match_tensors(checkpoint, expected[part], unused))
    return tensors


def open_scheduler(layout: Layout) -> BinaryDiffusionScheduler:
    """The scheduler of the head's config; `ValueError` where that is missing or contradicts itself."""
    with naming(layout.vision_head_config):
        _, config = vision_head_config_from_original(read_settings(layout.vision_head_config))
        return BinaryDiffusionScheduler(**config)


def open_vae(layout: Layout) -> tuple[BitDanceTokenizer, dict[str, StoredTensor]]:
    """
    Open the autoencoder, as [`open_transformer`] does the transformer.

    Raises:
        ValueError: also where the head is for codes of other bits.
    """
    checkpoint = open_safetensors_folder(*layout.autoencoder)
    settings = read_settings(layout.autoencoder_config)
    with naming(layout.vision_head_config):
        head_config, _ = vision_head_config_from_original(read_settings(layout.vision_head_config))
    with naming(layout.autoencoder_config):
        vae, tensors = match_autoencoder(BitDanceTokenizer, checkpoint, settings)
        if vae.config.latent_channels != head_config["in_channels"]:
            raise ValueError(
                f"`z_channels` is {vae.config.latent_channels}, but `ch_target` in {layout.vision_head_config} is "
                f"{head_config['in_channels']}."
            )
    return vae, tensors


class OriginalTextToImageMixin:
    """Goes before `DiffusionPipeline` in the bases of a pipeline with the components of [`BitDancePipeline`]."""

    @classmethod
    @validate_hf_hub_args
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """
        Load a pipeline that was saved, as in Diffusers; or an original checkpoint, in the original's layout
        (`vision_head_config.json` beside `model*.safetensors`) or in that of the community's port to Diffusers.

        Of an original repository only the files that are needed are downloaded. Weights that have the asked dtype stay
        in their mapped files, others are cast one by one.

        Args:
            pretrained_model_name_or_path: A folder, or a repository of the Hub.
            dtype (`torch.dtype` or dict of them by component and `"default"`): Of the weights, float32 by default.
            subfolder (`str`): Of the folder or repository; a repository of Diffusers' own layout has none.
            cache_dir, force_download, local_files_only, token, revision: Of a download.
            kwargs: Components that take the place of the checkpoint's, arguments of the pipeline
                (`default_guidance_scale=...`), and for a pipeline that was saved all others of Diffusers.

        Raises:
            ValueError: for an original checkpoint that is damaged, incomplete or contradicts its configs, and for an
                argument (`quantization_config`, `device_map`, ...) that only a converted one can be loaded with.
            TypeError: for a `dtype` that is none.
        """
        subfolder = kwargs.pop("subfolder", None) or ""
        folder = Path(pretrained_model_name_or_path) / subfolder
        if folder.is_dir():
            layout = find_layout(folder)
            if layout is None:
                return super().from_pretrained(folder if subfolder else pretrained_model_name_or_path, **kwargs)
            _check_arguments(kwargs, folder)
            pop_hub_arguments(kwargs)
            return cls._from_original(layout, pretrained_model_name_or_path, kwargs)

        repository = str(pretrained_model_name_or_path)
        file = None
        if repository.count("/") <= 1:  # of anything else Diffusers says that it is no repository
            files = {(Path(subfolder) / file).as_posix(): file for file in _LAYOUTS}
            file = files.get(first_file(repository, files, **pop_hub_arguments(dict(kwargs))))
        if file is None:
            if subfolder:
                raise ValueError(
                    f"`subfolder` {subfolder!r} of {repository!r} has no original checkpoint; a pipeline that was "
                    "saved loads from the root of its repository."
                )
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        _check_arguments(kwargs, "DOWNLOADED_FOLDER")
        layout_of = _LAYOUTS[file]
        patterns = layout_of(Path(subfolder)).file_patterns(given=kwargs)
        snapshot = download_files(repository, patterns, **pop_hub_arguments(kwargs))
        return cls._from_original(layout_of(snapshot / subfolder), repository, kwargs)

    @classmethod
    def _from_original(cls, layout: Layout, location: str | Path, kwargs: dict[str, Any]) -> Self:
        # 1. Arguments
        for name in _NO_MATTER:
            kwargs.pop(name, None)
        dtypes = _dtypes_by_component(kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
        expected, optional = cls._get_signature_keys(cls)
        components = {name: kwargs.pop(name) for name in expected if name in kwargs}
        arguments = {name: kwargs.pop(name) for name in optional if name in kwargs}
        if kwargs:
            logger.warning(f"Keyword arguments {sorted(kwargs)} are not expected by {cls.__name__} and are ignored.")

        # 2. Configs and headers, before any weight is read
        opened = {}
        if "transformer" not in components:
            opened["transformer"] = open_transformer(layout)
        if "vae" not in components:
            opened["vae"] = open_vae(layout)
        if "scheduler" not in components:
            components["scheduler"] = open_scheduler(layout)
        if "tokenizer" not in components:
            with naming(layout.tokenizer):
                components["tokenizer"] = load_tokenizer(layout.tokenizer)

        # 3. The pipeline, which checks that all belongs together, then the weights
        components |= {name: model for name, (model, _) in opened.items()}
        if components["transformer"] is not None:
            patch_size = components["transformer"].config.patch_size
            arguments.setdefault("supported_sizes", SUPPORTED_SIZES.get(patch_size**2))
        pipeline = cls(**components, **arguments)
        for name, (model, tensors) in opened.items():
            load_tensors(model, tensors, dtypes[name])
        pipeline.register_to_config(_name_or_path=str(location))
        return pipeline


def _check_arguments(kwargs: dict[str, Any], folder: Path | str) -> None:
    """Raises a `ValueError` or `TypeError` that names the argument, and the command where that helps."""
    for name in _ONLY_CONVERTED:
        if kwargs.pop(name, None) not in (None, False):
            raise ValueError(
                f"`{name}` does not work with a checkpoint in the original's layout. Convert it once, `python "
                f"conversion/convert_text_to_image.py --checkpoint_path {folder} --output_path DIR` (or by "
                "`bitdance_diffusers.loaders.convert.convert_text_to_image`), and load DIR."
            )
    if kwargs.pop("use_safetensors", True) is False:
        raise ValueError("`use_safetensors` is False; weights load from safetensors files only.")
    _dtypes_by_component(kwargs.get("dtype"), kwargs.get("torch_dtype"))


def _dtypes_by_component(dtype: Any, torch_dtype: Any) -> dict[str, torch.dtype]:
    """The dtype of transformer and vae: of all, or by component and "default"; `torch_dtype` is its former name."""
    dtype = torch_dtype if dtype is None else dtype
    by_name = dtype if isinstance(dtype, dict) else {"default": dtype}
    for one in by_name.values():
        check_dtype("dtype", one)
    default = by_name.get("default") or torch.float32
    return {name: by_name.get(name) or default for name in ("transformer", "vae")}
