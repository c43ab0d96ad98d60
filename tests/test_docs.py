"""The documents: every command in them runs, every example works, every link leads somewhere, and what is written by a
program is what it writes.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from documents import (
    EXCUSED,
    PAGES,
    PUBLISHED,
    ROOT,
    SMALL,
    Block,
    Command,
    as_run,
    blocks,
    commands,
    on_cluster,
    prose,
)
from tiny import answer, dsno

from dsno_cluster import cli
from dsno_cluster.diffusion.noise import sample_noise
from dsno_cluster.storage import open_storage
from dsno_cluster.trajectories.shards import read_manifest, read_shard, trajectory_spec

DOCS = ROOT / "docs"

STAGES = {"gen-trajectories", "train", "eval", "run", "demo"}
DATA_SET = "data-set"  # a link to the digits' trajectories
# what the placeholders of the documents stand for on this machine
NAMES = {
    "CONFIG": "configs/digits.yaml",
    "STUDENT": "runs/students/digits",
    "FOLDER_OR_URL": DATA_SET,
    "CHECKPOINT": str(PUBLISHED / "one_point/solver-model_1000.pt"),
    "PUBLISHED.yaml": str(PUBLISHED / "one_point/config.yaml"),
    "FLAX_FILE": str(PUBLISHED / "teacher_flax_x/teacher"),
    "FLAX.yaml": str(PUBLISHED / "teacher_flax_x/config.yaml"),
    "DIR": "imported",
}
# the experiment that a published teacher of the test data fits
FLAX = (
    *("network.image_size=16", "network.channels=3", "network.null_class=false"),
    *("network.attention_resolutions=[8]", "trajectories.solver=ddim", "trajectories.steps=16"),
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A working directory with trajectories and a student of the digits, and the files that the documents tell to write."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny_data, folder / "runs")
    for page in PAGES:
        for block in blocks(page):
            if (name := file_name(block)) is not None:
                (folder / name).write_text(block.text)
    made = dsno("train", *SMALL, "--launcher", "local", cwd=folder)
    assert made.returncode == 0, made.stderr
    (data,) = folder.glob("runs/trajectories/*")
    (folder / DATA_SET).symlink_to(data)
    save_diffusers_model(folder / "teachers/mine")
    return folder


@pytest.fixture(scope="module")
def examples(workplace: Path) -> int:
    """Runs every Python example; returns how many. Commands may use what they wrote."""
    found = [b for page in PAGES for b in blocks(page) if b.language == "python"]
    with pytest.MonkeyPatch.context() as patch:
        for block in found:
            patch.chdir(workplace / DATA_SET if block.page.name == "shard-format.md" else workplace)
            code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
            exec(code, {"__name__": "example"})
    said = run_here(["sample", NAMES["STUDENT"], "--num", "64", "--out", "samples.npz"], workplace)
    assert said is None, said
    return len(found)


def file_name(block: Block) -> str | None:
    """Of a block that is a file: its first line says `# NAME`."""
    found = re.match(r"# (\S+\.(?:py|yaml))\n", block.text)
    return found[1] if found else None


def save_diffusers_model(folder: Path) -> None:
    """A small UNet2DModel of 32x32 colour images, at initialisation, as a user saves theirs."""
    from diffusers import DDPMScheduler, UNet2DModel

    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    model.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)


def run_here(words: list[str], workplace: Path) -> str | None:
    """Run `dsno-cluster` in this process; returns None, or what it said where it did not exit with 0."""
    done = answer(*words, cwd=workplace)
    return None if done.returncode == 0 else done.stdout + done.stderr


# ---- commands ----------------------------------------------------------------------------------------------


def test_every_command_is_accounted_for() -> None:
    shown = commands()
    unknown = [
        c.where for c in shown if c.words[0] not in (*CHECKS, "dsno-cluster") and c.text not in EXCUSED
    ]
    assert not unknown, "neither run nor excused"
    assert not EXCUSED.keys() - {c.text for c in shown}, "an excuse for a command that no page has"
    ours = {c.words[1] for c in shown if c.words[0] == "dsno-cluster"}
    assert not set(cli.COMMANDS) - ours, "a command of the program that no page shows"


@pytest.mark.usefixtures("examples")
def test_commands_run_on_this_machine(workplace: Path) -> None:
    """All that is done in seconds."""
    run_all([c for c in ours() if not is_long(c)], workplace)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("examples")
def test_long_commands_run_on_this_machine(workplace: Path) -> None:
    """The stages, of the digits and of the user's own model: a UNet2DModel as diffusers saves it."""
    run_all([c for c in ours() if is_long(c)], workplace)


def is_long(command: Command) -> bool:
    """Whether it is a stage, measures a teacher, or shows a student that only the documents' own stages make."""
    return is_stage(command.words) or measures(command.words) or "mine" in command.text


def measures(words: list[str]) -> bool:
    return not {"--measure", "--tolerance"}.isdisjoint(words)


def ours() -> list[Command]:
    """Commands of this program that this machine executes."""
    return [
        c for c in commands() if c.words[0] == "dsno-cluster" and not on_cluster(c) and c.text not in EXCUSED
    ]


def is_stage(words: list[str]) -> bool:
    """Whether a command leaves its process changed, as DeepSpeed and Ray do, and so needs one of its own."""
    by_ray = not STAGES.isdisjoint(words[:2]) or "--shards" in words
    return by_ray and not {"--help", "--dry-run"} & set(words)


def run_all(commands: list[Command], workplace: Path) -> None:
    """Run each command line that the commands stand for once."""
    done: set[tuple[str, ...]] = set()
    failures = []
    for command in commands:
        for words in variants(command, NAMES):
            if tuple(words) in done:
                continue
            done.add(tuple(words))
            said = run(words, workplace, len(done))
            if said is not None:
                failures.append(f"{command.where}\n  dsno-cluster {' '.join(words)}\n  {said}")
    assert not failures, "\n".join(failures)
    assert len(done) > 5


def variants(command: Command, names: dict[str, str]) -> Iterator[list[str]]:
    """The command lines that a command stands for: `COMMAND` is each of them."""
    more = FLAX if "FLAX_FILE" in command.text else ()
    for name in cli.COMMANDS if command.words[1] == "COMMAND" else (command.words[1],):
        yield as_run(Command(command.page, command.line, command.text.replace("COMMAND", name)), names, more)


def run(words: list[str], workplace: Path, number: int) -> str | None:
    """Run a command; returns None, or what it said where it did not exit with 0."""
    if not is_stage(words):
        return run_here([*words, "--probes", "2"] if measures(words) else words, workplace)
    if any(word.startswith("training.lr=") for word in words):
        words = [*words, f"name=other{number}"]  # another training than the one that is finished
    local = ["--launcher", "local"] if "--launcher" not in words and words[0] in STAGES else []
    made = dsno(*words, *local, cwd=workplace)
    return None if made.returncode == 0 else made.stderr


def check_make(command: Command) -> None:
    made = subprocess.run(
        ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    targets = [word for word in command.words[1:] if "=" not in word]
    assert set(targets) <= set(phony[1].split()), "a target that `make help` does not list"


def check_pip(command: Command) -> None:
    """Installing takes minutes and a network; that what is named can be installed is seen in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert command.words[1] == "install"
    for word in command.words[2:]:
        found = re.fullmatch(r"(?:\.|dsno-cluster)(?:\[(\w+)\])?|-e", word)
        assert found, f"{word}: not this project"
        assert found[1] is None or found[1] in project["optional-dependencies"]


def check_apt(command: Command) -> None:
    """CI installs Debian's packages; that they are the ones named is seen in its script."""
    assert command.words[1] == "install"
    missing = set(command.words[2:]) - set((ROOT / ".ci/apt-packages").read_text().split())
    assert not missing, f"not in .ci/apt-packages: {missing}"


def check_python(command: Command) -> None:
    """Benchmarks and tests take minutes: that they are there, with these options, is seen in their files."""
    file, *options = command.words[1:] if command.words[1:3] != ["-m", "pytest"] else command.words[3:]
    text = (ROOT / file).read_text()
    missing = [word for word in options if word.startswith("-") and f'"{word}"' not in text]
    assert not missing, f"not options of {file}: {missing}"


CHECKS = {"make": check_make, "pip": check_pip, "python": check_python, "apt-get": check_apt}


@pytest.mark.parametrize("tool", CHECKS)
def test_other_commands_exist(tool: str) -> None:
    distinct = {c.text: c for c in commands() if c.words[0] == tool and c.text not in EXCUSED}
    assert distinct
    for command in distinct.values():
        try:
            CHECKS[tool](command)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{command.where}: {error}") from None


# ---- examples ----------------------------------------------------------------------------------------------


def test_python_examples_run(examples: int) -> None:
    assert examples >= 3


def test_a_reader_can_be_written_from_the_format_alone(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workplace / DATA_SET
    (block,) = [b for b in blocks(DOCS / "shard-format.md") if b.language == "python"]
    assert "dsno_cluster" not in block.text and "torch" not in block.text
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(block.text, found)
    storage = open_storage(str(folder))
    read = read_manifest(storage, "")
    assert read is not None
    last = read[0].shards[-1]
    ours = read_shard(storage, "", last)
    assert np.array_equal(found["states"], ours["states"].numpy())
    assert np.array_equal(found["labels"], ours["labels"].numpy())
    spec = trajectory_spec(read[0], "the data set")
    noise = sample_noise(spec.seed, range(last.start, last.stop), spec.shape)
    assert np.array_equal(found["noise"], noise.numpy())

    copy = workplace / "damaged"
    shutil.copytree(folder, copy)
    data = bytearray((copy / last.key).read_bytes())
    data[-1] ^= 1
    (copy / last.key).write_bytes(data)
    monkeypatch.chdir(copy)
    with pytest.raises(AssertionError, match=last.key):
        exec(block.text, {})


# ---- pages -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"(?:\]\(|<img src=\")([^)\"\s]+)", prose(page)):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [page.name for page in PAGES[1:] if f"]({page.relative_to(ROOT)})" not in readme]
    assert not missing


def test_files_that_the_documents_name_exist() -> None:
    """Paths in the repository, written as code."""
    folders = r"(?:dsno_cluster|tests|benchmarks|docs|configs)"
    missing = []
    for page in PAGES:
        for path in re.findall(rf"`({folders}/[\w./-]+)`", page.read_text()):
            if not (ROOT / path).exists():
                missing.append(f"{page.relative_to(ROOT)}: {path}")
    assert not missing


def make_configuration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_that_of_the_models() -> None:
    module = make_configuration()
    assert (DOCS / "configuration.md").read_text() == module.document(), "run `make docs`"


def test_every_key_is_described() -> None:
    assert not make_configuration().undescribed()


def messages() -> list[str]:
    """Every text of the sources, what is filled in as an ellipsis."""
    texts = []
    for file in (ROOT / "dsno_cluster").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
                )
    return texts


def test_messages_in_troubleshooting_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) >= 30
    texts = messages()

    def is_said(row: str) -> bool:
        parts = [re.escape(part) for part in row.split("…")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        return any(pattern.search(text) for text in texts)

    gone = [row for row in rows if not is_said(row)]
    assert not gone, "messages that the program no longer says"


def test_documents_use_the_plain_words() -> None:
    """ "only", "continues", "except" and "lack of" in place of these, and no sentence that begins "Of a ..."."""
    odd = re.compile(r"\b(alone|goes on|go on|but for|want of)\b|(?:^|[.:] )Of an? ", re.MULTILINE)
    found = [
        f"{page.name}:{number}: {line}"
        for page in PAGES
        if page.name != "configuration.md"  # of the models' descriptions
        for number, line in enumerate(prose(page).splitlines(), 1)
        if odd.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_citation_is_the_readmes() -> None:
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    entry = (ROOT / "README.md").read_text()
    assert cited["title"].lower() in entry.lower() and f"year={{{cited['year']}}}" in entry
    for author in cited["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in entry


def test_the_picture_follows_the_start() -> None:
    """Small, and with a text for those who do not see it."""
    (start,) = re.findall(r"^## Start\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (width,) = re.findall(r'^<img src="docs/demo\.png" width="(\d+)" alt="[^"]+">$', start, re.MULTILINE)
    assert int(width) <= 800
    assert os.path.getsize(DOCS / "demo.png") > 10_000
