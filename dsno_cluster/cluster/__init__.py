"""Running stages on this machine or on a cluster: Ray pools, Slurm jobs, run folders.

Nothing here uses tensors.
"""
