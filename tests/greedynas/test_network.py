"""The standalone network of a path: inherited from a supernet it is that path, bit for bit, and its own."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from greedynas.network import Network
from greedynas.published import PUBLISHED, PUBLISHED_SPACE
from greedynas.spaces import get_space
from greedynas.supernet import Supernet

PATHS = {
    "mini-16": [0, 1, 6, 3, 4, 5, 2, 6],
    "mini-28": [6, 0, 6, 1, 2, 6, 3, 4, 5, 6],
    "macro": [0, 0, 1, 2, 0, 2, 1, 0],
    "mbv2-se-13": [12, 0, 7, 12, 3, 8],
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=list(PATHS))
def supernet(request):
    space = get_space(request.param, num_classes=7)
    space = replace(space, layers=space.layers[: len(PATHS[request.param])])
    supernet = Supernet(space, seed=8)
    for step in range(2):  # running statistics that are neither initial nor equal to the batch's
        supernet(2 + draw(4, space.in_channels, 16, 16, seed=step), PATHS[request.param])
    return supernet


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_supernet_is_the_path_bit_for_bit(supernet, training, dtype):
    path = PATHS[supernet.space.name]
    images = draw(4, supernet.space.in_channels, 19, 19, seed=5).to(dtype)
    state = {name: value.clone() for name, value in supernet.state_dict().items()}
    try:
        supernet.to(dtype).train(training).zero_grad(set_to_none=True)
        network = Network.from_supernet(supernet, path)
        assert {module.training for module in network.modules()} == {training}
        outputs, expected = network(images), supernet(images, path)
        assert outputs.dtype == dtype
        assert torch.equal(outputs, expected)
        outputs.square().sum().backward()
        expected.square().sum().backward()
        of_supernet = {**supernet.state_dict(), **{f"{k}.grad": v for k, v in gradients(supernet).items()}}
        of_network = {**network.state_dict(), **{f"{k}.grad": v for k, v in gradients(network).items()}}
        for name, value in of_network.items():  # in training mode the running statistics have moved alike
            if name.startswith("blocks."):
                _, layer, rest = name.split(".", 2)
                name = f"choices.{layer}.{path[int(layer)]}.{rest}"
            assert torch.equal(value, of_supernet[name]), name
    finally:
        supernet.float().load_state_dict(state)


def test_from_supernet_copies(supernet):
    path = PATHS[supernet.space.name]
    supernet.eval()
    images = draw(2, supernet.space.in_channels, 16, 16)
    before = supernet(images, path)
    network = Network.from_supernet(supernet, path)
    addresses = {tensor.data_ptr() for tensor in [*supernet.parameters(), *supernet.buffers()]}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in [*network.parameters(), *network.buffers()])
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.fill_(1)
    assert torch.equal(supernet(images, path), before)


def test_from_supernet_needs_a_path(supernet):
    with pytest.raises(ValueError, match=r"path: expected \d+ operation indices .* got 3"):
        Network.from_supernet(supernet, [0, 0, 0])


def test_a_fresh_network_has_the_weights_of_its_seed_and_leaves_the_global_state():
    space = get_space("mini-16")
    path = PATHS["mini-16"]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (Network(space, torch.tensor(path), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    images = draw(2, 1, 8, 8)
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))
    assert first.path == tuple(path)
    assert first.space is space
    assert first.training


def test_fresh_weights_in_a_network_and_in_a_supernet_give_the_same_outputs():
    supernet = Supernet(get_space("mini-28"), seed=4).eval()
    path = PATHS["mini-28"]
    network = Network(supernet.space, path, seed=None).eval()
    images = draw(3, 1, 28, 28)
    assert not torch.equal(network(images), supernet(images, path))
    network.load_state_dict(Network.from_supernet(supernet, path).state_dict())
    assert torch.equal(network(images), supernet(images, path))


@pytest.mark.parametrize("inherited", [False, True])
def test_dropout_works_in_training_only_and_keeps_names(inherited):
    space = get_space("mini-16")
    path = PATHS["mini-16"]
    supernet = Supernet(space, seed=0)

    def build(dropout):
        if inherited:
            return Network.from_supernet(supernet, path, dropout=dropout)
        return Network(space, path, seed=0, dropout=dropout)

    plain, dropping = build(0.0), build(0.5)
    assert [name for name, _ in plain.head.named_children()] == ["conv", "bn", "act", "pool", "flatten", "linear"]
    assert [name for name, _ in dropping.head.named_children()][-3:] == ["flatten", "dropout", "linear"]
    assert list(plain.state_dict()) == list(dropping.state_dict())
    images = draw(8, 1, 8, 8)
    assert torch.equal(plain.eval()(images), dropping.eval()(images))
    dropping.train()
    seen = []
    dropping.head.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    dropping.head.act.register_forward_hook(lambda module, args, output: output.fill_(2.0))
    dropping(images)
    assert set(seen[0].unique().tolist()) == {0.0, 4.0}
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6


def test_dropout_follows_the_training_flag_of_the_supernet():
    supernet = Supernet(get_space("mini-16"), seed=0).eval()
    network = Network.from_supernet(supernet, [6] * 8, dropout=0.3)
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range(dropout):
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\), got"):
        Network(get_space("mini-16"), [0] * 8, dropout=dropout)


def test_a_wrong_path_is_refused():
    with pytest.raises(ValueError, match=r"path\[2\]: expected an operation index of 0 to 6, got 7"):
        Network(get_space("mini-16"), [0, 0, 7, 0, 0, 0, 0, 0])
    with pytest.raises(TypeError, match=r"path: .* got float32 \[8\]"):
        Network(get_space("mini-16"), torch.zeros(8))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_architectures_run(name):
    space = get_space(PUBLISHED_SPACE)
    network = Network(space, space.encode(PUBLISHED[name])).eval()
    assert network(draw(2, 3, 33, 47)).shape == (2, 1000)
    identities = [index for index, block in enumerate(network.blocks) if isinstance(block, nn.Identity)]
    named = [index for index, op in enumerate(PUBLISHED[name]) if op == "id"]
    assert identities == named
    assert [index for index, block in enumerate(network.blocks) if getattr(block, "se", None) is not None] == [
        index for index, op in enumerate(PUBLISHED[name]) if op.endswith("s")
    ]


def test_state_dict_names_are_readable():
    names = list(Network(get_space("mini-16"), PATHS["mini-16"]).state_dict())
    assert names[0] == "stem.conv.weight"
    assert "blocks.0.depthwise.bn.running_mean" in names
    assert not any(name.startswith("blocks.7.") for name in names)  # identity
    assert names[-1] == "head.linear.bias"
