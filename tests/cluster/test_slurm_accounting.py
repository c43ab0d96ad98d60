"""status, logs and cancel on a cluster with accounting, whose controller soon forgets the jobs that are over."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest
from cluster_users import SLOW, User, started, wait_for
from testbed import ACCOUNTING_TOOLS
from tiny import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def accounted() -> Iterator[User]:
    absent = [tool for tool in ACCOUNTING_TOOLS if shutil.which(tool) is None]
    if absent:
        pytest.skip(f"accounting needs {', '.join(absent)}: apt-get install slurmdbd mariadb-server")
    with started(1, accounting=True) as cluster:
        yield User.new(cluster, "accounted", on_s3=False)


def test_runs_are_told_from_accounting(accounted: User) -> None:
    user, cluster = accounted, accounted.cluster
    user.profile(account="research")
    run = user.submit("gen-trajectories", *SLOW)
    said = user.dsno("gen-trajectories", *SLOW, *user.storage, status=1).stderr
    assert "already, as job" in said and run.id in said
    wait_for(lambda: user.shards_made() >= 2)
    row = user.row(run)
    assert row["state"] == "running" and row["nodes"] == "node1"
    user.dsno("cancel", run.id)
    assert user.row(run)["state"] == "cancelled"

    user.profile(account="research", sbatch={"begin": "now+1hour"})
    later = user.submit("gen-trajectories", *TINY, "name=later")
    assert user.row(later)["state"] == "waiting"
    cluster.run("scancel", str(later.record().job))
    cluster.run("sleep", "8")
    forgotten = ["squeue", "-h", "-t", "all", "-o", "%i"]
    wait_for(lambda: str(later.record().job) not in cluster.run(*forgotten).stdout.split(), 120)
    assert user.row(later)["state"] == "cancelled"  # it never began, so its folder has no word of it

    user.profile(account="research")
    again = user.submit("gen-trajectories", *SLOW)
    row = user.ends(again)
    assert row["attempts"] == 1 and user.shards_made() == 24
    wait_for(lambda: str(again.record().job) not in cluster.run(*forgotten).stdout.split(), 120)
    time.sleep(1)
    assert user.row(again)["state"] == "done"
    assert "done:" in user.dsno("logs", again.id).stdout


def test_an_account_that_is_not_there_is_refused(accounted: User) -> None:
    accounted.profile(account="nobodys")
    said = accounted.dsno("gen-trajectories", *TINY, *accounted.storage, "name=refused", status=2).stderr
    assert "Slurm refuses this job" in said and "account" in said, said
