"""Fuzzes every parser of ours, each for so many minutes of processor time.

    python tests/fuzz/run.py [minutes=30] [folder=target/fuzz] [jobs=1] [TARGET…]

needs a nightly toolchain and cargo-fuzz (`rustup toolchain install nightly`, `cargo install cargo-fuzz`). Built once, without
a sanitizer: what is tried is Rust without `unsafe`; panics, overflows, endless loops and memory beyond all sense are found
all the same. A finding lies in FOLDER/artifacts/TARGET, and `cargo +nightly fuzz run -s none --fuzz-dir tests/fuzz
--target-dir FOLDER TARGET FILE` repeats it. Inputs that led to new code are kept in FOLDER/corpus, so that the next run goes on.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import time

import seeds

ROOT = pathlib.Path(__file__).resolve().parents[2]
options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
minutes, folder = float(options.get("minutes", 30)), pathlib.Path(options.get("folder", ROOT / "target" / "fuzz")).resolve()
known = seeds.write(folder / "seeds")
targets = [a for a in sys.argv[1:] if "=" not in a] or known

FUZZ = ["cargo", "+nightly", "fuzz"]
HERE = ["-s", "none", "--fuzz-dir", "tests/fuzz", "--target-dir", str(folder)]
if "built" not in options:
    subprocess.run([*FUZZ, "build", *HERE], cwd=ROOT, check=True)


# Inputs that are long only say the same again and again here.
LONGEST = {"speech": 8192, "websocket": 4096}


def spent(pid):
    """Processor seconds of a process so far, or nothing when it is gone."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fuzz(target):
    program = next(folder.glob(f"*/release/{target}"))
    corpus, artifacts = folder / "corpus" / target, folder / "artifacts" / target
    for at in (corpus, artifacts):
        at.mkdir(parents=True, exist_ok=True)
    log = folder / f"{target}.log"
    slow = ["-timeout=20", "-rss_limit_mb=3000", f"-max_len={LONGEST.get(target, 65536)}", "-len_control=20", "-print_final_stats=1"]
    with open(log, "w") as out:
        run = subprocess.Popen([program, corpus, folder / "seeds" / target, f"-artifact_prefix={artifacts}/", *slow],
                               stdout=out, stderr=out, cwd=ROOT)
        used = 0
        while (now := spent(run.pid)) is not None and run.poll() is None:
            used = now
            if used >= minutes * 60:
                run.send_signal(2)
                run.wait()
                break
            time.sleep(1)
    text = log.read_text(errors="replace")
    executed = re.findall(r"stat::number_of_executed_units: (\d+)", text) or re.findall(r"^#(\d+)", text, re.M)
    coverage = re.findall(r"cov: (\d+)", text)
    found = sorted(p.name for p in artifacts.iterdir())
    print(f"| `{target}` | {used / 60:.1f} | {executed[-1] if executed else 0} | {coverage[-1] if coverage else 0} | {len(found)} |",
          *found, flush=True)
    return found


print("| target | minutes | executions | edges | findings |\n| --- | --- | --- | --- | --- |", flush=True)
with concurrent.futures.ThreadPoolExecutor(int(options.get("jobs", 1))) as pool:
    findings = sum(pool.map(fuzz, targets), [])
sys.exit(1 if findings else 0)
