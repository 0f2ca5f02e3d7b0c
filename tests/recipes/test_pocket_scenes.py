"""Scenes, captions and tokenizer: what is said is what was drawn, and held out stays held out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_runtime.errors import UserError
from recipes.pocket.captions import caption, parse_caption
from recipes.pocket.scenes import (
    BACKGROUNDS,
    COLOURS,
    Object,
    Scene,
    draw,
    draw_many,
    held_out,
    leave_open,
    sample_scene,
)
from recipes.pocket.shapes import SHAPES, coverage
from recipes.pocket.train_unet import training_scenes

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.booleans(), st.sampled_from([0.0, 0.3]))
@settings(max_examples=300, deadline=None)
def test_a_caption_reads_back_as_its_scene(seed, pairs, share):
    rng = np.random.default_rng(seed)
    scene = leave_open(sample_scene(rng, pairs=pairs), rng, share)
    assert parse_caption(caption(scene, rng)) == scene


def test_training_scenes_hold_no_held_out_combination():
    scenes = training_scenes(seed=0, count=3000, extra_pairs=500)
    assert not any(held_out(scene) for scene in scenes)
    assert {len(scene.objects) for scene in scenes} == {1, 2}


def test_one_combination_in_five_is_held_out_and_the_choice_is_stable():
    rng = np.random.default_rng(0)
    scenes = [
        Scene((Object(shape, colour, size, place),), ground)
        for shape in SHAPES
        for colour in COLOURS
        for size in ("small", "large")
        for place in ("center", "top left")
        for ground in BACKGROUNDS
    ]
    share = np.mean([held_out(scene) for scene in scenes])
    assert 0.15 < share < 0.25
    assert all(held_out(sample_scene(rng, "held_out", pairs)) for pairs in (False, True) * 50)


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_a_relation_and_its_mirror_are_the_same_combination(seed):
    scene = sample_scene(np.random.default_rng(seed), pairs=True)
    mirrors = {"left of": "right of", "above": "below"}
    mirrors |= {b: a for a, b in mirrors.items()}
    turned = Scene(scene.objects[::-1], scene.background, mirrors[scene.relation])
    assert held_out(turned) == held_out(scene)


def test_drawing_is_seeded_and_needs_a_complete_scene():
    scene = parse_caption("a small red star in the top left, on navy")
    first, second = (draw(scene, np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert (first == second).all()
    with pytest.raises(ValueError, match="complete"):
        draw(parse_caption("a red star"), np.random.default_rng(0))


def test_every_shape_lies_inside_its_picture_with_soft_edges():
    for shape in SHAPES:
        mask = coverage(shape, *(np.array([v], np.float32) for v in (32, 32, 20)))[0]
        assert mask[[0, -1]].max() == 0
        assert mask[:, [0, -1]].max() == 0
        assert 0.25 * 40**2 < mask.sum() < 0.9 * 40**2
        assert ((mask > 0.05) & (mask < 0.95)).any()


def test_palette_colours_lie_far_apart():
    colours = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e9 * np.eye(len(colours))
    assert distances.min() > 60


def test_two_objects_of_a_picture_do_not_touch():
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = sample_scene(rng, pairs=True)
        picture = draw_many([scene], rng)[0].astype(float)
        empty = np.linalg.norm(picture - BACKGROUNDS[scene.background], axis=-1) < 40
        axis = 0 if scene.relation in ("left of", "right of") else 1
        assert empty.all(axis=axis)[24:40].any()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a red fox in the snow", "shape"),
        ("a star on navy", "colour"),
        ("a red star and a blue ring", "shape"),
        ("a red star left of a dog", "shape"),
        ("a red star on a navy and cream background", "two backgrounds"),
        ("a small large red star", "two sizes"),
    ],
)
def test_a_caption_that_cannot_be_read_is_told_in_one_sentence(text, told):
    with pytest.raises(UserError, match=told):
        parse_caption(text)
