"""Candidates of a picture, of which the best go on."""

import pytest
import torch

from bitdance_diffusers.search import CandidateSearch


@pytest.fixture(params=["text", "class"])
def pipeline_and_call(request, t2i_pipeline, class_pipeline):
    """A pipeline and the arguments of a quick call for two pictures."""
    quick = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    if request.param == "text":
        return t2i_pipeline(), {"prompt": ["a fox", "two"], "height": 16, "width": 16} | quick
    return class_pipeline("class_p4"), {"class_labels": [1, 2]} | quick


def seeded():
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


def draw(pipeline_and_call, **more):
    pipeline, call = pipeline_and_call
    return pipeline(**call | {"generator": seeded()} | more).images


def condition_of(call):
    return call["prompt"] if "prompt" in call else call["class_labels"]


def candidates_of(pipeline, call, number):
    """The codes (2, n, C, h, w) that `best_of` chooses among, and their scores (2, n)."""
    generation = pipeline.prepare_generation(
        **{name: value for name, value in call.items() if name != "output_type"}, generator=seeded()
    )
    search = CandidateSearch(generation, number, 1, generation.pictures[0].num_patches)
    while not generation.finished:
        search.advance()
    return generation.code.unflatten(0, (2, number)), search._scores.view(2, number)


def test_best_of_returns_the_candidate_with_the_best_score(pipeline_and_call):
    pipeline, call = pipeline_and_call
    codes, scores = candidates_of(pipeline, call, 3)
    best = draw(pipeline_and_call, best_of=3)
    for row in range(2):
        assert torch.equal(best[row], codes[row, scores[row].argmax()])
        again = pipeline.score(codes[row], condition_of(call)[row], num_times=4, num_draws=2).sum(dim=1)
        torch.testing.assert_close(again, scores[row], rtol=1e-4, atol=1e-4)


def test_a_scorer_is_asked_with_pictures_and_what_they_are_of(pipeline_and_call):
    pipeline, call = pipeline_and_call
    codes, _ = candidates_of(pipeline, call, 3)
    asked = []

    def scorer(pictures, conditions):
        asked.append((pictures, conditions))
        return [0, 0, 1, 1, 0, 0]

    best = draw(pipeline_and_call, best_of=3, scorer=scorer)
    assert torch.equal(best[0], codes[0, 2]) and torch.equal(best[1], codes[1, 0])
    ((pictures, conditions),) = asked
    assert conditions == [one for one in condition_of(call) for _ in range(3)]
    expected = pipeline.decode_latents(codes.flatten(0, 1), "pil", seeded() * 3)
    assert [picture.size for picture in pictures] == [picture.size for picture in expected]


@pytest.mark.parametrize("num_kept", [1, 2])
def test_search_chooses_after_every_row(pipeline_and_call, num_kept):
    pipeline, call = pipeline_and_call
    heights, codes = [], []

    def scorer(pictures, conditions):
        heights.append(pictures[0].height // pipeline.vae_scale_factor)
        return [0, 3, 2, 1] * 2

    def watch(pipeline, index, step, tensors):
        codes.append(tensors["latents"].clone())

    found = draw(
        pipeline_and_call,
        num_candidates_per_row=4,
        num_kept_per_row=num_kept,
        scorer=scorer,
        callback_on_step_end=watch,
    )
    patch = pipeline.transformer.config.patch_size
    assert heights == list(range(patch, found.shape[2] + 1, patch))
    per_row = found.shape[3] // patch
    first_row = codes[per_row - 1][:, :, :patch].unflatten(0, (2, 4))
    then = codes[per_row][:, :, :patch].unflatten(0, (2, 4))
    for picture in range(2):
        kept = [1, 1, 1, 1] if num_kept == 1 else [1, 1, 2, 2]
        assert torch.equal(then[picture], first_row[picture][kept])
        assert torch.equal(found[picture], codes[-1][4 * picture + 1])


def test_search_by_the_models_own_score_repeats(pipeline_and_call):
    first = draw(pipeline_and_call, num_candidates_per_row=2)
    assert torch.equal(first, draw(pipeline_and_call, num_candidates_per_row=2))
    one_generator = draw(pipeline_and_call, best_of=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one_generator, draw(pipeline_and_call, best_of=2, generator=torch.Generator().manual_seed(0)))
    assert ((first.abs() == 1).all()) and first.shape == one_generator.shape


def test_an_interrupted_search_leaves_one_candidate_of_each(pipeline_and_call):
    def interrupt(pipeline, index, step, tensors):
        pipeline._interrupt = True

    assert len(draw(pipeline_and_call, best_of=3, callback_on_step_end=interrupt)) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"best_of": 0}, ValueError, "`best_of` is 0"),
        ({"num_candidates_per_row": 0}, ValueError, "`num_candidates_per_row` is 0"),
        ({"num_candidates_per_row": 4, "num_kept_per_row": 3}, ValueError, "`num_kept_per_row` is 3"),
        ({"num_candidates_per_row": 2, "best_of": 2}, ValueError, "one of them has to be 1"),
        ({"best_of": 2, "scorer": "clip"}, TypeError, "`scorer` is 'clip'"),
    ],
)
def test_bad_input_is_named(pipeline_and_call, arguments, error, message):
    with pytest.raises(error, match=message):
        draw(pipeline_and_call, **arguments)
