"""The Dockerfile and CI begin with one script, so the image has what CI tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def instructions(file: Path) -> list[list[str]]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return [line.split(maxsplit=1) for line in lines]


def test_the_image_is_made_by_the_script_that_ci_begins_with() -> None:
    steps = instructions(ROOT / "Dockerfile")
    assert [words for word, words in steps if word == "RUN"] == [".ci/setup"]
    assert steps.index(["COPY", ". ."]) < steps.index(["RUN", ".ci/setup"])
    folder = dict(steps)["WORKDIR"]
    assert dict(steps)["ENV"] == f"PATH={folder}/.venv/bin:$PATH"  # where `make setup` puts it
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if not line.startswith("#")]
    assert commands[2] == ".ci/setup" and "apt-get" not in " ".join(commands)
    assert (ROOT / ".ci/setup").stat().st_mode & 0o111


def test_the_script_installs_the_list_and_then_the_package(tmp_path: Path) -> None:
    """With stand-ins for the commands that it calls, which note their words."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / ".ci", copy / ".ci")
    for name in ("apt-get", "make"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/noted\n')
        tool.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run([copy / ".ci/setup"], env=env, check=True, cwd=tmp_path)
    update, install, setup = (tmp_path / "noted").read_text().splitlines()
    packages = (ROOT / ".ci/apt-packages").read_text().split()
    assert update == "apt-get update -q" and setup == "make setup"
    assert install.split()[1:5] == ["install", "-y", "-q", "--no-install-recommends"]
    assert install.split()[5:] == packages and len(set(packages)) == len(packages)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", package) for package in packages)
