"""Features of images: networks that extract them, their statistics, distances between sets of them."""

from dsno_cluster.config.protocols import INCEPTION

__all__ = ["INCEPTION"]
