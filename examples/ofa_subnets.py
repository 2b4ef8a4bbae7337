"""Evaluates sub-networks of a once-for-all network, an `ofa.OFAMobileNetV3` from PyPI, at once.

Run: pip install ofa==0.1.0.post202307202001 torchvision; python examples/ofa_subnets.py, half a minute.
"""

import random
import time

import torch
import torch.nn.functional as F
from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3

import greedynas_ext

KERNELS, RATIOS, DEPTHS = [3, 5, 7], [3, 4, 6], [2, 3, 4]
STAGES, BLOCKS = 5, 20  # each stage has the blocks of its largest depth
SUBNETS, IMAGES, RESOLUTION = 10, 32, 96


def once_for_all():
    """A network with random weights, as its training starts."""
    torch.manual_seed(0)
    return OFAMobileNetV3(n_classes=100, ks_list=KERNELS, expand_ratio_list=RATIOS, depth_list=DEPTHS).train()


def set_subnet(network, values):
    """Kernel sizes and expansion ratios of all blocks, then depths of stages."""
    network.set_active_subnet(ks=values[:BLOCKS], e=values[BLOCKS : 2 * BLOCKS], d=values[2 * BLOCKS :])


def draw_subnet(generator):
    """A random sub-network, as `set_subnet` takes it."""
    return [
        *(generator.choice(KERNELS) for _ in range(BLOCKS)),
        *(generator.choice(RATIOS) for _ in range(BLOCKS)),
        *(generator.choice(DEPTHS) for _ in range(STAGES)),
    ]


def losses_one_by_one(network, subnets, images, targets):
    """The loop: each sub-network on its own, BatchNorm with statistics of the batch."""
    losses = []
    with torch.no_grad():
        for subnet in subnets:
            set_subnet(network, subnet)
            losses.append(F.cross_entropy(network(images), targets))
    return torch.stack(losses)


def main():
    """Prints the losses of some sub-networks, how much of the work ran fused, and both times."""
    network = once_for_all()
    network.classifier.dropout.p = 0.0  # else the loop below draws random numbers
    choices = [KERNELS] * BLOCKS + [RATIOS] * BLOCKS + [DEPTHS] * STAGES
    view = greedynas_ext.adapt(network, choices=choices, select=set_subnet)

    generator = random.Random(0)
    subnets = [draw_subnet(generator) for _ in range(SUBNETS)]
    images, targets = torch.randn(IMAGES, 3, RESOLUTION, RESOLUTION), torch.randint(100, (IMAGES,))
    paths = view.encode(subnets)
    greedynas_ext.evaluate_paths(view, paths, images, targets)  # compares what is recognised with the modules
    start = time.perf_counter()
    evaluation = greedynas_ext.evaluate_paths(view, paths, images, targets, k=3)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    expected = losses_one_by_one(network, subnets, images, targets)
    one_by_one = time.perf_counter() - start

    for number in evaluation.top_k.tolist():
        depths = subnets[number][2 * BLOCKS :]
        print(f"loss {evaluation.losses[number]:.4f}: sub-network {number}, depths {depths}")
    plan = evaluation.plan
    print(f"largest difference from the loop: {(evaluation.losses - expected).abs().max():.1e}")
    print(f"{plan.macs_fused / plan.macs_computed:.1%} of the multiply-accumulates fused ({plan.kernels})")
    print(f"{seconds:.2f} s at once, {one_by_one:.2f} s one by one")


if __name__ == "__main__":
    main()
