"""A real SLURM cluster on one machine: munge, slurmctld and several slurmd in a folder and on ports of their own.

No systemd, no cgroups, no accounting; as root or as any user; several clusters live side by side. GPUs are character
devices that every machine has: slurmd only looks whether they exist, and gives each job its CUDA_VISIBLE_DEVICES.
Facts: Debian 12, slurm-wlm 22.05. `SLURM_CONF` alone selects the cluster.
"""

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "setpriv")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian keeps the daemons
GPU_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
NODE_MARK = "VLAEXP_TEST_NODE"  # in the environment of a node's slurmd and slurmstepd
NOT_STARTED = ("PENDING", "REQUEUED", "CONFIGURING")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")

CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
# the nodes may promise more than the machine has
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=2
# squeue -t all knows ended jobs for this many seconds
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=20
MessageTimeout=10
CompleteWait=0
MailProg=/bin/true
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/none
"""
NODE = (
    "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN\n"
)
PARTITION = "PartitionName={name} Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP DefMemPerCPU=100 {more}\n"


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


class SlurmCluster:
    """A cluster with the partitions `gpu` (the default) and `urgent`, whose jobs preempt those of `gpu`.

    Args:
        folder: empty and with a short path: a unix socket's has at most 107 characters.
        nodes: slurmd daemons, named n1, n2, ...
        gpus: per node, at most 4.
        cpus: per node, whatever the machine has.
    """

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 2, cpus: int = 4) -> None:
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        self.env = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        host, (port, *node_ports) = socket.gethostname().partition(".")[0], free_ports(1 + nodes)
        common = {"folder": folder, "host": host, "user": getpass.getuser(), "cpus": cpus, "gpus": gpus}
        conf = CONF.format(name=f"vlaexp{port}", port=port, **common)
        for node, node_port in zip(self.nodes, node_ports, strict=True):
            conf += NODE.format(node=node, port=node_port, **common)
        conf += PARTITION.format(name="gpu", more="Default=YES PriorityTier=1 GraceTime=2")
        conf += PARTITION.format(name="urgent", more="PriorityTier=10 PreemptMode=OFF")
        folder.chmod(0o755)
        (folder / "slurm.conf").write_text(conf)
        (folder / "state").mkdir()
        devices = [f"NodeName={n} Name=gpu File={device}\n" for n in self.nodes for device in GPU_DEVICES[:gpus]]
        (folder / "gres.conf").write_text("AutoDetect=off\n" + "".join(devices))
        (folder / "munge").mkdir(mode=0o700)
        (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
        (folder / "munge" / "key").chmod(0o600)

    def start(self) -> None:
        """Start every daemon and wait until each node is idle."""
        munge, options = self.folder / "munge", ("key-file=key", "log-file=log", "pid-file=pid", "seed-file=seed")
        named = [f"--{name}={munge / file}" for name, file in (option.split("=") for option in options)]
        self._spawn("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.sock", *named)
        wait_for(lambda: (self.folder / "munge.sock").exists(), 20, "munged has no socket")
        self.start_controller()
        for node in self.nodes:
            self._spawn(node, "slurmd", "-D", "-N", node)
        wait_for(lambda: set(self.node_states().values()) == {"idle"}, 60, "the nodes do not become idle")

    def stop(self) -> None:
        """End jobs and daemons; whatever still carries this cluster's address afterwards is killed."""
        for daemon in self._daemons.values():  # first, so that nothing is started or requeued any more
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        wait_for(lambda: not self._kill(self.processes()), 20, "processes of the cluster do not die")

    def run(self, *command: str) -> str:
        """Output of a SLURM command; one that finds no controller would try for a minute, hence the limit."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submit the text of a batch script; returns the job id. Output goes to the cluster's folder."""
        output = f"--output={self.folder}/%A_%a.out"
        return self.run("sbatch", "--parsable", output, *options, f"--wrap={script}").strip()

    def states(self, job: str = "") -> dict[str, str]:
        """State by job id (`7`, or `7_0` for an array element), ended jobs too; of one job or array, or of all."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T").split()
        found = dict(line.split("|") for line in lines)
        return {key: state for key, state in found.items() if not job or key == job or key.startswith(f"{job}_")}

    def wait(self, job: str, state: str = "COMPLETED", timeout_s: float = 60) -> None:
        """Wait until a job, or every element of an array, is in a state; one that ended otherwise fails at once."""

        def reached() -> bool:
            states = set(self.states(job).values())
            if wrong := states & set(ENDED) - {state}:
                raise AssertionError(f"job {job} should become {state} and is {wrong}")
            return states == {state}

        wait_for(reached, timeout_s, lambda: f"job {job} does not become {state}: {self.states(job)}")

    def release(self, job: str) -> None:
        """Let a requeued job start in 2 s; SLURM holds it back for 120 s.

        Not at once: a start in the second of the kill fails ("Job credential revoked").
        """
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    def requeue(self, job: str) -> None:
        """Kill a running job and put it back into the queue, ready to start again."""
        self.run("scontrol", "requeue", job)
        wait_for(lambda: self.states(job).get(job) == "PENDING", 30, f"job {job} is not requeued")
        self.release(job)

    def cancel(self, *jobs: str) -> None:
        self.run("scancel", *jobs)

    def node_states(self) -> dict[str, str]:
        """State by node, in sinfo's short form: idle, mix, alloc, down, ... (`*`: does not answer)."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-o", "%N %t").splitlines())

    def node_down(self, node: str) -> None:
        """Lose a node: its daemon and everything that runs on it die without a word."""
        self._end(node)
        # slurmstepd first: one that outlives its job reports a failure of the job
        self._kill(self.processes(f"{NODE_MARK}={node}"))
        self._kill(self.processes(f"SLURMD_NODENAME={node}"))
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
        # a new slurmd purges the scripts of jobs it finds here, and those of jobs just given to it with them
        shutil.rmtree(self.folder / f"spool.{node}", ignore_errors=True)

    def node_up(self, node: str) -> None:
        """Bring a lost node back."""
        self._spawn(node, "slurmd", "-D", "-N", node)
        wait_for(lambda: self.node_states()[node] in ("idle", "mix", "alloc"), 60, f"node {node} does not come back")
        time.sleep(3)  # the controller now repeats what the node missed: kills of jobs that may run there again

    def stop_controller(self) -> None:
        """Stop slurmctld; jobs run on, commands find nobody until `start_controller`.

        Not with SIGKILL: a slurmctld killed like that has forgotten the jobs of its last 5 seconds.
        """
        self._daemons["slurmctld"].terminate()
        self._daemons["slurmctld"].wait(30)

    def start_controller(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D")
        wait_for(self.answers, 60, "slurmctld does not answer")

    def answers(self) -> bool:
        """Whether the controller can be reached."""
        done = subprocess.run(["scontrol", "ping"], env=self.env, capture_output=True, text=True, check=False)
        return re.search(r"is UP", done.stdout) is not None

    def reset(self) -> None:
        """What a test may have left: dead daemons are started, jobs cancelled and waited for."""
        if self._daemons["slurmctld"].poll() is not None:
            self.start_controller()
        for node in self.nodes:
            if self._daemons[node].poll() is not None:
                self.node_up(node)
        jobs = [job for job, state in self.states().items() if state not in ENDED]
        if jobs:
            self.cancel(*jobs)
        wait_for(lambda: set(self.node_states().values()) == {"idle"}, 60, "jobs do not end")

    def processes(self, mark: str = "") -> list[int]:
        """Processes whose environment names this cluster (daemons, steps, jobs), and `mark`."""
        wanted = [f"SLURM_CONF={self.folder}/slurm.conf", *([mark] if mark else [])]
        return [pid for pid, environment in environments() if all(text in environment for text in wanted)]

    def _spawn(self, key: str, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SEARCH)
        assert path is not None, program
        log = (self.folder / f"{key}.err").open("ab")
        # pdeathsig: a test run that is killed leaves no daemon behind
        command = ["setpriv", "--pdeathsig", "KILL", path, *arguments]
        self._daemons[key] = subprocess.Popen(
            command, env={**self.env, NODE_MARK: key}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
        )
        log.close()

    def _end(self, key: str) -> None:
        self._daemons[key].kill()
        self._daemons[key].wait()

    def _kill(self, pids: list[int]) -> list[int]:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return pids


def environments() -> Iterator[tuple[int, set[str]]]:
    """Every process that can be looked at, this one excepted, with its environment; zombies have none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if int(folder.name) != os.getpid():
            yield int(folder.name), set(environment.decode(errors="replace").split("\0"))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def wait_for(condition: Callable[[], object], timeout_s: float, complaint: str | Callable[[], str]) -> None:
    """Poll until `condition` holds.

    Raises:
        TimeoutError: with the complaint, after `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(complaint if isinstance(complaint, str) else complaint())
        time.sleep(0.1)
