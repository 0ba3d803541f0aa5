"""Several processes at work on one cell: `accelerate launch --multi_gpu --num_processes N -m dqbench ...`.

What is computed depends on no process count: work is cut into the pieces that one process would take, decisions and
whatever cannot be cut are the main process's. Before join(), and inside alone(), a process is the only one and nothing
here costs anything; torch.distributed is imported by join().
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from dqbench.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor, nn

Value = TypeVar("Value")
PATIENCE = timedelta(weeks=4)  # for others' work and locks; who dies is noticed by the launcher, not by a time-out
_joined: list[PartialState] = []  # one, after join()
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def launched() -> int:
    """The processes that accelerate (torchrun) has started for this program."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def leads() -> bool:
    """Whether this is the main one of the launched processes: the one that prints and writes."""
    return launched() == 1 or os.environ.get("RANK") == "0"


def join(device: str) -> None:
    """Meet the other launched processes, on GPUs (NCCL) or on CPUs (gloo), as `device` says."""
    if launched() == 1 or _joined:
        return
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        raise UserError("one cell runs on one machine; allowed: --num_machines 1")
    from accelerate import PartialState

    _joined.append(PartialState(cpu=device == "cpu", timeout=PATIENCE))


def leave() -> None:
    """Part from the others, when all is done."""
    if _joined:
        _joined.pop().destroy_process_group()


def joined() -> int:
    """How many processes are at the run."""
    return _joined[0].num_processes if _joined else 1


def count() -> int:
    """How many processes share the present work."""
    return 1 if _alone.get() else joined()


def is_main() -> bool:
    """Whether this process leads the present work."""
    return count() == 1 or _joined[0].is_main_process


@contextmanager
def alone() -> Iterator[None]:
    """Inside: the work is this process's own; the others wait elsewhere."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        _joined[0].wait_for_everyone()


def agreed(decide: Callable[[], Value]) -> Value:
    """What the main process decides, or does, alone; the others wait for it and get a copy."""
    if count() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    decided = []
    with alone():
        decided.append(decide() if _joined[0].is_main_process else None)
    return broadcast_object_list(decided)[0]


def split(items: Sequence[Value]) -> Sequence[Value]:
    """This process's part of a list or tensor; none where there are fewer items than processes."""
    if count() == 1:
        return items
    with _joined[0].split_between_processes(items) as own:
        return own


def add_up(values: Tensor) -> Tensor:
    """The sum over processes, on the CPU: exact where each element is 0 in all but one."""
    if count() == 1:
        return values
    from accelerate.utils import reduce

    return reduce(values.to(_joined[0].device), "sum").cpu()


def average_gradients(parameters: Sequence[nn.Parameter], weight: float) -> None:
    """Let every gradient be the sum over processes of weight x gradient; one without gradients counts as zeros."""
    if count() == 1:
        return
    import torch
    from accelerate.utils import reduce

    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = reduce(torch.cat([part.flatten() for part in parts]) * weight, "sum")
    for parameter, part in zip(parameters, total.split([part.numel() for part in parts]), strict=True):
        parameter.grad = part.view_as(parameter)


def largest(value: int) -> int:
    """The maximum over processes."""
    if count() == 1:
        return value
    from accelerate.utils import gather_object

    return max(gather_object([value]))


@contextmanager
def common_folder(parent: Path | None) -> Iterator[Path]:
    """A temporary folder that all processes share; the main one makes and deletes it."""
    with ExitStack() as stack:
        yield Path(agreed(lambda: stack.enter_context(TemporaryDirectory(dir=parent))))


def begin() -> None:
    """Let the main process alone speak (DQBENCH_DEBUG lets all); warn where it is the only one and was not to be.

    accelerate starts one process without --multi_gpu, however many it is asked for.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and launched() == 1:
        given = "accelerate was asked for several processes and has started one; the row will be the same"
        print(f"dqbench: {given}. N, on CPUs too: --multi_gpu --num_processes N", file=sys.stderr)
    if not leads() and not os.environ.get("DQBENCH_DEBUG"):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)


def fails_first() -> bool:
    """Whether to tell of this process's failure: all fail when one does, and the first knows why. It gets stderr back.

    The first is who makes a file in the folder that the launcher has made for these processes.
    """
    if launched() == 1 or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return leads()
    try:
        (Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / "told").touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):  # told, or the launcher has cleaned up after those who ended
        return False
    sys.stderr = sys.__stderr__
    return True


def tell(line: str) -> None:
    """Print what has gone wrong, unless another process has."""
    if fails_first():
        print(f"dqbench: {line}", file=sys.stderr, flush=True)
