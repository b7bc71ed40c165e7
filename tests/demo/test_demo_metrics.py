"""The demo's measures: Frechet distances with known values, and a classifier that is put to the test."""

import math
import random
from collections.abc import Callable

import numpy as np
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
    FEATURE_SPACE,
    caption_accuracy,
    evaluate,
    frechet_distance,
    noise_floor,
)
from trajectory_consistency.trainer.tiny.world import LABELS, Scene, all_scenes, draw_pictures

Sample = tuple[Tensor, list[Scene]]


def cloud(count: int, covariance: Tensor, mean: float = 0.0, *, seed: int = 0) -> Tensor:
    """Points [count, D] whose sample mean and sample covariance are exactly those asked for."""
    z = torch.randn(count, len(covariance), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z = z - z.mean(0)
    white = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (count - 1))).mT
    return white @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(dim: int, seed: int) -> Tensor:
    root = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / dim + 0.01 * torch.eye(dim, dtype=torch.float64)


def diagonal(*variances: float) -> Tensor:
    return torch.diag(torch.tensor(variances, dtype=torch.float64))


# ---- the distance


@pytest.mark.parametrize("count", [2, 5, 200])
def test_equal_sets_are_at_distance_zero(count: int) -> None:
    features = 100 * torch.randn(count, 16, generator=torch.Generator().manual_seed(1)) + 1000
    assert 0 <= frechet_distance(features, features) < 1e-16 * features.double().square().sum()


def test_a_shift_counts_by_its_square() -> None:
    features = cloud(50, random_covariance(8, 0))
    assert frechet_distance(features, features + 0.5) == pytest.approx(8 * 0.25, rel=1e-12)


@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0])
def test_a_scaled_covariance_counts_by_its_trace(factor: float) -> None:
    covariance = random_covariance(8, 0)
    a, b = cloud(50, covariance), factor * cloud(70, covariance, seed=1)
    assert frechet_distance(a, b) == pytest.approx((1 - factor) ** 2 * covariance.trace().item(), rel=1e-10)


def test_in_one_dimension_means_and_deviations_are_subtracted() -> None:
    a, b = cloud(30, diagonal(4.0), 1.0), cloud(40, diagonal(9.0), -2.0, seed=1)
    assert frechet_distance(a, b) == pytest.approx((1.0 + 2.0) ** 2 + (2.0 - 3.0) ** 2, rel=1e-12)


def test_commuting_covariances_are_compared_axis_by_axis() -> None:
    turn = torch.linalg.qr(random_covariance(3, 5)).Q
    a = cloud(30, diagonal(1.0, 4.0, 1e-6)) @ turn.T
    b = cloud(30, diagonal(9.0, 0.25, 4e-6), seed=1) @ turn.T
    assert frechet_distance(a, b) == pytest.approx((1 - 3) ** 2 + (2 - 0.5) ** 2 + (1e-3 - 2e-3) ** 2, rel=1e-10)


@pytest.mark.parametrize("dim", [2, 5, 64])
def test_covariances_that_do_not_commute_agree_with_the_eigenvalues_of_their_product(dim: int) -> None:
    first, second = random_covariance(dim, 1), random_covariance(dim, 2)
    assert not torch.allclose(first @ second, second @ first, atol=1e-3)
    eigenvalues = np.linalg.eigvals((first @ second).numpy())
    expected = (first + second).trace().item() - 2 * np.sqrt(eigenvalues.astype(complex)).real.sum()
    a, b = cloud(3 * dim + 2, first), cloud(4 * dim, second, seed=1)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_covariances_that_do_not_commute_agree_with_newtons_square_root() -> None:
    first, second = random_covariance(6, 3), random_covariance(6, 4)
    y, z = first @ second, torch.eye(6, dtype=torch.float64)
    for _ in range(60):  # Denman and Beavers: y tends to the square root of where it began
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    torch.testing.assert_close(y @ y, first @ second)
    expected = (first + second).trace().item() - 2 * y.trace().item()
    assert frechet_distance(cloud(40, first), cloud(40, second, seed=1)) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_features_still_give_the_distance() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])  # variance 2 along the first axis
    b = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, -2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # 4 along the second
    assert frechet_distance(a, b) == pytest.approx(2 + 4, rel=1e-12)


def test_float32_features_far_from_the_origin_are_measured_in_float64() -> None:
    features = (cloud(500, diagonal(1.0, 1.0)) + 4096.0).float()
    widened = features.double()
    exact = (1 - math.sqrt(2.0)) ** 2 * torch.cov(widened.T).trace().item()
    stretched = (widened - widened.mean(0)) * math.sqrt(2.0) + widened.mean(0)
    assert frechet_distance(features, stretched) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4), "at least two features"),
        (torch.zeros(5, 4), torch.zeros(5, 3), r"got \[5, 4\] and \[5, 3\]"),
        (torch.zeros(5), torch.zeros(5, 4), "two sets"),
        (torch.zeros(5, 4), torch.full((5, 4), math.nan), "not finite"),
    ],
)
def test_features_that_have_no_distance_are_refused(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


# ---- the classifier


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(seed=0)


@pytest.fixture(scope="module")
def reference(trained: Classifier) -> Tensor:
    return trained.features(world_sample(1000, purpose="reference", seed=0)[0])


@pytest.fixture(scope="module")
def held_out() -> Sample:
    return world_sample(500, purpose="test", seed=7)


def with_noise(pictures: Tensor, std: float) -> Tensor:
    return as_signal(pictures) + std * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))


def with_blur(pictures: Tensor, radius_px: int) -> Tensor:
    kernel = 2 * radius_px + 1
    return torch.nn.functional.avg_pool2d(as_signal(pictures), kernel, 1, radius_px, count_include_pad=False)


def test_the_classifier_reads_held_out_pictures(trained: Classifier, held_out: Sample) -> None:
    pictures, scenes = held_out
    whole, parts = caption_accuracy(trained, trained.features(pictures), scenes)
    assert list(parts) == list(LABELS)
    assert min(whole, *parts.values()) >= 0.99


@pytest.mark.parametrize("damage", [lambda p: with_noise(p, 0.2), lambda p: with_blur(p, 1), lambda p: 0.8 * p])
def test_the_classifier_reads_imperfect_pictures(
    trained: Classifier, held_out: Sample, damage: Callable[[Tensor], Tensor]
) -> None:
    pictures, scenes = held_out
    whole, _ = caption_accuracy(trained, trained.features(damage(as_signal(pictures))), scenes)
    assert whole >= 0.97


def test_features_of_the_world_have_about_unit_variance(trained: Classifier, reference: Tensor) -> None:
    assert reference.shape == (1000, NUM_FEATURES)
    assert reference.std(0).min() > 0.7 and reference.std(0).max() < 1.4


def test_the_distance_grows_with_the_damage(trained: Classifier, held_out: Sample, reference: Tensor) -> None:
    pictures, scenes = held_out
    floor = noise_floor(trained, scenes, reference, seed=0)["frechet"]
    noisy = [evaluate(trained, with_noise(pictures, std), scenes, reference)["frechet"] for std in (0.15, 0.3, 0.6)]
    blurred = [evaluate(trained, with_blur(pictures, px), scenes, reference)["frechet"] for px in (2, 4, 8)]
    for distances in (noisy, blurred):
        assert 1.5 * floor < distances[0] < distances[1] / 2 < distances[2] / 4


def test_the_distance_sees_what_is_missing_from_the_world(
    trained: Classifier, held_out: Sample, reference: Tensor
) -> None:
    circles = random.Random(0).choices([scene for scene in all_scenes() if scene.shape == "circle"], k=500)
    found = evaluate(trained, draw_pictures(circles, random.Random(1)), circles, reference)
    assert found["accuracy"] > 0.99
    floor = noise_floor(trained, held_out[1], reference, seed=0)
    assert found["frechet"] > 10 * floor["frechet"]


def test_the_noise_floor_is_what_the_world_itself_scores(
    trained: Classifier, held_out: Sample, reference: Tensor
) -> None:
    pictures, scenes = held_out
    floor = noise_floor(trained, scenes, reference, seed=0)
    world = evaluate(trained, pictures, scenes, reference)
    assert floor["accuracy"] >= 0.99
    assert floor["frechet"] == pytest.approx(world["frechet"], rel=0.2)
    assert floor["frechet"] != world["frechet"]
    assert noise_floor(trained, scenes, reference, seed=0) == floor
    assert noise_floor(trained, scenes, reference, seed=1) != floor


def test_the_result_says_what_was_measured(trained: Classifier, held_out: Sample, reference: Tensor) -> None:
    pictures, scenes = held_out
    found = evaluate(trained, pictures, scenes, reference)
    assert (found["accuracy"], found["accuracy_of"]) == caption_accuracy(trained, trained.features(pictures), scenes)
    assert found["frechet"] == frechet_distance(trained.features(pictures), reference)
    assert (found["samples"], found["reference_samples"], found["feature_space"]) == (500, 1000, FEATURE_SPACE)


def test_bytes_and_floats_measure_the_same_and_batches_do_not_matter(trained: Classifier, held_out: Sample) -> None:
    pictures, _ = held_out
    whole = trained.features(pictures)
    assert torch.equal(whole, trained.features(as_signal(pictures)))
    one_by_one = torch.cat([trained.features(picture[None]) for picture in pictures[:20]])
    torch.testing.assert_close(one_by_one, whole[:20], rtol=1e-4, atol=1e-4)


def test_accuracy_counts_each_part_and_the_whole(trained: Classifier) -> None:
    scene = Scene("circle", "red", "left", "blue")
    asked = [scene, Scene("star", "red", "left", "blue"), Scene("circle", "red", "top", "green"), scene]
    features = trained.features(draw_pictures([scene] * 4, random.Random(0)))
    whole, parts = caption_accuracy(trained, features, asked)
    assert whole == 0.5
    assert parts == {"shape": 0.75, "color": 1.0, "place": 0.75, "ground": 0.75}


def test_accuracy_needs_a_scene_for_each_picture(trained: Classifier, held_out: Sample) -> None:
    pictures, scenes = held_out
    with pytest.raises(ValueError, match="got 500 pictures and 499 scenes"):
        caption_accuracy(trained, trained.features(pictures), scenes[1:])


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
    scene = Scene("square", "yellow", "left", "blue")
    picture = draw_pictures([scene], random.Random(0))[0]
    assert picture[:, 32, 18].tolist() == [245, 205, 50]
    assert picture[:, 32, 60].tolist() == [40, 80, 210]
    assert scene_labels([scene]).tolist() == [[1, 3, 0, 2]]


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
