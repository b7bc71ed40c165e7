"""Prompts are read with weights and in chunks, and each family encodes them in its way."""

import pytest
import torch

from hard_captions import HARD_CAPTIONS
from small_bases import random_parts, shrink
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet.families import Family, empty_text_encoder
from trajectory_consistency.trainer.models.unet.prompt import clip_tokenizer, read_prompt, weighted_parts
from trajectory_consistency.trainer.models.unet.text import TextEncoder, check_clip_skip

START, END = 49406, 49407


def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder("tiny", [empty_text_encoder("tiny")]).eval()


def context(model: TextEncoder, caption: str) -> torch.Tensor:
    return model.encode([caption])[0].tensors["context"]


def test_ids_that_every_implementation_of_clip_gives() -> None:
    assert len(clip_tokenizer()) == 49408
    # "a photo of a cat": the ids in CLIP's own documentation and in every SD1.5 prompt dump.
    assert read_prompt("a photo of a cat").ids[0, :8].tolist() == [START, 320, 1125, 539, 320, 2368, END, END]


@pytest.mark.parametrize("padding", [0, END])
@pytest.mark.parametrize("caption", HARD_CAPTIONS)
def test_each_chunk_has_77_tokens_between_start_and_end(caption: str, padding: int) -> None:
    ids, weights = read_prompt(caption, padding=padding)
    assert ids.shape == weights.shape == (len(ids), 77)
    assert (ids[:, 0] == START).all() and (ids == END).any(1).all() and (weights[:, 0] == 1).all()
    after_end = (ids == END).cumsum(1) > 1 if padding == END else (ids == END).cumsum(1) > 0
    assert caption.count("<|") or ((ids == padding) | (ids == END) | ~after_end).all()


def test_case_and_spaces_do_not_matter() -> None:
    assert torch.equal(read_prompt("A  Red\nCIRCLE").ids, read_prompt("a red circle").ids)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red:1.5) circle", [("a ", 1), ("red", 1.5), (" circle", 1)]),
        ("((red) blue)", [("red", 1.21), (" blue", 1.1)]),
        ("(a (red:1.5):0.5)", [("a ", 0.5), ("red", 1.5)]),
        ("artist_\\(style\\)", [("artist_(style)", 1)]),
        ("(artist_\\(style\\):1.3)", [("artist_(style)", 1.3)]),
        ("artist_(style)", [("artist_", 1), ("style", 1.1)]),
        ("(red:very)", [("red:very", 1.1)]),
        ("open ( only", [("open ", 1), ("( only", 1)]),
        ("()", []),
    ],
)
def test_weights_in_brackets(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = weighted_parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def test_a_short_part_is_not_divided_between_two_chunks() -> None:
    long, short = read_prompt("word " * 80), read_prompt("word " * 73 + "(a b c:1.1)")
    assert [(row != END).sum().item() - 1 for row in long.ids] == [75, 5]
    assert [(row != END).sum().item() - 1 for row in short.ids] == [73, 3]
    assert encoder().chunks("word " * 75) == 1 and encoder().chunks("word " * 76) == 2


def test_what_cannot_be_read_is_said() -> None:
    assert read_prompt("my-embedding:x").ids.shape == (1, 77)
    for prompt in ("embedding:easynegative, bad", "a fox, (embedding:easynegative:1.2)"):
        with pytest.raises(UserError, match="textual inversion, embedding:easynegative"):
            read_prompt(prompt)
    with pytest.raises(UserError, match="nested too deeply"):
        read_prompt("(" * 5000 + ")" * 5000)


def test_embeddings_are_the_normed_last_state_and_do_not_depend_on_neighbors() -> None:
    model = encoder()
    captions = ["a red circle", "a long caption of a (blue:1.3) square", "word " * 80]
    together = model.encode(captions)
    for caption, row in zip(captions, together, strict=True):
        torch.testing.assert_close(row.tensors["context"], context(model, caption), rtol=1e-5, atol=1e-5)
    assert [row.tensors["context"].shape for row in together] == [(1, 77, 32), (1, 77, 32), (1, 154, 32)]
    first = together[0].tensors["context"]
    torch.testing.assert_close(first.mean(-1), torch.zeros(1, 77), rtol=0, atol=1e-5)  # a LayerNorm was the last


def test_a_weight_scales_the_distance_to_the_empty_prompt_and_chunks_stand_side_by_side() -> None:
    model = encoder()
    plain, empty = context(model, "red"), context(model, "")
    assert torch.equal(context(model, "(red:1.0)"), plain)
    weighted = context(model, "(red:1.5)")
    assert torch.equal(weighted[:, [0, *range(2, 77)]], plain[:, [0, *range(2, 77)]])
    torch.testing.assert_close(weighted[:, 1], empty[:, 1] + 1.5 * (plain[:, 1] - empty[:, 1]))
    torch.testing.assert_close(context(model, "(red:0)")[:, 1], empty[:, 1])
    both = context(model, "word " * 75 + "red")
    torch.testing.assert_close(both, torch.cat([context(model, "word " * 75), plain], dim=1))


@pytest.mark.parametrize(("family", "usual"), [("sd15", 1), ("sd2", 2), ("sdxl", 2)])
def test_clip_skip_counts_layers_from_the_last(
    family: Family, usual: int, monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    shrink(monkeypatch, tmp_path / "bases")
    model = random_parts(family).text_encoder
    contexts: dict[int, Conditioning] = {}
    for layer in (0, 2, 3):
        model.clip_skip = layer
        (contexts[layer],) = model.encode(["a (red:1.2) circle"])
    model.clip_skip = 0
    zero, two, three = (each.tensors["context"] for each in contexts.values())
    assert torch.equal(zero, two) == (usual == 2) and not torch.allclose(two, three)
    check_clip_skip(family, 3)
    for layer in (5, -1):
        with pytest.raises(UserError, match=f"base.clip_skip is {layer}, but the text_encoder of {family} has the"):
            check_clip_skip(family, layer)
    with pytest.raises(UserError, match="the layers 2 to 4"):
        check_clip_skip("sd2", 1)
