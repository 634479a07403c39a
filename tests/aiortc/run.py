"""Starts a Loquent (its path is the argument), points `client.py` at it, and stops it.

    python tests/aiortc/run.py target/release/loquent [card|pocket]
"""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time

import client


def main(binary, engine):
    env = dict(os.environ, LOQUENT__NET__BIND="127.0.0.1")
    command = [binary, "serve", "--engine", engine, "--listen", "127.0.0.1:0", "--stop-after", "120"]
    service = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = []
    threading.Thread(target=lambda: log.extend(service.stderr), daemon=True).start()
    try:
        base = None
        for line in service.stdout:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                base = found.group(0)
                break
        if base is None:
            print(f"the service did not start: {''.join(log)[-2000:]}\n\n0 passed, 1 failed")
            return 1
        threading.Thread(target=lambda: [None for _ in service.stdout], daemon=True).start()
        time.sleep(0.5)
        failed = asyncio.run(client.main(base, 8.0, ""))
        if "panicked" in "".join(log):
            print(f"the service panicked: {''.join(log)[-2000:]}\n\n0 passed, 1 failed")
            return 1
        return failed
    finally:
        service.terminate()
        try:
            service.wait(15)
        except subprocess.TimeoutExpired:
            service.kill()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/aiortc/run.py PATH/TO/loquent [card|pocket]")
    sys.exit(1 if main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "card") else 0)
