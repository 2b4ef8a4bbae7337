"""Real images for GreedyNAS: where they come from, how they are split, and how they are drawn.

`load_data` gives the training, validation and test part of a data set; `BatchStream` draws training batches and
`ValidationSampler` the validation batches of the path filter. Both are pure functions of a seed and a counter, so a
killed run resumes from the counter alone.
"""

from greedynas.data.folders import FolderImageSet
from greedynas.data.image_sets import Batch, HeldOutImages, ImageSet, TensorImageSet
from greedynas.data.sources import available_datasets, load_data
from greedynas.data.splits import DataSplits
from greedynas.data.streams import BatchStream, ValidationSampler

__all__ = [
    "Batch",
    "BatchStream",
    "DataSplits",
    "FolderImageSet",
    "HeldOutImages",
    "ImageSet",
    "TensorImageSet",
    "ValidationSampler",
    "available_datasets",
    "load_data",
]
