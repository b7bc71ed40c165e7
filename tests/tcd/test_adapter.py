"""The adapter against peft's own, in every state, compiled and with activations computed again."""

import copy
import gc
import logging
import weakref
from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

from small_bases import SHARED, UNET
from trajectory_consistency.tcd import Adapter, AdapterWeights, Lora, TargetTime
from trajectory_consistency.tcd.adapter import AVERAGE, OFF, STUDENT, layer_shape, new_weights
from trajectory_consistency.tcd.unet_layers import TARGETS
from trajectory_consistency.trainer.models.unet import families

TIME = "time_embedding.linear_2"


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """SD1.5's UNet, layer for layer, at a fraction of the width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Channels that differ wherever SD1.5's do, so that it has each of its shortcuts.
        small = {**UNET["sd15"], **SHARED, "block_out_channels": [8, 16, 32, 32]}
        unet = UNet2DConditionModel.from_config({**families.config("sd15", "unet"), **small})
    return unet.requires_grad_(False).eval()


def places(unet: nn.Module) -> list[str]:
    return [path for path, _ in unet.named_modules() if path.endswith(tuple(f".{kind}" for kind in TARGETS))]


def adapted(unet: nn.Module, effect: float = 0.05, state: str = STUDENT) -> tuple[Adapter, AdapterWeights]:
    adapter = Adapter(unet, TIME)
    weights = adapter.add(state, new_weights(unet, places(unet), rank=4, alpha=2.0, seed=0))
    shake(weights, effect)
    return adapter, weights


def shake(weights: nn.Module, effect: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in weights.parameters():
        parameter.data += effect * torch.randn(parameter.shape, generator=generator)


def predict(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 8, generator=generator)
    output: Tensor = unet(x, torch.tensor([999, 19]), text).sample
    return output


def gradients(unet: nn.Module, weights: nn.Module) -> dict[str, Tensor]:
    weights.zero_grad()
    predict(unet).square().mean().backward()
    return {
        name: parameter.grad.clone() for name, parameter in weights.named_parameters() if parameter.grad is not None
    }


def distance(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_outputs_and_gradients_are_pefts(unet: UNet2DConditionModel) -> None:
    theirs = copy.deepcopy(unet)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=2.0, target_modules=list(TARGETS)), adapter_name="tcd")
    adapter, weights = adapted(unet)
    parameters = dict(theirs.named_parameters())
    assert len(weights.paths) == 278 == sum(".lora_A." in name for name in parameters)
    for path, lora in weights.items():
        parameters[f"{path}.lora_A.tcd.weight"].data.copy_(lora.down)
        parameters[f"{path}.lora_B.tcd.weight"].data.copy_(lora.up)
    ours, expected = predict(unet), predict(theirs)
    assert distance(ours, expected) < 1e-6
    with adapter.off():
        assert distance(predict(unet), expected) > 1e-2
    ours.square().mean().backward()
    expected.square().mean().backward()
    pairs = {
        f"{path}.{name}": (part.grad, parameters[f"{path}.{name}.tcd.weight"].grad)
        for path, lora in weights.items()
        for part, name in ((lora.down, "lora_A"), (lora.up, "lora_B"))
    }
    largest = max(expected.norm() for _, expected in pairs.values())
    for path, (got, expected) in pairs.items():
        # Some have a gradient of rounding errors only: a normalization removes what the layer adds.
        assert (got - expected).norm() < 3e-6 * expected.norm() + 1e-7 * largest, path


def test_new_weights_change_nothing_and_the_same_seed_gives_the_same(unet: UNet2DConditionModel) -> None:
    plain = predict(unet)
    first = new_weights(unet, places(unet), rank=4, alpha=2.0, seed=0)
    adapter = Adapter(unet, TIME)
    adapter.add(STUDENT, first)
    assert torch.equal(predict(unet), plain)
    torch.manual_seed(7)
    same, other = (new_weights(unet, places(unet), rank=4, alpha=2.0, seed=seed).tensors() for seed in (0, 1))
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.tensors().items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.tensors().items())


def test_gradients_with_activations_computed_again_are_the_same_to_the_last_bit(unet: UNet2DConditionModel) -> None:
    _, weights = adapted(unet)
    plain = gradients(unet, weights)
    unet.enable_gradient_checkpointing()
    calls = []
    unet.up_blocks[1].resnets[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    again = gradients(unet, weights)
    assert calls == [True, True], "forward, and again for the gradient"
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # of every step of the compiler
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("quiet")
def test_compiled_there_is_one_graph_to_a_state_and_switching_back_finds_it(unet: UNet2DConditionModel) -> None:
    adapter, weights = adapted(unet)
    adapter.add(AVERAGE, copy.deepcopy(weights))
    shake(adapter.weights[AVERAGE], 0.05)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    states = (STUDENT, OFF, AVERAGE)
    plain = {}
    for state in states:
        with torch.no_grad(), adapter.using(state):
            plain[state] = predict(unet)
    unet.compile(backend=backend)
    for _ in range(3):
        for state in states:
            with torch.no_grad(), adapter.using(state):
                assert distance(predict(unet), plain[state]) < 1e-5, state
    assert len(graphs) == len(states)
    with adapter.using(STUDENT):
        for _ in range(2):
            compiled = gradients(unet, weights)
    assert len(graphs) == len(states) + 1, "the student with a gradient is one more"
    unet._compiled_call_impl = None
    with adapter.using(STUDENT):
        expected = gradients(unet, weights)
    assert all(distance(compiled[name], expected[name]) < 1e-4 for name in expected)


def test_switching_assigns_one_attribute_and_comes_back_after_an_error(unet: UNet2DConditionModel) -> None:
    adapter, _ = adapted(unet)
    before = [dict(vars(module)) for module in unet.modules()]
    with pytest.raises(ZeroDivisionError), adapter.off():
        assert adapter.state == OFF and [dict(vars(module)) for module in unet.modules()] == before
        raise ZeroDivisionError
    assert adapter.state == STUDENT
    with pytest.raises(KeyError, match="has no average: it has student"), adapter.using(AVERAGE):
        pass
    with pytest.raises(KeyError, match="has student already"):
        adapter.add(STUDENT, new_weights(unet, [], rank=1, alpha=1.0, seed=0))


def test_taken_away_the_network_is_the_one_that_was_loaded(unet: UNet2DConditionModel) -> None:
    plain, names = predict(unet), list(unet.state_dict())
    adapter, weights = adapted(unet)
    adapter.add(AVERAGE, copy.deepcopy(weights))
    adapter.weights[AVERAGE].target_time = None
    assert list(unet.state_dict()) == names, "the adapter is beside the network, not in it"
    adapter.remove(AVERAGE)
    assert adapter.state == OFF and torch.equal(predict(unet), plain)
    adapter.state = STUDENT
    assert not torch.equal(predict(unet), plain)
    adapter.eject()
    assert torch.equal(predict(unet), plain)
    assert not any("forward" in vars(module) for module in unet.modules())


class Quantised(nn.Module):
    """A layer as hosts have them: no nn.Linear, its weight packed, and recognizable only by its attributes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Parameter(linear.weight.detach()[:, ::2].to(torch.float8_e4m3fn), requires_grad=False)
        self.real = [linear]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.real[0](x)
        return output


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.plain = nn.Linear(3, 5), nn.Linear(3, 5)
        self.packed = Quantised(nn.Linear(5, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.packed(self.time(x) + self.plain(x))
        return output


def test_a_network_is_freed_as_soon_as_it_is_dropped_without_waiting_for_the_garbage_collector() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapter = Adapter(network, "1")
    adapter.add(STUDENT, new_weights(network, ["0"], rank=2, alpha=2.0, seed=0, target_time=TargetTime(4, 4)))
    gone = weakref.ref(network[0].weight)
    gc.disable()
    try:
        del network, adapter
        assert gone() is None
    finally:
        gc.enable()


def test_layers_are_recognized_by_their_attributes_not_by_their_class() -> None:
    network = Small().requires_grad_(False)
    adapter = Adapter(network, "time")
    weights = adapter.add(STUDENT, new_weights(network, ["packed"], rank=2, alpha=1.0, seed=0))
    shake(weights, 0.5)
    x = torch.randn(2, 3)
    with adapter.off():
        plain, hidden = network(x), network.time(x) + network.plain(x)
    (lora,) = weights.loras
    assert isinstance(lora, Lora)
    torch.testing.assert_close(network(x), plain + 0.5 * hidden @ lora.down.T @ lora.up.T)
    assert layer_shape(network.packed) == (4, 5)


def test_a_lora_is_the_same_as_the_weight_it_would_be_merged_into() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {
        "linear": (nn.Linear(6, 8), (2, 6)),
        "2-D": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
        "1-D, dilated": (nn.Conv1d(6, 8, 3, padding=2, dilation=2), (2, 6, 9)),
        "3-D": (nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1)), (2, 6, 2, 5, 5)),
    }
    for name, (layer, shape) in layers.items():
        network = nn.ModuleDict({"layer": layer}).double().requires_grad_(False)
        adapter = Adapter(network, "layer")
        weights = adapter.add(STUDENT, new_weights(network, ["layer"], rank=3, alpha=6.0, seed=0)).double()
        shake(weights, 0.3)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        beside = network["layer"](x)
        (lora,) = weights.loras
        assert isinstance(lora, Lora)
        with adapter.off():
            layer.weight.data += 2 * (lora.up.flatten(1) @ lora.down.flatten(1)).view_as(layer.weight)
            torch.testing.assert_close(network["layer"](x), beside, msg=name)


def test_layers_that_cannot_have_a_lora_are_refused() -> None:
    network = nn.ModuleDict(
        {"norm": nn.LayerNorm(4), "grouped": nn.Conv2d(4, 4, 3, groups=2), "back": nn.ConvTranspose2d(4, 4, 2)}
    )
    network["around"] = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    for path in network:
        assert layer_shape(network[path]) is None
        with pytest.raises(ValueError, match=f"{path} is a {type(network[path]).__name__}, which has no LoRA"):
            new_weights(network, [path], rank=1, alpha=1.0, seed=0)
    with pytest.raises(AttributeError):
        new_weights(network, ["nowhere"], rank=1, alpha=1.0, seed=0)


def test_a_layer_whose_forward_is_replaced_already_is_refused_and_left_alone() -> None:
    network = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    Adapter(network, "layer").add(STUDENT, new_weights(network, ["layer"], rank=1, alpha=1.0, seed=0))
    first = network["layer"].forward
    with pytest.raises(ValueError, match="layer has a replaced forward already"):
        Adapter(network, "layer").add(STUDENT, new_weights(network, ["layer"], rank=1, alpha=1.0, seed=0))
    assert network["layer"].forward is first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_stay_float32_beside_a_base_in_half_precision(dtype: torch.dtype) -> None:
    network = Small().to(dtype).requires_grad_(False)
    network.packed.real[0].to(dtype)
    adapter = Adapter(network, "time")
    weights = adapter.add(STUDENT, new_weights(network, ["time", "plain"], rank=2, alpha=2.0, seed=0))
    shake(weights, 0.5)
    y = network(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert y.dtype == dtype
    read = Lora(torch.ones(2, 3, dtype=dtype), torch.ones(4, 2, dtype=dtype), 2.0)  # as from a file
    assert {parameter.dtype for parameter in read.parameters()} == {torch.float32}
    y.float().square().mean().backward()
    for parameter in weights.parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.dtype == torch.float32 and parameter.grad.any()


def test_the_embedding_is_added_to_the_output_of_the_time_layer_of_its_own_state_alone() -> None:
    network = Small().requires_grad_(False)
    adapter = Adapter(network, "time")
    embedding = TargetTime(4, 5)
    shake(embedding, 0.5)
    adapter.add(STUDENT, AdapterWeights({}, embedding))
    adapter.add(AVERAGE, AdapterWeights({}))
    x, t, s = torch.randn(2, 3), torch.tensor([999, 499]), torch.tensor([499, 0])
    adapter.times = (t, s)
    plain = functional.linear(x, network.time.weight, network.time.bias)
    for state, expected in ((STUDENT, plain + embedding(t, s)), (AVERAGE, plain), (OFF, plain)):
        with adapter.using(state):
            torch.testing.assert_close(network.time(x), expected, rtol=0, atol=0)
    adapter.remove(AVERAGE)
    adapter.state = STUDENT
    torch.testing.assert_close(network.time(x), plain + embedding(t, s), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [(6,), (2, 3), (2, 1)])
def test_the_embedding_of_an_example_is_added_to_each_of_its_frames(rows: tuple[int, ...]) -> None:
    network = Small().requires_grad_(False)
    adapter = Adapter(network, "time")
    embedding = TargetTime(4, 5)
    shake(embedding, 0.5)
    adapter.add(STUDENT, AdapterWeights({}, embedding))
    x, times = torch.randn(*rows, 3), (torch.tensor([999, 499]), torch.tensor([499, 0]))
    plain = functional.linear(x, network.time.weight, network.time.bias)
    adapter.times = times
    added = (network.time(x) - plain).reshape(2, -1, 5)
    torch.testing.assert_close(added, embedding(*times).unsqueeze(1).expand_as(added))


def test_on_the_meta_device_weights_have_shapes_and_no_data(unet: UNet2DConditionModel) -> None:
    real = new_weights(unet, places(unet), rank=4, alpha=2.0, seed=0).tensors()
    with torch.device("meta"):
        bare = copy.deepcopy(unet).to("meta")
    meta = new_weights(bare, places(bare), rank=4, alpha=2.0, seed=0).tensors()
    assert {name: tensor.shape for name, tensor in meta.items()} == {
        name: tensor.shape for name, tensor in real.items()
    }
    assert all(tensor.is_meta for tensor in meta.values())
