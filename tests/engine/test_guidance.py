"""Teachers that have the guidance scale as an input: which scales they are trained with, and where that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, written
from lent_encoders import lend
from safetensors import safe_open
from test_run import settings

from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.model import HostModel
from trajectory_consistency.trainer.preflight import check, plan
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.tiny import world

LOW, HIGH = 2.0, 4.5


@pytest.mark.parametrize("name", ["flux", "hunyuan-video"])
def test_the_teacher_gets_the_scales_of_the_settings_and_no_empty_caption(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write_folder(folder / "pictures", 4, seed=0)
    values = settings(name, folder, tmp_path / "out")
    values["method"] |= {"guidance_min": LOW, "guidance_max": HIGH, "ema_decay": 0.0}
    values["preview"] = {}
    drawn: list[torch.Tensor] = []
    calls: list[tuple[int, list[float] | None]] = []
    teach = HostModel.guided_x0

    def watched(self: HostModel, x_t: Any, t: Any, cond: Any, uncond: Any, guidance: Any, s: Any = None) -> Any:
        drawn.append(guidance)
        network = self.network.register_forward_pre_hook(
            lambda _, inputs, named: calls.append((len(inputs[0]), [round(w, 4) for w in named["guidance"].tolist()])),
            with_kwargs=True,
        )
        try:
            return teach(self, x_t, t, cond, uncond, guidance, s)
        finally:
            network.remove()

    monkeypatch.setattr(HostModel, "guided_x0", watched)
    with lend(FAMILIES[name]):
        config = from_mapping(values)
        described = plan(config, check(config))
        file = run(config)
    assert "the guidance scale is an input" in described and f"guidance {LOW:g} to {HIGH:g}" in described
    scales = torch.cat(drawn)
    assert len(scales) == config.training.steps * config.training.batch
    assert (scales >= LOW).all() and (scales <= HIGH).all() and scales.max() - scales.min() > 0.5
    assert sum(rows for rows, _ in calls) == len(scales), "one row of the network for each example, so none is empty"
    told = [w for _, guidance in calls for w in guidance or []]
    assert sorted(told) == pytest.approx(sorted(scales.tolist()), abs=1e-3)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert (float(metadata["tcd.guidance_min"]), float(metadata["tcd.guidance_max"])) == (LOW, HIGH)


@pytest.mark.parametrize(("name", "scale"), [("flux", 3.5), ("hunyuan-video", 6.0)])
def test_a_range_without_the_students_scale_is_noted_and_a_students_cfg_is_refused(
    name: str, scale: float, folder: Path, tmp_path: Path
) -> None:
    world.write_folder(folder / "pictures", 4, seed=0)
    values = settings(name, folder, tmp_path / "out")
    for low, high, is_noted in ((1.0, scale - 0.1, True), (scale, scale, False), (1.0, 9.0, False)):
        values["method"] |= {"guidance_min": low, "guidance_max": high}
        with lend(FAMILIES[name]):
            config = from_mapping(values)
            described = plan(config, check(config))
        assert (f"gets the guidance scale {scale:g}, which is not in this range" in described) == is_noted
    values["preview"]["cfg"] = 2.0
    with (
        lend(FAMILIES[name]),
        pytest.raises(UserError, match=rf"preview.cfg is 2, but .* sampled with {scale:g} there: use preview.cfg 1"),
    ):
        check(from_mapping(values))


def test_other_networks_do_not_say_so(folder: Path) -> None:
    from trajectory_consistency.trainer.config.base import BaseConfig

    for name in ("flux-schnell", "wan"):
        assert "guidance" not in open_checkpoint(BaseConfig(model=str(written(name, folder)))).describe()
