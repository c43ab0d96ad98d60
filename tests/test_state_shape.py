"""The shape of a state in a config, which need not be square."""

from __future__ import annotations

import pytest

from dsno_cluster.config import load_config
from dsno_cluster.errors import UserError


def test_states_that_are_not_square() -> None:
    config = load_config("configs/digits.yaml", ["network.state_size=[8, 12]"])
    assert config.network.state_shape == (1, 8, 12)
    assert load_config("configs/digits.yaml", ["network.state_size=[8, 8]"]) == load_config(
        "configs/digits.yaml"
    )
    with pytest.raises(UserError, match="state_size 8x9 cannot be halved 1 times"):
        load_config("configs/digits.yaml", ["network.state_size=[8, 9]"])
