"""Evaluates a supernet of LayerChoice containers, in the manner of NNI, through `greedynas_ext.adapt`.

A container keeps its candidates as modules of its own and runs the one that was sampled by name. Nothing in the
supernet knows of greedynas_ext. Run: python examples/layer_choice.py, some seconds.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import greedynas_ext

STEPS, BATCH_SIZE, ARCHITECTURES = 300, 64, 50


class LayerChoice(nn.Module):
    """Alternative modules by name, of which the sampled one runs."""

    def __init__(self, candidates, label):
        super().__init__()
        self.label = label
        self.names = list(candidates)
        self.sampled = self.names[0]
        for name, candidate in candidates.items():
            self.add_module(name, candidate)

    def forward(self, x):
        """What the sampled candidate makes of x."""
        return getattr(self, self.sampled)(x)


class MobileBlock(nn.Module):
    """An inverted bottleneck, with a shortcut where it keeps the shape."""

    def __init__(self, channels_in, channels_out, kernel, stride, ratio):
        super().__init__()
        hidden = channels_in * ratio
        self.shortcut = stride == 1 and channels_in == channels_out
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            *(nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)),
        )

    def forward(self, x):
        """Features [N, channels_out, H / stride, W / stride] of x [N, channels_in, H, W]."""
        return x + self.layers(x) if self.shortcut else self.layers(x)


def layer_choice(channels_in, channels_out, stride, label):
    """Four blocks, and where the shape stays as it is the identity."""
    candidates = {
        f"k{kernel}_e{ratio}": MobileBlock(channels_in, channels_out, kernel, stride, ratio)
        for kernel in (3, 5)
        for ratio in (2, 4)
    }
    if stride == 1 and channels_in == channels_out:
        candidates["skip"] = nn.Identity()
    return LayerChoice(candidates, label)


class Net(nn.Module):
    """Layer choices with fixed blocks before, between and after them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
            layer_choice(16, 24, 2, "reduce"),
            layer_choice(24, 24, 1, "first"),
            MobileBlock(24, 24, 3, 1, 2),
            layer_choice(24, 24, 1, "second"),
            layer_choice(24, 32, 1, "widen"),
            *(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )

    def forward(self, x):
        """Logits [N, 10] of images [N, 1, 8, 8] by the candidates that are sampled."""
        return self.net(x)


def layer_choices(net):
    """The containers, in the order in which they run."""
    return [module for module in net.modules() if isinstance(module, LayerChoice)]


def random_architecture(net, generator):
    """The name of a candidate for each container."""
    return [
        choice.names[int(torch.randint(len(choice.names), (), generator=generator))] for choice in layer_choices(net)
    ]


def logits(net, images, architecture):
    """Logits [N, 10] of one architecture."""
    for choice, name in zip(layer_choices(net), architecture, strict=True):
        choice.sampled = name
    return net(images)


def main():
    """Trains the supernet on random architectures, and compares others by their losses."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(digits.target)
    train, validation, test = torch.randperm(len(images), generator=generator).split([1200, 200, 397])

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        batch = train[torch.randint(len(train), (BATCH_SIZE,))]
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits(net, images[batch], random_architecture(net, generator)), targets[batch]).backward()
        optimizer.step()

    architectures = [random_architecture(net, generator) for _ in range(ARCHITECTURES)]
    view = greedynas_ext.adapt(net)
    paths = view.encode(architectures)
    result = greedynas_ext.evaluate_paths(view, paths, images[validation], targets[validation], k=5)

    print(view)
    plan = result.plan
    print(f"{plan.unique_nodes} operations run for {ARCHITECTURES} architectures of {plan.num_layers} layers")
    print(f"fused: {plan.macs_fused / plan.macs_computed:.1%} of the multiply-accumulates")
    for index in result.top_k.tolist():
        print(f"  loss {result.losses[index]:.4f}  {' '.join(architectures[index])}")

    with torch.no_grad():
        own = [F.cross_entropy(logits(net, images[validation], each), targets[validation]) for each in architectures]
        best = logits(net, images[test], architectures[result.top_k[0]])
    print(f"largest difference from the supernet's own loop: {(torch.stack(own) - result.losses).abs().max():.1e}")
    print(f"the best one's accuracy on the test images: {(best.argmax(1) == targets[test]).float().mean():.1%}")


if __name__ == "__main__":
    main()
