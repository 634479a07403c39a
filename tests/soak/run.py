"""A scripted population for hours: visitors join, speak, idle, lose their network, leave; then the books are checked.

    python tests/soak/run.py target/release/loquent [minutes=2] [engine=pocket] [seed=1]

2 minutes, 20 or 240. One session lives through all of it and is recorded at the beginning and at the end, speaking bursts: how
its lips stand to its voice then and now is the drift. Two more places are taken and given back by visitors, each a session of
its own, driven over a WebSocket and watched by `target/release/examples/viewers` (`cargo build --release --examples`); a lost
network is that process stopped for a while (SIGSTOP), or killed. Needs aiohttp, numpy and ffmpeg. Ends with `N passed, N failed`.
"""

import array
import asyncio
import contextlib
import math
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import aiohttp

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "aiortc"))
from client import Checks  # noqa: E402

RATE = 16_000
BURSTS = 6
# 40 ms a picture: half of what is allowed is one picture's worth of luck.
DRIFT_MS = 40
# Idle connections and helper threads are ended after 10 s.
REST = 14


def tone(seconds, level=0.5):
    """Vowel-like: a buzz with two formants, which opens mouths."""
    out = array.array("h")
    for i in range(int(seconds * RATE)):
        t = i / RATE
        buzz = sum(math.sin(2 * math.pi * 140 * k * t) * (1.0 if k in (5, 6, 8) else 0.35) for k in range(1, 14)) / 6
        edge = min(1, i / 80, (seconds * RATE - i) / 80)
        out.append(int(32000 * level * edge * max(-1, min(1, buzz))))
    return out.tobytes()


async def gone(process):
    """Ends a process without a word."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


class Books:
    """What the process holds, taken while nobody but the long session is there."""

    def __init__(self, pid):
        proc = pathlib.Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        self.memory, self.peak = (int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
        self.threads = int(status["Threads"])
        self.descriptors = len(list((proc / "fd").iterdir()))

    def __str__(self):
        return f"{self.memory:.1f} MiB (at most {self.peak:.1f}), {self.threads} threads, {self.descriptors} descriptors"


class Soak:
    def __init__(self, binary, http, base, pid, chance):
        self.viewers = pathlib.Path(binary).resolve().parent.parent / "release/examples/viewers"
        self.http, self.base, self.pid, self.chance = http, base, pid, chance
        self.counts = {}
        self.wrong = []

    def count(self, what):
        self.counts[what] = self.counts.get(what, 0) + 1

    async def begin(self, limits):
        async with self.http.post(f"{self.base}/v1/sessions", json={"limits": limits}) as answer:
            if answer.status == 503:
                self.count("refused")
                return None
            assert answer.status == 201, await answer.text()
            return await answer.json()

    async def end(self, session):
        async with self.http.delete(f"{self.base}/v1/sessions/{session['id']}") as answer:
            assert answer.status in (204, 404, 410), answer.status

    async def speak(self, socket, seconds):
        """Speaks and waits until it was played."""
        await socket.send_json({"type": "set", "rate": RATE})
        await socket.send_bytes(tone(seconds))
        await socket.send_json({"type": "speak_end"})
        while True:
            message = await socket.receive_json(timeout=seconds + 20)
            if message["type"] == "speak_ended":
                return message
            if message["type"] in ("closed", "error"):
                raise RuntimeError(f"{message}")

    async def visitor(self):
        """One visit, from its beginning to one of the ends that visits have."""
        session = await self.begin({"idle_timeout_s": 20})
        if session is None:
            await asyncio.sleep(self.chance.uniform(1, 4))
            return
        self.count("visits")
        watching = None
        try:
            if self.chance.random() < 0.8:
                watching = await self.viewer(session)
            async with self.http.ws_connect(f"{self.base}{session['urls']['websocket']}") as socket:
                for _ in range(self.chance.randint(1, 4)):
                    what = self.chance.choice(["speak", "speak", "idle", "interrupt", "dark"])
                    self.count(what)
                    if what == "idle":
                        await asyncio.sleep(self.chance.uniform(0.5, 3))
                    elif what == "interrupt":
                        await socket.send_json({"type": "set", "rate": RATE})
                        await socket.send_bytes(tone(4))
                        await asyncio.sleep(self.chance.uniform(0.5, 2))
                        await socket.send_json({"type": "interrupt"})
                    elif what == "dark" and watching and watching.returncode is None:
                        watching.send_signal(signal.SIGSTOP)
                        await asyncio.sleep(self.chance.uniform(1, 5))
                        if self.chance.random() < 0.3:
                            self.count("killed")
                            await gone(watching)
                        else:
                            watching.send_signal(signal.SIGCONT)
                    else:
                        await self.speak(socket, self.chance.uniform(0.5, 3))
            if self.chance.random() < 0.5:
                await self.end(session)
            else:
                # Leaves without a word: the idle limit ends the session.
                self.count("left without a word")
        except (RuntimeError, asyncio.TimeoutError, aiohttp.ClientError, TypeError) as error:
            self.wrong.append(repr(error))
            await self.end(session)
        finally:
            if watching:
                await gone(watching)

    async def full_house(self, long):
        """Every place taken, watched and spoken to at the same time."""
        sessions = [s for s in await asyncio.gather(self.begin({}), self.begin({})) if s]
        watching = [await self.viewer(s) for s in sessions]

        async def talk(session):
            async with self.http.ws_connect(f"{self.base}{session['urls']['websocket']}") as socket:
                await self.speak(socket, 4)

        await asyncio.gather(*(talk(s) for s in [long, *sessions]))
        for session, viewer in zip(sessions, watching):
            await gone(viewer)
            await self.end(session)

    async def value(self, name):
        async with self.http.get(f"{self.base}/metrics") as answer:
            text = await answer.text()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    async def alone(self):
        """Waits until the long session alone is left, and helpers of the others as well."""
        for _ in range(60):
            if await self.value("loquent_slots_used") == 1:
                break
            await asyncio.sleep(1)
        await asyncio.sleep(REST)

    async def viewer(self, session):
        return await asyncio.create_subprocess_exec(
            self.viewers, "--url", f"{self.base}{session['urls']['whep']}", "--token", session["token"], "--count", "1",
            "--seconds", "600", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def visitors(self, until):
        while time.monotonic() < until:
            await self.visitor()
            await asyncio.sleep(self.chance.uniform(0.2, 2))

    async def recorded(self, session, folder):
        """Bursts of the long session into a recording; the median of lips minus voice, milliseconds."""
        at, headers = f"{self.base}/v1/sessions/{session['id']}/recording", {"Authorization": f"Bearer {session['token']}"}
        async with self.http.post(at, headers=headers) as answer:
            assert answer.status == 201, await answer.text()
        async with self.http.ws_connect(f"{self.base}{session['urls']['websocket']}") as socket:
            for _ in range(BURSTS):
                await asyncio.sleep(1.2)
                await self.speak(socket, 0.6)
        await asyncio.sleep(1)
        async with self.http.delete(at, headers=headers) as answer:
            told = await answer.json()
            file = told["parts"][0]["file"]
        return offset(folder / file)


def offset(film):
    """Median over all bursts of (mouth moves − voice begins), milliseconds, in a recorded film."""
    import numpy as np

    run = ["ffmpeg", "-v", "error", "-i", str(film)]
    voice = np.frombuffer(subprocess.run(run + ["-ac", "1", "-ar", "8000", "-f", "s16le", "-"], check=True, capture_output=True).stdout, np.int16)
    # Each picture at its own time, 100 a second, so that held ones do not shift what follows.
    raw = subprocess.run(run + ["-vf", "fps=100,scale=256:256,format=gray", "-f", "rawvideo", "-"], check=True, capture_output=True).stdout
    pictures = np.frombuffer(raw, np.uint8).reshape(-1, 256, 256)
    loud = np.abs(voice[: len(voice) // 80 * 80].astype(float)).reshape(-1, 80).max(axis=1) > 2000
    mouth = pictures[:, 132:196, 88:168].astype(float)
    found = []
    for at in range(60, len(loud) - 40):
        # The first loud centisecond after half a second of silence.
        if not loud[at] or loud[at - 50:at].any() or at + 60 > len(mouth):
            continue
        rest = mouth[at - 30:at - 5].mean(axis=0)
        moved = np.abs(mouth[at - 20:at + 60] - rest).mean(axis=(1, 2))
        least, most = np.median(moved[:12]), moved.max()
        over = np.nonzero(moved > least + 0.4 * (most - least))[0]
        if most > least + 1 and len(over):
            found.append((over[0] - 20) * 10)
    if len(found) < BURSTS // 2:
        raise RuntimeError(f"only {len(found)} of {BURSTS} bursts were found in {film}")
    return statistics.median(found)


async def main(binary, base, pid, options, folder, log):
    checks, chance = Checks(), random.Random(options["seed"])
    minutes = options["minutes"]
    async with aiohttp.ClientSession() as http:
        soak = Soak(binary, http, base, pid, chance)
        long = await soak.begin({})
        await asyncio.sleep(2)
        before = await soak.recorded(long, folder)
        # Everything is touched before the books are opened: all places at once, caches, pools, the allocator's arenas.
        for _ in range(3):
            await soak.full_house(long)
        # Fifteen seconds of visits are too few: what three openings at once need is then seen after the books were opened.
        until = time.monotonic() + min(max(60 * minutes / 4, 60), 300)
        await asyncio.gather(*(soak.visitors(until) for _ in range(3)))
        await soak.alone()
        first, began = Books(pid), time.monotonic()
        print(f"        at the beginning: {first}")
        while time.monotonic() < began + 60 * minutes * 3 / 4:
            step = time.monotonic() + min(600, 10 * minutes, began + 60 * minutes * 3 / 4 - time.monotonic())

            async def token():
                # A session's token lives shorter than this session.
                async with http.post(f"{base}/v1/sessions/{long['id']}/token") as answer:
                    long.update(await answer.json())

            async def chatter():
                while time.monotonic() < step - 5:
                    async with http.ws_connect(f"{base}{long['urls']['websocket']}") as socket:
                        await soak.speak(socket, 2)
                    await asyncio.sleep(3)

            await token()
            await asyncio.gather(*(soak.visitors(step) for _ in range(3)), chatter())
            print(f"        after {(time.monotonic() - began) / 60:.1f} min: {Books(pid)}; {soak.counts}", flush=True)
        await soak.alone()
        after = await soak.recorded(long, folder)
        await soak.alone()
        last = Books(pid)
        checks("visits", soak.counts, "some, and nothing unforeseen", soak.counts.get("visits", 0) > minutes and not soak.wrong)
        for wrong in soak.wrong[:5]:
            print(f"        unforeseen: {wrong}")
        # The allocator keeps what a full house needed, so that is what nothing may grow beyond: while it ran, and at its end.
        checks("memory at most", f"{first.peak:.1f} → {last.peak:.1f} MiB, {last.memory:.1f} at the end", "within 5 % of the first full houses",
               last.peak <= first.peak * 1.05)
        checks("descriptors", f"{first.descriptors} → {last.descriptors}", "none more", last.descriptors <= first.descriptors)
        checks("threads", f"{first.threads} → {last.threads}", "none more", last.threads <= first.threads)
        checks("lips against voice", f"{before:.0f} → {after:.0f} ms", f"the same within {DRIFT_MS} ms", abs(after - before) <= DRIFT_MS)
        left, rebuilt = await soak.value("loquent_slots_used"), await soak.value("loquent_engine_rebuilds_total")
        checks("sessions left", left, "the long one", left == 1)
        checks("engine built anew", rebuilt, "never", rebuilt == 0)
        checks("panics in the log", log.read_text().count("panicked"), "none", "panicked" not in log.read_text())
        await soak.end(long)
    return checks.end()


def start(binary, engine, folder, log):
    env = {**os.environ, "LOQUENT__NET__BIND": "127.0.0.1", "LOQUENT__SERVER__RECORDINGS_DIR": str(folder)}
    # Three at once and who watches them share the processor: the smaller pictures, always.
    sets = ["engine.size=256", "session.idle_timeout_s=0", "session.max_session_s=0", "net.failed_after_ms=3000"]
    args = [binary, "serve", "--engine", engine, "--listen", "127.0.0.1:0", "--sessions", "3"]
    for one in sets:
        args += ["--set", one]
    process = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
    for line in process.stdout:
        if line.startswith("Open http://"):
            return process, line.split()[1].rstrip("/")
    raise SystemExit(f"the service did not start: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    options = {"minutes": 2.0, "engine": "pocket", "seed": 1}
    for word in sys.argv[2:]:
        name, text = word.split("=")
        options[name] = type(options[name])(text)
    with tempfile.TemporaryDirectory(prefix="loquent-soak-") as name:
        folder = pathlib.Path(name)
        log = folder / "log"
        process, base = start(sys.argv[1], options["engine"], folder, log)
        try:
            code = asyncio.run(main(sys.argv[1], base, process.pid, options, folder, log))
            process.send_signal(signal.SIGTERM)
            ended = process.wait(30)
            print(f"        the service ended with {ended}")
        finally:
            if process.poll() is None:
                process.kill()
            if log.exists() and "panicked" in log.read_text():
                print(log.read_text()[-3000:])
    sys.exit(code or ended)
