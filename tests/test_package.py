"""The package as it is published: its version everywhere, and a wheel and an sdist that work outside a checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from documents import ROOT
from tiny import TINY

from dsno_cluster import __version__

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # of Keep a Changelog


def test_the_version_is_that_of_changelog_and_citation() -> None:
    releases = re.findall(r"^## \[(\S+)\] - (\d{4}-\d{2}-\d{2})$", CHANGELOG, re.M)
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert releases[0][0] == __version__
    assert releases == sorted(releases, key=lambda r: [int(n) for n in r[0].split(".")], reverse=True)
    assert [date for _, date in releases] == sorted((date for _, date in releases), reverse=True)
    assert set(re.findall(r"^### (.+)$", CHANGELOG, re.M)) <= KINDS
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == releases[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist; the wheel is built from the sdist, as a user would who has only that."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], ROOT)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A virtual environment with the libraries of this one, but without this checkout."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    # a folder that a .pth adds is not searched for further .pth files, by which checkouts are installed
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "libraries.pth").write_text("\n".join(libraries))
    yield folder
    shutil.rmtree(folder)


def run(command: list[str], cwd: Path) -> str:
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd)}  # no PYTHONPATH that leads to a checkout
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(python: str, package: Path, cwd: Path) -> None:
    """Install a wheel or an sdist for another Python, whose libraries are those of this one."""
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run([sys.executable, "-m", "pip", "--python", python, *words, str(package)], cwd)


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.mark.slow
def test_the_sdist_has_every_tracked_file(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not tracked_files() - names


@pytest.mark.slow
def test_pypi_would_take_both(built: tuple[Path, Path]) -> None:
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built)], built[0].parent)
    with zipfile.ZipFile(built[0]) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(archive.read(metadata))
    assert (about["Name"], about["Version"]) == ("dsno-cluster", __version__)
    assert about["License-Expression"] == "Apache-2.0" and any(
        name.endswith("/licenses/LICENSE") for name in names
    )
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    page = about.get_payload()
    assert isinstance(page, str) and page.startswith("# dsno-cluster") and "## Commands" in page
    targets = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)", page)  # relative ones would lead nowhere
    assert targets and all(link.startswith(("https://", "#")) for pair in targets for link in pair if link)


@pytest.mark.slow
def test_the_wheel_works_outside_a_checkout(
    built: tuple[Path, Path], elsewhere: Path, tmp_path: Path
) -> None:
    python = str(elsewhere / "bin/python")
    install(python, built[0], tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    command = str(elsewhere / "bin/dsno-cluster")
    home = run([python, "-c", "import dsno_cluster; print(dsno_cluster.__file__)"], work)
    assert Path(home.strip()).is_relative_to(elsewhere)
    assert run([command, "--version"], work).strip() == __version__
    run(
        [sys.executable, "-m", "pip", "--python", python, "check"], work
    )  # of what it says that it needs, all is there
    # the config, the profiles, the teacher and the classifier that travel inside
    run([command, "demo", *TINY, "training.threads=1"], work)
    assert (work / "runs/evaluation/digits/samples.png").is_file()
    assert "all as the manifest says" in run([command, "verify", "configs/digits.yaml", *TINY], work)


@pytest.mark.slow
def test_tests_run_from_the_sdist(built: tuple[Path, Path], elsewhere: Path, tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("dsno_cluster-*")
    python = str(elsewhere / "bin/python")
    words = ["-q", "-p", "no:cacheprovider", "tests/test_noise.py", "tests/test_release_1.py"]
    install(python, built[1], tmp_path)
    assert " passed" in run([python, "-m", "pytest", *words], folder)
