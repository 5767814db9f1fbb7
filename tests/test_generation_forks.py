"""A batch of pictures under way: copies of it, and what is saved of it."""

import io

import pytest
import torch

SEEDS = [3, 4]


def seeded(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(params=["text", "class", "linear"])
def prepare(request, t2i_pipeline, class_pipeline):
    """`prepare(**call)`: two pictures of four patches or more before their first patch."""
    if request.param == "text":
        pipeline = t2i_pipeline()
        call = {"prompt": ["a fox", "a longer prompt"], "height": 16, "width": 16, "guidance_scale": 3.0}
    else:
        pipeline = class_pipeline("class_p4")
        schedule = "linear" if request.param == "linear" else "constant"
        call = {"class_labels": [1, 2], "guidance_scale": 3.0, "guidance_schedule": schedule}
    return lambda **more: pipeline.prepare_generation(**call | {"num_inference_steps": 3} | more)


def finish(generation):
    for _ in generation:
        pass
    return generation.code


def advance(generation, num_patches):
    for _ in range(num_patches):
        generation.advance()
    return generation


@pytest.mark.parametrize("num_patches", [0, 1, 3])
def test_a_fork_goes_on_from_where_its_picture_stands(prepare, num_patches):
    generation = advance(prepare(generator=seeded(SEEDS)), num_patches)
    states = generation.state_dict()["pictures"]
    generation.fork([1, 0, 1])
    assert [picture.index for picture in generation.pictures] == [num_patches] * 3
    forked_states = [picture.generator.get_state() for picture in generation.pictures]
    assert not torch.equal(forked_states[0], forked_states[2])
    code = finish(generation)

    for copy, parent in enumerate([1, 0, 1]):
        alone = prepare(generator=seeded(SEEDS))
        states_of_both = [dict(state) for state in states]
        states_of_both[parent]["generator"] = forked_states[copy]
        alone.load_state_dict({"pictures": states_of_both, "generator": None})
        assert torch.equal(finish(alone)[parent], code[copy])
    assert not torch.equal(code[0], code[2]) or num_patches == 3


def test_a_fork_without_repetition_changes_no_bit(prepare):
    expected = finish(prepare(generator=seeded(SEEDS)))
    generation = advance(prepare(generator=seeded(SEEDS)), 2)
    generation.fork([1])
    assert torch.equal(finish(generation)[0], expected[1])


def test_a_fork_reads_nothing_again(prepare):
    generation = advance(prepare(generator=seeded(SEEDS)), 2)
    generation.prepare()
    calls = []
    hook = generation.transformer.register_forward_hook(lambda *args: calls.append(args))
    generation.fork([0, 0, 1])
    hook.remove()
    assert not calls


def test_bad_forks_are_refused(prepare):
    with pytest.raises(ValueError, match="`generator` is a list"):
        prepare(generator=torch.Generator()).fork([0])
    for indices in ([], [2], [-1]):
        with pytest.raises(ValueError, match="`indices` is"):
            prepare(generator=seeded(SEEDS)).fork(indices)


def test_separate_generators_come_from_the_one_of_the_batch(prepare):
    codes = []
    for seed in (0, 0, 1):
        generation = prepare(generator=torch.Generator().manual_seed(seed))
        generation.separate_generators()
        codes.append(finish(generation))
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("own_generators", [True, False])
def test_a_run_that_is_saved_goes_on_to_the_same_bits(prepare, own_generators):
    def start():
        return prepare(generator=seeded(SEEDS) if own_generators else torch.Generator().manual_seed(0))

    expected = finish(start())
    given = torch.zeros_like(expected)
    patch = start().pictures[0].patches.shape[1] ** 0.5
    given[:, :, : int(patch)] = expected[:, :, : int(patch)]
    with_given = finish(prepare(generator=seeded(SEEDS), latents=given))
    for num_patches in (1, 2, 3):
        for latents, unbroken in ((None, expected), (given, with_given)):
            if latents is not None and not own_generators:
                continue
            whole = start() if latents is None else prepare(generator=seeded(SEEDS), latents=latents)
            file = io.BytesIO()
            torch.save(advance(whole, min(num_patches, 1 if latents is not None else 3)).state_dict(), file)
            file.seek(0)
            resumed = start() if latents is None else prepare(generator=seeded(SEEDS), latents=latents)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            assert resumed.state_dict()["pictures"][0]["index"] == whole.pictures[0].index
            assert torch.equal(finish(resumed), unbroken)
