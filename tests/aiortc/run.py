"""Starts a Loquent (its path is the argument), points `client.py` at it, and stops it.

    python tests/aiortc/run.py target/release/loquent [card|pocket]
"""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
import time

import client


@contextlib.contextmanager
def service(binary, engine, pid=False):
    """A running Loquent; gives its address, and its process id when asked. Ends the program with a failure when it does not start or panics."""
    env = dict(os.environ, LOQUENT__NET__BIND="127.0.0.1", LOQUENT__SERVER__PUBLISH_HOSTS="127.0.0.1")
    command = [binary, "serve", "--engine", engine, "--listen", "127.0.0.1:0", "--stop-after", "300"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = []
    threading.Thread(target=lambda: log.extend(process.stderr), daemon=True).start()
    try:
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
        base = next((f.group(0) for f in found if f), None)
        if base is None:
            print(f"the service did not start: {''.join(log)[-2000:]}\n\n0 passed, 1 failed")
            sys.exit(1)
        threading.Thread(target=lambda: [None for _ in process.stdout], daemon=True).start()
        time.sleep(0.5)
        yield (base, process.pid) if pid else base
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
        if "panicked" in "".join(log):
            print(f"the service panicked: {''.join(log)[-2000:]}\n\n0 passed, 1 failed")
            sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/aiortc/run.py PATH/TO/loquent [card|pocket]")
    with service(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "card") as base:
        sys.exit(1 if asyncio.run(client.main(base, 8.0, "")) else 0)
