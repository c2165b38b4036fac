"""A Slurm of one node on this machine, which runs in a folder of its own; for root, who needs no set-up."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
LONGEST_ARRAY = 2

# A job that was requeued waits for `cred_expire` seconds: 120 unless told, 5 at least.
_CONFIGURATION = """
ClusterName=one_node
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
AccountingStorageType=accounting_storage/none
MaxArraySize={longest_array}
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def is_possible() -> bool:
    """Whether one can be started here."""
    return hasattr(os, "getuid") and os.getuid() == 0 and all(map(shutil.which, (*DAEMONS, "sbatch")))


class OneNodeSlurm:
    """Slurm while the context lasts, for processes whose environment has its `SLURM_CONF`.

    Attributes:
        configuration: the file that SLURM_CONF has to name.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short name, for a socket's may not be long
        self.configuration = self.folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "OneNodeSlurm":
        self.folder.chmod(0o755)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        control_port, node_port = _free_ports(2)
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                folder=self.folder,
                control_port=control_port,
                node_port=node_port,
                longest_array=LONGEST_ARRAY,
            )
        )
        own = {f"--{name}-file": self.folder / f"munged.{name}" for name in ("pid", "log", "seed")}
        own |= {"--key-file": key, "--socket": self.folder / "munge.socket"}
        try:
            self._start("munged", "--foreground", "--force", *(f"{name}={path}" for name, path in own.items()))
            self._start("slurmctld", "-D", "-c", "-f", self.configuration)
            self._start("slurmd", "-D", "-c", "-f", self.configuration)
            wait_for(lambda: "idle" in self._run("sinfo", "--noheader", "--format=%t"), "the node does not come up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) == len(DAEMONS):
            self._run("scancel", "--user=root")
            wait_for(lambda: not self._run("squeue", "--noheader"), "its jobs do not end", failing=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *words: object) -> None:
        with (self.folder / f"{words[0]}.out").open("w") as log:
            self._daemons.append(subprocess.Popen(list(map(str, words)), stdout=log, stderr=log))
        if words[0] == "munged":
            wait_for((self.folder / "munge.socket").exists, "munged does not start")

    def _run(self, *words: str) -> str:
        environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout


def wait_for(condition, complaint, seconds=300, failing=True):
    """Waits until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            assert not failing, complaint
            return
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
