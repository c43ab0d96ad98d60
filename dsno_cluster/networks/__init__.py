"""Torch modules: U-Nets, temporal convolutions, backbones of other libraries."""
