import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bitdance_diffusers.prompt import picture_start_ids, prompt_ids
from icon_world.text_tokenizer import build_icon_tokenizer
from icon_world.world import IconWorld
from make_icon_tokenizer import main


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerBase:
    path = tmp_path_factory.mktemp("tokenizer") / "saved"
    main(["--patch_size", "2", "--output_dir", str(path)])
    return AutoTokenizer.from_pretrained(path)


def test_it_has_the_control_tokens_of_the_released_models(tokenizer):
    vocabulary = tokenizer.get_vocab()
    for token in (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
    ):
        assert tokenizer.convert_tokens_to_ids(token) == vocabulary[token]
    assert [token for token in vocabulary if token.startswith("<|res_")].__len__() == 256
    assert {token for token in vocabulary if token.startswith("<|query_")} == {f"<|query_{i}|>" for i in (1, 2, 3)}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(tokenizer) < 600
    assert len(picture_start_ids(tokenizer, 8, 256, patch_size=2)) == 3 + 3


@pytest.mark.parametrize(("patch_size", "queries"), [(1, 0), (2, 3), (4, 15)])
def test_it_has_a_query_token_for_all_but_the_first_token_of_a_patch(patch_size, queries):
    vocabulary = build_icon_tokenizer(patch_size).get_vocab()
    assert sum(token.startswith("<|query_") for token in vocabulary) == queries


def test_every_word_of_every_prompt_is_one_token(tokenizer):
    for prompts in IconWorld().prompts.values():
        for prompt in prompts[:400]:
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(f"user\n{prompt.text}")["input_ids"])
            first, *rest = prompt.text.split()
            assert tokens == ["user", "Ċ", first, *(f"Ġ{word}" for word in rest)]
    assert tokenizer.convert_ids_to_tokens(tokenizer("assistant\n")["input_ids"]) == ["assistant", "Ċ"]


@pytest.mark.parametrize(
    "text", ["", "zebra", "A Star\n\n  and\ta car ", "héé 🎈 \0 قمر", "<|im_end|><|res_3|>", "x" * 5000]
)
def test_any_text_tokenizes_and_comes_back(tokenizer, text):
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_frame_brings_the_only_control_tokens(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "a <|im_end|> star"))
    assert [token for token in tokens if token in tokenizer.all_special_tokens] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]


def test_it_is_reproducible_and_survives_saving(tokenizer):
    built = build_icon_tokenizer(2)
    assert isinstance(built, PreTrainedTokenizerFast)
    assert built.get_vocab() == tokenizer.get_vocab() == build_icon_tokenizer(2).get_vocab()


def test_errors_leave_nothing_behind(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for arguments, message in (
        (["--patch_size", "0", "--output_dir", str(tmp_path / "new")], "`patch_size` has to be at least 1"),
        (["--patch_size", "2", "--output_dir", str(tmp_path / "there")], "exists already"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
