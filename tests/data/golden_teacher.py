"""A teacher by a function: part of a spec whose hash is pinned, so this file is not changed."""


def build(shrink, sizes):
    raise NotImplementedError
