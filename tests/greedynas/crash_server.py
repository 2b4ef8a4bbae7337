"""Runs stages in processes of their own and kills them; one start-up of Python serves many.

Reads a job a line from stdin: {"stage", "run", "options", "resume", "operation", "how", "seconds", "file_size"}. Each
is forked off and killed by SIGKILL at its n-th file operation ("operation"; "how": before it, after it, or, if a write,
with half of it done), or after some seconds, or not at all. Beyond "file_size" bytes the kernel refuses to write, as on
a full disk. Answers with a line: {"outcome": "done", "killed" or an error,
"operations": file operations of a process that was done, "seconds"}.
"""

import contextlib
import functools
import gc
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import sklearn.datasets  # noqa: F401  # imported once for all children
import tiny
import torch

from greedynas.retraining import retrain
from greedynas.search import search
from greedynas.training import train

STAGES = {
    "train": (train, tiny.train_config),
    "search": (search, tiny.search_config),
    "retrain": (retrain, tiny.retrain_config),
}
WRITE = os.write  # the answer is no operation of the stage: a bomb must not count it, nor tear it
OPERATIONS = ("write", "replace", "fsync", "ftruncate", "unlink")


class Bomb:
    """Counts file operations and ends the process at one of them."""

    def __init__(self, at, how):
        self.at, self.how, self.count = at, how, 0
        for name in OPERATIONS:
            setattr(os, name, functools.partial(self.call, name, getattr(os, name)))

    def call(self, name, original, *arguments):
        self.count += 1
        if self.count != self.at:
            return original(*arguments)
        if self.how == "torn" and name == "write":
            descriptor, data = arguments
            original(descriptor, data[: len(data) // 2])
        elif self.how == "after":
            original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")


def child(job, answer):
    stage, make_config = STAGES[job["stage"]]
    sys.stderr = io.StringIO()
    if "file_size" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    bomb = Bomb(job.get("operation"), job.get("how"))
    try:
        stage(make_config(Path(job["run"]), **job.get("options", {})), resume=job["resume"])
        outcome = "done"
    except BaseException:
        outcome = traceback.format_exc()
    count = bomb.count
    WRITE(answer, json.dumps({"outcome": outcome, "operations": count}).encode())
    os._exit(0)


def serve(job):
    reader, writer = os.pipe()
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        child(job, writer)
    os.close(writer)
    if job.get("seconds") is not None:
        while time.monotonic() - start < job["seconds"] and os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    data = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
    os.close(reader)
    with contextlib.suppress(ChildProcessError):  # where it was reaped above
        os.waitpid(process, 0)
    answer = json.loads(data) if data else {"outcome": "killed"}
    return {**answer, "seconds": time.monotonic() - start}


def main():
    torch.set_num_threads(1)  # a process with threads cannot fork safely
    tiny.register()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for stage, make_config in STAGES.values():  # what the first run of all sets up, children need not
            stage(make_config(Path(folder)))
    gc.freeze()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
