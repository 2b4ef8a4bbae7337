"""The supernet: its forward against a functional re-implementation, its contract, its initial values."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from greedynas.blocks import ConvBN, IdentityBlock, InvertedBottleneck
from greedynas.layers import Operation
from greedynas.spaces import ACTIVATIONS, available_spaces, get_space
from greedynas.supernet import Supernet

CURVES = {"relu": F.relu, "relu6": F.relu6, "hswish": lambda x: x * F.relu6(x + 3) / 6, "silu": F.silu}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(name, **changes):
    """A space with a layer of each kind (change of width with and without stride, shape kept) and every operation."""
    return replace(get_space(name, num_classes=5, **changes), head_channels=24)


def reference_forward(space, state, path, images, training):
    """The forward pass from the state alone, by the definition of the blocks; `state` is left as it is."""

    def conv_bn(features, key, *, stride=1, groups=1, act=False):
        weight = state[f"{key}conv.weight"]
        out = F.conv2d(features, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2, groups=groups)
        if training:
            mean, var = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
        else:
            mean, var = state[f"{key}bn.running_mean"], state[f"{key}bn.running_var"]
        scale = state[f"{key}bn.weight"] / (var + space.bn_eps).sqrt()
        out = (out - mean[:, None, None]) * scale[:, None, None] + state[f"{key}bn.bias"][:, None, None]
        return CURVES[space.activation](out) if act else out

    def bottleneck(features, key, layer, op):
        hidden = features
        if op.expansion > 1:
            hidden = conv_bn(hidden, f"{key}expand.", act=True)
        hidden = conv_bn(hidden, f"{key}depthwise.", stride=layer.stride, groups=hidden.shape[1], act=True)
        if op.se:
            gate = hidden.mean((2, 3)) @ state[f"{key}se.reduce.weight"][:, :, 0, 0].T + state[f"{key}se.reduce.bias"]
            gate = gate.relu() @ state[f"{key}se.expand.weight"][:, :, 0, 0].T + state[f"{key}se.expand.bias"]
            hidden = hidden * ((gate + 3).clamp(0, 6) / 6)[:, :, None, None]
        out = conv_bn(hidden, f"{key}project.")
        return out + features if layer.stride == 1 and layer.in_channels == layer.out_channels else out

    features = conv_bn(images, "stem.", stride=space.stem_stride, act=True)
    for index, layer in enumerate(space.fixed):
        features = bottleneck(features, f"stem.fixed_{index}.", layer, Operation.parse("e1k3"))
    for index, (layer, op) in enumerate(zip(space.layers, path, strict=True)):
        key, operation = f"choices.{index}.{op}.", space.operations[op]
        if not operation.identity:
            features = bottleneck(features, key, layer, operation)
        elif layer.stride != 1 or layer.in_channels != layer.out_channels:
            features = conv_bn(features, key, stride=layer.stride)
    features = conv_bn(features, "head.", act=True).mean((2, 3))
    return features @ state["head.linear.weight"].T + state["head.linear.bias"]


def perturb(module, seed):
    """Move every value off its initial one, running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.add_(0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return module


@pytest.fixture(scope="module")
def mini():
    return perturb(Supernet(small("mini-16"), seed=3).double(), seed=4)


@pytest.fixture(scope="module")
def with_se():
    space = small("mbv2-se-13", in_channels=2)
    return perturb(Supernet(replace(space, layers=space.layers[:6]), seed=1).double(), seed=2)


@pytest.mark.parametrize("supernet", ["mini", "with_se"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_the_definition(supernet, training, request):
    supernet = request.getfixturevalue(supernet)
    space = supernet.space
    images = draw(3, space.in_channels, 21, 13).double()
    paths = [[op] * space.num_layers for op in range(space.num_operations)]  # each operation in each layer
    paths.append([layer % space.num_operations for layer in range(space.num_layers)])
    supernet.train(training)
    for path in paths:
        expected = reference_forward(space, supernet.state_dict(), path, images, training)
        assert expected.shape == (3, 5)
        torch.testing.assert_close(supernet(images, path), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    space = small("mini-16", activation=activation)
    supernet = Supernet(space, seed=0).double()
    images = 5 * draw(2, 1, 9, 9).double()
    path = [5] * space.num_layers
    expected = reference_forward(space, supernet.state_dict(), path, images, training=True)
    torch.testing.assert_close(supernet(images, path), expected, rtol=1e-9, atol=1e-9)


def test_a_path_may_be_a_tensor_or_integers(mini):
    mini.eval()
    images = draw(2, 1, 8, 8).double()
    path = [0, 1, 2, 3, 4, 5, 6, 0]
    expected = mini(images, path)
    assert torch.equal(mini(images, tuple(path)), expected)
    assert torch.equal(mini(images, torch.tensor(path)), expected)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ([0] * 7, ValueError, r"path: expected 8 operation indices \(one per layer\), got 7"),
        ([0] * 7 + [7], ValueError, r"path\[7\]: expected an operation index of 0 to 6, got 7"),
        ([-1] + [0] * 7, ValueError, r"path\[0\]: .* got -1"),
        (torch.zeros(1, 8, dtype=torch.int64), ValueError, r"got int64 \[1, 8\]"),
        (torch.zeros(8), TypeError, r"got float32 \[8\]"),
    ],
)
def test_forward_refuses_what_is_no_path(mini, path, error, message):
    with pytest.raises(error, match=message):
        mini(draw(2, 1, 8, 8).double(), path)


@pytest.mark.parametrize("name", available_spaces())
def test_contract_and_size(name):
    space = get_space(name)
    if name == "mbv2-se-13":  # the whole of it has 46M weights
        space = replace(space, layers=space.layers[:6])
    supernet = Supernet(space)
    assert [len(operations) for operations in supernet.choices] == [space.num_operations] * space.num_layers
    assert [child for child, _ in supernet.named_children()] == ["stem", "choices", "head"]
    table = space.cost_table()
    assert sum(p.numel() for p in supernet.parameters()) == table.fixed.params + int(table.params.sum())
    for layer, operations in zip(space.layers, supernet.choices, strict=True):
        for op, module in zip(space.operations, operations, strict=True):
            kept = nn.Identity if layer.keeps_shape else IdentityBlock
            assert type(module) is (kept if op.identity else InvertedBottleneck)


def test_batch_norms_take_the_constants_of_the_space():
    supernet = Supernet(replace(small("mini-16"), bn_eps=1e-3, bn_momentum=0.25))
    norms = [module for module in supernet.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 1 + 2 + 8 * 6 * 3 + 1  # stem, two identities, bottlenecks, head
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.25)}


def test_state_dict_names_are_readable(with_se):
    bn = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]

    def conv_bn(prefix):
        return [f"{prefix}conv.weight", *(f"{prefix}{name}" for name in bn)]

    names = list(with_se.state_dict())
    stem = [*conv_bn("stem."), *conv_bn("stem.fixed_0.depthwise."), *conv_bn("stem.fixed_0.project.")]
    assert names[: len(stem)] == stem
    assert names[-8:] == [*conv_bn("head."), "head.linear.weight", "head.linear.bias"]
    se = [f"choices.1.9.se.{part}.{kind}" for part in ("reduce", "expand") for kind in ("weight", "bias")]
    expected = [
        *conv_bn("choices.1.9.expand."), *conv_bn("choices.1.9.depthwise."), *se, *conv_bn("choices.1.9.project."),
    ]  # fmt: skip
    assert [name for name in names if name.startswith("choices.1.9.")] == expected
    assert [name for name in names if name.startswith("choices.0.12.")] == conv_bn("choices.0.12.")
    assert not [name for name in names if name.startswith("choices.1.12.")]


def test_operations_leave_their_input_alone(with_se):
    space = with_se.space
    for training in (True, False):
        with_se.train(training)
        for layer, operations in zip(space.layers, with_se.choices, strict=True):
            features = draw(2, layer.in_channels, 5, 5).double()
            before = features.clone()
            for operation in operations:
                operation(features)
                assert torch.equal(features, before)


def test_only_the_selected_operations_get_gradients(mini):
    mini.train().zero_grad(set_to_none=True)
    path = [3, 1, 4, 1, 5, 0, 2, 6]
    mini(draw(4, 1, 8, 8).double(), path).square().sum().backward()
    for layer, operations in enumerate(mini.choices):
        for op, operation in enumerate(operations):
            gradients = [parameter.grad for parameter in operation.parameters()]
            if op == path[layer]:
                assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
            else:
                assert gradients == [None] * len(gradients)
    assert all(parameter.grad is not None for parameter in [*mini.stem.parameters(), *mini.head.parameters()])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_activations_out_of_place(activation):
    supernet = Supernet(small("mini-16", activation=activation), seed=0)
    other = copy.deepcopy(supernet)
    in_place = [module for module in other.modules() if getattr(module, "inplace", False)]
    assert len(in_place) == 1 + 8 * 6 * 2 + 1
    for module in in_place:
        module.inplace = False
    images = draw(3, 1, 8, 8)
    for module in (supernet, other):
        module(3 * images, [0, 1, 2, 3, 4, 5, 0, 6]).square().sum().backward()
    for (name, parameter), reference in zip(supernet.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, reference.grad), name


def test_channels_last_gives_the_same_results(mini):
    mini.eval()
    images = draw(2, 1, 12, 10).double()
    path = [5, 0, 6, 3, 2, 6, 1, 4]
    expected = mini(images, path)
    other = Supernet(mini.space, seed=None).double().eval()
    other.load_state_dict(mini.state_dict())
    other.to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(images.contiguous(memory_format=torch.channels_last), path), expected)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state():
    space = small("mini-16")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (Supernet(space, seed=seed).state_dict() for seed in (5, 5, 6))
    unseeded, unseeded_too = (Supernet(space, seed=None).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        drawn = value.dim() > 1
        assert torch.equal(value, other[name]) is not drawn
        assert torch.equal(unseeded[name], unseeded_too[name]) is not drawn


def test_initial_values():
    supernet = Supernet(get_space("mbv2-7"), seed=0)
    assert supernet.training
    for module in supernet.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
            count = module.weight.numel()
            tolerance = 5 / math.sqrt(count)  # five standard errors and more
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance)
            assert abs(module.weight.mean().item()) < tolerance * math.sqrt(2 / fan_out)
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones(module.num_features))
            assert torch.equal(module.bias, torch.zeros(module.num_features))
            assert torch.equal(module.running_mean, torch.zeros(module.num_features))
            assert torch.equal(module.running_var, torch.ones(module.num_features))
            assert torch.equal(module.num_batches_tracked, torch.tensor(0))
    assert supernet.head.linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert supernet.head.linear.bias.abs().max() == 0
    everything = [*supernet.parameters(), *supernet.buffers()]
    assert {tensor.device.type for tensor in everything} == {"cpu"}
    assert {tensor.dtype for tensor in supernet.parameters()} == {torch.float32}
    assert len({tensor.data_ptr() for tensor in everything}) == len(everything)


def test_biases_of_squeeze_excitation_start_at_zero():
    space = get_space("mbv2-se-13")
    supernet = Supernet(replace(space, layers=space.layers[:2]))
    biases = {name: value for name, value in supernet.named_parameters() if ".se." in name and name.endswith("bias")}
    assert len(biases) == 2 * 6 * 2
    assert all(value.abs().max() == 0 for value in biases.values())


def test_conv_bn_parts():
    space = get_space("mini-16")
    features = draw(2, 6, 7, 9)
    block = ConvBN(6, 12, 5, 2, space=space, activation="relu", groups=3)
    assert [name for name, _ in block.named_children()] == ["conv", "bn", "act"]
    assert block(features).shape == (2, 12, 4, 5)
    assert block(features).min() >= 0
    linear = ConvBN(6, 12, 1, space=space)
    assert [name for name, _ in linear.named_children()] == ["conv", "bn"]
    assert linear(features).min() < 0
