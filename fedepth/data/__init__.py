"""Datasets on disk, their transforms, and label-skewed partitions of them."""
