"""A batch of pictures under way: what it draws is what separate plain calls draw, bit for bit in float32."""

import random
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from bitdance_diffusers import generation as generation_module
from bitdance_diffusers.patch_order import grid_to_patches, patches_to_grid

T2I = {"prompt": ["a cat", "a large brown dog on a bed"], "height": 16, "width": 24}  # 4 x 6 tokens, 6 patches
CLASS = {"class_labels": [1, 7]}
QUICK = {"num_inference_steps": 3, "guidance_scale": 3.0}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def pipelines(t2i_pipeline_path, class_pipeline_path):
    """`pipelines[kind]`: the two cases with P = 4, and what a call of each asks for."""
    from bitdance_diffusers import BitDanceClassPipeline, BitDancePipeline

    loaded = {
        "t2i": (BitDancePipeline.from_pretrained(t2i_pipeline_path), T2I | QUICK),
        "class": (BitDanceClassPipeline.from_pretrained(class_pipeline_path("class_p4")), CLASS | QUICK),
    }
    for pipeline, _ in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(params=["t2i", "class"])
def pipeline_and_call(request, pipelines):
    return pipelines[request.param]


def draw(pipeline, call, generator, **kwargs):
    return pipeline(**call, generator=generator, output_type="latent", **kwargs).images


def draw_next_patch(pipeline, call, code, generator):
    """The code after a plain call that goes on from a prefix and is interrupted after the first patch it draws."""

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = True
        return {}

    return draw(pipeline, call, generator, latents=code, callback_on_step_end=stop)


def one_of(call, i):
    """The call for its picture `i` alone."""
    return {name: [value[i]] if isinstance(value, list) else value for name, value in call.items()}


def test_iterating_draws_what_a_call_draws(pipeline_and_call):
    pipeline, call = pipeline_and_call
    expected = draw(pipeline, call, seeded(0)[0])
    generation = pipeline.prepare_generation(**call, generator=seeded(0)[0])
    codes, steps = [], []
    for progress in generation:
        codes.append(generation.code)
        steps.append(progress)
    num_patches = steps[0].num_patches[0]
    assert [step.num_done for step in steps] == [(i + 1, i + 1) for i in range(num_patches)]
    assert all(step.drawn == (True, True) for step in steps)
    assert torch.equal(codes[-1], expected)
    for i, code in enumerate(codes):  # what is done does not change, what is not is 0
        patches = grid_to_patches(code, 2)
        assert torch.equal(patches[:, : i + 1], grid_to_patches(expected, 2)[:, : i + 1])
        assert not patches[:, i + 1 :].any()


def test_who_stops_iterating_stops_the_work(pipeline_and_call, count_operators):
    pipeline, call = pipeline_and_call
    generator = seeded(0)[0]
    generation = pipeline.prepare_generation(**call, generator=generator)
    next(iter(generation))
    state = generator.get_state()
    with count_operators() as operators:
        del generation
    assert not operators.counts and torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("at_once", [1, 16])
def test_known_patches_anywhere(pipeline_and_call, monkeypatch, at_once):
    """
    Each row with known patches of its own. What is expected comes patch by patch from plain calls with a prefix, one
    picture at a time: a known patch is taken over and draws nothing.
    """
    monkeypatch.setattr(generation_module, "KNOWN_PATCHES_AT_ONCE", at_once)
    pipeline, call = pipeline_and_call
    if "class_labels" in call:  # of "linear" the first patch would not be the same in both sequences
        call = call | {"guidance_schedule": "constant"}
    given = grid_to_patches(draw(pipeline, call, seeded(8, 9)), 2)
    batch, num_patches = given.shape[:2]
    rows = [{0, 1, 3}, {2, num_patches - 1}]
    known = torch.zeros(batch, num_patches, 1, 1)
    for i, row in enumerate(rows):
        known[i, sorted(row)] = 1

    size = tuple(draw(pipeline, call, seeded(0, 1)).shape[-2:])
    expected = []
    for i in range(batch):
        patches, generator = torch.zeros_like(given[i : i + 1]), seeded(20 + i)
        for m in range(num_patches):
            if m in rows[i]:
                patches[:, m] = given[i, m]
            else:
                code = draw_next_patch(pipeline, one_of(call, i), patches_to_grid(patches, *size), generator)
                patches = grid_to_patches(code, 2)
        expected.append(patches)
    latents = patches_to_grid(given * known, *size)
    result = draw(pipeline, call, seeded(20, 21), latents=latents)
    assert torch.equal(grid_to_patches(result, 2), torch.cat(expected))


def test_given_whole_nothing_is_drawn(pipeline_and_call):
    pipeline, call = pipeline_and_call
    code = draw(pipeline, call, seeded(0, 1))
    generators = seeded(5, 6)
    states = [generator.get_state() for generator in generators]
    calls = []
    result = draw(pipeline, call, generators, latents=code, callback_on_step_end=lambda *args: calls.append(args))
    assert torch.equal(result, code) and not calls
    assert all(map(torch.equal, states, (generator.get_state() for generator in generators)))


def test_known_tokens_inside_a_patch_stay(pipeline_and_call):
    """Half of a patch is given: its bits are kept, and the draws of all patches are those of a plain call."""
    pipeline, call = pipeline_and_call
    plain = draw(pipeline, call, seeded(0, 1))
    generation = pipeline.prepare_generation(**call, generator=seeded(0, 1))
    given = torch.zeros_like(plain)
    given[:, :, 1, 2:4] = -plain[:, :, 1, 2:4]  # the lower two tokens of the second patch, other bits than were drawn
    partly = generation_module.Generation(
        pipeline.transformer,
        pipeline.scheduler,
        generation.prefix,
        given,
        generation.pictures[0].positions,
        generation.condition_argument,
        generation.pictures[0].condition_places,
        generation.pictures[0].settings,
        seeded(0, 1),
    )
    for _ in partly:
        pass
    assert torch.equal(partly.code[:, :, 1, 2:4], given[:, :, 1, 2:4])
    assert torch.equal(partly.code[:, :, :2, :2], plain[:, :, :2, :2])  # the first patch
    assert (partly.code.abs() == 1).all()
    states = [picture.generator.get_state() for picture in partly.pictures]
    after_plain = seeded(0, 1)
    draw(pipeline, call, after_plain)
    assert all(map(torch.equal, states, (generator.get_state() for generator in after_plain)))


@pytest.mark.parametrize("kind", ["t2i", "class"])
@pytest.mark.parametrize("seed", [0, 1])
def test_joining_a_running_batch(pipelines, kind, seed):
    """Pictures of several sizes, texts and settings join at random patches; each is what it is alone."""
    pipeline, _ = pipelines[kind]
    numbers = random.Random(seed)

    def random_call():
        settings = {"num_inference_steps": numbers.choice([3, 4]), "guidance_scale": numbers.choice([3.0, 2.0, 1.0])}
        if kind == "class":
            return settings | {
                "class_labels": [numbers.randrange(pipeline.transformer.config.num_classes)],
                "guidance_schedule": numbers.choice(["linear", "constant"]),
            }
        size = {"height": numbers.choice([8, 16]), "width": numbers.choice([16, 24])}
        return settings | size | {"prompt": [numbers.choice(["a", "a cat", "a large brown dog on a bed"])]}

    calls = [random_call() for _ in range(5)]
    expected = [draw(pipeline, call, seeded(i))[0] for i, call in enumerate(calls)]
    waiting = [pipeline.prepare_generation(**call, generator=seeded(i)) for i, call in enumerate(calls)]
    pictures = [generation.pictures[0] for generation in waiting]
    running = waiting.pop(0)
    while not running.finished or waiting:
        while waiting and (running.finished or numbers.random() < 0.5):
            running.join(waiting.pop(0))
        if not running.finished:
            running.advance()
    assert running.pictures == pictures
    for picture, code in zip(pictures, expected, strict=True):
        assert torch.equal(picture.code, code)


def test_splitting_a_batch(pipeline_and_call):
    pipeline, call = pipeline_and_call
    expected = draw(pipeline, call, seeded(0, 1))
    running = pipeline.prepare_generation(**call, generator=seeded(0, 1))
    running.advance()
    running.advance()
    taken = running.split([1])
    for generation in (taken, running):
        for _ in generation:
            pass
    assert torch.equal(torch.cat([running.code, taken.code]), expected)


def test_joins_that_cannot_be(pipelines):
    pipeline, call = pipelines["t2i"]
    batch, own = (pipeline.prepare_generation(**call, generator=g) for g in (seeded(0)[0], seeded(0, 1)))
    with pytest.raises(ValueError, match="`generator` is a list"):
        own.join(batch)
    with pytest.raises(ValueError, match="`generator` is a list"):
        batch.split([0])
    with pytest.raises(ValueError, match=r"`indices` is \[2\]"):
        own.split([2])
    other, other_call = pipelines["class"]
    with pytest.raises(ValueError, match="different `transformer`"):
        own.join(other.prepare_generation(**other_call, generator=seeded(0, 1)))


RESUME = textwrap.dedent(
    """
    import sys
    import torch
    import bitdance_diffusers
    pipeline_class, path, call, folder = sys.argv[1], sys.argv[2], eval(sys.argv[3]), sys.argv[4]
    pipeline = getattr(bitdance_diffusers, pipeline_class).from_pretrained(path)
    for name in sys.argv[5:]:
        generator = [torch.Generator(), torch.Generator()] if name.startswith("list") else torch.Generator()
        generation = pipeline.prepare_generation(**call, generator=generator)
        generation.load_state_dict(torch.load(f"{folder}/{name}", weights_only=True))
        for _ in generation:
            pass
        torch.save(generation.code, f"{folder}/{name}.code")
    """
)


def test_stopped_and_resumed_in_another_process(pipeline_and_call, tmp_path):
    pipeline, call = pipeline_and_call
    num_patches = pipeline.prepare_generation(**call).pictures[0].num_patches
    expected, names = {}, []
    for kind in ("list", "one"):
        generator = seeded(0, 1) if kind == "list" else seeded(0)[0]
        generation = pipeline.prepare_generation(**call, generator=generator)
        torch.save(generation.state_dict(), tmp_path / f"{kind}0")
        for i, _ in enumerate(generation, start=1):
            torch.save(generation.state_dict(), tmp_path / f"{kind}{i}")
        expected[kind] = generation.code
        names += [f"{kind}{i}" for i in range(num_patches + 1)]
    arguments = [type(pipeline).__name__, str(pipeline._name_or_path), repr(call), str(tmp_path), *names]
    subprocess.run([sys.executable, "-c", RESUME, *arguments], check=True)
    for name in names:
        code = torch.load(tmp_path / f"{name}.code", weights_only=True)
        assert torch.equal(code, expected[name.rstrip("0123456789")]), name


def test_states_of_other_pictures_are_refused(pipelines):
    pipeline, call = pipelines["t2i"]
    state = pipeline.prepare_generation(**call, generator=seeded(0, 1)).state_dict()
    with pytest.raises(ValueError, match="`state` holds 2 pictures; it has to hold 1"):
        pipeline.prepare_generation(**one_of(call, 0), generator=seeded(0)).load_state_dict(state)
    with pytest.raises(ValueError, match="a picture 0 of"):
        pipeline.prepare_generation(**call | {"width": 16}, generator=seeded(0, 1)).load_state_dict(state)
    with pytest.raises(ValueError, match="one generator draws"):
        pipeline.prepare_generation(**call, generator=seeded(0)[0]).load_state_dict(state)
    begun = pipeline.prepare_generation(**call, generator=seeded(0, 1))
    begun.advance()
    with pytest.raises(ValueError, match="before the first patch"):
        begun.load_state_dict(state)


def test_two_threads_draw_by_one_pipeline(pipeline_and_call):
    """Of other sizes, steps and guidance; each callback reads and changes its own call only."""
    pipeline, call = pipeline_and_call
    calls = [call, call | {"num_inference_steps": 5, "guidance_scale": 2.0}]
    if "height" in call:
        calls[1] |= {"height": 8, "width": 16, "prompt": ["a"]}
    barrier = threading.Barrier(2, timeout=60)

    def drawn(call, wait):
        seen = []

        def callback(pipe, index, timestep, tensors):
            if wait and index < 2:
                barrier.wait()  # the calls take turns
            seen.append((pipe.guidance_scale, pipe.current_timestep, pipe.num_timesteps))
            if index == 1:
                pipe._guidance_scale = call["guidance_scale"] + 1
            return {}

        num_images = len(call.get("prompt", call.get("class_labels")))
        return draw(pipeline, call, seeded(*range(num_images)), callback_on_step_end=callback), seen

    expected = [drawn(call, wait=False) for call in calls]
    config = dict(vars(pipeline.scheduler))
    results = [None, None]

    def run(i):
        results[i] = drawn(calls[i], wait=True)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (code, seen), (expected_code, expected_seen) in zip(results, expected, strict=True):
        assert torch.equal(code, expected_code) and seen == expected_seen
    assert dict(vars(pipeline.scheduler)) == config  # untouched


def test_another_thread_may_interrupt(pipelines):
    pipeline, call = pipelines["t2i"]
    begun, stopped = threading.Event(), threading.Event()

    def wait(pipe, index, timestep, tensors):
        begun.set()
        stopped.wait(60)

    results = []
    thread = threading.Thread(
        target=lambda: results.append(draw(pipeline, call, seeded(0, 1), callback_on_step_end=wait))
    )
    thread.start()
    begun.wait(60)
    pipeline._interrupt = True
    stopped.set()
    thread.join()
    assert (grid_to_patches(results[0], 2) != 0).all(dim=(0, 2, 3)).tolist() == [True] + [False] * 5
