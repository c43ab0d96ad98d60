"""Configs load, and every mistake in one is a line that names it and the nearest right one."""

from __future__ import annotations

import pwd
import re
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
    assert _loaded(key, "./~it") == str(tmp_path / "~it")
    monkeypatch.setenv("EMPTY", "")
    for value, problem in (
        ("$NO_SUCH/it", "names a variable that is not set here: $NO_SUCH"),
        ("${EMPTY}/it", "names a variable that is empty here: $EMPTY"),
        ("s3://$NO_SUCH/it", "names a variable that is not set here: $NO_SUCH"),
        ("${SCRATCH:-/tmp}/it", "only $NAME and ${NAME} are expanded, not ${SCRATCH:-/tmp}/it"),
        ("$(pwd)/it", "only $NAME and ${NAME} are expanded, not $(pwd)/it"),
    ):
        assert _refusal(key, value) == f"{key}: {value}{':' * problem.startswith('only')} {problem}"


def _refusal(key: str, value: str) -> str:
    with pytest.raises(UserError) as caught:
        _loaded(key, value)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{DIGITS}: ")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("s3:/bucket/it", "s3:/bucket/it: did you mean s3://bucket/it?"),
        ("S3:bucket/it", "S3:bucket/it: did you mean s3://bucket/it?"),
        ("s3a://bucket/it", "s3a://bucket/it: did you mean s3://bucket/it?"),
        ("file:/data", "file:/data: write a folder as its path, /data"),
        ("file:///data", "file:///data: write a folder as its path, /data"),
        ("gs://bucket/it", "gs://bucket/it: storage is a folder or s3://bucket/prefix"),
        ("hdfs:/it", "hdfs:/it: storage is a folder or s3://bucket/prefix"),
        ("http://host:9000/it", "http://host:9000/it: storage is a folder or s3://bucket/prefix; the URL of an S3 server"),
        ("~nobody_like_that/it", "~nobody_like_that is no folder here, as there is no user nobody_like_that"),
    ],
)  # fmt: skip
def test_no_folder_is_named_after_a_scheme_or_a_user(
    value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for key in PATHS:
        assert f"{key}: " in (refusal := _refusal(key, value)) and says in refusal
    # the same on the command line
    for words in (["verify", value], ["sample", value]):
        told = answer(*words, cwd=tmp_path)
        assert told.returncode == 2 and told.stderr.startswith(f"dsno-cluster: {value}: "), told.stderr
        assert len(told.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry in the users' list, as in a container or under cron."""

    def unknown(number: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("nobody")
def test_without_a_home_folder_only_what_needs_it_is_refused(tmp_path: Path) -> None:
    for key in PATHS:
        assert (
            _refusal(key, "~/it")
            == f"{key}: ~/it: ~ is no folder here, as HOME is not set; write the path out"
        )
    for words in (["verify", "~/it"], ["sample", "~"]):
        told = answer(*words, cwd=tmp_path)
        assert told.returncode == 2 and "~ is no folder here, as HOME is not set" in told.stderr, told.stderr
    assert answer("plan", cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", PATHS)
def test_a_path_that_is_too_long_is_one_line(key: str) -> None:
    assert _refusal(key, f"x/{'n' * 256}/y") == (
        f"{key}: nnnnnnnnnnnnnnnnnnnn...: a name of 256 bytes; a folder or file can have 255"
    )
    assert (
        _refusal(key, "/abcdefghi" * 430)
        == f"{key}: /abcdefghi/abcdefghi...: a path of 4300 bytes; the limit is 3500"
    )


@pytest.mark.parametrize("long", ["n" * 300, "abcdefghi/" * 430])
def test_no_word_of_a_command_line_is_too_long(long: str, tmp_path: Path) -> None:
    words = (
        ["plan", f"{long}.yaml"],
        ["verify", long],
        ["inspect", long],
        ["sample", long],
        ["status", long],
    )
    for line in (
        *words,
        ["plan", f"name={long}"],
        ["report", long],
        ["import-weights", long, "--config", "x", "--out", "y"],
    ):
        told = answer(*line, cwd=tmp_path)
        assert told.returncode in (1, 2), told.stderr
        assert len(told.stderr.splitlines()) == 1 and "Traceback" not in told.stderr


@pytest.mark.parametrize("key", PATHS)
def test_an_s3_address_may_be_written_in_capitals_and_with_variables(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "lab")
    for value, address in (("S3://lab/it", "s3://lab/it"), ("s3://${BUCKET}/it", "s3://lab/it")):
        if key in ("storage.root", "teacher.path", "evaluation.reference"):
            assert _loaded(key, value) == address
        elif "$" not in value or key != "reader.cache_dir":
            assert _refusal(key, value) == f"{key}: {address}: must be a path on a disk"


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("storage.root", "s3://bucket/x"),
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
        ("lr=1", "unknown key lr; did you mean teacher_training.lr or training.lr or finish.lr?"),
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


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.lr=1e-4", 1e-4),
        ("training.lr=.5", 0.5),
        ("training.lr=1.e-3", 1e-3),
        ("training.lr=1", 1.0),
        ("seed=0123", 123),
        ("seed=0o17", 15),
        ("seed=0xff", 255),
        ("seed=1_000", 1000),
        ("training.steps=1e6", 1_000_000),
        ("training.compile=yes", True),
        ("training.compile=Off", False),
        ("name=007", "007"),
        ("name=1e5", "1e5"),
        ("name=2024", "2024"),
        ("name=2026-01-01", "2026-01-01"),
        ("name=no", "no"),
        ("name=0x1F", "0x1F"),
        ("name='1'", "1"),
        ("teacher.options={a: 1e-4, b: 07, c: yes, d: 1.0, 1: null}", {"a": 1e-4, "b": 7, "c": True, "d": 1.0, "1": None}),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2_and_text_is_text(override: str, value: object, tmp_path: Path) -> None:
    """On the command line, in a file, and in the file that a run keeps."""
    *groups, last = override.partition("=")[0].split(".")
    config = load_config(DIGITS, [override])
    (tmp_path / "digits.yaml").write_text(dump_config(config))
    (tmp_path / "own.yaml").write_text(
        Path(DIGITS)
        .read_text()
        .replace("seed: 0", override.replace("=", ": ", 1) if not groups else "seed: 0")
    )
    again = load_config(str(tmp_path / "own.yaml"), [override] if groups else [])
    for found in (config, load_config(str(tmp_path / "digits.yaml")), again):
        for group in groups:
            found = getattr(found, group)
        loaded = getattr(found, last)
        assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=16:00", 'seed: input should be a valid integer, found "16:00"'),
        ("seed=0b11", 'seed: input should be a valid integer, found "0b11"'),
        ("training.compile=y", 'training.compile: input should be a valid boolean, found "y"'),
        ("training.lr=.inf", "training.lr: input should be a finite number"),
        ("name=null", "name: input should be a valid string, found null"),
        ("name=a b", "'a b' cannot name folders"),
        ("teacher.options=!!python/name:os.system x", "the tag tag:yaml.org,2002:python/name:os.system is not known here"),
        ("teacher.options=&a {b: *a}", "not YAML: an anchor that contains itself on line 1"),
        ("teacher.options={<<: 3}", "not YAML: << takes a mapping, or a list of mappings on line 1"),
        ("teacher.options={[1]: 3}", "not YAML: a key is not plain text on line 1"),
        ("training.batch-size=4", "unknown key training.batch-size; did you mean training.batch_size?"),
        ("training.BATCH_SIZE=4", "unknown key training.BATCH_SIZE; did you mean training.batch_size?"),
        ("training.batchSize=4", "unknown key training.batchSize; did you mean training.batch_size?"),
        ("num-samples=4", "unknown key num-samples; did you mean trajectories.num_samples or evaluation.num_samples?"),
    ],
)  # fmt: skip
def test_what_yaml_1_2_does_not_know_is_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(DIGITS, [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def _written(folder: Path, *changes: tuple[str, str]) -> str:
    """The path of a copy of the shipped config with changes of its text."""
    text = Path(DIGITS).read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after, 1)
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def test_a_key_is_misspelt_before_another_is_missing(tmp_path: Path) -> None:
    for right, wrong in (
        ("  batch_size: 48", "  batch-size: 48"),
        ("training:\n  steps: 34", "Training:\n  steps: 34"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(_written(tmp_path, (right, wrong)))
        key = wrong.strip().partition(":")[0]
        assert f"unknown key {'training.' * (key != 'Training')}{key}; did you mean training" in str(
            caught.value
        )


def test_sections_may_share_keys_with_anchors_and_merges(tmp_path: Path) -> None:
    shared = ("seed: 0\n", "seed: 0\nx-shared: &shared {batch_size: 128, lr: 0.25, warmup: 7}\n")
    teacher = ("  batch_size: 128\n  lr: 1e-3\n", "  <<: *shared\n  lr: 0.5\n")
    student = (
        "  batch_size: 48\n  lr: 1e-3\n  warmup: 50\n",
        "  <<: [{lr: 2.0}, *shared]\n  batch_size: 32\n",
    )
    config = load_config(_written(tmp_path, shared, teacher, student), ["training.steps=9"])
    assert (config.teacher_training.batch_size, config.teacher_training.lr) == (128, 0.5)
    assert (config.training.batch_size, config.training.lr, config.training.warmup) == (32, 2.0, 7)
    # the anchor of a section that is used; an override changes only the section that it names
    text = Path(DIGITS).read_text()
    for section, value in (
        ("teacher_training", "&both {steps: 5, batch_size: 16, lr: 0.1}"),
        ("training", "*both"),
    ):
        text = re.sub(rf"^{section}:\n(  .*\n)+", f"{section}: {value}\n", text, flags=re.MULTILINE)
    (tmp_path / "both.yaml").write_text(text)
    config = load_config(str(tmp_path / "both.yaml"), ["training.steps=9"])
    assert (config.training.steps, config.teacher_training.steps) == (9, 5)
    twice = tmp_path / "twice.yaml"
    for text in ("seed: 1\nseed: 2\n", "x-a: &a {b: 1}\nc: {<<: *a, d: 1, d: 2}\n", "1: 1\n'1': 2\n"):
        twice.write_text(text)
        with pytest.raises(UserError, match=r"twice\.yaml: not YAML: key '[a-z1]+' appears twice on line 2$"):
            load_config(str(twice))


def test_a_config_with_spaces_in_its_name(tmp_path: Path) -> None:
    text = Path(DIGITS).read_text()
    (tmp_path / "my  digits run.yaml").write_text(text)
    assert load_config(str(tmp_path / "my  digits run.yaml")).name == "my-digits-run"
    (tmp_path / "größer (2).yaml").write_text(text)
    with pytest.raises(UserError, match=r"'größer-\(2\)' cannot name folders.*try name=gr-er-2$"):
        load_config(str(tmp_path / "größer (2).yaml"))


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
        (
            ["plan", "training.batch-size=4"],
            "unknown key training.batch-size; did you mean training.batch_size?",
        ),
        (["plan", "--training.lr=1e-4"], "is set without hyphens before it: training.lr=1e-4"),
        (["plan", "configs/digit"], "configs/digit: no such file; did you mean configs/digits.yaml?"),
        (["plan", "training.lr"], "training.lr: no such file"),
        (["sample", "x", "--shards", "y", "--out", "z.png"], "--out and --shards: a file or shards"),
    ],
)
def test_what_newcomers_type_is_answered_with_what_is_right(words: list[str], says: str) -> None:
    told = answer(*words, cwd=Path(DIGITS).resolve().parents[1])
    assert told.returncode == 2 and says in told.stderr, told.stderr
    assert len(told.stderr.splitlines()) == 1
