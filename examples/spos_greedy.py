"""Trains a small single-path one-shot supernet on scikit-learn's digits; docs/drop-in.md turns it greedy.

Run: python examples/spos_plain.py and python examples/spos_greedy.py, some seconds each.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from greedynas_ext import ExploitSchedule, PathFilter

STEPS, BATCH_SIZE = 1000, 64
KERNELS, CHANNELS, LAYERS = (1, 3, 5), 12, 5


class Supernet(nn.Module):
    """A chain of choice blocks; a path picks one operation of each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.choices = nn.ModuleList(
            nn.ModuleList([*(convolution(kernel) for kernel in KERNELS), nn.Identity()]) for _ in range(LAYERS)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, 10))

    def forward(self, images, path):
        """Logits [N, 10] of images [N, 1, 8, 8] by one path [LAYERS]."""
        features = self.stem(images)
        for block, operation in zip(self.choices, path, strict=True):
            features = block[operation](features)
        return self.head(features)


def convolution(kernel):
    """One candidate operation."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2), nn.BatchNorm2d(CHANNELS), nn.ReLU()
    )


def uniform_path(generator):
    """One operation for each layer, int64 [LAYERS]."""
    return torch.randint(len(KERNELS) + 1, (LAYERS,), generator=generator)


def train_step(supernet, optimizer, images, targets, path):
    """One optimizer step of one path on a random batch; operations off the path stay as they are."""
    batch = torch.randint(len(images), (BATCH_SIZE,))
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(supernet(images[batch], path), targets[batch])
    loss.backward()
    optimizer.step()


def accuracy(supernet, images, targets, path):
    """Of one path, with the statistics of these images: those that BatchNorm stores are a mixture of all paths."""
    with torch.no_grad():
        return (supernet(images, path).argmax(1) == targets).float().mean().item()


def main():
    """Trains the supernet, and picks the best of 50 random paths."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(digits.target)
    train, validation, test = torch.randperm(len(images), generator=generator).split([1200, 200, 397])

    supernet = Supernet()
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    schedule = ExploitSchedule(warmup_steps=STEPS // 20, total_steps=STEPS // 5)
    path_filter = PathFilter(supernet, m=10, k=5, pool_size=100, schedule=schedule, generator=generator)
    for _ in range(STEPS // 5):
        for path in path_filter.draw(images[validation], targets[validation]):
            train_step(supernet, optimizer, images[train], targets[train], path)
        if path_filter.steady:
            break

    paths = [uniform_path(generator) for _ in range(50)]
    best = max(paths, key=lambda path: accuracy(supernet, images[validation], targets[validation], path))
    print(f"best of 50 random paths: {best.tolist()}")
    print(f"its accuracy on the test images: {accuracy(supernet, images[test], targets[test], best):.1%}")


if __name__ == "__main__":
    main()
