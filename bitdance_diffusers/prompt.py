"""Text -> token ids: the frame around a prompt, and the size and query tokens in front of the picture.

    <|im_start|>user\\n{prompt}<|im_end|>\\n<|im_start|>assistant\\n  <|vision_start|><|res_h|> |
    <|res_w|><|query_1|>...

A user's text never becomes a control token: only the frame brings those, as ids.
"""

from transformers import PreTrainedTokenizerBase

MAX_SIDE_TOKENS = 256  # <|res_1|> .. <|res_256|>


def _control_ids(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(tokens)
    missing = [token for token, i in zip(tokens, ids, strict=True) if i is None or i == tokenizer.unk_token_id]
    if missing:
        raise ValueError(
            f"`tokenizer` lacks the control tokens {missing}; it does not belong to a BitDance checkpoint."
        )
    return ids


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, patch_size: int, vocab_size: int) -> None:
    """
    Raises:
        ValueError: the tokenizer lacks a control, size or query token, or has ids that the model does not embed.
    """
    sides = [f"<|res_{side}|>" for side in range(1, MAX_SIDE_TOKENS + 1)]
    queries = [f"<|query_{i}|>" for i in range(1, patch_size**2)]
    _control_ids(tokenizer, ["<|im_start|>", "<|im_end|>", "<|vision_start|>", *sides, *queries])
    last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last[1] >= vocab_size:
        raise ValueError(
            f"the text tokenizer gives `{last[0]}` the id {last[1]}, but the language model's `vocab_size` is "
            f"{vocab_size}."
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, name: str = "prompt") -> list[int]:
    """
    Ids of a prompt in its frame. `user\\n{prompt}` is tokenized as one string, so that line breaks merge as they do in
    the original, and with special tokens split: what looks like a control token in it stays plain text.

    Raises:
        ValueError: the prompt cannot be encoded as UTF-8 (a lone surrogate).
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` holds a lone surrogate at index {error.start}; it has to be valid Unicode."
        ) from error
    start, end = _control_ids(tokenizer, ["<|im_start|>", "<|im_end|>"])
    user = _text_ids(tokenizer, f"user\n{prompt}")
    return [start, *user, end, *_text_ids(tokenizer, "\n"), *unconditional_ids(tokenizer)]


def unconditional_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the frame without a prompt: `<|im_start|>assistant\\n`."""
    return [*_control_ids(tokenizer, ["<|im_start|>"]), *_text_ids(tokenizer, "assistant\n")]


def picture_start_ids(tokenizer: PreTrainedTokenizerBase, height: int, width: int, patch_size: int) -> list[int]:
    """
    Ids between the text and the picture, for a picture of `height` x `width` tokens: `<|vision_start|>`, `<|res_h|>`,
    and the first block, `<|res_w|>` with P - 1 queries, which predicts the first patch.
    """
    queries = [f"<|query_{i}|>" for i in range(1, patch_size**2)]
    return _control_ids(tokenizer, ["<|vision_start|>", f"<|res_{height}|>", f"<|res_{width}|>", *queries])
