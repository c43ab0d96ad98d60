"""The commands and examples of README.md, CONTRIBUTING.md and docs/*.md, and who executes which."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny import DATA, TINY

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TOOLS = (
    "dsno-cluster",
    "make",
    "pip",
    "python",
    "apt-get",
    "source",
    "module",
    "git",
    "sbatch",
    "srun",
    "aws",
)

# Commands that no test executes, each with its reason. A command that is neither here nor executed fails test_docs.py.
EXCUSED = {
    "source .venv/bin/activate": "the shell's own; `make setup` makes that environment, and tests run in one",
    "dsno-cluster eval mine.yaml": "needs Inception's weights, which are not at hand; test_metrics.py has random ones",
    "dsno-cluster eval configs/cifar10.yaml evaluation.protocol=edm": "needs Inception's weights and 150 000 samples; "
    "test_protocols.py has the protocols' parts",
    "dsno-cluster import-trajectories SOURCE --out runs --scale flow --timesteps 0.999,0.937,0.833,0.624": "needs "
    "trajectories of another trainer; test_foreign_trajectories.py writes some",
    "dsno-cluster train configs/digits.yaml trajectories.imported=NAME_OF_IMPORT teacher.path=null student.warm_start=false "
    "training.heldout_every=null": "needs the name that the import printed; test_imported_training.py trains so",
    "dsno-cluster train CONFIG training.start=IMPORTED training.objective=distribution data.images=FOLDER": "needs an "
    "imported student and pictures of its size; test_finishing.py finishes one",
    "dsno-cluster inspect-teacher FILE": "needs a file; test_inspect_teacher.py has one of each family",
    "dsno-cluster inspect-teacher edm-cifar10-32x32-uncond-vp.pkl schedule=native": "needs a published file; "
    "test_inspect_teacher.py has small ones",
    "dsno-cluster report configs/digits.yaml --follow": "ends only when a run has ended; test_followed_report.py follows one",
    "dsno-cluster fetch-teacher NAME": "needs the internet; test_fetch_teacher.py has a stand-in for the hub",
    "dsno-cluster fetch-teacher google/ddpm-cifar10-32": "needs the internet; test_fetch_teacher.py has a stand-in for the hub",
    "python benchmarks/teachers.py --edm DIR ...": "needs checkouts of the original code",
    "module load": "what a cluster may have; ours has none",
    "module load slurm": "what a cluster may have; ours has none",
    "aws sts get-caller-identity": "the AWS command line, which the package does not need; there is no AWS here",
}

# For the stages of the experiment that the documents' commands become: as TINY, and small for train-teacher too.
SMALL = [
    *TINY,
    "teacher_training.steps=3",
    "teacher_training.warmup=1",
    "teacher_training.checkpoint_every=3",
    "training.threads=1",  # two threads crawl beside another process
]
SMALL_FINISH = [
    "finish.steps=2",
    "finish.batch_size=16",
    "finish.checkpoint_every=2",
    "finish.distribution.heldout_samples=40",
    "finish.distribution.frechet_population=64",
]
TAKES_A_CONFIG = ("gen-trajectories", "train", "eval", "run", "plan", "demo", "train-teacher", "report")
MAY_TAKE_A_CONFIG = ("verify", "inspect", "sample", "export")
PUBLISHED = DATA / "published"


@dataclass(frozen=True)
class Block:
    """A code block: its page, line, language ("" for an indented one) and text."""

    page: Path
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command line as it stands in a page, without its comment."""

    page: Path
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def blocks(page: Path) -> list[Block]:
    """Fenced code blocks, and those that are indented by four spaces after an empty line."""
    found, lines = [], page.read_text().splitlines()
    at = 0
    while at < len(lines):
        begin = at
        if fence := re.match(r"```(\w*)$", lines[at]):
            at = lines.index("```", at + 1)
            found.append(Block(page, begin + 2, fence[1], "\n".join(lines[begin + 1 : at]) + "\n"))
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            found.append(Block(page, begin + 1, "", "\n".join(line[4:] for line in lines[begin:at]) + "\n"))
            continue
        at += 1
    return found


def prose(page: Path) -> str:
    """The page with the lines of its code blocks emptied, so that line numbers stay."""
    lines = page.read_text().splitlines()
    for block in blocks(page):
        fence = 1 if block.language or lines[block.line - 2] == "```" else 0
        first, last = block.line - 1 - fence, block.line - 1 + block.text.count("\n") + fence
        lines[first:last] = [""] * (min(last, len(lines)) - first)
    return "\n".join(lines)


def commands() -> list[Command]:
    """Every command of every page: lines of blocks, and inline code, that begin with one of TOOLS and a word more."""
    return [command for page in PAGES if page.exists() for command in _commands(page)]


def _commands(page: Path) -> Iterator[Command]:
    begins = re.compile(rf"(?:{'|'.join(TOOLS)})\s+\S")
    for block in blocks(page):
        if block.language in ("python", "yaml"):
            continue
        for offset, line in enumerate(block.text.splitlines()):
            for part in re.split(r";\s+", re.sub(r"\s#\s.*", "", line)):
                if begins.match(part.strip()):
                    yield Command(page, block.line + offset, part.strip())
    text = prose(page)
    for found in re.finditer(r"`([^`]+)`", text):
        if begins.match(found[1]):
            yield Command(page, text.count("\n", 0, found.start()) + 1, " ".join(found[1].split()))


def on_cluster(command: Command) -> bool:
    """Whether the test cluster executes the command: what submits to Slurm, or needs S3."""
    words = command.words
    if words[0] != "dsno-cluster" or words[1] == "plan":
        return False
    several = any(word in ("--nodes", "--wait", "--array") for word in words)
    return several or words[1] in ("status", "logs", "cancel") or any("s3://" in word for word in words)


def as_run(command: Command, names: dict[str, str], more: Sequence[str] = ()) -> list[str]:
    """The words after `dsno-cluster` with placeholders replaced and the experiment made tiny.

    `names` has the value of each placeholder; `more` are further overrides. The paper's experiments become the digits'.
    """
    name, *rest = command.words[1:]
    words = [name]
    for word in rest:
        for placeholder, value in names.items():
            word = re.sub(rf"\b{placeholder}\b", lambda _, value=value: value, word)  # type: ignore[misc]
        words.append(re.sub(r"^configs/\S+\.yaml$", "configs/digits.yaml", word))
    of_config = name in TAKES_A_CONFIG or (
        name in MAY_TAKE_A_CONFIG and any(word.endswith(".yaml") for word in words)
    )
    if of_config and "--help" not in words:
        words += more
        words = [word for word in words if not word.startswith("training.steps=")]  # as few as those of SMALL
        own = {word.partition("=")[0] for word in words}
        small = [*SMALL, *(SMALL_FINISH if "finish.enabled=true" in words else [])]
        words += [word for word in small if word.partition("=")[0] not in own]
    return words
