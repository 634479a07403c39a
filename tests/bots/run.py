"""Runs the bots of the README as a user does, while aiortc watches: python tests/bots/run.py BINARY."""

import asyncio
import contextlib
import os
import pathlib
import re
import subprocess
import sys
import urllib.request

from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

HERE = pathlib.Path(__file__).parent
VERSION = int(subprocess.run(["node", "-p", "process.versions.node.split('.')[0]"], capture_output=True, text=True).stdout)
# Node 20 has WebSocket behind a flag.
FLAG = ["--experimental-websocket"] if VERSION < 22 else []


async def watch(base, query, frames):
    """Plays the session by WHEP and counts its pictures."""
    session, token = (re.search(rf"{name}=(\w+)", query)[1] for name in ("session", "token"))
    peer = RTCPeerConnection()

    @peer.on("track")
    def began(track):
        async def count():
            with contextlib.suppress(MediaStreamError):
                while True:
                    frame = await track.recv()
                    if track.kind == "video":
                        frames.append(frame.width)

        asyncio.ensure_future(count())

    for kind in ("audio", "video"):
        peer.addTransceiver(kind, direction="recvonly")
    await peer.setLocalDescription(await peer.createOffer())
    headers = {"Content-Type": "application/sdp", "Authorization": f"Bearer {token}"}
    url = f"{base}/v1/sessions/{session}/whep"
    request = urllib.request.Request(url, peer.localDescription.sdp.encode(), headers)
    answer = await asyncio.to_thread(lambda: urllib.request.urlopen(request).read().decode())
    await peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    return peer, session


async def talk(base, command):
    """One bot: two lines, the second of which interrupts the first. Returns its events and the pictures seen."""
    pipe = asyncio.subprocess.PIPE
    bot = await asyncio.create_subprocess_exec(*command, base, stdin=pipe, stdout=pipe)
    frames, said = [], []
    first = (await asyncio.wait_for(bot.stdout.readline(), 20)).decode()
    peer, session = await watch(base, first, frames)

    async def listen():
        while line := await bot.stdout.readline():
            said.append(line.decode())

    listening = asyncio.ensure_future(listen())
    await asyncio.sleep(1)
    bot.stdin.write(b"One two three four five six seven eight nine ten eleven twelve thirteen.\n")
    await asyncio.sleep(2.5)
    bot.stdin.write(b"Stop.\n")
    for _ in range(80):
        await asyncio.sleep(0.1)
        if sum("speak_ended" in line for line in said) == 2:
            break
    bot.kill()
    await bot.wait()
    await listening
    await peer.close()
    end = urllib.request.Request(f"{base}/v1/sessions/{session}", method="DELETE")
    await asyncio.to_thread(lambda: urllib.request.urlopen(end).read())
    return "".join(said), frames


async def main():
    serve = [sys.argv[1], "serve", "--engine", "card", "--listen", "127.0.0.1:0"]
    env = {**os.environ, "LOQUENT__NET__BIND": "127.0.0.1"}
    service = subprocess.Popen(serve, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    passed = failed = 0
    try:
        base = None
        while base is None:
            line = service.stdout.readline()
            assert line, "the service ended before it listened"
            base = re.search(r"http://127\.0\.0\.1:\d+", line)
        for name, command in {"Python": [sys.executable, HERE / "bot.py"], "JavaScript": ["node", *FLAG, HERE / "bot.mjs"]}.items():
            said, frames = await talk(base[0], command)
            # Only the end of a segment says whether it was interrupted.
            ended = re.findall(r"interrupted['\"]?: (\w+)", said, re.I)
            results = {
                f"{name}: two segments, the first cut off ({ended})": [e.lower() for e in ended] == ["true", "false"],
                f"{name}: {len(frames)} pictures were seen": len(frames) >= 40,
            }
            for what, good in results.items():
                print(f"{'ok' if good else 'FAILED'}: {what}", "" if good else said, flush=True)
            passed += sum(results.values())
            failed += sum(not good for good in results.values())
    finally:
        service.terminate()
        service.wait(30)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


asyncio.run(main())
