"""An independent WebRTC client: speaks to a running Loquent and checks what comes back.

    python tests/aiortc/client.py http://127.0.0.1:8080 [seconds] [presenter]

Posts an offer (microphone both ways, video to us), sends a voice, counts decoded pictures and the returned voice,
deletes the session, and ends with `N passed, N failed`.
"""

import asyncio
import fractions
import random
import struct
import sys
import time
import urllib.error
import urllib.request

import aioice.ice
import av
import numpy as np
import pylibsrtp
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

RATE, PACKET = 48_000, 960


class Voice(MediaStreamTrack):
    """Voiced bursts: a second of 140 Hz and its harmonics, half a second of silence."""

    kind = "audio"

    def __init__(self):
        super().__init__()
        self.sample, self.began = 0, None

    async def recv(self):
        self.began = self.began or time.monotonic()
        await asyncio.sleep(max(0, self.began + self.sample / RATE - time.monotonic()))
        t = (self.sample + np.arange(PACKET)) / RATE
        s = sum(np.sin(2 * np.pi * 140 * h * t) / h for h in range(1, 9)) * 0.2 * (t % 1.5 < 1.0)
        frame = av.AudioFrame.from_ndarray((s * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self.sample, fractions.Fraction(1, RATE)
        self.sample += PACKET
        return frame


class Checks:
    """Counts what held and what did not, and says both."""

    def __init__(self):
        self.passed = self.failed = 0

    def __call__(self, what, value, limit, held):
        self.passed, self.failed = self.passed + bool(held), self.failed + (not held)
        print(f"{'  ok  ' if held else 'FAILED'}  {what}: {value}   ({limit})", flush=True)

    def end(self):
        print(f"\n{self.passed} passed, {self.failed} failed")
        return self.failed


async def watch(track, seen):
    try:
        while True:
            frame = await track.recv()
            if track.kind == "video":
                grey = frame.to_ndarray(format="gray")
                seen["pictures"].append((time.monotonic(), frame.pts, grey.shape, float(grey.std())))
                seen["last"] = grey
            else:
                samples = frame.to_ndarray().astype(np.float64).ravel() / 32768
                seen["voice"].append((time.monotonic(), float(np.sqrt((samples**2).mean())), frame.samples / frame.sample_rate))
    except MediaStreamError:
        pass


def request(url, method, body=None, kind=None):
    asked = urllib.request.Request(url, data=body, method=method, headers={"content-type": kind} if kind else {})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return answer.status, answer.headers, answer.read().decode()


def bad_messages(random):
    """Malformed and hostile texts and bytes for the data channel."""
    good = ['{"type":"interrupt"}', '{"type":"ping","t":1}']
    fixed = [
        "", "null", "[]", "{}", "0", '"x"', "{", '{"type":', '{"type":null}', '{"type":7}', '{"type":["interrupt"]}',
        '{"type":"closed"}', '{"type":"metrics"}', '{"type":"ping"}', '{"type":"ping","t":"x"}', '{"type":"ping","t":1e999}',
        '{"type":"interrupt","type":"ping"}', '{"type":"\\ud800"}', "[" * 20_000, '{"a":' * 10_000, "\x00", "x" * 60_000,
        b"", b"\xff\xfe", bytes(range(256)),
    ]
    spoilt = []
    for _ in range(75):
        text = list(random.choice(good))
        for _ in range(random.randint(1, 4)):
            text[random.randrange(len(text))] = chr(random.choice([0, 34, 92, 123, 125, 0x20AC, random.randrange(32, 127)]))
        spoilt.append("".join(text))
    return fixed + spoilt


async def attack(peer, channel, random):
    """Hostile input from a peer that is let in: messages, and packets under the right keys. Returns how many."""
    messages = bad_messages(random)
    for message in messages:
        channel.send(message)
        await asyncio.sleep(0.002)
    sender = peer.getSenders()[0]
    packets = 0

    async def send(packet):
        nonlocal packets
        try:
            await sender.transport._send_rtp(packet)
            packets += 1
        except pylibsrtp.Error:
            # Our own side does not even encrypt it.
            pass

    for _ in range(200):
        # RTP: any payload type and source, empty, random Opus, paddings and extensions that lie.
        first = random.choice([0x80, 0x80, 0x90, 0xA0, 0xB0, 0x8F])
        kind = random.choice([96, 97, 111, 0, 127]) | random.choice([0, 0x80])
        head = struct.pack("!BBHII", first, 96 if 192 <= kind <= 223 else kind, random.randrange(65536),
                           random.randrange(2**32), random.choice([sender._ssrc, random.randrange(2**32)]))
        await send(head + random.randbytes(random.randrange(200)))
    for _ in range(100):
        # RTCP: each kind, with counts and lengths that lie.
        words = random.randrange(12)
        length = random.choice([words, 0, 1, 0xFFFF])
        head = struct.pack("!BBHI", 0x80 | random.randrange(32), random.randrange(200, 208), length, sender._ssrc)
        await send(head + random.randbytes(4 * words))
        await asyncio.sleep(0.001)
    return len(messages) + packets


async def main(base, seconds, presenter):
    # Loopback is left out of the addresses by default; here it is the only one that is meant.
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]
    seen = {"pictures": [], "voice": []}
    peer = RTCPeerConnection()
    tasks = []
    peer.on("track", lambda track: tasks.append(asyncio.ensure_future(watch(track, seen))))
    peer.addTransceiver(Voice(), direction="sendrecv")
    peer.addTransceiver("video", direction="recvonly")
    channel = peer.createDataChannel("loquent")
    channel.on("message", lambda text: seen.setdefault("messages", []).append(text))
    await peer.setLocalDescription(await peer.createOffer())
    query = f"?presenter={presenter}" if presenter else ""
    began = time.monotonic()
    status, headers, answer = await asyncio.to_thread(
        request, f"{base}/v1/live{query}", "POST", peer.localDescription.sdp.encode(), "application/sdp"
    )
    location = headers["location"]
    await peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await asyncio.sleep(seconds)
    calm = len(seen["pictures"])
    hostile = await attack(peer, channel, random.Random(1))
    await asyncio.sleep(1)
    unmoved = len(seen["pictures"])
    await asyncio.sleep(3)
    unmoved = len(seen["pictures"]) - unmoved
    gone, _, _ = await asyncio.to_thread(request, base + location if location.startswith("/") else location, "DELETE")
    await asyncio.sleep(0.2)
    await peer.close()
    for task in tasks:
        task.cancel()

    check = Checks()
    check(f"pictures in 3 s after {hostile} hostile messages and packets", unmoved, "at least 60", unmoved >= 60)
    pictures, voice = seen["pictures"][:calm], seen["voice"]
    check("answer", status, "201", status == 201)
    check("farewell", gone, "200", gone == 200)
    if pictures:
        first = pictures[0][0] - began
        check("first picture", f"{first:.2f} s", "within 15 s", first < 15)
        steady = [p for p in pictures if p[0] > pictures[0][0] + 1]
        rate = len(steady) / max(0.1, steady[-1][0] - steady[0][0]) if len(steady) > 1 else 0
        check("decoded pictures", f"{len(pictures)}, {rate:.1f} a second", "at least 5 a second; 25 where the machine is not busy", rate >= 5)
        height, width = pictures[-1][2]
        check("size", f"{width}×{height}", "at least 256×256", min(width, height) >= 256)
        check("contrast", f"{pictures[-1][3]:.1f}", "not one grey", pictures[-1][3] > 5)
    else:
        check("decoded pictures", 0, "some", False)
    loud = [v for v in voice if v[1] > 0.02]
    length = sum(v[2] for v in voice)
    check("voice", f"{length:.1f} s, {len(loud)} of {len(voice)} frames loud", "at least a quarter loud", len(loud) > len(voice) / 4 > 10)
    check("messages", len(seen.get("messages", [])), "some", len(seen.get("messages", [])) > 0)
    return check.end()


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
    how_long = float(sys.argv[2]) if len(sys.argv) > 2 else 8.0
    sys.exit(1 if asyncio.run(main(where.rstrip("/"), how_long, sys.argv[3] if len(sys.argv) > 3 else "")) else 0)
