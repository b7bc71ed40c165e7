"""The demo's measures: distances with known values, and a classifier that is put to the test."""

import math
import random
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trajectory_consistency.trainer.demo import classifier as classifier_module
from trajectory_consistency.trainer.demo.classifier import (
    LOWEST_ACCURACY,
    NUM_FEATURES,
    Classifier,
    as_signal,
    scene_labels,
    train_classifier,
    world_sample,
)
from trajectory_consistency.trainer.demo.metrics import (
    Judge,
    Points,
    caption_accuracy,
    energy_distance,
    pixel_difference,
    world_pictures,
)
from trajectory_consistency.trainer.tiny.world import LABELS, Prompt, Scene, draw_pictures, random_prompts

PROMPTS = random_prompts(250, seed=3)
Sample = tuple[Tensor, list[Scene]]


# ---- the distance


KINDS = torch.arange(200)
CENTERS = 10 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))


def drawn(seed: int, rounds: int = 1, away: float = 0.0) -> Tensor:
    """A point of each kind, which is around a center of its own, in some rounds."""
    noise = torch.randn(200 * rounds, 3, generator=torch.Generator().manual_seed(seed))
    return CENTERS.repeat(rounds, 1) + noise + away


def test_equal_distributions_are_at_distance_zero_and_those_that_moved_are_not() -> None:
    reference = Points(drawn(1, rounds=5), KINDS.repeat(5))
    same = [energy_distance(Points(drawn(seed), KINDS), reference) for seed in range(2, 12)]
    assert abs(sum(same) / len(same)) < 0.002
    assert energy_distance(Points(drawn(2, away=1.0), KINDS), reference) > 0.1


def test_kinds_that_chance_picks_are_noise_that_all_kinds_alike_are_without() -> None:
    reference = Points(drawn(1, rounds=5), KINDS.repeat(5))
    picked = [torch.randint(200, (200,), generator=torch.Generator().manual_seed(seed)) for seed in range(2, 12)]
    by_chance = [energy_distance(Points(drawn(seed)[some]), reference) for seed, some in enumerate(picked, 2)]
    alike = [energy_distance(Points(drawn(seed), KINDS), reference) for seed in range(2, 12)]
    assert torch.tensor(alike).std() < 0.2 * torch.tensor(by_chance).std()


def test_the_distance_is_that_of_its_definition() -> None:
    x, y = Points(torch.tensor([[0.0], [1.0], [3.0]])), Points(torch.tensor([[0.0], [2.0]]))
    across = (0 + 2 + 1 + 1 + 3 + 1) / 6
    assert energy_distance(x, y) == pytest.approx(2 * across - (1 + 3 + 2) / 3 - 2)


def test_in_one_dimension_it_is_the_area_between_the_distribution_functions() -> None:
    x, y = torch.randn(3000, 1), 0.5 + 2 * torch.randn(3000, 1)
    at = torch.linspace(-12, 12, 24001)
    below = [(points < at).double().mean(0) for points in (x, y)]
    area = 2 * torch.trapezoid((below[0] - below[1]).square(), at.double())
    assert energy_distance(Points(x), Points(y)) == pytest.approx(area.item(), abs=2e-3)


@pytest.mark.parametrize("at", [torch.zeros(1, 4), torch.zeros(5), torch.full((5, 4), math.nan)])
def test_points_that_have_no_distance_are_refused(at: Tensor) -> None:
    with pytest.raises(ValueError, match="at least two points"):
        Points(at)


# ---- the classifier


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(seed=0)


@pytest.fixture(scope="module")
def held_out() -> Sample:
    return world_sample(500, purpose="test", seed=7)


def with_noise(pictures: Tensor, std: float) -> Tensor:
    return as_signal(pictures) + std * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))


def with_blur(pictures: Tensor, radius_px: int) -> Tensor:
    kernel = 2 * radius_px + 1
    return torch.nn.functional.avg_pool2d(as_signal(pictures), kernel, 1, radius_px, count_include_pad=False)


@pytest.fixture(scope="module")
def judge(trained: Classifier) -> Judge:
    world, teacher = (world_pictures(PROMPTS, rounds, purpose) for rounds, purpose in ((4, "world"), (1, "teacher")))
    return Judge(trained, PROMPTS, world=world, teacher=teacher)


def accuracy(classifier: Classifier, pictures: Tensor, scenes: list[Scene]) -> tuple[float, dict[str, float]]:
    return caption_accuracy(
        classifier, classifier.features(pictures), [Prompt(scene, tuple(LABELS)) for scene in scenes]
    )


def test_the_classifier_reads_held_out_pictures(trained: Classifier, held_out: Sample) -> None:
    whole, parts = accuracy(trained, *held_out)
    assert list(parts) == list(LABELS)
    assert min(whole, *parts.values()) >= 0.99


@pytest.mark.parametrize("damage", [lambda p: with_noise(p, 0.2), lambda p: with_blur(p, 1), lambda p: 0.8 * p])
def test_the_classifier_reads_imperfect_pictures(
    trained: Classifier, held_out: Sample, damage: Callable[[Tensor], Tensor]
) -> None:
    pictures, scenes = held_out
    whole, _ = accuracy(trained, damage(as_signal(pictures)), scenes)
    assert whole >= 0.9


def test_features_of_the_world_have_about_unit_variance(judge: Judge) -> None:
    features = judge.world.at
    assert features.shape == (4 * len(PROMPTS), NUM_FEATURES)
    assert features.std(0).min() > 0.7 and features.std(0).max() < 1.4


def test_the_world_is_at_no_distance_from_itself(judge: Judge) -> None:
    found = [judge.metrics(world_pictures(PROMPTS, 1, f"fresh {seed}")) for seed in range(4)]
    for key in ("to_world", "to_teacher"):
        # Half of the prompts are partial, whose pictures vary: a single distance is within about 5e-3.
        assert abs(statistics.mean(each[key] for each in found)) < 5e-3  # type: ignore[literal-required]
    assert min(each["accuracy"] for each in found) > 0.98


def test_the_distances_grow_with_the_damage(judge: Judge) -> None:
    pictures = world_pictures(PROMPTS, 1, "damaged")
    noisy = [judge.metrics(with_noise(pictures, std)) for std in (0.15, 0.3, 0.6)]
    blurred = [judge.metrics(with_blur(pictures, px)) for px in (2, 4, 8)]
    for found in (noisy, blurred):
        for first, second, third in ([each["to_world"] for each in found], [each["to_teacher"] for each in found]):
            assert 0.01 < first < second / 2 < third / 4


def test_the_distance_sees_what_is_missing_from_the_world(judge: Judge) -> None:
    rng = random.Random(1)
    circles = [[scene for scene in prompt.scenes() if scene.shape == "circle"] for prompt in PROMPTS]
    scenes = [rng.choice(allowed or prompt.scenes()) for allowed, prompt in zip(circles, PROMPTS, strict=True)]
    found = judge.metrics(draw_pictures(scenes, rng))
    assert found["accuracy"] > 0.98, "no caption says that it shows no circle"
    assert found["to_world"] > 0.01


def test_pictures_that_are_not_one_for_each_prompt_are_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match="one for each prompt, got 3"):
        judge.metrics(world_pictures(PROMPTS[:3], 1, "few"))


def test_bytes_and_floats_measure_the_same_and_batches_do_not_matter(trained: Classifier, held_out: Sample) -> None:
    pictures, _ = held_out
    whole = trained.features(pictures)
    assert torch.equal(whole, trained.features(as_signal(pictures)))
    one_by_one = torch.cat([trained.features(picture[None]) for picture in pictures[:20]])
    torch.testing.assert_close(one_by_one, whole[:20], rtol=1e-4, atol=1e-4)


def test_accuracy_counts_the_parts_that_are_mentioned_and_the_whole(trained: Classifier) -> None:
    drawn, star = Scene("circle", "red", "left", "blue", "dotted"), Scene("star", "red", "left", "blue", "plain")
    asked = [
        Prompt(drawn, tuple(LABELS)),
        Prompt(star, ("color", "place", "ground")),
        Prompt(star, ("shape", "color", "place")),
        Prompt(star, ("place", "pattern")),
    ]
    whole, parts = caption_accuracy(trained, trained.features(draw_pictures([drawn] * 4, random.Random(0))), asked)
    assert whole == 0.5
    assert parts == {"shape": 0.5, "color": 1.0, "place": 1.0, "ground": 1.0, "pattern": 0.5}


def test_a_part_that_is_never_mentioned_has_no_accuracy(trained: Classifier) -> None:
    scene = Scene("circle", "red", "left", "blue", "dotted")
    features = trained.features(draw_pictures([scene], random.Random(0)))
    whole, parts = caption_accuracy(trained, features, [Prompt(scene, ("shape",))])
    assert whole == parts["shape"] == 1.0 and math.isnan(parts["color"])


def test_accuracy_needs_a_prompt_for_each_picture(trained: Classifier, held_out: Sample) -> None:
    with pytest.raises(ValueError, match=f"got 500 pictures, {len(PROMPTS)} prompts"):
        caption_accuracy(trained, trained.features(held_out[0]), PROMPTS)


# ---- its training, briefly


def test_the_same_seed_gives_the_same_classifier_whatever_the_global_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_module, "LOWEST_ACCURACY", 0.0)
    torch.manual_seed(11)
    first = train_classifier(seed=5, steps=3, num_pictures=100).state_dict()
    expected = torch.rand(3)
    torch.manual_seed(12)
    second = train_classifier(seed=5, steps=3, num_pictures=100).state_dict()
    other = train_classifier(seed=6, steps=3, num_pictures=100).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), expected)  # training draws nothing from the global generator


def test_a_classifier_that_reads_badly_is_an_error() -> None:
    assert LOWEST_ACCURACY == 0.97
    with pytest.raises(RuntimeError, match=r"too few held-out pictures correctly \(shape \d.*needs 97%.*than 1 steps"):
        train_classifier(seed=0, steps=1, num_pictures=100)


# ---- its pictures


def test_samples_for_different_purposes_share_no_stream() -> None:
    first, scenes = world_sample(20, purpose="a", seed=0)
    again, same_scenes = world_sample(20, purpose="a", seed=0)
    assert torch.equal(first, again) and scenes == same_scenes
    assert first.shape == (20, 3, 64, 64) and first.dtype == torch.uint8
    for purpose, seed in [("b", 0), ("a", 1)]:
        assert world_sample(20, purpose=purpose, seed=seed)[1] != scenes


def test_pictures_lie_channels_first_and_labels_in_the_order_of_the_world() -> None:
    scene = Scene("square", "yellow", "left", "blue", "plain")
    picture = draw_pictures([scene], random.Random(0))[0]
    assert picture[:, 32, 18].tolist() == [245, 205, 50]
    assert picture[:, 32, 60].tolist() == [40, 80, 210]
    assert scene_labels([scene]).tolist() == [[1, 3, 0, 2, 0]]


def test_bytes_span_the_signal_and_floats_are_clamped() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 64, 64)
    assert as_signal(ends)[:, 0, 0, 0].tolist() == [-1.0, 1.0]
    assert as_signal(torch.full((1, 3, 64, 64), 1.5, dtype=torch.float64)).eq(1).all()


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(0, 3, 64, 64), "B >= 1"),
        (torch.zeros(2, 64, 64, 3), r"got \[2, 64, 64, 3\]"),
        (torch.zeros(3, 64, 64), r"got \[3, 64, 64\]"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), "got torch.int64"),
        (torch.full((2, 3, 64, 64), math.nan), "diverged"),
    ],
)
def test_what_is_no_picture_is_refused(pictures: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_signal(pictures)


def test_the_difference_of_pixels_is_of_pairs() -> None:
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    others = pictures.clone()
    others[1, :, :2] = 200  # half of one picture: its root mean square is 200 / sqrt(2)
    assert pixel_difference(pictures, pictures) == 0
    assert pixel_difference(pictures, others) == pixel_difference(others, pictures) == pytest.approx(100 / math.sqrt(2))
