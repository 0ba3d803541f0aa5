"""The cells of a sweep as tasks of Slurm job arrays: what hydra/launcher=slurm does."""

from __future__ import annotations

import io
import logging
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hydra.core.utils import JobReturn, configure_log
from omegaconf import DictConfig
from rich.console import Console
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths

from dqbench.errors import UserError
from dqbench.launching import command, squeue
from dqbench.launching.cells import cells, is_finished, run_folder
from dqbench.launching.command import jobs_of, returned
from dqbench.launching.logs import last_words
from dqbench.launching.slurm_options import Options, parameters
from dqbench.launching.slurm_task import Task
from dqbench.results import atomic_write
from dqbench.stages import refresh

LOOKS = 2  # without a job in the queue and without a row, before a cell counts as failed
log = logging.getLogger("dqbench")


@dataclass
class Job:
    """A cell that is to run. state: waiting, running, done or failed."""

    name: str
    cfg: DictConfig
    label: str
    task: Task
    root: Path  # of what Slurm and submitit write, a folder per submission
    folder: Path = Path()
    id: str = ""
    state: str = "waiting"
    missed: int = 0

    @property
    def note(self) -> Path:
        """The file that says which task of Slurm runs this cell, for a later launch to join it."""
        return self.root / f"{self.name}.job"

    @property
    def paths(self) -> JobPaths:
        """submitit's files."""
        return JobPaths(self.folder, self.id)


def launch(sweep: DictConfig, overrides: Sequence[Sequence[str]], first: int, options: Options) -> list[JobReturn]:
    """Run the sweep's cells first, first + 1, ... of launching.cells. A cell that fails is told."""
    configure_log(sweep.hydra.hydra_logging, sweep.hydra.verbose)
    logging.getLogger("dqbench").setLevel(logging.INFO)
    configs = cells[first : first + len(overrides)]
    jobs = [to_job(cell, options) for cell in jobs_of(sweep, overrides, configs)]
    pending = [job for job in jobs if job.cfg.runtime.force or not is_finished(job.cfg)]
    with letting_go(pending, options.on_interrupt):
        join(pending)
        submit([job for job in pending if not job.id], options)
        watch(pending, options.poll_s)
    return returned(overrides, configs)


def to_job(cell: command.Job, options: Options) -> Job:
    """A cell as a task of Slurm."""
    task = Task(cell.overrides, options.processes or max(1, options.gpus), os.getcwd())
    return Job(cell.name, cell.cfg, cell.label, task, Path(cell.cfg.paths.results).absolute() / ".slurm")


def join(jobs: Sequence[Job]) -> None:
    """Find the tasks that an earlier launch left in the queue."""
    known = {job.note: job for job in jobs if job.note.is_file()}
    queue = squeue.look() if known else {}
    for note, job in known.items():
        folder, earlier = note.read_text().split()
        if queue is None or squeue.is_alive(queue.get(earlier, (None, ""))[0]):
            job.folder, job.id = job.root / folder, earlier
    if joined := [job for job in jobs if job.id]:
        log.info("joining what is in Slurm's queue already: %s", " ".join(job.id for job in joined))


def submit(jobs: Sequence[Job], options: Options) -> None:
    """Give the jobs to Slurm, in arrays; with runtime.force old rows go, no row is better than one of before."""
    for start in range(0, len(jobs), options.max_array_size):
        part = jobs[start : start + options.max_array_size]
        folder = part[0].root / f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        with set_aside([run_folder(job.cfg) / "row.json" for job in part]):
            ids = to_slurm([job.task for job in part], folder, options)
        for job, job_id in zip(part, ids, strict=True):
            job.folder, job.id = folder, job_id
            atomic_write(job.note, f"{folder.name} {job_id}")
        array, at_once = part[0].id.split("_")[0], min(len(part), options.array_parallelism)
        log.info("submitted %d of %d as Slurm job %s, %d at once", start + len(part), len(jobs), array, at_once)
        log.info("logs: %s/%s_*_log.out", folder, array)


@contextmanager
def set_aside(files: Sequence[Path]) -> Iterator[None]:
    """Inside: the files are not there. After: they are gone for good, or back where an error ended the block."""
    aside = {file: file.with_suffix(".earlier") for file in files if file.exists()}
    for file, other in aside.items():
        file.replace(other)
    try:
        yield
    except BaseException:
        for file, other in aside.items():
            other.replace(file)
        raise
    for other in aside.values():
        other.unlink()


def to_slurm(tasks: Sequence[Task], folder: Path, options: Options) -> list[str]:
    """sbatch, through submitit, which writes to `folder`. The ids of the tasks."""
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints there what it raises
            executor = SlurmExecutor(folder, max_num_timeout=options.max_num_timeout, python=options.python)
            executor.update_parameters(**parameters(options))
            return [submitted.job_id for submitted in executor.submit_array(tasks)]
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(folder)
        lines = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines()]
        raise UserError(f"Slurm refused the job: {'; '.join(lines)}") from error


def watch(jobs: Sequence[Job], poll_s: float) -> None:
    """Until no job is in the queue: tell what happens to each."""
    with Console(stderr=True).status("") as shown:
        while left := [job for job in jobs if job.state in ("waiting", "running")]:
            time.sleep(poll_s)
            queue = squeue.look()
            for job in left if queue is not None else ():
                update(job, *queue.get(job.id, (None, "")))
            shown.update(counts(jobs))
    if jobs:
        log.info("%s", counts(jobs))


def counts(jobs: Sequence[Job]) -> str:
    """'1 waiting, 2 running, 3 done'"""
    states = Counter(job.state for job in jobs)
    return ", ".join(f"{states[name]} {name}" for name in ("waiting", "running", "done", "failed") if states[name])


def update(job: Job, state: str | None, where: str) -> None:
    """Take note of what Slurm says about a job."""
    if squeue.is_alive(state):
        job.missed = 0
        follow(job, "waiting" if state in squeue.PENDING else "running", where)
        return
    for folder in (run_folder(job.cfg).parent, run_folder(job.cfg)):
        refresh(folder)
    if is_finished(job.cfg):
        settle(job, "done")
        log.info("%s is done (Slurm %s): %s", job.name, job.id, job.label)
    elif (missed := job.missed) < LOOKS:
        job.missed = missed + 1
    else:
        settle(job, "failed")
        log.error("run %s failed: %s (%s); log: %s", job.name, reason(job, state), job.label, job.paths.stdout)


def follow(job: Job, state: str, where: str) -> None:
    """A job that is in the queue: it starts, or goes back."""
    if state == job.state or (state, where) == ("running", ""):
        return
    if state == "running":
        log.info("%s starts on %s (Slurm %s): %s", job.name, where, job.id, job.label)
    else:
        log.info("%s waits again, to go on from where it was (Slurm %s, %s): %s", job.name, job.id, where, job.label)
    job.state = state


def settle(job: Job, state: str) -> None:
    """A job that has left the queue leaves its log."""
    job.state = state
    for path in (job.note, job.paths.submitted_pickle, job.paths.result_pickle):
        path.unlink(missing_ok=True)


def reason(job: Job, state: str | None) -> str:
    """Why a cell failed: its own last word, else Slurm's."""
    try:
        lines = job.paths.stdout.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    told = last_words(lines)
    own = told[-1].removeprefix(f"run {job.name} failed: ") if told else ""
    return f"{own or 'it left no row'}; Slurm {job.id} ended as {state or 'unknown'}"


@contextmanager
def letting_go(jobs: Sequence[Job], on_interrupt: str) -> Iterator[None]:
    """What becomes of the tasks where the launch ends before them."""
    try:
        yield
    except BaseException as error:
        left = [job for job in jobs if job.id and job.state in ("waiting", "running")]
        if isinstance(error, KeyboardInterrupt) and on_interrupt == "detach":
            log.warning("left to go on in Slurm: %s; the same command joins them", " ".join(job.id for job in left))
        elif left:
            squeue.cancel([job.id for job in left])
            for job in left:
                job.note.unlink(missing_ok=True)
            log.warning("cancelled: %s; what they have finished stays", " ".join(job.id for job in left))
        raise
