"""Where things run: the choice of a launcher, and the script for Slurm."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from tiny import TINY, dsno

from dsno_cluster.cluster.submit import stage_task
from dsno_cluster.cluster.task import StageTask
from dsno_cluster.config import load_config


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder with an sbatch and a controller that says what the file `ping` says (the real ones are for the cluster tests)."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("sbatch", "srun"):
        (bin_folder / name).write_text("#!/bin/sh\nexit 1\n")
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
    (tmp_path / "ping").write_text("Slurmctld(primary) at login is DOWN\n")
    local = dsno(*words, cwd=tmp_path, PATH=path)
    assert local.returncode == 0 and "would make" in local.stdout
    assert "controller is down" in local.stderr
    asked = dsno(*words, "--launcher", "slurm", cwd=tmp_path, PATH=path)
    assert asked.returncode == 1 and "controller is down" in asked.stderr


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


def test_a_silent_controller_is_not_waited_for(slurm: Path, tmp_path: Path) -> None:
    (slurm / "scontrol").write_text("#!/bin/sh\nexec sleep 60\n")
    local = dsno(
        "gen-trajectories", *TINY, "--dry-run", cwd=tmp_path, PATH=f"{slurm}:/usr/bin:/bin", timeout=30
    )
    assert local.returncode == 0 and "did not answer within 2 s" in local.stderr


def test_sbatch_script_holds_the_profile(slurm: Path, tmp_path: Path, tiny_data: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/train.yaml").write_text(
        "nodes: 2\ntasks_per_node: 4\ngpus_per_node: 4\ncpus_per_task: 8\nmem_gb: 100\ntime_minutes: 90\n"
        "partition: gpu\naccount: me\nqos: high\nsetup: [module load cuda]\nsbatch: {constraint: a100}\n"
    )
    path = f"{slurm}:/usr/bin:/bin"
    words = ["train", *TINY, f"storage.root={tiny_data}", "--dry-run"]
    script = dsno(*words, cwd=tmp_path, PATH=path).stdout
    for line in (
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "cpus-per-task=8",
        "mem=100GB",
        "time=90",
    ):
        assert f"#SBATCH --{line}\n" in script
    for line in ("partition=gpu", "account=me", "qos=high", "constraint=a100", "job-name=train-digits"):
        assert f"#SBATCH --{line}\n" in script
    assert "module load cuda" in script
    more = dsno(*words, "--nodes", "3", cwd=tmp_path, PATH=path)
    assert more.returncode == 2 and "12 ranks" in more.stderr  # batch 16 does not divide


def test_a_task_is_text_and_finds_its_paths_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("configs/digits.yaml", ["storage.root=here"])
    monkeypatch.chdir(tmp_path)
    task = pickle.loads(pickle.dumps(stage_task("train", config)))  # noqa: S301 - our own
    assert isinstance(task, StageTask) and isinstance(task.config_yaml, str)
    assert f"root: {tmp_path}/here" in task.config_yaml
