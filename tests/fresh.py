"""Runs snippets in processes that have imported only what they should have.

Importing Lightning takes seconds, so one process for each package imports it once, and every snippet runs in a fork
of it. Started by hand: `python fresh.py pytorch_lightning`, then one JSON object `{"code", "env"}` a line.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class Fresh:
    """A process that has imported one package and nothing of ours."""

    def __init__(self, package):
        self.process = subprocess.Popen(
            [sys.executable, __file__, package],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, code, **env):
        """The output of a snippet; fails with its traceback if it raises."""
        print(json.dumps({"code": code, "env": env}), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert answer["ok"], answer["output"]
        return answer["output"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def run(code, env):
    """In the fork: runs a snippet with its output in a file."""
    os.environ.update(env)
    try:
        exec(compile(code, "<snippet>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


def serve(package):
    importlib.import_module(package)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "output")
            child = os.fork()
            if not child:
                with path.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    status = run(**json.loads(line))
                os._exit(status)
            ok = os.waitpid(child, 0)[1] == 0
            print(json.dumps({"ok": ok, "output": path.read_text()}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
