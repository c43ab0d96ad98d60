"""Features of images: networks that extract them, their statistics, distances between sets of them."""

INCEPTION = "inception-v3-compat"  # the network whose Frechet distance the field calls FID
