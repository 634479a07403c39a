"""One presenter, many WHEP viewers: what it costs, what a strangled viewer does to the others, and aiortc beside it.

    python tests/aiortc/fanout.py target/release/loquent [viewers=50] [relayed=5] [seconds=20] [engine=pocket]
    python tests/aiortc/fanout.py target/release/loquent cycles=500 [engine=card]

The viewers are `target/release/examples/viewers`, the bad network is `…/link` (`cargo build --release --examples`). The
relay is `whip_server.py`, to which the same session is published; it shows it to fewer viewers, for it encodes anew for
each. Processor time is that of the serving process alone, as the system counts it. `cycles=N` lets N viewers come and go instead, and looks
for descriptors and memory that stay. Ends with `N passed, N failed`.
"""

import asyncio
import json
import os
import pathlib
import sys
import time

import aiohttp
from aiortc import RTCPeerConnection
from client import Checks, Voice
from run import service
from whip import negotiate

HERE = pathlib.Path(__file__).parent


def cpu(pid):
    """Processor seconds used so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def lines(process):
    while line := await process.stdout.readline():
        yield line.decode().strip()


async def watch(examples, url, token, count, seconds, pid, strangle=None):
    """Runs viewers; returns what they saw, and the share of a core that `pid` used meanwhile."""
    command = [examples / "viewers", "--url", url, "--token", token, "--count", str(count), "--seconds", str(seconds)]
    link = None
    if strangle:
        command += ["--via", "link"]
    viewers = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    begun = share = None
    async for line in lines(viewers):
        if line.startswith("via "):
            link = await asyncio.create_subprocess_exec(
                examples / "link", "--to", line[4:], stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
            port = (await link.stdout.readline()).split()[1]
            link.stdin.write(strangle.encode() + b"\n")
            viewers.stdin.write(port + b"\n")
        elif line == "connected":
            await asyncio.sleep(2)
            begun = (time.monotonic(), cpu(pid))
        elif line.startswith("{"):
            report = json.loads(line)
    share = (cpu(pid) - begun[1]) / (time.monotonic() - begun[0])
    if link:
        link.stdin.close()
        await link.wait()
    await viewers.wait()
    return report, share


async def leaks(examples, url, token, cycles, pid, checks):
    """Viewers come and go, half of them with a DELETE, half without a word."""

    async def some(n):
        viewers = await asyncio.create_subprocess_exec(
            examples / "viewers", "--url", url, "--token", token, "--cycles", str(n))
        assert await viewers.wait() == 0, "the viewers broke off"
        await asyncio.sleep(15)
        return len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir())), int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) / 256

    before = await some(cycles // 5)
    after = await some(cycles - cycles // 5)
    told = f"{before[0]} → {after[0]} descriptors, {before[1]:.1f} → {after[1]:.1f} MiB"
    checks(f"{cycles // 5} and then {cycles} viewers that came and went", told, "no more than before, 5 MiB of slack",
           after[0] <= before[0] and after[1] < before[1] + 5)


def idle(pid, seconds):
    before = cpu(pid)
    time.sleep(seconds)
    return (cpu(pid) - before) / seconds


async def main(binary, base, pid, options):
    checks = Checks()
    examples = pathlib.Path(binary).resolve().parent.parent / "release/examples"
    count, relayed, seconds = options["viewers"], options["relayed"], options["seconds"]
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{base}/v1/sessions", json={}) as answer:
            told = await answer.json()
        here, token = f"{base}/v1/sessions/{told['id']}", told["token"]
        await asyncio.sleep(3)
        if options["cycles"]:
            await leaks(examples, f"{here}/whep", token, options["cycles"], pid, checks)
            return checks.end()
        # Somebody speaks, so that the pictures move.
        speaker = RTCPeerConnection()
        speaker.addTransceiver(Voice(), direction="sendonly")
        status, _, answer = await negotiate(http, f"{here}/whip", token, speaker)
        assert status == 201, answer
        await asyncio.sleep(3)
        # One viewer first: what remains is the presenter and its encoding.
        report, one = await watch(examples, f"{here}/whep", token, 1, seconds / 2, pid)
        print(f"        one viewer: {report['viewers'][0]}; the service takes {100 * one:.1f} % of a core")
        report, many = await watch(examples, f"{here}/whep", token, count, seconds, pid)
        each = (many - one) / (count - 1)
        rates = sorted(v["fps"] for v in report["viewers"])
        gaps = sorted(v["longest_gap_ms"] for v in report["viewers"])
        checks(f"{count} viewers, slowest and fastest", f"{rates[0]} and {rates[-1]} a second", "alike within 1 %", rates[0] >= 0.99 * rates[-1])
        checks("all of them at the full rate", f"{rates[0]} a second", "25 within 1 %; less where the machine is busy with other things",
               rates[0] >= 24.75)
        checks("decoded by the first", report["viewers"][0], "all of its pictures", report["viewers"][0]["undecodable"] == 0)
        checks("lost, out of order, orphaned", [sum(v[k] for v in report["viewers"]) for k in ("lost", "out_of_order", "orphans")],
               "none", not any(v["lost"] or v["orphans"] for v in report["viewers"]))
        print(f"        longest gaps: median {gaps[len(gaps) // 2]} ms, worst {gaps[-1]} ms; keyframes each: "
              f"{report['viewers'][-1]['keyframes']}; viewers' own process {report['own_cpu_percent']:.0f} % of a core")
        print(f"        the service: {100 * many:.1f} % of a core, "
              f"{100 * each:.2f} % for each further viewer")
        narrow = "down rate=250 queue=300"
        report, strangled = await watch(examples, f"{here}/whep", token, count, seconds, pid, narrow)
        rates = sorted(v["fps"] for v in report["viewers"][1:])
        checks("with one viewer at 250 kbit/s, the others", f"{rates[0]} to {rates[-1]} a second", "alike within 1 %",
               rates[0] >= 0.99 * rates[-1])
        checks("all of the others at the full rate", f"{rates[0]} a second", "as above", rates[0] >= 24.75)
        print(f"        the strangled one: {report['viewers'][0]}; keyframes of the others: {report['viewers'][-1]['keyframes']}; "
              f"the service {100 * strangled:.1f} % of a core")
        # The relay.
        relay = await asyncio.create_subprocess_exec(sys.executable, HERE / "whip_server.py", stdout=asyncio.subprocess.PIPE)
        other = (await relay.stdout.readline()).decode().strip()
        try:
            async with http.post(f"{here}/publish", json={"url": f"{other}/whip", "token": "secret"},
                                 headers={"Authorization": f"Bearer {token}"}) as answer:
                assert answer.status == 201, await answer.text()
            await asyncio.sleep(5)
            alone = idle(relay.pid, seconds / 2)
            report, busy = await watch(examples, f"{other}/whep", "", relayed, seconds, relay.pid)
            theirs = (busy - alone) / relayed
            rates = sorted(v["fps"] for v in report["viewers"])
            print(f"        aiortc: {rates[0]} to {rates[-1]} pictures a second for {relayed} viewers, {100 * busy:.0f} % of a core, "
                  f"{100 * theirs:.1f} % for each")
            checks("aiortc's cost of a viewer against ours", f"{theirs / each:.0f} times", "more", theirs > each)
        finally:
            relay.terminate()
            await relay.wait()
    return checks.end()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    given = dict(word.split("=") for word in sys.argv[2:])
    wanted = {"viewers": int(given.get("viewers", 50)), "relayed": int(given.get("relayed", 5)), "seconds": float(given.get("seconds", 20)),
              "cycles": int(given.get("cycles", 0))}
    with service(sys.argv[1], given.get("engine", "pocket"), pid=True) as (where, process):
        sys.exit(1 if asyncio.run(main(sys.argv[1], where, process, wanted)) else 0)
