"""CLIP's tokenizer, rebuilt from its merge rules, and each family's conditioning on a caption."""

import pytest
import torch

from trajectory_consistency.trainer.models.unet.families import empty_text_encoder
from trajectory_consistency.trainer.models.unet.text import TextEncoder, clip_tokenizer, tokenize

START, END = 49406, 49407


def test_ids_that_every_implementation_of_clip_gives() -> None:
    assert len(clip_tokenizer()) == 49408
    # "a photo of a cat": the ids in CLIP's own documentation and in every SD1.5 prompt dump.
    assert tokenize(["a photo of a cat"])[0, :8].tolist() == [START, 320, 1125, 539, 320, 2368, END, END]


@pytest.mark.parametrize("caption", ["", "a red circle", "word " * 200])
def test_the_length_is_always_77_and_ends_with_the_end(caption: str) -> None:
    ids = tokenize([caption, "x"])
    assert ids.shape == (2, 77) and ids[0, 0] == START and ids[0, -1] == END


def test_case_and_spaces_do_not_matter() -> None:
    assert torch.equal(tokenize(["A  Red\nCIRCLE"]), tokenize(["a red circle"]))


def test_embeddings_are_the_normed_last_state_and_do_not_depend_on_neighbors() -> None:
    torch.manual_seed(0)
    model = TextEncoder("tiny", [empty_text_encoder("tiny")]).eval()
    captions = ["a red circle", "a long caption of a blue square"]
    both, alone = (
        torch.cat([row.tensors["context"] for row in model.encode(each)]) for each in (captions, captions[:1])
    )
    assert both.shape == (2, 77, 32)
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.mean(-1), torch.zeros(2, 77), rtol=0, atol=1e-5)  # a LayerNorm was the last
