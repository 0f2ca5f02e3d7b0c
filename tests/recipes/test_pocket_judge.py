"""The judge: right on true drawings, at chance on mismatched captions, strict on flaws."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from recipes.pocket.captions import caption, parse_caption
from recipes.pocket.evaluate import contact_sheet, held_out_scenes, score, wilson
from recipes.pocket.judge import ATTRIBUTES, components, judge, read
from recipes.pocket.scenes import BACKGROUNDS, COLOURS, PLACES, SIZES, draw, draw_many, sample_scene
from recipes.pocket.shapes import SHAPES

CASE = parse_caption("a large red star in the center, on a cream background")


def held_out_drawings(count: int, pairs: bool, seed: int = 0):
    rng = np.random.default_rng([seed, int(pairs)])
    scenes = [sample_scene(rng, "held_out", pairs) for _ in range(count)]
    return scenes, draw_many(scenes, rng)


@pytest.fixture
def picture() -> np.ndarray:
    return draw(CASE, np.random.default_rng(0))


@pytest.mark.parametrize("pairs", [False, True])
def test_the_judge_is_right_on_at_least_99_percent_of_held_out_drawings(pairs):
    scenes, pictures = held_out_drawings(300, pairs)
    result = score(pictures, scenes)
    assert all(row["share"] >= 0.99 for row in result["by"].values()), result


@pytest.mark.parametrize("pairs", [False, True])
def test_the_judge_is_at_chance_on_mismatched_captions(pairs):
    scenes, pictures = held_out_drawings(300, pairs, seed=1)
    by = score(pictures, scenes[1:] + scenes[:1])["by"]
    objects = 2 if pairs else 1
    chance = {
        "shape": 1 / len(SHAPES) ** objects,
        "colour": 1 / len(COLOURS) ** objects,
        "background": 1 / len(BACKGROUNDS),
    }
    if not pairs:
        chance |= {"size": 1 / len(SIZES), "place": 1 / len(PLACES)}
    for name, share in chance.items():
        # The two objects of a pair may be named in either order: up to twice the chance.
        assert by[name]["share"] < share * objects + 0.09, (name, by[name])
        if not pairs:
            assert by[name]["share"] > share - 0.09, (name, by[name])
    assert by["together"]["share"] <= 0.01


@pytest.mark.parametrize("pairs", [False, True])
def test_slight_blur_and_noise_change_no_verdict(pairs):
    scenes, pictures = held_out_drawings(100, pairs, seed=2)
    soft = pictures.astype(float)
    soft = (2 * soft + sum(np.roll(soft, s, a) for s in (1, -1) for a in (1, 2))) / 6
    soft += np.random.default_rng(0).normal(0, 6, soft.shape)
    result = score(np.clip(soft, 0, 255).astype(np.uint8), scenes)
    assert result["by"]["together"]["share"] >= 0.97


@pytest.mark.parametrize(
    ("wrong", "attribute"),
    [
        ("a large red heart in the center, on a cream background", "shape"),
        ("a large pink star in the center, on a cream background", "colour"),
        ("a small red star in the center, on a cream background", "size"),
        ("a large red star in the top left, on a cream background", "place"),
        ("a large red star in the center, on a mint background", "background"),
    ],
)
def test_one_wrong_word_fails_that_attribute_and_no_other(picture, wrong, attribute):
    verdict = judge(picture, parse_caption(wrong))
    assert [name for name in ATTRIBUTES if not getattr(verdict, name)] == [attribute]
    assert judge(picture, CASE).ok


def test_a_swapped_relation_fails():
    scene = parse_caption("a small red star left of a large blue ring, on a navy background")
    picture = draw(scene, np.random.default_rng(0))
    assert judge(picture, scene).ok
    turned = judge(picture, replace(scene, relation="right of"))
    assert not turned.relation
    assert turned.shape
    assert turned.colour


def test_words_swapped_between_two_objects_fail():
    scene = parse_caption("a small red star left of a large blue ring, on navy")
    picture = draw(scene, np.random.default_rng(0))
    for text in (
        "a small blue star left of a large red ring, on navy",
        "a large red star left of a small blue ring, on navy",
        "a small red ring left of a large blue star, on navy",
    ):
        assert not judge(picture, parse_caption(text)).ok


def test_what_a_caption_leaves_open_is_not_demanded(picture):
    assert judge(picture, parse_caption("a red star")).ok
    assert not judge(picture, parse_caption("a blue star")).ok


def test_an_extra_blob_fails_the_count(picture):
    picture[4:9, 4:9] = COLOURS["blue"]
    verdict = judge(picture, CASE)
    assert not verdict.count
    assert not verdict.ok


def test_an_empty_picture_and_a_pair_for_one_fail(picture):
    assert not judge(np.full_like(picture, 252), CASE).ok
    scene = parse_caption("a large red star left of a large blue ring, on cream")
    assert not judge(draw(scene, np.random.default_rng(0)), CASE).count


def test_a_stained_background_fails(picture):
    picture[:16, :] = BACKGROUNDS["mint"]
    assert not judge(picture, CASE).ok


def test_an_object_of_two_colours_fails(picture):
    star = np.linalg.norm(picture - np.array(COLOURS["red"], float), axis=-1) < 60
    star[:, :32] = False
    picture[star] = COLOURS["blue"]
    assert not judge(picture, CASE).ok


def test_noise_fails():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not judge(noise, parse_caption("a red star")).ok


@pytest.mark.parametrize(
    ("side", "pairs", "least"),
    [
        *((side, pairs, 60) for side in (48, 96) for pairs in (False, True)),
        (32, False, 60),
        (32, True, 59),  # at a quarter of the pixels the smaller of two is misread now and then
    ],
)
def test_a_drawing_of_another_size_is_judged_right(side, pairs, least):
    scenes, pictures = held_out_drawings(60, pairs, seed=3)
    resized = [
        np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX))
        for picture in pictures
    ]
    assert score(resized, scenes)["by"]["together"]["right"] >= least


def test_what_is_no_picture_is_not_read(picture):
    assert read(picture.repeat(2, axis=0).repeat(2, axis=1)).background == "cream"
    for wrong in (picture[..., 0], picture[:0], picture[..., :2]):
        with pytest.raises(ValueError, match=r"must be \(H, W, 3\)"):
            read(wrong)


def test_components_are_4_connected():
    mask = np.zeros((64, 64), bool)
    mask[1, 1] = mask[2, 2] = mask[2, 3] = True
    assert sorted(int(part.sum()) for part in components(mask)) == [1, 2]


def test_held_out_captions_are_seeded_and_say_their_scene():
    cases = held_out_scenes(20, seed=5, pairs=True)
    assert cases == held_out_scenes(20, seed=5, pairs=True)
    assert cases != held_out_scenes(20, seed=6, pairs=True)
    assert all(parse_caption(text) == scene for text, scene in cases)
    assert all(isinstance(caption(s, np.random.default_rng(0)), str) for _, s in cases)


def test_wilson_matches_known_values_and_pictures_need_their_scenes(picture):
    low, high = wilson(50, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="1 pictures for 2 scenes"):
        score([picture], [CASE, CASE])
    assert contact_sheet(np.stack([picture] * 3), columns=2).shape == (134, 134, 3)
