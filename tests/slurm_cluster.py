"""A whole Slurm on this machine, without root: munged, slurmctld and a slurmd for each of four
virtual nodes, all of Debian's packages, which are unpacked and not installed."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from processes import PATIENCE, ROOT, environment

FETCH = ROOT / "tests" / "launch" / "fetch_slurm.sh"
SCRIPT = ROOT / "launch" / "slurm.sh"
NODES = 4
# Every process of the cluster and of its jobs has it in its environment, and so is found again.
MARK = "JAXMOE_TEST_CLUSTER"

CONF = """
ClusterName=virtual
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# The second also says how long a job waits that was requeued: 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=8
KillWait=5
CompleteWait=0
SlurmdParameters=config_overrides
NodeName=127.0.0.[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.[1-{nodes}] Port={ports} CPUs=4
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def fetched(cache: Path) -> Path | None:
    """Where Slurm was unpacked, once for all runs of the suite; None where it is installed.

    Without either a person's tests are skipped, and CI's fail.
    """
    if all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        return None
    folder = cache / "slurm"
    done = subprocess.run([str(FETCH), str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs Slurm: {done.stderr.strip()}")
        pytest.skip(done.stderr.strip())
    return folder / "root"


class Cluster:
    """Commands of a user, and the daemons' processes."""

    def __init__(self, folder: Path, programs: Path | None, text_cache: Path) -> None:
        self.folder, self._programs = folder, programs
        self.jobs = folder / "jobs"  # where they write their output
        self.jobs.mkdir()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**environment(text_cache), MARK: str(folder)}
        # What a job of the suite must not see: it may itself run in one.
        for name in list(self.environment):
            if name.startswith(("SLURM_", "SBATCH_", "JAXMOE_PROCESS", "JAX_COORD")):
                del self.environment[name]
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        if programs is not None:
            library = next(programs.glob("usr/lib/*/slurm-wlm"))
            paths = {
                "PATH": [programs / "usr/bin", programs / "usr/sbin"],
                "LD_LIBRARY_PATH": [library.parent, library],
            }
            for name, ours in paths.items():
                theirs = filter(None, [self.environment.get(name)])
                self.environment[name] = os.pathsep.join([*map(str, ours), *theirs])

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._configure()
        own = {name: f"{self.folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
        words = [f"--{name}{'-file' * (name != 'socket')}={file}" for name, file in own.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", f"--key-file={key}", *words])
        self.wait(lambda: Path(own["socket"]).exists(), "munged")
        self._daemon("slurmctld", [self._program("slurmctld"), "-D", "-c"])
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Until all of them are up, and none has work."""
        up = f"idle {NODES}"
        self.wait(lambda: self.say("sinfo", "-h", "-o", "%T %D").strip() == up, "idle nodes")

    @property
    def nodes(self) -> list[str]:
        return [f"127.0.0.{k}" for k in range(1, NODES + 1)]

    def start_node(self, node: str) -> None:
        stepd = ["-d", self._program("slurmstepd")]
        self._daemon(node, [self._program("slurmd"), "-D", "-N", node, *stepd])

    def kill_node(self, node: str) -> None:
        """kill -9 of all that runs there: the daemon, its steps and their tasks."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait(timeout=PATIENCE)
        self._kill(lambda: self.of_node(node))

    def of_node(self, node: str) -> list[int]:
        """Processes of jobs on a node: the steps' own daemons, and their tasks."""
        own = f"SLURMD_NODENAME={node}".encode()
        return [
            pid
            for pid in self.processes()
            if own in _read(pid, "environ").split(b"\0") or self._node_of_step(pid) == node
        ]

    def processes(self) -> list[int]:
        """All of the cluster that still run, but its daemons."""
        daemons = {daemon.pid for daemon in self._daemons.values()}
        mark = f"{MARK}={self.folder}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            pid = int(entry.name)
            if pid in daemons:
                continue
            marked = mark in _read(pid, "environ").split(b"\0")
            if not marked and self._node_of_step(pid) is None:
                continue
            if _read(pid, "stat").rpartition(b")")[2].split()[:1] not in ([b"Z"], [b"X"], []):
                found.append(pid)
        return found

    def _node_of_step(self, pid: int) -> str | None:
        """Whose step a slurmstepd holds: it writes its title over its environment, so that the log
        that it has open is what tells."""
        try:
            if not os.readlink(f"/proc/{pid}/exe").rpartition("/")[2].startswith("slurmstepd"):
                return None
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:  # it has ended
            return None
        logs = {f"{self.folder}/slurmd-{node}.log": node for node in self.nodes}
        return next((logs[link] for link in links if link in logs), None)

    def run(self, *words: str, **own: str) -> subprocess.CompletedProcess[str]:
        """A command of a user; keywords are environment."""
        return subprocess.run(
            words,
            cwd=self.jobs,
            env={**self.environment, **own},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )

    def say(self, *words: str, **own: str) -> str:
        """A command that must succeed; its stdout."""
        done = self.run(*words, **own)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, **own: str) -> str:
        """sbatch; the job's id."""
        return self.say("sbatch", "--parsable", *words, **own).strip()

    def shown(self, job: str) -> Mapping[str, str]:
        """What scontrol knows of a job."""
        text = self.say("scontrol", "show", "job", "-o", job)
        words = [word.split("=", 1) for word in text.split() if "=" in word]
        return {name: value for name, value in words}

    def output(self, job: str) -> str:
        file = self.jobs / f"slurm-{job}.out"
        return file.read_text() if file.exists() else ""

    def finished(self, job: str, seconds: float = PATIENCE) -> tuple[str, int]:
        """Waits for a job's end; its state and exit code."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.shown(job)["JobState"] in over, f"job {job}", seconds)
        shown = self.shown(job)
        return shown["JobState"], int(shown["ExitCode"].partition(":")[0])

    def wait(self, seen: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not seen():
            dead = [n for n, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                pytest.fail(f"waited in vain for {what}; dead: {dead}\n{self._logs()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends everything by its id, and what jobs have left."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait(timeout=PATIENCE)
        self._daemons.clear()
        self._kill(self.processes)

    def _kill(self, found: Callable[[], list[int]]) -> None:
        """Until there are none: the dead have to be seen as such, and some are born meanwhile."""
        while left := found():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _configure(self) -> None:
        with socket.socket() as one:  # five ports in a row, below those that the kernel hands out
            for first in range(21000 + 10 * (os.getpid() % 900), 32000, 10):
                if all(_free(one, first + k) for k in range(NODES + 1)):
                    break
        plugins = (
            f"PluginDir={next(self._programs.glob('usr/lib/*/slurm-wlm'))}"
            if self._programs
            else ""
        )
        text = CONF.format(
            folder=self.folder,
            user=pwd.getpwuid(os.getuid()).pw_name,
            ctld=first,
            ports=f"[{first + 1}-{first + NODES}]",
            nodes=NODES,
            plugins=plugins,
        )
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(text)

    def _daemon(self, name: str, words: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                words,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def _program(self, name: str) -> str:
        """Debian's daemons have an ending of their own until they are installed."""
        for one in (f"{name}-wlm", name):
            if found := shutil.which(one, path=self.environment["PATH"]):
                return found
        raise AssertionError(f"no {name}")

    def _logs(self) -> str:
        names = [f"{name}.out" for name in self._daemons] + ["slurmctld.log"]
        ends = {name: (self.folder / name) for name in names if (self.folder / name).exists()}
        text = [f"== {name}\n{file.read_text()[-1500:]}" for name, file in ends.items()]
        text += [f"== {f.name}\n{f.read_text()[-3000:]}" for f in self.jobs.glob("*.out")]
        return "\n".join(text)


def _free(one: socket.socket, port: int) -> bool:
    with socket.socket() as test:
        try:
            test.bind(("", port))
        except OSError:
            return False
    return True


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
