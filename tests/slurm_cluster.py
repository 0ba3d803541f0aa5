"""A real Slurm of one node for tests: munged, slurmctld and slurmd with ports, spool and logs of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
INSTALL = f"apt-get install {' '.join(PACKAGES)}"
START_S = 30
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
GresTypes=gpu
KillWait=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def one_node(folder: Path) -> Iterator[dict[str, str]]:
    """The environment that makes Slurm's commands talk to a cluster of this machine, which ends with the block."""
    require()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(host=host, folder=folder, port=free_port(), node_port=free_port())
    (folder / "slurm.conf").write_text(text)
    for device in ("gpu0", "gpu1"):
        (folder / device).touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with ExitStack() as stack:
        stack.enter_context(daemon(munged(folder), folder / "munged.log", environment))
        until((folder / "munge.socket").exists, "munged", folder)
        for name in ("slurmctld", "slurmd"):
            stack.enter_context(daemon([name, "-D"], folder / f"{name}.out", environment))
        until(lambda: "idle" in asked("sinfo", "-h", "-o", "%t", environment=environment).split(), "slurmd", folder)
        yield environment
        asked("scancel", "--full", "--signal=KILL", "--user=root", environment=environment)


def require() -> None:
    """Skip the test where Slurm is not here and may not be installed."""
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    with FileLock(Path(tempfile.gettempdir()) / "dqbench-slurm.lock"):  # workers of pytest-xdist come here at once
        if not all(map(shutil.which, PROGRAMS)):
            install()


def install() -> None:
    """Debian's Slurm; skip where there is none."""
    if shutil.which("apt-get") is None:
        pytest.skip(f"Slurm is not installed, and there is no apt-get; elsewhere: {INSTALL}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "--quiet", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{INSTALL} failed: {done.stderr.strip().splitlines()[-1:]}")


def munged(folder: Path) -> list[str]:
    """munged as this user, with a key, a socket and logs of its own."""
    folder.chmod(0o755)  # others may look in, as munged wants it
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    places = {"key-file": key, "socket": folder / "munge.socket", "log-file": folder / "munge.log"}
    places |= {"pid-file": folder / "munge.pid", "seed-file": folder / "munge.seed"}
    return ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in places.items())]


@contextmanager
def daemon(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    """A process for as long as the block runs."""
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(ready: Callable[[], bool], what: str, folder: Path) -> None:
    """Wait for a daemon; fail with what the daemons said."""
    end = time.monotonic() + START_S
    while not ready():
        if time.monotonic() > end:
            said = {file.name: file.read_text()[-1500:] for file in sorted(folder.glob("*.[lo][ou][gt]"))}
            pytest.fail(f"{what} did not start: {said}")
        time.sleep(0.1)


def asked(*command: str, environment: dict[str, str]) -> str:
    """What a command of Slurm prints; empty where it fails."""
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
