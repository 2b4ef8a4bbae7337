"""Networks of the package `ofa`: losses are those of a loop over their own forwards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from foreign_supernets import own_losses
from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3, OFAProxylessNASNets
from supernets import draw_images, randomise, relative_error
from test_adapt import FP64
from torch import Tensor

from greedynas_ext import adapt, evaluate_paths

KERNELS, RATIOS, DEPTHS = [3, 5, 7], [2, 4], [1, 2]


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("make", [OFAMobileNetV3, OFAProxylessNASNets])
def test_losses_of_sub_networks(make: Any, bn: Any) -> None:
    torch.manual_seed(0)
    net = make(n_classes=5, width_mult=0.5, ks_list=KERNELS, expand_ratio_list=RATIOS, depth_list=DEPTHS).double()
    randomise(net)
    for name, parameter in net.named_parameters():
        if name.endswith("_matrix"):  # by which the weights of smaller kernels are made of larger ones
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    blocks, stages = len(net.blocks) - 1, len(net.block_group_info)
    choices = [KERNELS] * blocks + [RATIOS] * blocks + [DEPTHS] * stages

    def select(net: Any, values: Sequence[int]) -> None:
        net.set_active_subnet(ks=values[:blocks], e=values[blocks : 2 * blocks], d=values[2 * blocks :])

    def run(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
        select(net, [options[op] for options, op in zip(choices, path, strict=True)])
        return net(images)

    view = adapt(net, choices=choices, select=select)
    assert view.reason is None
    generator = random.Random(0)
    paths = torch.tensor([[generator.randrange(len(options)) for options in choices] for _ in range(4)])
    images, targets = draw_images(3, 48)
    result = evaluate_paths(view, paths, images, targets, bn=bn, per_image=True)
    assert relative_error(result.image_losses, own_losses(net, run, paths, images, targets, bn)) < FP64
    assert len(result.plan.nodes_per_layer) == blocks
    whole = make is OFAProxylessNASNets  # the other's head has a convolution after the mean
    assert result.plan.kernels.startswith("fused, " if whole else "partly fused; modules: supernet.head: mean: ")
    assert result.plan.macs_fused >= (1.0 if whole else 0.8) * result.plan.macs_computed
