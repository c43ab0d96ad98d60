"""A real Slurm cluster on one machine: a login host and nodes, each with an address, a name and processes of its own.

    python tests/cluster/testbed.py up [--nodes 4] [--accounting] [--folder DIR]
    python tests/cluster/testbed.py shell | status | down

A host is a set of Linux namespaces (network, host name, mounts, processes) whose first process, once killed, takes all
others of that host with it, as a power cut does. The hosts share this machine's files, as nodes share a file system.
Needs root, Debian's `slurm-wlm munge iproute2` and, for accounting, `slurmdbd mariadb-server`; the S3 server on the login
host is SeaweedFS from the dev extra. Nothing listens outside the hosts' own network, and `down` leaves nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import s3_server

DEFAULT_FOLDER = Path("/tmp/dsno-cluster-testbed")
SUBNET = "10.99.0"
LOGIN_ADDRESS = f"{SUBNET}.1"
S3_PORT = 8333
LOCAL_DISK = "/mnt"  # each host's own, for temporary files
CPUS, MEMORY_MB = 2, 4000  # what each node says that it has
TOOLS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
ACCOUNTING_TOOLS = ("slurmdbd", "mariadbd", "mariadb-install-db")


def missing() -> str | None:
    """Why no cluster can be had here, in a line; None where it can."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"a test cluster needs {', '.join(absent)}: apt-get install slurm-wlm munge iproute2"
    return None


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up. Its state is in files below `folder`, so that another process can use or end it."""

    folder: Path
    nodes: int
    accounting: bool
    label: str

    @property
    def node_names(self) -> list[str]:
        return [f"node{i}" for i in range(1, self.nodes + 1)]

    @property
    def shared(self) -> Path:
        """A folder for what a user has on the shared file system."""
        return self.folder / "shared"

    @property
    def s3_url(self) -> str:
        return f"http://{LOGIN_ADDRESS}:{S3_PORT}"

    def environment(self) -> dict[str, str]:
        """What a user's shell on the login host has."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RAY_"))}
        python = Path(sys.executable).parent
        return kept | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{python}:{os.environ['PATH']}",
            "XDG_STATE_HOME": str(self.folder / "state"),
            "TMPDIR": LOCAL_DISK,
            "AWS_EC2_METADATA_DISABLED": "true",
            **s3_server.KEYS,
        }

    def inside(self, host: str = "login") -> list[str]:
        """The command line that runs what follows it on a host."""
        pid = (self.folder / host / "pid").read_text().strip()
        return ["nsenter", "-t", pid, "--net", "--uts", "--mount", "--pid", "--"]

    def run(
        self,
        *command: str | Path,
        host: str = "login",
        cwd: Path | None = None,
        timeout: float = 120,
        check: bool = True,
        account: str = "root",
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, as a user does from its shell."""
        done = subprocess.run(
            self._command(host, account, cwd, command),
            env=self.environment() | env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def start(
        self,
        *command: str | Path,
        host: str = "login",
        cwd: Path | None = None,
        account: str = "root",
        **env: str,
    ) -> subprocess.Popen[str]:
        """Start a command on a host and let it run; standard error is of the same pipe as standard output."""
        return subprocess.Popen(
            self._command(host, account, cwd, command),
            env=self.environment() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _command(self, host: str, account: str, cwd: Path | None, command: Sequence[str | Path]) -> list[str]:
        """The command line that runs `command` on a host as that account."""
        as_account = ["setpriv", f"--reuid={account}", f"--regid={account}", "--init-groups", "--"]
        who = [] if account == "root" else as_account
        return [*self.inside(host), *who, "env", "-C", str(cwd or self.shared), *map(str, command)]

    @contextlib.contextmanager
    def python_for_all(self) -> Iterator[None]:
        """Within, every account may read this Python and the checkout, though they lie in a home that is closed to others.

        On every host a folder that holds nothing but them stands in that home's place.
        """
        wanted = {Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parents[2]}
        by_home: dict[Path, list[Path]] = {}
        for path in sorted(wanted):
            closed = [parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001]
            if closed:
                by_home.setdefault(closed[0], []).append(path)
        aside = self.folder / "python-for-all"
        script = ["set -e"]
        for home, paths in by_home.items():
            for number, path in enumerate(paths):
                script += [f"mkdir -p {aside}/{number}", f"mount --bind {path} {aside}/{number}"]
            script += [f"mount -t tmpfs -o mode=0755 tmpfs {home}"]
            for number, path in enumerate(paths):
                script += [f"mkdir -p {path}", f"mount --bind {aside}/{number} {path}"]
                script += [f"umount -l {aside}/{number}"]
        hosts = ["login", *self.node_names]
        for host in hosts:
            self.run("bash", "-c", "\n".join(script), host=host)
        try:
            yield
        finally:
            for host in hosts:
                for home in by_home:
                    self.run("umount", "-l", home, host=host, check=False)

    # -- faults --

    def kill_node(self, name: str) -> None:
        """The power of a node is cut; Slurm finds out by itself after SlurmdTimeout."""
        sh(
            "ip", "-n", self._netns("bridge"), "link", "set", name, "down"
        )  # it says nothing more, not even "refused"
        os.kill(int((self.folder / name / "pid").read_text()), signal.SIGKILL)

    def declare_down(self, name: str) -> None:
        """What an administrator does who does not want to wait for Slurm to notice."""
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=power")

    def boot_node(self, name: str) -> None:
        """Switch a node on (again)."""
        index = self.node_names.index(name) + 1
        self._boot_host(
            name, f"{SUBNET}.{10 + index}", f"slurmd -D -N {name} >>{self.folder}/{name}/slurmd.out 2>&1"
        )
        wait_for(lambda: name in self.idle_nodes(), 60, f"{name} does not register")

    def idle_nodes(self) -> list[str]:
        listing = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False).stdout.split("\n")
        return [line.split()[0] for line in listing if line.endswith((" idle", " mix", " alloc"))]

    def stop_controller(self) -> None:
        self._stop_daemon("slurmctld")

    def start_controller(self) -> None:
        self._start_daemon("slurmctld", "slurmctld", "-D")
        wait_for(lambda: " UP" in self.run("scontrol", "ping", check=False).stdout, 60, "slurmctld is silent")

    def _munged(self, host: str) -> str:
        """The command line of a host's munge, which goes into the background."""
        own = f"{self.folder}/{host}"
        files = f"--key-file={self.folder}/munge.key --seed-file={own}/munge.seed --log-file={own}/munged.log"
        return f"munged --force {files} --pid-file=/run/munge/munged.pid --socket=/run/munge/munge.socket.2"

    def stop_munge(self, host: str) -> None:
        self.run("pkill", "-x", "munged", host=host)

    def start_munge(self, host: str) -> None:
        self.run(*self._munged(host).split(), host=host)

    def signal_daemon(self, name: str, number: int) -> None:
        """Freeze (SIGSTOP) or wake (SIGCONT) a daemon of the login host."""
        self.run("kill", f"-{int(number)}", (self.folder / f"{name}.pid").read_text().strip())

    def stop_s3(self) -> None:
        """kill -9 of the S3 server."""
        self._stop_daemon("s3", signal.SIGKILL)

    def start_s3(self) -> None:
        folder = self.folder / "s3"
        folder.mkdir(exist_ok=True)
        command = s3_server.command(folder, LOGIN_ADDRESS, self._s3_ports())
        self._start_daemon("s3", *command)
        probe = [sys.executable, s3_server.__file__, self.s3_url]
        said = f"the S3 server is silent; see {self.folder}/s3.out"
        wait_for(lambda: self.run(*probe, check=False).returncode == 0, 90, said)

    def _s3_ports(self) -> s3_server.Ports:
        return s3_server.Ports.kept(self.folder / "s3" / "ports.json", S3_PORT)

    # -- up and down --

    def up(self) -> None:
        """Start everything; what was begun is taken down again where something fails."""
        try:
            self._up()
        except BaseException:
            self.down()
            raise

    def _up(self) -> None:
        self.folder.mkdir(parents=True)
        for name in ("shared", "state", "save", "s3"):
            (self.folder / name).mkdir()
        (self.folder / "cluster.json").write_text(
            json.dumps({"nodes": self.nodes, "accounting": self.accounting, "label": self.label})
        )
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (self.folder / "slurm.conf").write_text(self._slurm_conf())
        hosts = ["127.0.0.1 localhost", f"{LOGIN_ADDRESS} login"]
        hosts += [f"{SUBNET}.{10 + i} node{i}" for i in range(1, self.nodes + 1)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        self._namespace("bridge")
        sh("ip", "-n", self._netns("bridge"), "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", self._netns("bridge"), "link", "set", "br0", "up")
        self._boot_host("login", LOGIN_ADDRESS, "sleep infinity")
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        for i, name in enumerate(self.node_names, 1):
            self._boot_host(
                name, f"{SUBNET}.{10 + i}", f"slurmd -D -N {name} >>{self.folder}/{name}/slurmd.out 2>&1"
            )
        self.start_s3()
        wait_for(lambda: len(self.idle_nodes()) == self.nodes, 60, "not every node registers")

    def down(self) -> None:
        """End every process, network and mount of the cluster, and delete its folder."""
        for host in ["login", *self.node_names]:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int((self.folder / host / "pid").read_text()), signal.SIGKILL)
        for host in ["login", *self.node_names, "bridge"]:
            subprocess.run(["ip", "netns", "del", self._netns(host)], capture_output=True, check=False)
        if (self.folder / "s3").is_dir():
            s3_server.remove_sockets(self._s3_ports())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _netns(self, host: str) -> str:
        return f"{self.label}-{host}"

    def _namespace(self, host: str) -> None:
        sh("ip", "netns", "add", self._netns(host))
        sh("ip", "-n", self._netns(host), "link", "set", "lo", "up")

    def _boot_host(self, name: str, address: str, service: str) -> None:
        """Wire a host up and start its first process: munge, then `service`."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        netns, bridge = self._netns(name), self._netns("bridge")
        subprocess.run(
            ["ip", "netns", "del", netns], capture_output=True, check=False
        )  # of a host that was killed
        subprocess.run(["ip", "-n", bridge, "link", "del", name], capture_output=True, check=False)
        self._namespace(name)
        sh("ip", "link", "add", "eth0", "netns", netns, "type", "veth", "peer", "name", name, "netns", bridge)
        sh("ip", "-n", netns, "addr", "add", f"{address}/24", "dev", "eth0")
        sh("ip", "-n", netns, "link", "set", "eth0", "up")
        sh("ip", "-n", bridge, "link", "set", name, "master", "br0", "up")
        # /dev/shm and the folder for temporary files are a machine's own; munged wants a folder that nobody else can write
        script = f"""
            set -e
            hostname {name}
            mount --make-rprivate /
            mount --bind {self.folder}/hosts /etc/hosts
            mount -t tmpfs -o mode=1777 tmpfs /dev/shm
            mkdir -p /run/munge
            mount -t tmpfs -o mode=0755 tmpfs /run/munge
            mount -t tmpfs -o mode=1777,size=2g tmpfs {LOCAL_DISK}
            {self._munged(name)}
            set +e
            {service} &
            while :; do wait; sleep 1; done
        """
        with (folder / "boot.log").open("w") as log:
            first = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{netns}", "unshare", "--uts", "--mount", "--pid", "--fork",
                 "--mount-proc", "--kill-child", "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(), start_new_session=True,
            )  # fmt: skip

        def started() -> bool:
            if first.poll() is not None:
                raise AssertionError(f"{name} does not boot: {(folder / 'boot.log').read_text()}")
            children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
            if children:
                (folder / "pid").write_text(children[0])
            return bool(children)

        wait_for(started, 20, f"{name} does not boot")
        wait_for(
            lambda: self.run("munge", "-n", host=name, check=False).returncode == 0, 20, f"{name}: no munge"
        )

    def _start_daemon(self, name: str, *command: str, host: str = "login") -> None:
        """Start a daemon on a host; its process id goes to `<name>.pid`."""
        note = f'echo $$ >{self.folder}/{name}.pid; exec "$@"'
        with (self.folder / f"{name}.out").open("a") as log:
            subprocess.Popen(
                [*self.inside(host), "bash", "-c", note, name, *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(), start_new_session=True,
            )  # fmt: skip

    def _stop_daemon(self, name: str, number: int = signal.SIGTERM) -> None:
        pid = (self.folder / f"{name}.pid").read_text().strip()
        self.run("kill", f"-{int(number)}", pid)
        wait_for(lambda: self.run("kill", "-0", pid, check=False).returncode != 0, 30, f"{name} does not end")

    def _start_accounting(self) -> None:
        data, socket = self.folder / "mariadb", self.folder / "mariadb" / "socket"
        data.mkdir()
        shutil.chown(data, "mysql", "mysql")
        self.folder.chmod(0o755)
        sh(
            "mariadb-install-db",
            f"--datadir={data}",
            "--user=mysql",
            "--auth-root-authentication-method=normal",
        )
        options = [f"--datadir={data}", f"--socket={socket}", "--skip-networking", "--user=mysql"]
        self._start_daemon("mariadb", "mariadbd", "--no-defaults", *options, f"--pid-file={data}/pid")
        wait_for(socket.exists, 60, "mariadbd does not start")
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(
            f"AuthType=auth/munge\nDbdHost=login\nSlurmUser=root\nStorageType=accounting_storage/mysql\n"
            f"StorageHost=localhost\nStorageUser=root\nStorageLoc=slurm\nPidFile={self.folder}/slurmdbd.file\n"
            f"LogFile={self.folder}/slurmdbd.log\n"
        )
        conf.chmod(0o600)
        self._start_daemon("slurmdbd", "env", f"MYSQL_UNIX_PORT={socket}", "slurmdbd", "-D")
        manage = ["sacctmgr", "-i", "add"]
        wait_for(
            lambda: self.run(*manage, "cluster", "testbed", check=False).returncode == 0, 60, "no slurmdbd"
        )
        self.run(*manage, "account", "research")
        self.run(*manage, "user", "root", "account=research")

    def _slurm_conf(self) -> str:
        nodes = f"node[1-{self.nodes}]"
        accounting = (
            "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=login\nJobAcctGatherType=jobacct_gather/linux\nAccountingStorageEnforce=associations\n"
            if self.accounting
            else "AccountingStorageType=accounting_storage/none\n"
        )
        return f"""\
ClusterName=testbed
SlurmctldHost=login({LOGIN_ADDRESS})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={self.folder}/save
SlurmdSpoolDir={self.folder}/%n/spool
SlurmctldPidFile={self.folder}/slurmctld.file
SlurmdPidFile={self.folder}/%n/slurmd.file
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/%n/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=3,bf_interval=3
ReturnToService=2
SlurmdTimeout=20
KillWait=15
MinJobAge={2 if self.accounting else 300}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
{accounting}NodeName={nodes} CPUs={CPUS} RealMemory={MEMORY_MB} State=UNKNOWN
PartitionName=main Nodes={nodes} Default=YES MaxTime=1-0 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes={nodes} MaxTime=1-0 State=UP PriorityTier=10 PreemptMode=OFF
"""


def wait_for(condition: Callable[[], object], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{otherwise} within {seconds:g} s")
        time.sleep(0.2)


def sh(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")


def find(folder: Path = DEFAULT_FOLDER) -> Cluster:
    """The cluster that is up in a folder."""
    file = folder / "cluster.json"
    if not file.is_file():
        sys.exit(f"no test cluster is up in {folder}; `make cluster-up` starts one")
    return Cluster(folder, **json.loads(file.read_text()))


def write_profiles(folder: Path, **values: Any) -> None:
    """jobs/*.yaml of every stage below `folder`, of a size that the nodes have, with `values` over it."""
    (folder / "jobs").mkdir(exist_ok=True)
    content = {"cpus_per_task": 1, "mem_gb": 1, "time_minutes": 10, **values}
    for stage in ("gen-trajectories", "train", "eval"):
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items())
        (folder / f"jobs/{stage}.yaml").write_text(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("up", "down", "shell", "status"))
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd, so that sacct answers")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args(argv)
    if options.what == "up":
        if reason := missing():
            sys.exit(reason)
        if (options.folder / "cluster.json").is_file():
            sys.exit(f"a test cluster is up already in {options.folder}; `make cluster-down` ends it")
        print(f"starting a login host and {options.nodes} nodes")
        cluster = Cluster(options.folder, options.nodes, options.accounting, "dsno")
        cluster.up()
        write_profiles(cluster.shared)
        print("up: `make cluster-shell` gives a shell on the login host, `make cluster-down` ends it")
        return
    if options.what == "down" and not (options.folder / "cluster.json").is_file():
        print("there is no test cluster")
        return
    cluster = find(options.folder)
    if options.what == "down":
        cluster.down()
        print("the test cluster is gone")
    elif options.what == "status":
        print(cluster.run("sinfo").stdout + cluster.run("squeue").stdout, end="")
    else:
        print(
            f"login host, as root; storage.root=s3://bucket/... is its S3 server; files in {cluster.shared}, profiles in jobs/ "
            "there; leave with `exit`"
        )
        command = [*cluster.inside(), "env", "-C", str(cluster.shared), "PS1=login:\\w# ", "bash", "--norc"]
        environment = cluster.environment() | {"AWS_ENDPOINT_URL": cluster.s3_url}
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
