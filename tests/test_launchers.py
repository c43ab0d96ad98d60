"""Where things run: the choice of a launcher, and the script for Slurm."""

from __future__ import annotations

import functools
import inspect
import json
import os
import pickle
import re
import sys
from pathlib import Path

import cloudpickle
import pytest
import submitit
import submitit.local.local
from tiny import DATA, TINY, answer, dsno

from dsno_cluster.cluster.launchers import SLURM
from dsno_cluster.cluster.launchers.slurm import check_room, check_tasks
from dsno_cluster.cluster.runs import all_runs
from dsno_cluster.cluster.stage import SharedOptions, StageOptions, Submission
from dsno_cluster.cluster.submitit_internals import controller_variables, start_on_this_machine
from dsno_cluster.cluster.task import StageTask
from dsno_cluster.config import (
    Config,
    Profile,
    dump_profile,
    load_config,
    load_profile,
    load_resolved_profile,
)
from dsno_cluster.errors import UserError
from dsno_cluster.stages import EVAL, GEN_TRAJECTORIES, STAGES, TRAIN, EvaluationOptions


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder with an sbatch and a controller that says what the file `ping` says (the real ones are for the cluster tests)."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("sbatch", "srun"):
        (bin_folder / name).write_text("#!/bin/sh\nexit 1\n")
    (bin_folder / "sinfo").write_text("#!/bin/sh\necho 'main*|4|8|16000|1-00:00:00|(null)'\n")
    (bin_folder / "scontrol").write_text(f"#!/bin/sh\ncat {tmp_path}/ping\n")
    for tool in bin_folder.iterdir():
        tool.chmod(0o755)
    (tmp_path / "ping").write_text("Slurmctld(primary) at login is UP\n")
    return bin_folder


def test_auto_is_slurm_where_its_controller_answers(slurm: Path, tmp_path: Path) -> None:
    words = ["gen-trajectories", *TINY, "--dry-run"]
    path = f"{slurm}:/usr/bin:/bin"
    script = dsno(*words, cwd=tmp_path, PATH=path)
    assert script.returncode == 0 and "#SBATCH --nodes=1" in script.stdout, script.stderr
    told = dsno("eval", *TINY, "--dry-run", "--json", cwd=tmp_path, PATH=path)  # there is no student yet
    assert told.returncode == 2 and "#SBATCH --nodes=1" in json.loads(told.stdout)["dry_run"]["eval"]
    # training that makes its trajectories itself has no stage before it
    itself = ["training.online=true", "reader.shuffle=none"]
    online = answer("run", *TINY, *itself, "--dry-run", cwd=tmp_path, PATH=path)
    assert online.returncode == 0, online.stderr
    assert re.findall("^# (.*)$", online.stdout, re.M)[0] == "train" and "# gen-traj" not in online.stdout
    large = dsno(*words, "--nodes", "16", cwd=tmp_path, PATH=path)  # the script, and what is wrong with it
    assert large.returncode == 2 and "partition main has 4 node(s)" in large.stderr
    assert "#SBATCH --nodes=16" in large.stdout
    nowhere = dsno(*words, "teacher.path=nowhere", cwd=tmp_path, PATH=path)  # the script, and what is missing
    assert nowhere.returncode == 2 and "nowhere" in nowhere.stderr
    assert "#SBATCH --nodes=1" in nowhere.stdout
    (tmp_path / "ping").write_text("Slurmctld(primary) at login is DOWN\n")
    local = dsno(*words, cwd=tmp_path, PATH=path)
    assert local.returncode == 0 and "would make" in local.stdout
    assert "controller is down" in local.stderr
    asked = dsno(*words, "--launcher", "slurm", cwd=tmp_path, PATH=path)
    assert asked.returncode == 1 and "controller is down" in asked.stderr
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/gen-trajectories.yaml").write_text("nodes: 4\nmem_gb: 1\ntime_minutes: 10\n")
    large = dsno(*words, cwd=tmp_path, PATH=path)  # four nodes' work is not a login node's
    assert large.returncode == 1 and "the profile asks for 4 nodes" in large.stderr
    laptop = dsno(*words, cwd=tmp_path, PATH=str(tmp_path / "no Slurm"))
    assert laptop.returncode == 0 and "would make" in laptop.stdout, laptop.stderr


def test_a_ray_cluster_that_is_given_is_used_from_here(slurm: Path, tmp_path: Path) -> None:
    words = ["gen-trajectories", *TINY, "--dry-run"]
    path = f"{slurm}:/usr/bin:/bin"
    for option, env in ((["--ray-address", "10.0.0.1:6379"], {}), ([], {"RAY_ADDRESS": "10.0.0.1:6379"})):
        auto = dsno(*words, *option, cwd=tmp_path, PATH=path, **env)
        assert auto.returncode == 0 and "would make" in auto.stdout, auto.stderr
        assert "10.0.0.1:6379" in auto.stderr
        asked = dsno(*words, *option, "--launcher", "slurm", cwd=tmp_path, PATH=path, **env)
        assert asked.returncode == 2 and "10.0.0.1:6379" in asked.stderr, asked.stderr
        assert len(asked.stderr.splitlines()) == 1
    own = dsno(*words, "--ray-address", "local", cwd=tmp_path, PATH=path, RAY_ADDRESS="10.0.0.1:6379")
    assert own.returncode == 0 and "#SBATCH" in own.stdout, own.stderr


def test_an_array_is_for_slurm_and_has_a_node_for_each_task(slurm: Path, tmp_path: Path) -> None:
    words = ["gen-trajectories", *TINY, "--array", "8", f"storage.root={tmp_path}/out"]
    path = f"{slurm}:/usr/bin:/bin"
    shown = answer(*words, "--dry-run", cwd=tmp_path, PATH=path)
    assert shown.returncode == 0 and "#SBATCH --array=0-7%8" in shown.stdout, shown.stderr
    (tmp_path / "jobs").mkdir()
    profile = "nodes: 4\nmem_gb: 1\ntime_minutes: 10\n"
    for more, refused in (
        ("", ""),  # the profile's number of nodes is for a single job
        ("chain: 2\n", "--array 8: not with chain 2 of jobs/gen-trajectories.yaml"),
    ):
        (tmp_path / "jobs/gen-trajectories.yaml").write_text(profile + more)
        shown = answer(*words, "--dry-run", cwd=tmp_path, PATH=path)
        assert "#SBATCH --nodes=1\n" in shown.stdout and refused in shown.stderr
        assert shown.returncode == (2 if refused else 0), shown.stderr
    for option, refused in (
        (["--nodes", "2"], "--nodes 2 with --array 8: each task of an array has one node"),
        (["--launcher", "local"], "--array 8: an array is for Slurm"),
    ):
        said = answer(*words, *option, cwd=tmp_path, PATH=path)
        assert said.returncode == 2 and refused in said.stderr, said.stderr
        assert len(said.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_silent_controller_is_not_waited_for(slurm: Path, tmp_path: Path) -> None:
    (slurm / "scontrol").write_text("#!/bin/sh\nexec sleep 60\n")
    local = dsno(
        "gen-trajectories", *TINY, "--dry-run", cwd=tmp_path, PATH=f"{slurm}:/usr/bin:/bin", timeout=30
    )
    assert local.returncode == 0 and "did not answer within 2 s" in local.stderr


PROFILES = {
    "gen-trajectories": "nodes: 16\ngpus_per_node: 8\ncpus_per_task: 64\nmem_gb: 400\ntime_minutes: 1440\npartition: gpu\n",
    "train": (
        "nodes: 2\ntasks_per_node: 4\ngpus_per_node: 4\ncpus_per_task: 8\nmem_gb: 100\ntime_minutes: 90\npartition: gpu\n"
        "account: me\nqos: high\nconstraint: a100&nvlink\ninterface: ib0\nsave_seconds: 300\n"
        "setup: [module load cuda, source ~/env.sh]\nenvironment: {NCCL_DEBUG: WARN, NOTE: it's quoted}\n"
        "sbatch: {exclusive: true, mail-type: FAIL}\n"
    ),
    "eval": "mem_gb: 8\ntime_minutes: 60\n",
    "gen-trajectories-pyxis": (
        "nodes: 2\ngpus_per_node: 8\ncpus_per_task: 64\nmem_gb: 400\ntime_minutes: 1440\n"
        "container: {runtime: pyxis, image: registry.example.org#team/dsno:1, mounts: [/data/images, '/cache:/root/.cache:ro'],\n"
        "  options: [--no-container-mount-home]}\n"
    ),
    "train-apptainer": (
        "nodes: 2\ntasks_per_node: 4\ngpus_per_node: 4\nmem_gb: 100\ntime_minutes: 90\n"
        "container: {runtime: apptainer, image: ./my images/dsno.sif, mounts: [/data], python: /opt/venv/bin/python}\n"
    ),
    "eval-singularity": "mem_gb: 8\ntime_minutes: 60\ncontainer: {runtime: singularity, image: docker://team/dsno}\n",
    "eval-student": "mem_gb: 8\ntime_minutes: 60\ncontainer: {runtime: apptainer, image: docker://team/dsno}\n",
    "eval-samples": "mem_gb: 8\ntime_minutes: 60\ncontainer: {runtime: pyxis, image: team/dsno}\n",
    "train-links": "mem_gb: 8\ntime_minutes: 60\ncontainer: {runtime: pyxis, image: team/dsno}\n",
    "gen-trajectories-array": "gpus_per_node: 8\ncpus_per_task: 64\nmem_gb: 400\ntime_minutes: 1440\n",
    "eval-chain": "mem_gb: 8\ntime_minutes: 60\nchain: 4\n",
}
# the options of those stages that have any; ../scratch is beside the working directory
OPTIONS: dict[str, StageOptions] = {
    "gen-trajectories-array": SharedOptions(array=64),
    "eval-student": EvaluationOptions(student="../scratch/students/digits/best"),
    "eval-samples": EvaluationOptions(samples="../scratch/samples/in64-{000..146}.tar"),
}


def script(name: str, config: Config, profile: Profile, options: StageOptions = StageOptions()) -> str:  # noqa: B008 (frozen)
    (stage,) = (stage for stage in STAGES if stage.name == name)
    return str(SLURM.describe(Submission(stage, config, profile, "dsno-cluster", options)))


@pytest.mark.parametrize("name", PROFILES)
def test_the_script_is_that_of_the_golden_file(
    name: str, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole text that sbatch gets. After a change that is meant: put what this test found into tests/data/sbatch/."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    (home / "jobs").mkdir(parents=True)
    (scratch / "students/digits/step-000000300").mkdir(parents=True)
    (scratch / "students/digits/best").write_text("step-000000300")
    (scratch / "samples").mkdir()
    stage = next(stage.name for stage in STAGES if name.startswith(stage.name))
    (home / f"jobs/{stage}.yaml").write_text(PROFILES[name])
    monkeypatch.chdir(home)
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    if name == "gen-trajectories-pyxis":  # somebody whose home is elsewhere
        (scratch / "me").mkdir()
        monkeypatch.setenv("HOME", str(scratch / "me"))
    place = "run.dir=scratch"
    if name == "train-links":
        (scratch / "runs").mkdir()
        (home / "runs").symlink_to(scratch / "runs")
        place = "storage.root=runs"
    config = load_config("configs/digits.yaml", [place])
    text = script(stage, config, load_profile(stage, {}), OPTIONS.get(name, StageOptions()))
    text = text.replace(str(home), "/home/me").replace(str(scratch), "/scratch")
    text = text.replace(sys.executable, "/venv/bin/python")
    assert text == (DATA / f"sbatch/{name}.sh").read_text()
    assert not (home / "scratch").exists()


@pytest.mark.parametrize("pattern", ["in64-{000..146}.tar", "*.tar", "part-[01]/in64.tar", "in64-?.tar"])
def test_a_container_sees_the_files_of_a_pattern(
    pattern: str, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    for folder in ("here", "images"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    config = load_config(
        "configs/digits.yaml", ["data.name=null", f"data.images={tmp_path}/images/{pattern}"]
    )
    profile = load_profile("train", {"container": {"runtime": "apptainer", "image": "docker://team/dsno"}})
    assert f" --bind {tmp_path}/here,{tmp_path}/images --pwd " in script("train", config, profile)


def test_a_container_sees_what_links_lead_to(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))

    def mounted(*words: str) -> list[str]:
        """What is mounted besides the working directory."""
        config = load_config("configs/digits.yaml", list(words))
        profile = load_profile(
            "train", {"container": {"runtime": "apptainer", "image": "docker://team/dsno"}}
        )
        (found,) = re.findall(r" --bind (\S+) --pwd ", script("train", config, profile))
        assert str(tmp_path / "here") in found.split(",")
        places = [Path(place) for place in found.split(",")]
        return [str(p.relative_to(tmp_path)) for p in places if p != tmp_path / "here"]

    # a link to what is reached by another: both places, as the first one names the second
    (tmp_path / "lustre/me/runs").mkdir(parents=True)
    (tmp_path / "disk").symlink_to("lustre")
    Path("runs").symlink_to(tmp_path / "disk/me/runs")
    assert mounted("storage.root=runs/new") == ["disk/me/runs/new", "lustre/me/runs/new"]
    assert mounted("storage.root=runs") == ["disk/me/runs", "lustre/me/runs"]
    Path("runs").unlink()

    # a snapshot in Hugging Face's cache, which may be reached by a link
    blobs, snapshot = tmp_path / "lustre/hub/blobs", tmp_path / "lustre/hub/snapshots/1a2b"
    for folder in (blobs, snapshot / "unet", tmp_path / "models"):
        folder.mkdir(parents=True)
    for name in ("1", "2", "unused"):
        (blobs / name).write_text("")
    (snapshot / "model_index.json").symlink_to("../../blobs/1")
    (snapshot / "unet/config.json").symlink_to("../../../blobs/2")
    (snapshot / "gone.json").symlink_to("../../blobs/gone")
    (snapshot / "python").symlink_to("/usr/bin/env")
    real = ["lustre/hub/blobs/1", "lustre/hub/blobs/2", "lustre/hub/snapshots/1a2b"]
    assert mounted(f"teacher.path={snapshot}") == real
    assert mounted(f"teacher.path={snapshot}/unet") == real  # whose scheduler is beside it
    by_link = [place.replace("lustre", "disk") for place in real]
    assert mounted(f"teacher.path={tmp_path}/disk/hub/snapshots/1a2b") == [*by_link, *real]
    (tmp_path / "models/dit").symlink_to(snapshot)
    assert mounted(f"teacher.path={tmp_path}/models/dit") == [*real, "models"]

    # the folder for downloads
    (tmp_path / "lustre/cache").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.cache").symlink_to("../lustre/cache")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert mounted() == ["home/.cache/dsno-cluster", "lustre/cache/dsno-cluster"]
    (tmp_path / "lustre/cache").rename(tmp_path / "lustre/gone")  # it cannot be made
    assert mounted() == []

    # many links into one folder
    pictures = tmp_path / "lustre/pictures, all"
    pictures.mkdir()
    (tmp_path / "chosen").mkdir()
    for number in range(20):
        (pictures / f"{number}.png").write_text("")
        (tmp_path / f"chosen/{number}.png").symlink_to(pictures / f"{number}.png")
    with pytest.raises(UserError, match=r"lustre/pictures, all: a path with : or ,"):
        mounted("data.name=null", f"data.images={tmp_path}/chosen")


@pytest.fixture
def own_places(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm is that of `slurm`; notes of runs and downloads are kept in the test's folder."""
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_root_that_cannot_be_made_leaves_no_run_folder(own_places: None, tmp_path: Path) -> None:
    """It is made before a job whose container mounts it."""
    (tmp_path / "file").write_text("")
    place = [f"storage.root={tmp_path}/file/root", f"run.dir={tmp_path}/out"]
    config = load_config("configs/digits.yaml", place)
    container = {"runtime": "pyxis", "image": "team/dsno"}
    profile = load_profile("eval", {"container": container, "mem_gb": 1, "time_minutes": 10})
    with pytest.raises(NotADirectoryError):
        SLURM.submit([Submission(EVAL, config, profile, "dsno-cluster eval")])
    assert list((tmp_path / "out/jobs").iterdir()) == all_runs() == []


def test_what_a_container_mounts_is_made_before(
    own_places: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root, and the folder for downloads unless the profile chooses another place for them."""
    monkeypatch.chdir(tmp_path)
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}/root", f"run.dir={tmp_path}/out"])
    changes = {"container": {"runtime": "pyxis", "image": "team/dsno"}, "mem_gb": 1, "time_minutes": 10}
    own = load_profile("eval", {**changes, "environment": {"XDG_CACHE_HOME": "/own"}})
    for profile, made in ((own, ["root"]), (load_profile("eval", changes), ["cache", "root"])):
        with pytest.raises(UserError, match="Slurm refuses"):  # the sbatch here refuses every job
            SLURM.submit([Submission(EVAL, config, profile, "dsno-cluster eval")])
        assert [name for name in ("cache", "root") if (tmp_path / name).is_dir()] == made
        assert ("export XDG_CACHE_HOME=${XDG" in script("eval", config, profile)) == ("cache" in made)
    assert (tmp_path / "cache/dsno-cluster").is_dir()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tasks_per_node": 2}, "tasks_per_node 2 with gpus_per_node 4: training runs one task per GPU"),
        ({"save_seconds": 5400}, "save_seconds 5400: not below the time limit of 90 minutes"),
        ({"environment": {"WANDB_TOKEN": "x"}}, "WANDB_TOKEN looks like a secret"),
        ({"environment": {"A-B": "x"}}, "'A-B' is not the name of a variable"),
        ({"partitoin": "gpu"}, "unknown key partitoin; did you mean partition?"),
        ({"environment": {"DB_PWD": "x"}}, "DB_PWD looks like a secret"),
        ({"setup": ["export AWS_SECRET_ACCESS_KEY=abc"]}, "setup: AWS_SECRET_ACCESS_KEY looks like a secret"),
        ({"sbatch": {"time": "99999"}}, "sbatch: time: is time_minutes of the profile"),
        ({"sbatch": {"output": "x"}}, "sbatch: output: dsno-cluster sets it itself"),
        ({"environment": {"A": None}}, "environment.A: input should be a valid string, found null"),
        ({"time_minutes": "1:00"}, "save_seconds 300: not below the time limit of 1 minutes"),
        (
            {"time_minutes": "12:60:00"},
            "time_minutes: '12:60:00' is not a number of minutes, nor a time as Slurm writes it",
        ),
        ({"time_minutes": "1-24"}, "time_minutes: '1-24' is not a number of minutes"),
        ({"time_minutes": "UNLIMITED"}, "time_minutes: 'UNLIMITED' is not a number of minutes"),
        ({"time_minutes": "0:00"}, "time_minutes: input should be greater than 0"),
        ({"chain": 3, "sbatch": {"requeue": True}}, "chain 3: not with `requeue` in sbatch"),
        (
            {"container": {"runtime": "docker", "image": "x"}},
            "container.runtime: input should be 'pyxis', 'apptainer'",
        ),
        ({"container": {"runtime": "pyxis"}}, "container.image"),
        (
            {"container": {"runtime": "pyxis", "image": "x", "mounts": ["/a:/b:rx"]}},
            "container.mounts.0: '/a:/b:rx' is not PATH, PATH:INSIDE or PATH:INSIDE:ro",
        ),
        (
            {"container": {"runtime": "pyxis", "image": "x", "mounts": ["/a:b"]}},
            "container.mounts.0: '/a:b': 'b' does not begin with /",
        ),
        (
            {"container": {"runtime": "apptainer", "image": "x", "options": ["--home", "/a"]}},
            "container.options: '/a' is not an option, which begins with - and has its value after =",
        ),
        (
            {"container": {"runtime": "apptainer", "image": "x", "options": ["--env=WANDB_API_KEY=hush=="]}},
            "container.options: WANDB_API_KEY looks like a secret",
        ),
        (
            {"container": {"runtime": "apptainer", "image": "x", "options": ["--env", "HF_TOKEN=hush"]}},
            "container.options: HF_TOKEN looks like a secret",
        ),
        ({"chain": 0}, "chain: input should be greater than 0"),
    ],
)
def test_wrong_profiles_are_one_line(
    change: dict[str, object], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/train.yaml").write_text(PROFILES["train"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        check_tasks(TRAIN, load_profile(TRAIN.name, change))
    assert expected in str(told.value) and "\n" not in str(told.value) and "hush" not in str(told.value)


@pytest.mark.parametrize(
    ("written", "minutes"),
    [("90", 90), ("0090", 90), ("30:00", 30), ("30:01", 31), ("90:00", 90), ("12:00:00", 720), ("1-00:00:00", 1440),
     ("1-12", 2160), ("2-12:30", 3630), ("36:00:00", 2160), ("'45'", 45), ("'06:00:30'", 361)],
)  # fmt: skip
def test_a_time_limit_is_in_minutes_or_as_slurm_writes_it(
    written: str, minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/train.yaml").write_text(f"mem_gb: 1\ntime_minutes: {written}\n")
    monkeypatch.chdir(tmp_path)
    assert load_profile("train", {}).time_minutes == minutes


def test_text_in_a_profile_is_taken_as_written(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/train.yaml").write_text(
        "x-all: &all {mem_gb: 1, time_minutes: 60}\n<<: *all\npartition: 1\naccount: 0123\nqos: 1e3\nconstraint: 12_0\n"
        "environment: {OMP_NUM_THREADS: 1, ON: yes, RATE: 1e5, NO: 08}\n"
        "sbatch: {begin: 16:00, deadline: 2026-12-01, wckey: 007, nice: 10, exclusive: yes, overcommit: off}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    profile = load_profile("train", {})
    assert (profile.partition, profile.account, profile.qos, profile.constraint) == (
        "1",
        "0123",
        "1e3",
        "12_0",
    )
    assert profile.environment == {"OMP_NUM_THREADS": "1", "ON": "yes", "RATE": "1e5", "NO": "08"}
    (tmp_path / "again.yaml").write_text(dump_profile(profile))
    assert load_resolved_profile(tmp_path / "again.yaml") == profile
    lines = script("train", load_config("configs/digits.yaml", []), profile).splitlines()
    options = ["begin=16:00", "deadline=2026-12-01", "wckey=007", "nice=10", "exclusive", "account=0123"]
    assert {f"#SBATCH --{option}" for option in options} <= set(lines)
    assert not [line for line in lines if "overcommit" in line]


def test_secrets_that_a_command_gives_do_not_stand_in_the_script() -> None:
    setup = [
        "export WANDB_API_KEY=$(cat ~/.wandb)",
        'export HF_TOKEN="$MINE"',
        "TOKENIZERS_PARALLELISM=false",
    ]
    assert load_profile("train", {"setup": setup}).setup == tuple(setup)


@pytest.mark.parametrize(
    ("words", "chain"),
    [({"no-requeue": True}, 1), ({"requeue": False}, 1), ({}, 2), ({"no-requeue": True}, 2)],
)
def test_a_site_without_requeue_has_its_way(
    words: dict[str, bool], chain: int, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    options = {**words, "exclusive": True, "overcommit": False}
    profile = load_profile("train", {"sbatch": options, "chain": chain})
    lines = script("train", load_config("configs/digits.yaml", []), profile).splitlines()
    asked = [line for line in lines if re.match("#SBATCH.*(requeue|exclusive|overcommit)", line)]
    assert sorted(asked) == ["#SBATCH --exclusive", "#SBATCH --no-requeue"]


@pytest.mark.parametrize(
    ("gpus", "share", "cpus", "refused"),
    [(0, 1, 1, "cpus_per_task 1 of a node: it has one actor at least, of trajectories.threads=2 CPUs"), (0, 1, 2, None),
     (8, 1, 8, "its 8 GPUs have an actor each, of trajectories.threads=2 CPUs; raise cpus_per_task to 16"), (8, 1, 16, None),
     (8, 0.25, 16, "its 8 GPUs have 32 actors (gpus_per_actor 0.25), of trajectories.threads=2 CPUs; raise cpus_per_task to 64"),
     (8, 0.25, 64, None), (8, 2, 8, None)],
)  # fmt: skip
def test_a_node_has_the_cpus_of_its_actors(gpus: int, share: float, cpus: int, refused: str | None) -> None:
    config = load_config("configs/digits.yaml", ["trajectories.threads=2"])
    profile = load_profile("gen-trajectories", {"gpus_per_node": gpus, "cpus_per_task": cpus})
    profile = profile.model_copy(update={"gpus_per_actor": share})
    if refused is None:
        check_room(GEN_TRAJECTORIES, config, profile)
        return
    with pytest.raises(UserError, match=re.escape(refused)):
        check_room(GEN_TRAJECTORIES, config, profile)


@pytest.mark.parametrize(("option", "share"), [([], 0.5), (["--gpus-per-actor", "0.25"], 0.25)])
def test_a_job_s_actors_take_the_share_of_the_profile_or_the_option(
    option: list[str], share: float, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/eval.yaml").write_text("mem_gb: 1\ntime_minutes: 10\ngpus_per_actor: 0.5\n")
    submitted: list[Submission] = []

    def describe(self: object, submission: Submission) -> str:
        submitted.append(submission)
        return "its script"

    monkeypatch.setattr(type(SLURM), "describe", describe)
    told = answer("eval", *TINY, "--dry-run", *option, cwd=tmp_path, PATH=f"{slurm}:/usr/bin:/bin")
    assert "its script" in told.stdout  # and that there is no student yet
    (found,) = submitted
    assert found.options.crew(None).gpus_per_actor == found.profile.gpus_per_actor == share


def test_the_ray_stages_take_one_task_a_node() -> None:
    with pytest.raises(UserError, match="tasks_per_node 2: gen-trajectories takes 1"):
        check_tasks(GEN_TRAJECTORIES, load_profile(GEN_TRAJECTORIES.name, {"tasks_per_node": 2}))


def test_a_task_is_its_stage_by_name_and_the_folder_that_it_reads() -> None:
    """No text of the config travels with it: the run folder's config.yaml is what the job runs."""
    pickled = cloudpickle.dumps(StageTask(EVAL, EvaluationOptions(student="there"), "/runs/1"))
    assert b"dsno_cluster.stages" in pickled and len(pickled) < 1500
    task = pickle.loads(pickled)  # noqa: S301 - our own
    assert (task.stage, task.options.subject, task.run_folder) == (EVAL, "there", "/runs/1")


def test_what_is_used_of_submitit_is_as_it_was() -> None:
    """If this fails after an upgrade: compare cluster/submitit_internals.py with submitit/local/local.py and slurm/slurm.py."""
    start = inspect.getsource(submitit.local.local.start_controller)
    assert set(re.findall(r"SUBMITIT_[A-Z_]+", start)) == set(controller_variables("", 1))
    assert "submitit.local._local" in start and "env=env)" in start
    assert (
        "Controller(Path(sys.argv[1]))"
        in (Path(submitit.local.local.__file__).parent / "_local.py").read_text()
    )
    controller = submitit.local.local.Controller
    assert "self.tasks.append(" in inspect.getsource(controller.start_tasks)
    assert "self.start_tasks()" in inspect.getsource(controller.run)
    assert list(inspect.signature(submitit.LocalExecutor._submit_command).parameters) == ["self", "command"]
    assert "start_controller(" in inspect.getsource(submitit.LocalExecutor._submit_command)
    assert isinstance(submitit.SlurmExecutor._submitit_command_str, property)
    text = inspect.signature(submitit.SlurmExecutor._make_submission_file_text)
    assert list(text.parameters) == ["self", "command", "uid"]
    made = inspect.getsource(submitit.SlurmExecutor._make_submission_file_text)
    assert "_make_sbatch_string(command=command, folder=self.folder, **self.parameters)" in made
    several = inspect.getsource(submitit.SlurmExecutor._internal_process_submissions)
    assert 'array_ex.parameters["map_count"] = n' in several
    assert (
        'job_id=f"{first_job.job_id}_{a}"' in several and "array_ex._submit_command(self._submitit" in several
    )


def test_wait_is_accepted_everywhere(tmp_path: Path) -> None:
    """This machine waits anyway."""
    words = ["gen-trajectories", *TINY, "--wait", "--launcher", "local", f"storage.root={tmp_path}/out"]
    made = dsno(*words, "trajectories.num_samples=16", cwd=tmp_path)
    assert made.returncode == 0 and "done:" in made.stderr, made.stderr


def note_devices(at: Path) -> str:
    (at / os.environ["SUBMITIT_LOCAL_GLOBALID"]).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    return "noted"


def test_local_ranks_see_the_devices_that_were_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        task = functools.partial(note_devices, tmp_path)
        job = start_on_this_machine(task, tmp_path / "submitit", 2, tmp_path / "errors", {})
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    os.waitpid(int(job), 0)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3,1", "3,1"]
