"""schemathesis against the served OpenAPI document: python tests/openapi/run.py BINARY [examples per operation].

Starts the service with the test card and short-lived sessions, and ends with "N passed, M failed".
"""

import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
CHECKS = "no_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main():
    binary, examples = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "4"
    short = {"LOQUENT__SESSION__IDLE_TIMEOUT_S": "1", "LOQUENT__NET__BIND": "127.0.0.1"}
    serve = [binary, "serve", "--engine", "card", "--sessions", "8", "--listen", "127.0.0.1:0"]
    service = subprocess.Popen(serve, env={**os.environ, **short}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        base = None
        while base is None:
            line = service.stdout.readline()
            assert line, "the service ended before it listened"
            base = re.search(r"http://127\.0\.0\.1:\d+", line)
        command = [
            pathlib.Path(sys.executable).with_name("schemathesis"), "run", f"{base[0]}/v1/openapi.json",
            "--checks", CHECKS, "--phases", "coverage,fuzzing", "--max-examples", examples, "--seed", "1",
            "--request-timeout", "20", "--no-color",
        ]
        ran = subprocess.run(command, env={**os.environ, "SCHEMATHESIS_HOOKS": "checks", "LOQUENT_BASE": base[0]}, cwd=HERE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(ran.stdout)
        alive = service.poll() is None
    finally:
        service.terminate()
        log = service.communicate(timeout=30)[1]
    panics = len(re.findall(r"panicked at", log))
    results = {"schemathesis": ran.returncode == 0, "the service lives": alive, "no panic": panics == 0}
    for what, good in results.items():
        print(f"{'ok' if good else 'FAILED'}: {what}")
    failed = sum(not good for good in results.values())
    print(f"{len(results) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
