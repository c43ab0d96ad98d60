"""Configs load, and every mistake in one is a line that names it and the nearest right one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import answer, dsno

from dsno_cluster.config import Config, Profile, dump_config, load_config, load_profile, validate
from dsno_cluster.errors import UserError

DIGITS = "configs/digits.yaml"


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenet64"])
def test_shipped_configs_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(f"configs/{name}.yaml")
    assert config.name == name
    assert validate(Config, yaml.safe_load(dump_config(config)), "again") == config


PATHS = (
    "storage.root",
    "run.dir",
    "reader.cache_dir",
    "teacher.path",
    "evaluation.reference",
    "evaluation.weights_path",
    "evaluation.precision_recall_weights_path",
    "training.lpips_weights",
)


def _loaded(key: str, value: str) -> str:
    extractor = "evaluation.precision_recall_extractor=vgg16"
    config = load_config(DIGITS, [extractor, f"{key}={value}"])
    group, name = key.split(".")
    return str(getattr(getattr(config, group), name))


@pytest.mark.parametrize("key", PATHS)
def test_every_path_is_expanded_and_absolute(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert _loaded(key, "sub/it") == str(tmp_path / "sub/it")
    assert _loaded(key, "~/it") == "/home/me/it"
    if key == "reader.cache_dir":  # its variables are those of the node that uses it
        assert _loaded(key, "$NODE/it") == "$NODE/it"
        return
    assert _loaded(key, "$SCRATCH/it") == _loaded(key, "${SCRATCH}/it") == "/scratch/me/it"
    with pytest.raises(UserError) as caught:
        _loaded(key, "$NO_SUCH/it")
    says = f"{DIGITS}: {key}: $NO_SUCH/it names a variable that is not set here: $NO_SUCH"
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("storage.root", "s3://bucket/$x"),
        ("teacher.path", "s3://bucket/teacher"),
        ("teacher.path", "package:digits-teacher"),
        ("teacher.path", "my.module:function"),
        ("teacher.path", "closed-form:mixture"),
        ("evaluation.weights_path", "package:digits-features"),
        ("evaluation.reference", "s3://bucket/samples"),
        ("evaluation.reference", "data"),
        ("evaluation.reference", "held-out"),
    ],
)
def test_what_is_no_path_stays_as_it_is(key: str, address: str) -> None:
    assert _loaded(key, address) == address


def test_defaults_are_absolute_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left_out = load_config(DIGITS, ["storage={}"])
    assert left_out.storage.root == str(left_out.run_dir) == str(tmp_path / "runs")
    assert load_config(DIGITS, ["storage.root=s3://bucket/x"]).run_dir == tmp_path / "runs/digits"


def test_paper_settings() -> None:
    cifar, imagenet = load_config("configs/cifar10.yaml"), load_config("configs/imagenet64.yaml")
    assert (cifar.network.width, imagenet.network.width) == (256, 192)
    assert cifar.trajectories.time_points == (0.5625, 0.25, 0.0625, 0.0)
    assert imagenet.trajectories.time_points == (0.75, 0.5, 0.25, 0.0)
    assert (cifar.trajectories.steps, imagenet.trajectories.steps) == (512, 16)
    assert (cifar.training.batch_size, imagenet.training.batch_size) == (256, 2048)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.lrr=1", "unknown key training.lrr; did you mean training.lr?"),
        ("trainig.lr=1", "unknown key trainig; did you mean training?"),
        ("lr=1", "unknown key lr; did you mean teacher_training.lr or training.lr?"),
        ("training.lr=fast", 'training.lr: input should be a valid number, found "fast"'),
        ("training.steps=1.5", "training.steps: input should be a valid integer"),
        ("training.steps=true", "training.steps: input should be a valid integer"),
        ("student.modes=5", "student.modes 5 is above 4 = M"),
        ("trajectories.solver=dim", "trajectories.solver: input should be 'ddim'"),
        ("trajectories.times=[0.5, 0.7]", "times must descend"),
        (
            "trajectories.times={points: 4, spacing: cubic}",
            "trajectories.times.spacing: input should be 'quadratic'",
        ),
        ("trajectories.times={spacing: uniform, point: 4}", "point"),
        ("trajectories.num_samples=1000", "not a multiple of"),
        ("evaluation.seed=0", "training noise"),
        ("network.width=33", "multiple of 32"),
        ("evaluation.metrics=[]", "evaluation.metrics"),
        ("network.width=null", "network.width left out: student.backbone=unet"),
        ("training.loss=lpips", "lpips_weights"),
        ("seed=[", "not YAML"),
        ("training=3", "training: input should be an object"),
        ("teacher.options={a: {b: 1}}", 'teacher.options.a: input should be a valid boolean, found {"b": 1}'),
        ("trajectories.times=[0.5, x]", 'trajectories.times.1: input should be a valid number, found "x"'),
        ("trajectories.times={spacing: uniform}", "key trajectories.times.points is missing"),
    ],
)
def test_a_mistake_is_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(DIGITS, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_numbers_and_repeated_keys(tmp_path: Path) -> None:
    assert load_config(DIGITS, ["training.lr=1e-4"]).training.lr == 1e-4
    twice = tmp_path / "twice.yaml"
    twice.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(UserError, match=r"twice\.yaml: not YAML: key 'seed' appears twice on line 2$"):
        load_config(str(twice))


def test_the_working_directory_wins_over_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(DIGITS).read_text() if Path(DIGITS).is_file() else None
    assert text is not None, "the tests run from the repository's top"
    monkeypatch.chdir(tmp_path)
    assert load_config(DIGITS).seed == 0  # the copy that travels
    (tmp_path / "configs").mkdir()
    (tmp_path / DIGITS).write_text(text.replace("seed: 0", "seed: 5", 1))
    assert load_config(DIGITS).seed == 5


def test_profiles() -> None:
    for stage in ("gen-trajectories", "train", "eval"):
        assert load_profile(stage, {"nodes": 4, "tasks_per_node": None}).nodes == 4
    with pytest.raises(UserError, match=r"unknown key node; did you mean nodes\?"):
        validate(Profile, {"node": 1, "mem_gb": 1, "time_minutes": 1}, "jobs/x.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["gen"],
        ["train", "configs/digit.yaml"],
        ["train", "training.lrr=1"],
        ["train", "--node", "2"],
        ["train", "--nodes", "0"],
        ["train", "--nodes", "4", "--launcher", "local"],
        ["train", "--tasks-per-node", "3"],
        ["train", "storage.root=ftp://x"],
        ["gen-trajectories", "teacher.path=nowhere"],
        ["gen-trajectories", "teacher.path=package:nothing"],
        ["eval", "configs/cifar10.yaml"],
        ["eval", "a.yaml", "b.yaml"],
        ["sample"],
        ["sample", "nowhere"],
        ["sample", "nowhere", "--out", "x.jpg"],
        ["verify", "nowhere"],
        ["train", "--launcher", "slurm"],
    ],
)
def test_wrong_input_is_one_line_and_status_2(words: list[str], tmp_path: Path) -> None:
    result = answer(*words, cwd=tmp_path, PATH="/nonexistent")  # without sbatch, wherever the tests run
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("dsno-cluster: "), result.stderr
    assert result.stdout == ""


def test_the_process_exits_with_the_status(tmp_path: Path) -> None:
    wrong = dsno("train", "training.lrr=1", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert (
        wrong.stderr
        == "dsno-cluster: configs/digits.yaml: unknown key training.lrr; did you mean training.lr?\n"
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["verify", "DATA", "--json"], ["inspect", "DATA"]]
)
def test_a_reader_that_has_enough_is_no_error(words: list[str], tiny_data: Path) -> None:
    """As `dsno-cluster --help | head -1`."""
    (data,) = tiny_data.glob("trajectories/*")
    named = [str(data) if word == "DATA" else word for word in words]
    command = [sys.executable, "-m", "dsno_cluster.cli", *named]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as helping:
        assert helping.stdout and helping.stderr
        helping.stdout.close()
        said = helping.stderr.read()
    assert "Traceback" not in said and "BrokenPipe" not in said, said
    assert helping.returncode == 0


def test_help_names_every_command_and_its_options(tmp_path: Path) -> None:
    overview = answer("--help", cwd=tmp_path)
    assert overview.returncode == 0
    for command in ("gen-trajectories", "train", "eval", "sample", "verify", "train-teacher", "demo"):
        assert command in overview.stdout
        assert "example:" in answer(command, "--help", cwd=tmp_path).stdout


HEAVY = {
    "torch",
    "torchvision",
    "numpy",
    "ray",
    "deepspeed",
    "submitit",
    "boto3",
    "diffusers",
    "sklearn",
    "PIL",
}


def test_help_imports_no_heavy_library() -> None:
    """So it answers at once, on a shared file system too."""
    code = """
import sys
from dsno_cluster.cli import COMMANDS, main
for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
    assert main(words) == 0
    print(*words, "|", *sys.modules, file=sys.stderr)
"""
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = dict(line.split(" | ") for line in helped.stderr.splitlines())
    assert len(imported) > 10
    assert {w: found for w, modules in imported.items() if (found := HEAVY & set(modules.split()))} == {}


def test_dry_runs_start_nothing(tmp_path: Path, tiny_data: Path) -> None:
    from tiny import TINY

    before = sorted(tiny_data.rglob("*"))
    for command in ("gen-trajectories", "train", "train-teacher", "demo"):
        result = answer(command, *TINY, f"storage.root={tiny_data}", "--dry-run", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
    assert sorted(tiny_data.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "trajectories.times=[0.5,", "0.0]"], "within quotes: 'a.b=[1, 2]'"),
        (["plan", "digits.yaml"], "did you mean configs/digits.yaml?"),
        (["plan", "--probes", "4"], "--probes: used only with --measure or --tolerance E"),
        (["sample", "x", "--shards", "y", "--out", "z.png"], "--out and --shards: a file or shards"),
    ],
)
def test_what_newcomers_type_is_answered_with_what_is_right(words: list[str], says: str) -> None:
    told = answer(*words, cwd=Path(DIGITS).resolve().parents[1])
    assert told.returncode == 2 and says in told.stderr, told.stderr
    assert len(told.stderr.splitlines()) == 1
