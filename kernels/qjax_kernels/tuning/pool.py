"""Workers on one GPU, and what is done about one that dies or hangs.

A thread for each worker hands it jobs and passes on what it says. A kernel that hangs, or breaks
the process, is known by the last message: the worker is replaced, and the job goes on without it.
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax_kernels.tuning.jobs import Job
from qjax_kernels.tuning.worker import MARK

# Seconds that a worker may take from one message to the next; waiting for the GPU takes any time.
LIMITS = {"start": 240.0, "compile": 240.0, "run": 120.0, "time": 60.0, "wait": float("inf")}
LIMIT = 240.0
COMMAND = (sys.executable, "-m", "qjax_kernels.tuning.worker")
STARTS = 3  # of a worker for which nothing goes well


@dataclasses.dataclass
class _Task:
    job: Job
    ms: list[int]
    skip: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


class Pool:
    """Runs jobs in worker processes.

    Iterate `messages`: {"hello": ...} of each worker, {"result": ...} of each size, {"failed":
    sentence} of what could not be measured.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        workers: int,
        options: dict[str, Any],
        seconds: float | None = None,
        limits: Mapping[str, float] = LIMITS,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Args: jobs; workers: processes; options: of the worker; seconds: after which all ends;
        limits: seconds by stage; command: that starts a worker."""
        self._tasks = collections.deque(_Task(job, list(job.ms)) for job in jobs)
        self._options, self._limits, self._command = options, limits, list(command)
        self._end = None if seconds is None else time.monotonic() + seconds
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._count = max(1, min(workers, len(self._tasks)))
        self._processes: set[subprocess.Popen] = set()
        self._stopped = threading.Event()

    def messages(self) -> Iterator[dict[str, Any]]:
        """All messages, until the jobs or the time are at their end."""
        with tempfile.TemporaryDirectory() as folder:
            lock = str(Path(folder) / "gpu")
            threads = [
                threading.Thread(target=self._serve, args=(folder, lock, i), daemon=True)
                for i in range(self._count)
            ]
            for thread in threads:
                thread.start()
            try:
                yield from self._listen(len(threads))
            finally:
                self._stopped.set()
                for process in list(self._processes):
                    process.kill()
                for thread in threads:
                    thread.join(10)

    def _listen(self, working: int) -> Iterator[dict[str, Any]]:
        while working:
            left = None if self._end is None else self._end - time.monotonic()
            try:
                if left is not None and left <= 0:
                    raise queue.Empty
                message = self._messages.get(timeout=left)
            except queue.Empty:
                yield {"failed": "the time is up; what was measured is kept"}
                return
            if message is None:
                working -= 1
            else:
                yield message
        if self._tasks:
            left_out = sum(len(task.ms) for task in self._tasks)
            yield {"failed": f"{left_out} sizes were not measured: no worker could go on"}

    def _serve(self, folder: str, lock: str, index: int) -> None:
        failures = 0
        try:
            while self._tasks and failures < STARTS and not self._stopped.is_set():
                options = json.dumps(self._options | {"lock": lock})
                worker = _Worker([*self._command, options], Path(folder) / f"{index}.log")
                self._processes.add(worker.process)
                try:
                    done = self._feed(worker)
                finally:
                    worker.end()
                    self._processes.discard(worker.process)
                failures = 0 if done else failures + 1
                if worker.refused:
                    return
        finally:
            self._messages.put(None)

    def _feed(self, worker: "_Worker") -> int:
        """Hand over tasks until there are none or the worker fails; what was achieved, 0 for
        nothing."""
        done, cores = 0, 0
        try:
            hello = worker.next(self._limits.get("start", LIMIT))
            if "refused" in hello:
                worker.refused = True
                self._messages.put({"failed": f"a worker did not start: {hello['refused']}"})
                return 0
            self._messages.put(hello)
            cores = hello["hello"]["cores"]
        except _Gone as gone:
            if not self._stopped.is_set():
                self._messages.put({"failed": f"a worker did not start: {gone}"})
            return 0
        while not self._stopped.is_set():
            try:
                task = self._tasks.popleft()
            except IndexError:
                return max(done, 1)
            at: dict[str, Any] = {"stage": "compile"}
            try:
                worker.send(
                    {
                        "job": dataclasses.asdict(task.job),
                        "ms": task.ms,
                        "skip": task.skip,
                        "cores": cores,
                    }
                )
                while True:
                    message = worker.next(self._limits.get(at["stage"], LIMIT))
                    if "done" in message:
                        break
                    if "stage" in message:
                        at = message
                        continue
                    if "result" in message or "failed" in message:
                        # Of the first size that is still to do: they come in order.
                        task.ms.pop(0)
                        done += 1
                    self._messages.put(message)
            except _Gone as gone:
                if not self._stopped.is_set():
                    done += self._give_back(task, at, str(gone))
                return done
        return done

    def _give_back(self, task: _Task, at: dict[str, Any], why: str) -> bool:
        """Put a task back, without what the worker died of; whether that is known."""
        if not task.ms:
            return True
        m, name = task.ms[0], at.get("label")
        if name is None:  # not a candidate's fault: the size is given up
            task.ms.pop(0)
            said = f"{task.job.op} m={m} n={task.job.n} k={task.job.k}: {at['stage']}: {why}"
            self._messages.put({"failed": said})
        else:
            task.skip.setdefault(str(m), {})[name] = f"{at['stage']}: {why}"
        if task.ms:
            self._tasks.appendleft(task)
        return name is not None


class _Gone(Exception):
    """A worker that died, or said nothing for too long."""


class _Worker:
    """A process and its two pipes."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        root = str(Path(__file__).resolve().parents[2])  # the worker may not find it installed
        paths = [root, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.refused = False
        self._log = log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                bufsize=0,
            )
        self._rest = b""

    def send(self, task: dict[str, Any]) -> None:
        """Hand over a task."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
        except OSError as error:
            raise _Gone(self._why(str(error))) from error

    def next(self, seconds: float) -> dict[str, Any]:
        """The next message."""
        end = time.monotonic() + seconds
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                if line.startswith(MARK.encode()):
                    message: dict[str, Any] = json.loads(line[len(MARK) :])
                    return message
                continue
            self._read(min(end - time.monotonic(), 3600), seconds)

    def _read(self, left: float, seconds: float) -> None:
        assert self.process.stdout is not None
        if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
            if left < 3600:
                raise _Gone(f"nothing came for {seconds:.0f} s")
            return
        more = self.process.stdout.read(1 << 16)
        if not more:
            raise _Gone(self._why("the process ended"))
        self._rest += more

    def _why(self, otherwise: str) -> str:
        """The last line that the process complained with."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        said = lines[-1][:300] if lines else otherwise
        return f"exit status {self.process.returncode}: {said}"

    def end(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
