"""Training augmentation: of small images held in memory as one batch, of photographs one by one.

Everything random comes from the generator that the caller passes.
"""

import math
import random
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# Evaluation sees the central 87.5% of the shorter side: 256 -> 224 pixels, the usual ImageNet protocol.
CENTRE_CROP = 0.875


@dataclass(frozen=True)
class SmallAugmentation:
    """Augmentation of small images: zero padding and a random crop (that is, a shift), then a random mirroring.

    Attributes:
        shift: largest shift along each axis, in pixels; 0 for none.
        flip: mirror half of the images left to right. Not for digits, where it makes new signs.
    """

    shift: int
    flip: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            images: [b, C, H, W], any dtype; left as it is. Zero is taken to be the background.
            generator: source of the shifts and flips, each image having its own.

        Returns:
            The augmented images, of the same shape and dtype.
        """
        shifted = random_shift(images, self.shift, generator)
        return random_flip(shifted, generator) if self.flip else shifted


def random_shift(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Move each image of [b, C, H, W] by its own -shift..shift pixels along both axes, filling with zeros."""
    if shift == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, (shift, shift, shift, shift))
    offsets = torch.randint(0, 2 * shift + 1, (2, count), generator=generator)
    rows = offsets[0, :, None] + torch.arange(height)  # [b, H]
    columns = offsets[1, :, None] + torch.arange(width)  # [b, W]
    # Advanced indices around a slice put the sliced dimension last: [b, H, W, C].
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of [b, C, H, W] left to right with probability 1/2."""
    mirrored = torch.rand(images.shape[0], generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def random_crop_box(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """The part of an image that a random resized crop keeps (Szegedy et al., Going deeper with convolutions, 2015).

    The area is uniform in 8% to 100% of the image's, the logarithm of the aspect ratio uniform in 3/4 to 4/3. After ten
    boxes that do not fit, the largest central box of a permitted ratio is taken.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        generator: source of the box.

    Returns:
        (left, top, right, bottom) in pixels; right and bottom are exclusive.
    """
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*CROP_SCALE)
        ratio = math.exp(generator.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = generator.randint(0, width - crop_width)
            top = generator.randint(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    crop_width = min(width, max(1, round(height * ratio)))
    crop_height = min(height, max(1, round(width / ratio)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def augment_photo(image: Image.Image, resolution: int, generator: random.Random) -> Image.Image:
    """Random resized crop to resolution x resolution, then mirrored left to right with probability 1/2."""
    box = random_crop_box(image.width, image.height, generator)
    # Cropping before resizing keeps the filter from reading pixels outside of the box.
    cropped = image.crop(box).resize((resolution, resolution), Image.Resampling.BILINEAR)
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else cropped


def centre_photo(image: Image.Image, resolution: int) -> Image.Image:
    """The central resolution x resolution pixels after resizing the shorter side to resolution / 0.875."""
    shorter = round(resolution / CENTRE_CROP)
    width = max(shorter, shorter * image.width // image.height)
    height = max(shorter, shorter * image.height // image.width)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + resolution, top + resolution))
