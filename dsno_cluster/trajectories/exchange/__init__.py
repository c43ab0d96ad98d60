"""Trajectories for other trainers, and from them: WebDataset tars, LMDB environments and numpy archives.

`export.py` writes a data set of ours in such a format, `importing.py` makes shards of one. Each format has a module that
encodes and reads one part, a file with many samples; `index.py` is the file that says what the parts hold.
"""
