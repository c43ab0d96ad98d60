"""Torch modules: U-Nets, temporal convolutions, backbones of other libraries. What they are used for stands above."""
