"""The noise that is injected: what it depends on, and what it does not."""

import struct
from decimal import Decimal

import pytest
import torch

from trajectory_consistency.tcd import seeded_noise


@pytest.mark.parametrize("seed", [0, 42, 2**63, 2**64 - 1])
def test_noise_of_an_item_is_a_function_of_seed_index_and_level(seed: int) -> None:
    like = torch.empty(3, 2, 4, 5)
    items_apart = int(Decimal(2).sqrt() % 1 * 2**64) | 1
    for sigma in (0.7194, 14.6146, 4518.76):
        (bits,) = struct.unpack("<I", struct.pack("<f", sigma))
        for items in (None, [5, 0, 5]):
            drawn = seeded_noise(seed, items=items)(torch.tensor(sigma), like)
            for k, image in zip(items or range(3), drawn, strict=True):
                generator = torch.Generator().manual_seed(
                    (seed + 1 + k * items_apart + bits * 0x9E3779B97F4A7C15) % 2**64
                )
                assert torch.equal(image, torch.randn(2, 4, 5, generator=generator))


def test_images_of_neighboring_seeds_share_no_noise() -> None:
    like, sigma = torch.empty(16, 8), torch.tensor(0.7194)
    drawn = torch.cat([seeded_noise(seed)(sigma, like) for seed in range(100, 150)])
    assert len(drawn.unique(dim=0)) == 16 * 50


@pytest.mark.parametrize("items", [[], [0], [0, 1, 2]])
def test_each_image_needs_its_item(items: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        seeded_noise(0, items=items)(torch.tensor(0.5), torch.empty(2, 3))


def test_noise_is_standard_normal_and_differs_by_seed_item_and_level() -> None:
    like = torch.empty(2, 4, 50, 50)
    draws = [seeded_noise(seed)(torch.tensor(s), like) for seed in (0, 2, 2**64 - 9) for s in (0.5, 0.25, 2.0)]
    items = torch.cat(draws).flatten(1)
    assert len(items) == 18
    assert (items.mean(1).abs() < 5 / 100).all()
    assert ((items.std(1) - 1).abs() < 5 / 141).all()
    correlation = torch.corrcoef(items) - torch.eye(18)
    assert (correlation.abs() < 0.06).all()


def test_noise_of_a_level_is_the_same_in_both_precisions_and_takes_the_form_of_the_latent() -> None:
    noise = seeded_noise(1)
    sigma = torch.tensor(0.7194)
    single = noise(sigma, torch.empty(2, 3))
    double = noise(sigma.double(), torch.empty(2, 3, dtype=torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(double, single.double())
    assert noise(sigma, torch.empty(2, 3, device="meta")).device.type == "meta"


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    seeded_noise(1)(torch.tensor(0.5), torch.empty(2, 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed is .* must be from 0 to"):
        seeded_noise(seed)
