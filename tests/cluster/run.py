"""Three workers and two fronts with Debian's nats-server, each in a network namespace of its own: what becomes of sessions.

    python tests/cluster/run.py target/release/loquent [sessions=100] [dark=10]

Sessions placed and removed through both fronts; NATS silent for `dark` seconds; a worker drained while somebody speaks; a worker
killed (kill -9); nothing left over at the end. Those who speak are aiortc's. Needs root, `ip` (iproute2), nats-server, aiortc.
Where namespaces are forbidden it says so and does the same on 127.0.0.1, NATS being killed instead of cut off. Ends with
`N passed, N failed`; times are told, not judged.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import aioice.ice
from aiortc import RTCPeerConnection, RTCSessionDescription

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "aiortc"))
from client import Checks, Voice, watch  # noqa: E402

NODES = {"nats": 2, "w1": 11, "w2": 12, "w3": 13, "f1": 21, "f2": 22, "us": 100}
WORKERS, FRONTS = ["w1", "w2", "w3"], ["f1", "f2"]
SECRET = "for this test and no other, 32 or more"


def run(*words, check=True):
    return subprocess.run(words, check=check, capture_output=True, text=True)


class Net:
    """A namespace for each node, on one bridge; or loopback."""

    def __init__(self):
        self.tag = f"lq{os.getpid() % 100000}"
        self.apart = run("ip", "netns", "add", f"{self.tag}hub", check=False).returncode == 0
        self.ports = {}
        if not self.apart:
            print("network namespaces are forbidden here: all nodes on 127.0.0.1, and NATS is killed, not cut off", flush=True)
            return
        hub = f"{self.tag}hub"
        run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", hub, "link", "set", "bridge", "up")
        for name, n in NODES.items():
            space = self.tag + name
            run("ip", "netns", "add", space)
            run("ip", "-n", hub, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "-n", hub, "link", "set", name, "master", "bridge", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")
            run("ip", "-n", space, "address", "add", f"10.77.0.{n}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")

    def enter(self, name):
        """This process, and the threads it starts from now on, live there."""
        if self.apart:
            with open(f"/run/netns/{self.tag}{name}") as space:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(space.fileno(), 0x40000000) != 0:
                    raise OSError(ctypes.get_errno(), "setns")

    def ip(self, name):
        return f"10.77.0.{NODES[name]}" if self.apart else "127.0.0.1"

    def port(self, name):
        if self.apart:
            return 4222 if name == "nats" else 8080
        if name not in self.ports:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.ports[name] = free.getsockname()[1]
        return self.ports[name]

    def at(self, name):
        return f"{self.ip(name)}:{self.port(name)}"

    def start(self, name, words, log, **more):
        inside = ["ip", "netns", "exec", self.tag + name] if self.apart else []
        return subprocess.Popen([*inside, *words], stdout=log, stderr=log, env={**os.environ, **more})

    def cut(self, name, off):
        run("ip", "-n", f"{self.tag}hub", "link", "set", name, "down" if off else "up")

    def end(self):
        if self.apart:
            for name in [*NODES, "hub"]:
                run("ip", "netns", "del", self.tag + name, check=False)


class Cluster:
    def __init__(self, program, net, folder, places):
        self.net, self.folder, self.processes = net, folder, {}
        keys = folder / "keys"
        made = run(program, "key", "new", "test", "--file", str(keys), check=False)
        assert made.returncode == 0, made.stderr
        self.key = next(word for word in made.stdout.split() if word.startswith("lq_"))
        self.bus()
        for name in WORKERS + FRONTS:
            n = places if name in WORKERS else 0
            words = [program, "serve", "--engine", "card", "--sessions", str(n), "--listen", net.at(name)]
            words += ["--keys-file", str(keys), "--cluster", f"nats://{net.at('nats')}"]
            more = {"LOQUENT__CLUSTER__SECRET": SECRET, "LOQUENT__NET__BIND": net.ip(name)}
            more |= {"LOQUENT__SERVER__DRAIN_WAIT_S": "60", "LOQUENT__CLUSTER__PUBLIC_URL": f"http://{net.at('f1')}"}
            # All of this comes from one address, and an idle session of the test card costs little.
            more |= {"LOQUENT__SERVER__REQUESTS_PER_SECOND": "0", "LOQUENT__SERVER__MEMORY_RESERVE_MB": "0"}
            self.processes[name] = net.start(name, words, open(folder / f"{name}.log", "w"), **more)

    def bus(self):
        program = shutil.which("nats-server") or "/usr/sbin/nats-server"
        words = [program, "--addr", self.net.ip("nats"), "--port", str(self.net.port("nats"))]
        self.processes["nats"] = self.net.start("nats", words, open(self.folder / "nats.log", "a"))

    def dark(self, off):
        """NATS is away, or back."""
        if self.net.apart:
            self.net.cut("nats", off)
        elif off:
            self.processes["nats"].kill()
            self.processes["nats"].wait()
        else:
            self.bus()

    def ask(self, name, method, path, body=None, kind="application/json"):
        """Status, headers, JSON or text, seconds."""
        url = path if path.startswith("http") else f"http://{self.net.at(name)}{path}"
        headers = {"authorization": f"Bearer {self.key}"} | ({"content-type": kind} if body is not None else {})
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        began = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, told, text = answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, told, text = error.code, error.headers, error.read().decode()
        except OSError as error:
            return 0, {}, str(error), time.monotonic() - began
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        return status, told, text, time.monotonic() - began

    def figure(self, name, what):
        text = self.ask(name, "GET", "/metrics")[2]
        return next((float(l.split()[1]) for l in str(text).splitlines() if l.startswith(f"loquent_{what} ")), float("nan"))

    def used(self, names=WORKERS):
        return {name: int(self.figure(name, "slots_used")) for name in names}

    def until(self, held, seconds=20):
        """Waits until something holds; how long that took, or None."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if held():
                return time.monotonic() - began
            time.sleep(0.1)
        return None

    def end(self):
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


class Talker:
    """Speaks and watches, over a real WebRTC connection."""

    def __init__(self, cluster):
        self.cluster, self.seen, self.tasks = cluster, {"pictures": [], "voice": []}, []

    async def begin(self, front):
        self.peer = RTCPeerConnection()
        self.peer.on("track", lambda track: self.tasks.append(asyncio.ensure_future(watch(track, self.seen))))
        self.peer.addTransceiver(Voice(), direction="sendrecv")
        self.peer.addTransceiver("video", direction="recvonly")
        await self.peer.setLocalDescription(await self.peer.createOffer())
        offer = self.peer.localDescription.sdp.encode()
        status, headers, answer, _ = await asyncio.to_thread(self.cluster.ask, front, "POST", "/v1/live", offer, "application/sdp")
        assert status == 201, (status, answer)
        self.at = headers["location"]
        await self.peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        began = time.monotonic()
        while not self.seen["pictures"] and time.monotonic() - began < 20:
            await asyncio.sleep(0.1)
        return bool(self.seen["pictures"])

    def gap(self, since):
        """The longest time without a picture since then, now included, in seconds."""
        times = [since] + [p[0] for p in self.seen["pictures"] if p[0] > since] + [time.monotonic()]
        return max(b - a for a, b in zip(times, times[1:]))

    async def end(self, front):
        status = (await asyncio.to_thread(self.cluster.ask, front, "DELETE", self.at))[0]
        await self.close()
        return status

    async def close(self):
        await self.peer.close()
        for task in self.tasks:
            task.cancel()


def code(answer):
    return answer[2]["error"]["code"] if isinstance(answer[2], dict) and "error" in answer[2] else answer[2]


async def main(program, sessions, dark):
    check, net = Checks(), Net()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="loquent-cluster-"))
    addresses = [net.ip("us")]
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: addresses
    cluster = Cluster(program, net, folder, sessions // 2)
    pool = ThreadPoolExecutor(16)
    in_thread = lambda *a, **k: asyncio.get_running_loop().run_in_executor(pool, lambda: a[0](*a[1:], **k))  # noqa: E731
    ask, until = (lambda *a: in_thread(cluster.ask, *a)), (lambda held, s=20: in_thread(cluster.until, held, s))
    try:
        net.enter("us")
        places = 3 * (sessions // 2)
        seen = lambda: all(cluster.figure(n, "cluster_slots") == places for n in WORKERS + FRONTS)  # noqa: E731
        took = await until(seen, 60)
        check("all five see all places", f"{places} after {took and round(took, 1)} s", "all", took is not None)

        # Those who speak, one for each worker: more are begun until every worker has one.
        talkers = {}
        for n in range(12):
            before = await in_thread(cluster.used)
            talker = Talker(cluster)
            came = await talker.begin(FRONTS[n % 2])
            after = await in_thread(cluster.used)
            where = next((w for w in WORKERS if after[w] > before[w]), None)
            if not came or where is None or where in talkers:
                await talker.end(FRONTS[n % 2])
                await until(lambda: sum(cluster.used().values()) == len(talkers), 10)
            else:
                talkers[where] = talker
            if len(talkers) == 3:
                break
        check("somebody speaks at each worker, through a front", sorted(talkers), "all three", len(talkers) == 3)

        # 1. Placed through both fronts, and removed through the other one.
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(FRONTS[n % 2], "POST", "/v1/sessions", b"{}") for n in range(sessions)))
        whole = time.monotonic() - began
        begun = [a[2] for a in answers if a[0] == 201]
        times = sorted(1000 * a[3] for a in answers)
        told = f"{len(begun)} in {whole:.1f} s, each {statistics.median(times):.0f} ms, p95 {times[int(0.95 * len(times))]:.0f} ms"
        check("sessions placed", told, f"{sessions}", len(begun) == sessions)
        used = await in_thread(cluster.used)
        # A front hears of what the other placed with the next beat: so long each may take the same worker for the freest.
        check("and spread", used, "within a third of each other, and six", max(used.values()) <= 1.34 * min(used.values()) + 6)
        listed = (await ask("f2", "GET", "/v1/sessions"))[2].get("sessions", [])
        check("seen from a front", len(listed), f"{sessions + 3}", len(listed) == sessions + 3)
        changed = await asyncio.gather(*(ask(w, "PATCH", f"/v1/sessions/{begun[n]['id']}", b'{"background":"keep"}') for n, w in enumerate(WORKERS + FRONTS)))
        check("changed from every node", [a[0] for a in changed], "200", all(a[0] == 200 for a in changed))
        ended = await asyncio.gather(*(ask(FRONTS[(n + 1) % 2], "DELETE", f"/v1/sessions/{s['id']}") for n, s in enumerate(begun)))
        check("removed through the other front", sum(a[0] == 204 for a in ended), f"{sessions}", all(a[0] == 204 for a in ended))
        check("left", await in_thread(cluster.used), "one each", sum((await in_thread(cluster.used)).values()) == 3)

        # 2. NATS is away.
        calm, kept = time.monotonic(), (await ask("f1", "POST", "/v1/sessions", b"{}"))[2]
        cluster.dark(True)
        refused = await ask("f1", "POST", "/v1/sessions", b"{}")
        check("in the first moment: refused, not hung", f"{refused[0]} {code(refused)} after {refused[3]:.1f} s", "503", refused[0] == 503 and refused[1]["retry-after"])
        refused = await ask("f2", "GET", f"/v1/sessions/{kept['id']}")
        check("then: at once", f"{refused[0]} {code(refused)} after {refused[3]:.1f} s", "cluster_unreachable", code(refused) == "cluster_unreachable")
        own = await ask("w1", "POST", "/v1/sessions", b"{}")
        check("a worker places on itself", own[0], "201", own[0] == 201)
        await asyncio.sleep(max(0, calm + dark - time.monotonic()))
        gaps = {w: round(t.gap(calm), 2) for w, t in talkers.items()}
        cluster.dark(False)
        check("media meanwhile: longest gap in s", gaps, "goes on", all(g < 3 for g in gaps.values()))
        back = await until(lambda: cluster.ask("f1", "GET", f"/v1/sessions/{kept['id']}")[0] == 200)
        check("NATS is back: sessions are found after", f"{back and round(back, 1)} s", "found", back is not None)
        back = await until(lambda: all(cluster.figure(n, "cluster_slots") == places for n in WORKERS + FRONTS))
        again = await ask("f2", "POST", "/v1/sessions", b"{}")
        check("and placed", again[0], "201", back is not None and again[0] == 201)
        for session in (kept, own[2], again[2]):
            await ask("f1", "DELETE", f"/v1/sessions/{session['id']}")
        check("left", await in_thread(cluster.used), "one each", sum((await in_thread(cluster.used)).values()) == 3)

        # 3. A worker is drained while somebody speaks there.
        calm = time.monotonic()
        cluster.processes["w2"].send_signal(signal.SIGTERM)
        heard = await until(lambda: 'loquent_cluster_nodes{state="draining"} 1' in str(cluster.ask("f1", "GET", "/metrics")[2]))
        check("a drain is known after", f"{heard and round(heard, 2)} s", "known", heard is not None)
        before = (await in_thread(cluster.used))["w2"]
        new = await asyncio.gather(*(ask(FRONTS[n % 2], "POST", "/v1/sessions", b"{}") for n in range(8)))
        after = (await in_thread(cluster.used))["w2"]
        check("new sessions there", after - before, "0 of 8", after == before and all(a[0] == 201 for a in new))
        await asyncio.sleep(3)
        gap = talkers["w2"].gap(calm)
        check("who speaks there is not disturbed: longest gap", f"{gap:.2f} s", "goes on", gap < 3)
        left = await talkers.pop("w2").end("f2")
        check("and leaves when done", left, "200", left == 200)
        ended = await in_thread(cluster.processes["w2"].wait, 20)
        check("then the worker ends, with", ended, "0", ended == 0)

        # 4. A worker is killed.
        there = [a[2]["id"] for a in new]
        node = talkers["w3"].at[-12:]
        lost = [i for i in there if i.endswith(node)]
        cluster.processes["w3"].kill()
        cluster.processes["w3"].wait()
        first = await ask("f1", "PATCH", talkers["w3"].at, b"x", "application/trickle-ice-sdpfrag")
        check("asked at once", f"{first[0]} {code(first)} after {first[3]:.1f} s", "503 or 410, not hung", first[0] in (503, 410) and first[3] < 6)
        took = await until(lambda: cluster.ask("f2", "DELETE", talkers["w3"].at)[0] == 410, 10)
        gone = await ask("f1", "DELETE", talkers["w3"].at)
        where = gone[2]["error"].get("reconnect") if isinstance(gone[2], dict) else None
        check("told that it is gone after", f"{took and round(took, 1)} s: {code(gone)}", "410 worker_gone", took is not None and code(gone) == "worker_gone")
        check("and where to go", where, "the front", where == f"http://{net.at('f1')}/v1/live")
        answers = await asyncio.gather(*(ask("f1", "GET", f"/v1/sessions/{i}") for i in lost))
        check("its other sessions too", [a[0] for a in answers], "410", all(a[0] == 410 for a in answers))
        await talkers.pop("w3").close()
        anew = Talker(cluster)
        check("who comes again is shown again", await anew.begin("f1"), "pictures", anew.seen["pictures"])
        gap = talkers["w1"].gap(calm)
        check("others are not disturbed: longest gap", f"{gap:.2f} s", "goes on", gap < 3)

        # 5. Nothing is left.
        for n, session in enumerate(i for i in there if i not in lost):
            await ask(FRONTS[n % 2], "DELETE", f"/v1/sessions/{session}")
        await anew.end("f2")
        await talkers["w1"].end("f2")
        empty = await until(lambda: cluster.used(["w1"])["w1"] == 0, 10)
        listed = (await ask("f1", "GET", "/v1/sessions"))[2].get("sessions")
        check("places taken, sessions listed at the end", f"{await in_thread(cluster.used, ['w1'])}, {listed}", "none", empty is not None and listed == [])
        for name in ["w1", *FRONTS]:
            cluster.processes[name].send_signal(signal.SIGTERM)
        codes = [await in_thread(cluster.processes[n].wait, 20) for n in ["w1", *FRONTS]]
        check("ends", codes, "0", codes == [0, 0, 0])
        logs = "".join((folder / f"{n}.log").read_text() for n in WORKERS + FRONTS)
        check("panics", logs.count("panicked"), "0", "panicked" not in logs)
    finally:
        cluster.end()
        net.end()
        if check.failed:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-1500:]}")
        shutil.rmtree(folder)
    return check.end()


if __name__ == "__main__":
    options = dict(word.split("=", 1) for word in sys.argv[2:])
    missing = [p for p in ("ip", "nats-server") if not shutil.which(p) and not os.path.exists(f"/usr/sbin/{p}")]
    if missing:
        print(f"missing: {missing}; apt-get install -y iproute2 nats-server\n\n0 passed, 1 failed")
        sys.exit(1)
    sys.exit(1 if asyncio.run(main(os.path.abspath(sys.argv[1]), int(options.get("sessions", 100)), float(options.get("dark", 10)))) else 0)
