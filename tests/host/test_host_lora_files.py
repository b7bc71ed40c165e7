"""LoRA files on full-size models in the host's own patcher: each spelling patches the right weights, or is refused."""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusionPipeline
from peft import LoraConfig
from run_script import run_script
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_spellings import SPELLINGS, Spelling, halves_on, sd15_unet, sdxl_unet, spelled
from trajectory_consistency.tcd.unet_layers import TARGETS
from trajectory_consistency.trainer.find_comfyui import Host
from trajectory_consistency.trainer.models.unet.ldm import UNET_PREFIX, unet_to_ldm

pytestmark = pytest.mark.host

Halves = dict[tuple[str, str], Tensor]
GIB = 2**30
UP, ALPHA, CORE, DORA = 2, 4, 5, 6  # positions in a patch that scripts/loras.py prints
CONV = "down_blocks.0.resnets.0.conv1"


class Files:
    """A folder of LoRAs, and the cases to run on them; the up matrix of each module contains the module's number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "loras"
        self.folder.mkdir()
        self.cases: dict[str, dict[str, Any]] = {}
        self.modules = {name: list(modules) for name, modules in NETWORKS.items()}
        self.halves = {name: numbered(modules) for name, modules in NETWORKS.items()}

    def add(self, name: str, model: str, *, lora: str | None = None, partial: bool = False) -> Path:
        self.cases[name] = {"model": model, "lora": lora or f"{name}.safetensors", "partial": partial}
        path = self.folder / self.cases[name]["lora"]
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self, name: str, model: str, tensors: Mapping[str, Tensor], *, metadata: Any = None, **more: Any) -> None:
        save_file(dict(tensors), self.add(name, model, **more), metadata=metadata)


def numbered(modules: Mapping[str, nn.Module]) -> Halves:
    halves = {key: torch.zeros(half.shape, dtype=torch.float16) for key, half in halves_on(modules, rank=1).items()}
    for number, path in enumerate(modules):
        halves[path, "up"].view(-1)[0] = number
        halves[path, "down"].fill_(1)
    return halves


def flux_transformer() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=4096, guidance_embeds=True
        )


def sd3_transformer() -> SD3Transformer2DModel:
    with torch.device("meta"):
        return SD3Transformer2DModel(num_layers=2, num_attention_heads=2, caption_projection_dim=128)


def linear(network: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear)}


def targets(network: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in network.named_modules() if path.endswith(TARGETS)}


UNETS = {"SD15": sd15_unet(), "SDXL": sdxl_unet()}
NETWORKS = {
    **{name: targets(unet) for name, unet in UNETS.items()},
    "SD3": linear(sd3_transformer()),
    "Flux": linear(flux_transformer()),
}
EXPECTED_MODULES = {"SD15": 278, "SDXL": 788, "SD3": 32, "Flux": 50}


def native(model: str, path: str) -> str:
    """Return a UNet module's path in the original network, input_blocks and so on."""
    name = next(iter(unet_to_ldm({f"{path}.weight": torch.empty(0)}, UNETS[model].config)))
    return name.removeprefix(UNET_PREFIX).removesuffix(".weight")


def in_native(model: str, spelling: Spelling) -> Spelling:
    return lambda path, side: spelling(native(model, path), side)


# tests/tcd/test_lora_keys.py converts all spellings; here are those that the host treats differently.
NATIVE = {f"{name}, native": name for name in ("kohya", "PEFT", "native prefix", "checkpoint prefix")}
DIFFUSERS = ("kohya", "LyCORIS", "PEFT", "PEFT unet.base_model", "diffusers", "diffusers processor")
TRANSFORMER = ("kohya", "PEFT", "PEFT transformer", "PEFT base_model", "OneTrainer", "LyCORIS")
SPELLED = [
    *(("SD15", name) for name in (*DIFFUSERS, *NATIVE)),
    *(("SDXL", name) for name in ("kohya", "diffusers processor", "native prefix, native")),
    *((model, name) for model in ("SD3", "Flux") for name in TRANSFORMER),
]


def add_spellings(files: Files) -> None:
    for model, name in SPELLED:
        spelling = in_native(model, SPELLINGS[NATIVE[name]]) if name in NATIVE else SPELLINGS[name]
        files.save(f"{model} {name}", model, spelled(files.halves[model], spelling))


def add_alphas(files: Files) -> None:
    halves = spelled(files.halves["SD15"], SPELLINGS["PEFT"])
    settings = {"r": 1, "lora_alpha": 8, "target_modules": list(TARGETS), "alpha_pattern": {"attn1.to_q": 3}}
    by_diffusers = LoraConfig(**settings).to_dict()
    path = files.add("alpha of diffusers", "SD15")
    StableDiffusionPipeline.save_lora_weights(
        files.folder, halves, weight_name=path.name, unet_lora_adapter_metadata=dict(by_diffusers)
    )
    metadata = {"lora_adapter_metadata": json.dumps(by_diffusers | {"target_modules": []})}
    files.save("alpha of the network", "SD15", halves, metadata=metadata)
    own = {f"{CONV}.alpha": torch.tensor(0.5)}
    files.save("alpha of its own", "SD15", {**halves, **own}, metadata=metadata)
    files.save("no alpha", "SD15", halves)
    text = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 8})}
    files.save("alpha of another", "SD15", halves, metadata=text)


def add_refusals(files: Files) -> None:
    kohya = spelled(files.halves["SD15"], SPELLINGS["kohya"])
    whole = files.folder / "SD15 kohya.safetensors"
    files.add("cut", "SD15").write_bytes(whole.read_bytes()[:-100])
    files.add("cut in the header", "SD15").write_bytes(whole.read_bytes()[:1000])
    files.add("empty", "SD15").write_bytes(b"")
    files.add("words", "SD15").write_text("<!doctype html>", encoding="utf-8")
    for suffix in ("pt", "CKPT", "bin"):
        torch.save({"lora": Bomb(files.folder / "executed")}, files.add(suffix, "SD15", lora=f"pickle.{suffix}"))
    torch.save({"lora": Bomb(files.folder / "executed")}, files.add("renamed pickle", "SD15"))
    for name, number in (("nan", math.nan), ("inf", math.inf)):
        bad = {key: tensor.clone() for key, tensor in kohya.items()}
        list(bad.values())[-1].view(-1)[-1] = number
        files.save(name, "SD15", bad)
        files.add(f"{name} for another", "SDXL", lora=f"{name}.safetensors")
    write_checkpoint(files.add("checkpoint", "SD15"), 5 * GIB)
    files.save("embedding", "SD15", {"emb_params": torch.zeros(2, 768)})
    files.save("nothing", "SD15", {}, metadata={"format": "pt"})
    files.save("LoHa", "SD15", {"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, partial=True)
    files.save("replaced", "SD15", {**kohya, "lora_unet_conv_in.set_weight": torch.zeros(2, 2)}, partial=True)
    files.save("both", "SD15", {**kohya, f"lora_unet_{CONV.replace('.', '_')}.diff": torch.zeros(2, 2)}, partial=True)
    files.save("wide diff", "SD15", {**kohya, "diffusion_model.out.0.diff": torch.zeros(321)})
    files.save(
        "bias of none",
        "SD15",
        {**kohya, "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.diff_b": torch.zeros(320)},
    )
    files.save("target time", "SD15", {**kohya, "tcd_target_time.in.weight": torch.zeros(2, 2)}, partial=True)
    half = dict(kohya)
    del half[f"lora_unet_{CONV.replace('.', '_')}.lora_up.weight"]
    files.save("half", "SD15", half, partial=True)
    twice = spelled({(CONV, side): files.halves["SD15"][CONV, side].clone() for side in ("up", "down")}, _native_sd15)
    files.save("twice", "SD15", {**kohya, **twice}, partial=True)
    for name, text in (("json", "{"), ("list", "[]"), ("alpha", '{"unet.lora_alpha": -1}')):
        files.save(f"metadata {name}", "SD15", kohya, metadata={"lora_adapter_metadata": text})
    files.add("SD15 on SDXL", "SDXL", lora="SD15 kohya.safetensors")
    files.add("SD15 on Flux", "Flux", lora="SD15 kohya.safetensors", partial=True)
    files.add("Flux on SD3", "SD3", lora="Flux PEFT transformer.safetensors")
    files.add("SDXL on SD15", "SD15", lora="SDXL kohya.safetensors")


def _native_sd15(path: str, side: str) -> str:
    return SPELLINGS["native prefix"](native("SD15", path), side)


def add_paths(files: Files) -> None:
    kohya = spelled(files.halves["SD15"], SPELLINGS["kohya"])
    outside = files.folder.parent / "outside"
    outside.mkdir()
    save_file(kohya, outside / "secret.safetensors")
    (files.folder / "linked").symlink_to(outside)
    few = {name: tensor for name, tensor in kohya.items() if "mid_block_resnets" in name}
    save_file(few, files.folder / "memory.safetensors")
    files.save("UPPER", "SD15", kohya, lora="UPPER.SAFETENSORS")
    for name, lora in {
        "linked": "linked/secret.safetensors",
        "above": "../outside/secret.safetensors",
        "absolute": str(outside / "secret.safetensors"),
        "around": "linked/../UPPER.SAFETENSORS",
        "missing": "missing.safetensors",
        "folder": "linked",
    }.items():
        files.add(name, "SD15", lora=lora)


def add_partial(files: Files) -> None:
    kohya = spelled(files.halves["SD15"], SPELLINGS["kohya"])
    text = {
        f"lora_te_text_model_{i}.lora_{side}.weight": torch.zeros(2, 2) for i in range(5) for side in ("up", "down")
    }
    wide = {"lora_unet_conv_in.lora_down.weight": torch.zeros(1, 9, 3, 3), "lora_unet_conv_in.lora_up.weight": ONE}
    bad = {"lora_te_text_model_0.lora_down.weight": torch.full((2, 2), math.nan)}
    for name, more in {
        "text": text,
        "wide": wide,
        "stray": {"lora_unet_conv_in.bias": ONE},
        "bad text": text | bad,
    }.items():
        files.save(f"{name} refused", "SD15", {**kohya, **more})
        files.save(f"{name} allowed", "SD15", {**kohya, **more}, partial=True)


ONE = torch.zeros(320, 1, 1, 1)


def add_dora(files: Files) -> None:
    halves = spelled(files.halves["SD15"], SPELLINGS["PEFT unet"])
    rows = torch.arange(320.0)
    query = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    magnitudes = {
        f"unet.{query}.lora_magnitude_vector": rows,
        f"unet.{CONV}.lora_magnitude_vector": rows.view(1, -1, 1, 1).clone(),
    }
    files.save("magnitudes", "SD15", {**halves, **magnitudes})
    wrong = {f"unet.{query}.lora_magnitude_vector": torch.ones(319)}
    files.save("wrong magnitudes", "SD15", {**halves, **wrong})


def add_differences(files: Files) -> None:
    """As in lightx2v's files for Wan: full differences of norms and biases beside the LoRA."""
    kohya = spelled(files.halves["SD15"], SPELLINGS["kohya"])
    norm = {
        "diffusion_model.out.0.diff": torch.full((320,), 2.0),
        "diffusion_model.out.0.diff_b": torch.full((320,), 3.0),
    }
    biases = {f"lora_unet_{CONV.replace('.', '_')}.diff_b": torch.full((320,), 4.0)}
    lycoris = {"lora_unet_input_blocks_1_0_in_layers_0.w_norm": torch.full((320,), 5.0)}
    files.save("differences", "SD15", {**kohya, **norm, **biases, **lycoris})


class Bomb:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.trace, 0o777, True)


def write_checkpoint(path: Path, size: int) -> None:
    """Write a checkpoint of one large tensor as a sparse file, which takes no space on the disk."""
    shape = {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"model.diffusion_model.input_blocks.0.0.weight": shape}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("files"))
    for add in (add_spellings, add_alphas, add_refusals, add_paths, add_partial, add_dora, add_differences):
        add(files)
    return files


@pytest.fixture(scope="module")
def results(comfy_host: Host, files: Files) -> dict[str, Any]:
    """The output of scripts/loras.py for all cases."""
    cases = json.dumps(list(files.cases.values()))
    return run_script(comfy_host, "loras.py", str(files.folder), cases, timeout_s=600)


@pytest.fixture(scope="module")
def outcomes(files: Files, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The result of each case by name, after a check that no case changed its model."""
    found = dict(zip(files.cases, results["cases"], strict=True))
    assert all(outcome["left alone"] for outcome in found.values())
    return found


def patches(outcome: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in outcome, outcome["error"]
    found: dict[str, Any] = outcome["patches"]
    return found


# Spellings


@pytest.mark.parametrize("model", NETWORKS)
def test_all_modules_are_patched(files: Files, outcomes: dict[str, Any], model: str) -> None:
    found = patches(outcomes[f"{model} kohya"])
    assert len(found) == len(files.modules[model]) == EXPECTED_MODULES[model]
    assert outcomes[f"{model} kohya"]["log"] == []
    assert all(strength == 0.7 for strength, *_ in found.values())


@pytest.mark.parametrize("model", UNETS)
def test_each_module_of_a_unet_is_patched_with_its_own(files: Files, outcomes: dict[str, Any], model: str) -> None:
    found = {weight: patch[UP][1] for weight, patch in patches(outcomes[f"{model} kohya"]).items()}
    assert found == {f"diffusion_model.{native(model, path)}.weight": i for i, path in enumerate(files.modules[model])}


def test_fused_weights_are_patched_by_their_rows(files: Files, outcomes: dict[str, Any]) -> None:
    found = {weight: patch[1:3] for weight, patch in patches(outcomes["SD3 kohya"]).items()}
    block, width = "diffusion_model.joint_blocks.1.x_block", 128
    expected = {
        "transformer_blocks.1.attn.to_q": f"{block}.attn.qkv.weight(0, 0, {width})",
        "transformer_blocks.1.attn.to_k": f"{block}.attn.qkv.weight(0, {width}, {width})",
        "transformer_blocks.1.attn.to_v": f"{block}.attn.qkv.weight(0, {2 * width}, {width})",
        "transformer_blocks.1.attn.to_out.0": f"{block}.attn.proj.weight",
        "transformer_blocks.1.ff.net.2": f"{block}.mlp.fc2.weight",
        "proj_out": "diffusion_model.final_layer.linear.weight",
        "norm_out.linear": "diffusion_model.final_layer.adaLN_modulation.1.weight",
    }
    for path, weight in expected.items():
        rearranged, up = found[weight]
        assert up[1] == files.modules["SD3"].index(path)
        assert rearranged == (path == "norm_out.linear"), "diffusers stores scale and shift in the opposite order"


@pytest.mark.parametrize(("model", "spelling"), SPELLED)
def test_every_spelling_gives_the_same_patches(outcomes: dict[str, Any], model: str, spelling: str) -> None:
    assert patches(outcomes[f"{model} {spelling}"]) == patches(outcomes[f"{model} kohya"])


# Alpha and DoRA


@pytest.mark.parametrize(
    ("name", "common", "conv", "query"),
    [
        ("alpha of diffusers", 8, 8, 3),
        ("alpha of the network", 8, 8, 3),
        ("alpha of its own", 8, 0.5, 3),
        ("no alpha", None, None, None),
        ("alpha of another", None, None, None),
    ],
)
def test_alpha(outcomes: dict[str, Any], name: str, common: Any, conv: Any, query: Any) -> None:
    found = {weight: patch[ALPHA] for weight, patch in patches(outcomes[name]).items()}
    queries = {weight for weight in found if "attn1.to_q" in weight}
    own = {f"diffusion_model.{native('SD15', CONV)}.weight"}
    assert len(found) == 278 and len(queries) == 16
    assert {found.pop(weight) for weight in own} == {conv}
    assert {found.pop(weight) for weight in queries} == {query}
    assert set(found.values()) == {common}


def test_a_magnitude_is_one_number_per_row(outcomes: dict[str, Any]) -> None:
    scales = {weight: patch[DORA] for weight, patch in patches(outcomes["magnitudes"]).items() if patch[DORA]}
    total = sum(range(320))
    assert scales == {
        f"diffusion_model.{native('SD15', CONV)}.weight": [[320, 1, 1, 1], 0, total],
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": [[320, 1], 0, total],
    }


def test_differences_are_patched_with_the_lora(outcomes: dict[str, Any]) -> None:
    found = patches(outcomes["differences"])
    assert outcomes["differences"]["log"] == []
    differences = {weight: found.pop(weight)[1:] for weight in list(found) if found[weight][1] == "diff"}
    assert found == patches(outcomes["SD15 kohya"])
    assert differences == {
        f"diffusion_model.{name}": ["diff", [[320], number, 320 * number]]
        for name, number in {
            "out.0.weight": 2,
            "out.0.bias": 3,
            f"{native('SD15', CONV)}.bias": 4,
            "input_blocks.1.0.in_layers.0.weight": 5,
        }.items()
    }


# The cache of tensors


@pytest.mark.parametrize(
    "behavior",
    [
        "reused while the file is unchanged",
        "read again after the file was overwritten",
        "read again if the size differs at the same time",
        "not changed by overwriting the file",
    ],
)
def test_tensors_are(results: dict[str, Any], behavior: str) -> None:
    assert results["cache"][behavior]


# Accepted files


@pytest.mark.parametrize("name", ["linked", "UPPER"])
def test_a_file_in_a_linked_folder_and_one_in_capitals(outcomes: dict[str, Any], name: str) -> None:
    assert patches(outcomes[name]) == patches(outcomes["SD15 kohya"])


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        (
            "text",
            "278 of 283 LoRA modules fit the model; for a text encoder, not in the model: lora_te_text_model_0, ",
        ),
        (
            "wide",
            "278 of 279 LoRA modules fit the model; wrong shape: lora_unet_conv_in is 320 x 9 x 3 x 3, but the model ",
        ),
        ("stray", "278 of 279 LoRA modules fit the model; not in the model: lora_unet_conv_in.bias"),
    ],
)
def test_a_partial_fit_needs_allow_partial(outcomes: dict[str, Any], name: str, left_out: str) -> None:
    error = outcomes[f"{name} refused"]["error"]
    assert left_out in error and error.endswith("Set allow_partial to apply what fits")
    allowed = outcomes[f"{name} allowed"]
    assert patches(allowed) == patches(outcomes["SD15 kohya"])
    assert len(allowed["log"]) == 1
    assert allowed["log"][0].startswith(f"{name} allowed.safetensors was applied in part: {left_out}")


# Refused files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut", "cut.safetensors cannot be read: it is damaged, incomplete or not a safetensors file"),
        ("cut in the header", "header.safetensors cannot be read: it is damaged, incomplete"),
        ("empty", "empty.safetensors cannot be read"),
        ("words", "words.safetensors cannot be read"),
        ("renamed pickle", "renamed pickle.safetensors cannot be read"),
        ("pt", "pickle.pt is not opened: a .pt file can run code when it is read. Convert it to .safetensors"),
        ("CKPT", "pickle.CKPT is not opened: a .CKPT file can run code"),
        ("bin", "pickle.bin is not opened: a .bin file can run code"),
        ("nan", "nan.safetensors was not applied: lora_unet_"),
        ("inf", "has numbers that are not finite: it was trained or saved with an error"),
        ("nan for another", "nan.safetensors does not fit the model, and nothing was applied"),
        ("checkpoint", "checkpoint.safetensors is a checkpoint, not a LoRA: put it in models/checkpoints"),
        ("embedding", "embedding.safetensors is not a LoRA: the first of its 1 tensors is emb_params"),
        ("nothing", "nothing.safetensors is not a LoRA: it has no tensors"),
        ("LoHa", "LoHa.safetensors was not applied: it has weights of the kind LoHa (lora_unet_x.hada_w1_a), not of a"),
        ("replaced", "it has weights of the kind replaced weight (lora_unet_conv_in.set_weight), not of a LoRA: use"),
        ("both", "resnets_0_conv1 has both a LoRA and a difference of its weight"),
        ("wide diff", "278 of 279 LoRA modules fit the model; wrong shape: diffusion_model.out.0 is 321, but the"),
        ("bias of none", "not in the model: diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.diff_b"),
        (
            "target time",
            "its embedding of the target time has {'in.weight': (2, 2)}, but must have in.weight",
        ),
        ("half", "conv1 has no lora_up.weight: the LoRA is damaged"),
        (
            "twice",
            "lora_unet_input_blocks_1_0_in_layers_2 and lora_unet_down_blocks_0_resnets_0_conv1 are the same weight",
        ),
        (
            "metadata json",
            "metadata json.safetensors was not applied: lora_adapter_metadata in the metadata is damaged: Expecting ",
        ),
        ("metadata list", "is damaged: it holds a list, but must be an object"),
        ("metadata alpha", "is damaged: lora_alpha of "),
        ("SD15 on SDXL", "the file is for SD 1.x, the model is SDXL. "),
        ("SDXL on SD15", "the file is for SDXL, the model is SD15. "),
        ("SD15 on Flux", "the model is Flux. 0 of 278 LoRA modules fit the model; not in the model: lora_unet_"),
        ("Flux on SD3", "the file is for Flux, the model is SD3. "),
        ("wrong magnitudes", "to_q.dora_scale is 319 x 1, but the model has 320 x 320"),
        ("above", "there is no '../outside/secret.safetensors' in the loras folders"),
        ("absolute", "outside/secret.safetensors' in the loras folders"),
        ("around", "there is no 'linked/../UPPER.SAFETENSORS' in the loras folders"),
        ("missing", "there is no 'missing.safetensors' in the loras folders: choose a file from the list"),
        ("folder", "there is no 'linked' in the loras folders"),
    ],
)
def test_refusal(outcomes: dict[str, Any], name: str, message: str) -> None:
    assert message in outcomes[name].get("error", "it was applied")


@pytest.mark.parametrize(
    "name", ["checkpoint", "embedding", "LoHa", "half", "twice", "nan for another", "text refused", "SD15 on SDXL"]
)
def test_a_refusal_by_the_header_reads_no_tensor(outcomes: dict[str, Any], name: str) -> None:
    assert outcomes[name]["error"]
    assert outcomes[name]["tensors read"] == 0  # the checkpoint has 5 GiB
    assert outcomes["nan"]["error"] and outcomes["nan"]["tensors read"] > 0, "the counter works"


def test_a_pickle_is_not_executed(files: Files, outcomes: dict[str, Any]) -> None:
    assert outcomes["pt"]["error"]
    assert not (files.folder / "executed").exists()
    torch.load(files.folder / "pickle.pt", weights_only=False)
    assert (files.folder / "executed").exists(), "the pickle would have run code"
