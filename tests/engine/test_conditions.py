"""CONDITIONING: kept on disk without a change of a bit, and refused if the network alone cannot use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.conds
import pytest
import torch
from families import FAMILIES
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import batch_for, each_family, open_network, shortened

from trajectory_consistency.nodes.host.training import from_tensors, to_tensors
from trajectory_consistency.nodes.host.training.conditions import equal_rows


@each_family
def test_to_disk_and_back_gives_the_same_prediction(name: str, folder: Path, tmp_path: Path) -> None:
    network = open_network(name, folder)
    batch = batch_for(name, network)
    with torch.no_grad():
        expected = network.x0(batch.x_t, batch.points.t, batch.conds)
        kept = []
        for i, cond in enumerate(batch.conds):
            tensors, scalars = to_tensors(cond)
            path = tmp_path / f"{i}.safetensors"
            save_file(tensors, path, metadata={"scalars": json.dumps(scalars)})
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, file is not a dict
                kept.append(from_tensors(found, json.loads(file.metadata()["scalars"])))
        assert torch.equal(network.x0(batch.x_t, batch.points.t, kept), expected)


def test_every_kind_of_value_that_is_kept_comes_back() -> None:
    options = {"pooled_output": torch.randn(1, 3).bfloat16(), "guidance": 3.5, "crop_w": 0, "tag": "a", "none": None}
    context = torch.randn(1, 2, 4)
    tensors, scalars = to_tensors([[context, options]])
    ((found, rest),) = from_tensors(tensors, json.loads(json.dumps(scalars)))
    assert found is context and rest == options
    twice = to_tensors([[context, {"cross_attn": None}]])
    assert from_tensors(*twice)[0][0] is context, "the first part of an entry counts, as in the host"
    without = [[None, {"pooled_output": context}]]  # as for a model that is told nothing
    assert from_tensors(*to_tensors(without)) == without


def test_tensors_of_inference_mode_are_copied() -> None:
    with torch.inference_mode():
        conditioning = FAMILIES["sd3"].conditioning(0)
    tensors, _ = to_tensors(conditioning)
    assert not any(tensor.is_inference() for tensor in tensors.values())
    assert torch.equal(tensors["cross_attn"], conditioning[0][0])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("area", (8, 8, 0, 0), "area, an area of the picture"),
        ("mask", torch.ones(1, 8, 8), "mask, a mask of the picture"),
        ("strength", 0.5, "strength"),
        ("hooks", object(), "hooks"),
        ("control", object(), "control, a ControlNet"),
        ("reference_latents", [torch.zeros(1)], "reference_latents, reference latents"),
        ("start_percent", 0.0, "start_percent, a range of steps"),
        ("unclip_conditioning", [{}], "unclip_conditioning, a list, but training can keep only tensors"),
    ],
)
def test_what_the_network_alone_cannot_use_is_refused(name: str, value: Any, message: str) -> None:
    ((context, options),) = FAMILIES["sd3"].conditioning(0)
    with pytest.raises(ValueError, match=f"the CONDITIONING has {message}.*leave out the node that adds it"):
        to_tensors([[context, options | {name: value}]])
    to_tensors([[context, options | {name: None}]])


def test_several_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="has 2 entries, but training needs one"):
        to_tensors([*FAMILIES["sd3"].conditioning(0), *FAMILIES["sd3"].conditioning(1)])


def test_rows_are_grouped_by_shapes_names_and_constants() -> None:
    def row(tokens: int, rate: int = 25, **more: Any) -> dict[str, Any]:
        context = comfy.conds.CONDCrossAttn(torch.zeros(1, tokens, 4))
        return {"c_crossattn": context, "frame_rate": comfy.conds.CONDConstant(rate), **more}

    rows = [row(77), row(154), row(77), row(77, rate=24), row(77, y=comfy.conds.CONDRegular(torch.zeros(1))), row(154)]
    assert rows[0]["c_crossattn"].can_concat(rows[1]["c_crossattn"]), "the host would repeat the short one"
    assert equal_rows(rows) == [[0, 2], [1, 5], [3], [4]]


@each_family
def test_equal_lengths_are_one_call_and_others_are_not(name: str, folder: Path) -> None:
    network = open_network(name, folder)
    batch = batch_for(name, network)
    calls = []
    network.network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    with torch.no_grad():
        network.x0(batch.x_t, batch.points.t, batch.conds)
        assert calls == [2]
        if name != "flux2":  # whose text is always padded to 512 tokens by the host
            network.x0(batch.x_t, batch.points.t, [shortened(batch.conds[0]), batch.conds[1]])
            assert calls == [2, 1, 1]
