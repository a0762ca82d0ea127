"""Real processes in a tenth of a second: a server that has PyTorch loaded, and has computed nothing, forks them.

    server = ForkServer()
    process = server.start(["main.py", "--epochs", "1"])     # what would follow ``python``; also -m MODULE, -c CODE
    process.wait(); process.end()

Each has a process id, signals and exit status of its own. A keeper between it and the server adopts whatever it starts
in its turn, and kills all of that when ``end`` is called, or when the tests themselves die. Elsewhere than on Linux it
is a new Python, which takes longer.
"""

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

PROJECT_DIR = Path(__file__).resolve().parents[1]
PRELOADED = ["training.train", "matplotlib.pyplot", "torchvision", "torchsummary"]
PRELOADED += ["fastapi", "uvicorn", "optuna.importance"]
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
SECONDS = 300  # nothing here takes a tenth of it


class ForkServer:
    """The server's process, and the socket on which it takes orders; it ends when that is closed."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            return
        self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(command, cwd=PROJECT_DIR, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()

    def start(
        self,
        arguments: Sequence[object],
        cwd: Path = PROJECT_DIR,
        env: Mapping[str, str] | None = None,
        terminal: int | None = None,
    ) -> "Forked | Started":
        """Start ``python ARGUMENTS``. Without a ``terminal`` what it prints goes into two pipes."""
        words = list(map(str, arguments))
        if sys.platform != "linux":
            return Started(words, cwd, env, terminal)
        return Forked(self.orders, words, cwd, env or dict(os.environ), terminal)

    def close(self) -> None:
        if sys.platform == "linux":
            self.orders.close()
            self.process.kill()
            self.process.wait(SECONDS)


class Started(subprocess.Popen[str]):
    """A process that was not forked."""

    def __init__(self, words: list[str], cwd: Path, env: Mapping[str, str] | None, terminal: int | None) -> None:
        output = subprocess.PIPE if terminal is None else terminal
        command = [sys.executable, *words]
        super().__init__(command, cwd=cwd, env=env, stdout=output, stderr=output, encoding="utf-8", errors="replace")

    def end(self) -> None:
        self.kill()
        self.communicate()


class Forked:
    """A process of the server's, used as subprocess.Popen's are; what it prints is text."""

    def __init__(
        self, orders: socket.socket, arguments: list[str], cwd: Path, env: Mapping[str, str], terminal: int | None
    ) -> None:
        self.args, self.returncode = arguments, None
        ends: list[int] = []
        streams: list[IO[str]] = []
        for _ in range(2):
            mine, theirs = os.pipe()
            streams.append(os.fdopen(mine, encoding="utf-8", errors="replace"))
            ends.append(theirs)
        self.stdout, self.stderr = streams
        self.keeper, keepers = socket.socketpair()
        order = json.dumps({"arguments": arguments, "cwd": str(cwd), "env": dict(env)}).encode()
        outputs = ends if terminal is None else [terminal, terminal]
        socket.send_fds(orders, [order], [*outputs, keepers.fileno()])
        for end in ends:
            os.close(end)
        keepers.close()
        self.answers = self.keeper.makefile("r")
        self.pid = int(self.answers.readline())

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.keeper], [], [], 0)[0]:
            self.returncode = int(self.answers.readline())
        return self.returncode

    def wait(self, timeout: float = SECONDS) -> int:
        if self.returncode is None and not select.select([self.keeper], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """All that it prints until it ends."""
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()), daemon=True)
        reader.start()
        watchdog = threading.Timer(timeout, self.kill)
        watchdog.start()
        out = self.stdout.read()
        reader.join()
        watchdog.cancel()
        self.wait(timeout)
        return out, errors[0]

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill it and all that it started, whatever became of them."""
        if self.answers.closed:
            return
        with contextlib.suppress(OSError):
            self.keeper.shutdown(socket.SHUT_WR)
        while line := self.answers.readline():  # until the keeper is done
            self.returncode = int(line)
        for stream in (self.answers, self.keeper, self.stdout, self.stderr):
            stream.close()


def serve(orders: socket.socket) -> None:
    """Fork a keeper for every order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests, which then close the socket
    for name in PRELOADED:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, 3)
        if not order:
            return
        if os.fork() == 0:
            orders.close()
            keep(json.loads(order), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(order: dict, stdout: int, stderr: int, answers: int) -> NoReturn:
    """Fork the process, report its number and its end, and end it and its descendants when nobody listens any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        become(order, stdout, stderr)
    os.close(stdout)
    os.close(stderr)
    with socket.socket(fileno=answers) as listener:
        with contextlib.suppress(OSError):
            listener.sendall(f"{pid}\n".encode())
        ended = os.pidfd_open(pid)
        select.select([ended, listener], [], [])
        if select.select([ended], [], [], 0)[0]:
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(OSError):
                listener.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            select.select([listener], [], [])
        kill_descendants()
    os._exit(0)


def kill_descendants() -> None:
    """Of this process, which adopts those whose parents die."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for pid in map(int, children.read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:  # there is none left
            return


def become(order: dict, stdout: int, stderr: int) -> NoReturn:
    """Be ``python ARGUMENTS``, in a session of its own."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, place in ((stdout, 1), (stderr, 2)):
            os.dup2(descriptor, place)
            os.close(descriptor)
        sys.stdout, sys.stderr = (
            os.fdopen(place, "w", 1 if os.isatty(place) else -1, "utf-8", errors, closefd=False)
            for place, errors in ((1, "strict"), (2, "backslashreplace"))
        )
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        run(order["arguments"])
        status = 0
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
        else:
            status = exit_.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)


def run(arguments: list[str]) -> None:
    """What ``python ARGUMENTS`` runs."""
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first, *rest = arguments
    if first in ("-m", "-c"):
        sys.path[:1] = [os.getcwd(), *path]
        sys.argv = [first, *rest[1:]]
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[:1] = [str(Path(first).resolve().parent), *path]
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT_DIR))
    serve(socket.socket(fileno=int(sys.argv[1])))
