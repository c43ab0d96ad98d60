"""Keys of the config that were renamed: older names are read with a warning, and some day refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import DATA, answer

from dsno_cluster import __version__
from dsno_cluster.cluster.runs import Run
from dsno_cluster.config import Config, dump_config, load_config, renamed
from dsno_cluster.config.renamed import RENAMED_KEYS, RenamedKey
from dsno_cluster.errors import UserError

DIGITS = Path("configs/digits.yaml").read_text()
OLDER = DIGITS.replace("state_size:", "image_size:").replace("state_channels:", "channels:")
WARNING = (
    "network.image_size is called network.state_size since version 0.2.0; the older name is read until 1.0.0"
)


def written(folder: Path, text: str, name: str = "digits.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_an_older_name_is_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, OLDER)
    assert load_config(file) == load_config("configs/digits.yaml")
    assert capsys.readouterr().err.splitlines() == [
        f"{file}: {WARNING}",
        f"{file}: {WARNING.replace('image_size', 'channels').replace('state_size', 'state_channels')}",
    ]
    load_config("configs/digits.yaml")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "override",
    [
        "network.image_size=16",
        "network={image_size: 16, state_channels: 1, num_classes: 10, width: 32, multipliers: [1, 2], blocks_per_level: 1, "
        "embedding_dim: 32}",
    ],
    ids=["a key", "a section"],
)
@pytest.mark.parametrize("text", [DIGITS, OLDER], ids=["current", "older"])
def test_an_override_takes_either_name(
    text: str, override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(written(tmp_path, text), [override, "network.attention_resolutions=[8]"])
    assert config.network.sides == (16, 16)
    assert capsys.readouterr().err.count(WARNING) == 1


def test_a_command_warns_on_standard_error(tmp_path: Path) -> None:
    told = answer("plan", written(tmp_path, OLDER), f"storage.root={tmp_path}", "--json")
    assert told.returncode == 0 and told.stdout.startswith("{"), told.stderr
    assert told.stderr.count(WARNING) == 1


def test_both_names_are_refused(tmp_path: Path) -> None:
    both = written(tmp_path, DIGITS.replace("  state_size: 8", "  state_size: 8\n  image_size: 8"))
    with pytest.raises(
        UserError,
        match=r"network\.image_size is the older name of network\.state_size, .* remove network\.image_size",
    ):
        load_config(both)


def test_what_the_project_wrote_has_current_names_and_gives_no_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(written(tmp_path, OLDER))
    capsys.readouterr()
    again = written(tmp_path, dump_config(config), "again.yaml")
    assert load_config(again) == config
    # a run folder of version 0.1.0, which knew only the older names
    folder = tmp_path / "run"
    folder.mkdir()
    written(folder, (DATA / "release_1/release.yaml").read_text(), "config.yaml")
    assert Run(folder).config().network.state_size == 8
    assert capsys.readouterr().err == ""


def test_an_older_name_is_refused_from_its_last_version_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = RenamedKey("training.rate", "training.lr", since="0.1.0", until=__version__)
    moved = RenamedKey("data.batch", "training.batch_size", since="0.1.0", until="99.0.0")
    monkeypatch.setattr(renamed, "RENAMED_KEYS", (ended, moved))
    file = written(tmp_path, DIGITS)
    assert load_config(file, ["data.batch=32"]).training.batch_size == 32  # moved to another section
    told = answer("plan", file, "training.rate=1e-4")
    assert told.returncode == 2 and len(told.stderr.splitlines()) == 1
    assert (
        f"{file}: training.rate is called training.lr since version 0.1.0, and its older name" in told.stderr
    )
    # what the project wrote itself is read for good
    lines = (
        dump_config(load_config(file)).replace("\ntraining:\n", "\ntraining:\n  rate: 0.25\n").splitlines()
    )
    at = next(i for i, line in enumerate(lines) if i > lines.index("training:") and line.startswith("  lr:"))
    written(tmp_path, "\n".join([*lines[:at], *lines[at + 1 :]]), "config.yaml")
    assert Run(tmp_path).config().training.lr == 0.25


def test_the_table_names_keys_that_exist() -> None:
    for key in RENAMED_KEYS:
        model = Config
        *sections, last = key.newer.split(".")
        for section in sections:
            model = model.model_fields[section].annotation
        assert last in model.model_fields and key.older.rpartition(".")[2] not in model.model_fields
        assert numbers(key.since) <= numbers(__version__)
        # a key is removed only by a major version, and one that was read when the older name was given up
        assert numbers(key.until)[1:] == [0, 0] and numbers(key.until) > numbers(key.since)
