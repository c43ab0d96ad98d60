"""The shape of a state in a config: its names, and states that are not square."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsno_cluster.config import dump_config, load_config
from dsno_cluster.errors import UserError


def test_the_older_names_of_the_state(tmp_path: Path) -> None:
    """A config and an override may use either name; a dump reads back to the same."""
    text = Path("configs/digits.yaml").read_text()
    older = text.replace("state_size:", "image_size:").replace("state_channels:", "channels:")
    (tmp_path / "digits.yaml").write_text(older)
    for file in ("configs/digits.yaml", str(tmp_path / "digits.yaml")):
        for names in (("image_size", "channels"), ("state_size", "state_channels")):
            config = load_config(
                file, [f"network.{names[0]}=16", f"network.{names[1]}=3", "network.attention_resolutions=[8]"]
            )
            assert config.network.state_shape == (3, 16, 16)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml")) == config
    (tmp_path / "both.yaml").write_text(text.replace("  state_size: 8", "  state_size: 8\n  image_size: 8"))
    with pytest.raises(UserError, match=r"unknown key network.image_size; did you mean network.state_size\?"):
        load_config(str(tmp_path / "both.yaml"))


def test_states_that_are_not_square() -> None:
    config = load_config("configs/digits.yaml", ["network.state_size=[8, 12]"])
    assert config.network.state_shape == (1, 8, 12)
    assert load_config("configs/digits.yaml", ["network.state_size=[8, 8]"]) == load_config(
        "configs/digits.yaml"
    )
    with pytest.raises(UserError, match="state_size 8x9 cannot be halved 1 times"):
        load_config("configs/digits.yaml", ["network.state_size=[8, 9]"])
