"""A temporary SLURM cluster on this host: munged, slurmctld, and a slurmd for each node, all on loopback.

Needs root and the Debian packages munge, slurmctld, slurmd and slurm-client. It uses no cgroups, systemd or
accounting database, so it also runs in a container. `low` is the default partition; jobs in `high` preempt
its jobs, which then have `GRACE_SECONDS` until they are requeued.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from helpers import HANG_SECONDS

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
GRACE_SECONDS = 120

_CONFIGURATION = """
ClusterName=m3llm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerParameters=bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing_requirement() -> str | None:
    """Return why the cluster cannot run here; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt install munge slurmctld slurmd slurm-client)"
    return "starting SLURM's daemons needs root" if os.geteuid() else None


class SlurmCluster:
    """Context manager that starts the daemons, and stops them with all their jobs.

    Args:
        nodes: number of nodes, `node1`, `node2`, ...

    Attributes:
        folder: configuration, state and logs of the daemons; deleted at the end.
    """

    def __init__(self, nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._nodes = nodes
        self._daemons: list[subprocess.Popen] = []
        self._environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Self:
        ports = _free_ports(self._nodes + 1)
        text = _CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            ports=ports,
            node_ports=",".join(map(str, ports[1:])),
            nodes=self._nodes,
            grace=GRACE_SECONDS,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.folder.chmod(0o755)
        files = {name: f"{self.folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
        try:
            self._start(
                "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={files['socket']}",
                f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}",
            )  # fmt: skip
            self.wait_until(Path(files["socket"]).exists)
            self._start("slurmctld", "-D", "-i")
            for number in range(1, self._nodes + 1):
                (self.folder / f"node{number}").mkdir()
                self._start("slurmd", "-D", "-N", f"node{number}")
            idle = ("sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D")
            self.wait_until(lambda: self.run(*idle, check=False).strip() == str(self._nodes))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:
            self.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)
            self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(HANG_SECONDS)
        shutil.rmtree(self.folder)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        self._daemons.append(daemon)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, while all daemons are running."""
        began = time.monotonic()
        while not condition():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not ended, (ended, *(file.read_text() for file in self.folder.glob("*.out")))
            assert time.monotonic() - began < HANG_SECONDS
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Run a SLURM command and return its output."""
        result = subprocess.run(
            command, capture_output=True, text=True, env=self._environment | environment,
            timeout=HANG_SECONDS,
        )  # fmt: skip
        assert not check or not result.returncode, result.stderr
        return result.stdout

    def submit(self, *arguments: str, **environment: str) -> int:
        """Submit a job with `sbatch`; return its id."""
        return int(self.run("sbatch", "--parsable", *arguments, **environment))

    def field(self, job: int, name: str) -> str:
        """Return a field of `scontrol show job`, such as `JobState`."""
        shown = self.run("scontrol", "show", "job", str(job))
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found[1]


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports
