"""What running any study takes: the head of its manifest, and pieces of work in this process or several at once."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

from thermoe.compare.study_base import StudyBase
from thermoe.results import RunFolder
from thermoe.runtime import environment_fingerprint

Task = TypeVar("Task")
Rows = list[dict[str, Any]]
#: Of a worker process: what does the work, and what it is given beside the task.
_held: list[Any] = []


def manifest_head(run: RunFolder, spec: StudyBase, *, kind: str, name: str) -> dict[str, Any]:
    """Return what the manifest of every study begins with; a study taken up keeps the time it was begun."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "command": "compare",
        "type": kind,
        "study": name,
        "created_at": run.manifest.get("created_at", now),
        "finished": False,
        "config": spec.as_dict(),
        "environment": environment_fingerprint(),
    }


def work_through(
    begin: Sequence[Task],
    work: Callable[..., Rows],
    given: tuple[Any, ...],
    *,
    workers: int,
    follow: Callable[[Task, Rows], list[Task]] = lambda task, found: [],
) -> Iterator[tuple[Task, Rows]]:
    """Yield each task with its rows as it ends.

    Args:
        begin: the first tasks, in order.
        work: a function of a module, called with a task and ``given``.
        given: large things that every task needs; sent to a process once.
        workers: processes; with 1 all is done in this one.
        follow: what is to be done once a task has ended.
    """
    if workers == 1 or not begin:
        _start()
        left = list(begin)
        while left:
            task = left.pop(0)
            found = work(task, *given)
            yield task, found
            left = follow(task, found) + left
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work, *given))
    try:
        running: dict[Future[Rows], Task] = {pool.submit(_work, task): task for task in begin}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, found = running.pop(future), future.result()
                running.update({pool.submit(_work, after): after for after in follow(task, found)})
                yield task, found
    finally:
        pool.shutdown(cancel_futures=True)


def _start(*held: Any) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    _held[:] = held


def _work(task: Any) -> Rows:
    work, *given = _held
    return list(work(task, *given))
