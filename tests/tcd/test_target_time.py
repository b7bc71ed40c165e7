"""The embedding of the target time against diffusers' own layers, and as it comes from a file."""

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from trajectory_consistency.tcd import TargetInput, TargetTime, split_target_time

T, S = torch.tensor([999, 519, 19]), torch.tensor([499, 0, 0])


def random_embedding(target_input: TargetInput = "s", channels: int = 32, width: int = 128) -> TargetTime:
    torch.manual_seed(0)
    embedding = TargetTime(channels, width, target_input=target_input)
    torch.nn.init.normal_(embedding["out"].weight, std=0.1)
    return embedding.requires_grad_(False)


def test_a_new_one_changes_nothing_and_can_be_trained() -> None:
    embedding = TargetTime(320, 1280)
    embedded = embedding(T, S)
    assert embedded.shape == (3, 1280) and not embedded.any()
    embedded.sum().backward()
    assert embedding["out"].weight.grad is not None and embedding["out"].weight.grad.any()


@pytest.mark.parametrize(("target_input", "time"), [("s", S), ("t-s", T - S)])
def test_it_is_diffusers_embedding_of_a_timestep(target_input: TargetInput, time: torch.Tensor) -> None:
    embedding = random_embedding(target_input)
    theirs = TimestepEmbedding(32, 128).requires_grad_(False)
    theirs.linear_1.load_state_dict(embedding["in"].state_dict())
    theirs.linear_2.load_state_dict(embedding["out"].state_dict())
    sinusoid = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)(time)
    torch.testing.assert_close(embedding(T, S), theirs(sinusoid), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(embedding(T, S)[0], embedding(T, S)[1], atol=1e-3)


def test_each_row_is_by_itself() -> None:
    embedding = random_embedding()
    torch.testing.assert_close(embedding(T[1:2], S[1:2])[0], embedding(T, S)[1])


def test_a_file_gives_it_back() -> None:
    embedding = random_embedding("t-s")
    tensors = {f"tcd_target_time.{name}": tensor for name, tensor in embedding.state_dict().items()}
    assert sorted(tensors) == [f"tcd_target_time.{name}" for name in ("in.bias", "in.weight", "out.bias", "out.weight")]
    lora, read = split_target_time({"lora_unet_x.alpha": torch.ones(()), **tensors})
    assert list(lora) == ["lora_unet_x.alpha"]
    assert torch.equal(TargetTime.from_state_dict(read, "t-s")(T, S), embedding(T, S))
    halves = {name: tensor.half() for name, tensor in read.items()}
    assert TargetTime.from_state_dict(halves, "s")(T, S).dtype == torch.float32


def test_reading_a_file_draws_no_random_numbers_and_shares_no_memory() -> None:
    tensors = dict(random_embedding().state_dict())
    drawn_before = torch.random.get_rng_state()
    read = TargetTime.from_state_dict(tensors, "s")
    assert torch.equal(torch.random.get_rng_state(), drawn_before)
    with torch.no_grad():
        read["out"].weight.zero_()
    assert tensors["out.weight"].any()
    read(T, S).sum().backward()
    assert read["out"].bias.grad is not None, "it can be trained on"


@pytest.mark.parametrize(
    ("changed", "target_input", "complaint"),
    [
        ({"out.bias": None}, "s", "the file is damaged"),
        ({"in.weight": torch.zeros(128)}, "s", "the file is damaged"),
        ({"out.weight": torch.zeros(128, 64)}, "s", "the file is damaged"),
        ({"more": torch.zeros(1)}, "s", "the file is damaged"),
        ({"in.weight": torch.zeros(128, 31)}, "s", "the file is damaged"),
        ({}, "s/t", "the input 's/t', but this version knows only s and t-s"),
    ],
)
def test_what_is_no_embedding_is_refused(
    changed: dict[str, torch.Tensor | None], target_input: str, complaint: str
) -> None:
    tensors = {**random_embedding().state_dict(), **changed}
    with pytest.raises(ValueError, match=complaint):
        TargetTime.from_state_dict({n: tensor for n, tensor in tensors.items() if tensor is not None}, target_input)
