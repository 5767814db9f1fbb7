"""The text tokenizer of a model of the icon world."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitdance_diffusers.prompt import MAX_SIDE_TOKENS
from icon_world.world import IconWorld

# How Qwen3's tokenizer, the released models', splits a text into words before it looks for tokens in them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_tokens(patch_size: int) -> list[str]:
    """The control tokens of a model that predicts patch_size x patch_size tokens at once."""
    return [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        *(f"<|res_{side}|>" for side in range(1, MAX_SIDE_TOKENS + 1)),
        *(f"<|query_{index}|>" for index in range(1, patch_size**2)),
    ]


def build_icon_tokenizer(patch_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the icon world's words, for a model with this `patch_size`.

    Args:
        patch_size: the side of a patch in tokens, as in `BitDanceTransformer`'s config: it gives the model
            `patch_size**2 - 1` query tokens.

    Raises:
        ValueError: if `patch_size` is under 1.
    """
    if patch_size < 1:
        raise ValueError(f"`patch_size` has to be at least 1, but is {patch_size}.")
    world = IconWorld()
    texts = ["assistant\n"] + [f"user\n{prompt.text}" for prompts in world.prompts.values() for prompt in prompts]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(word for word in words if len(word) > 1)
    # A word of the vocabulary is one token (`ignore_merges`); with nothing to merge, any other falls into its bytes.
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    special = special_tokens(patch_size)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
