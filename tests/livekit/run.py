"""A worker in a room: starts a Loquent and a LiveKit server of our own, plays the agent, and checks what happens.

    python tests/livekit/run.py target/release/loquent [card|pocket] [sdk]

With `sdk` the agent is also played by LiveKit's own packages (`requirements-sdk.txt`): their room client, their
`DataStreamAudioOutput`, their Beyond Presence plugin. Ends with `N passed, N failed`.
"""

import asyncio
import base64
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
from livekit.protocol import models, rtc

import server as lk

AVATAR, AGENT, ROOM = "bey-avatar-agent", "agent-1", "room"
passed = failed = 0


def check(what, value, limit, held):
    global passed, failed
    passed, failed = passed + bool(held), failed + (not held)
    print(f"{'  ok  ' if held else 'FAILED'}  {what}: {value}   ({limit})", flush=True)


class Loquent:
    """The program under test. `settings` go in as environment variables."""

    def __init__(self, binary, engine, **settings):
        env = dict(os.environ, LOQUENT__NET__BIND="127.0.0.1", **settings)
        command = [binary, "serve", "--engine", engine, "--listen", "127.0.0.1:0", "--stop-after", "180"]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        for line in self.process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.base = found.group(0)
                break
        else:
            sys.exit(f"the service did not start: {''.join(self.log)[-2000:]}\n\n0 passed, 1 failed")
        threading.Thread(target=lambda: [None for _ in self.process.stdout], daemon=True).start()
        time.sleep(0.3)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
        check("panics", sum("panicked" in line for line in self.log), "none", not any("panicked" in l for l in self.log))

    def post(self, path, body, kind="application/json", **headers):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        asked = urllib.request.Request(self.base + path, data, {"content-type": kind, "x-api-key": "k", **headers}, method="POST")
        try:
            with urllib.request.urlopen(asked, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    async def start(self, body, path="/v1/session", **more):
        return await asyncio.to_thread(self.post, path, body, **more)

    async def free(self, within=10.0):
        """Waits until no session is left."""
        until = time.monotonic() + within
        while time.monotonic() < until:
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(self.base + "/metrics", timeout=5).read().decode())
            states = re.findall(r'^loquent_sessions\{[^}]*\} (\d+)', text, re.M)
            if sum(map(int, states)) == 0:
                return True
            await asyncio.sleep(0.1)
        return False


async def until(condition, within, step=0.02):
    """Whether `condition` came true in time."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(step)
    return True


def tone(seconds, rate=24_000, hertz=220):
    t = np.arange(int(seconds * rate)) / rate
    return (np.sin(2 * np.pi * hertz * t) * 0.5 * 32767).astype("<i2").tobytes()


class Agent:
    """An agent made of packets: what livekit-agents' DataStreamAudioOutput puts on the wire, and what it listens to."""

    def __init__(self, server, kind=lk.Kind.AGENT, identity=AGENT, supports_started=True):
        self.me = server.add(identity, kind)
        self.server, self.supports_started = server, supports_started
        self.me.on_packet = self.hear
        self.calls, self.answers, self.acks = [], {}, {}
        self.fail = 0
        self.streams = 0

    def hear(self, packet):
        kind = packet.WhichOneof("value")
        now = time.monotonic()
        if kind == "rpc_request":
            request = packet.rpc_request
            self.calls.append((now, request.method, request.payload, request.version))
            self.me.say(packet.participant_identity, rpc_ack=models.RpcAck(request_id=request.id))
            error = None
            if self.fail:
                self.fail -= 1
                error = models.RpcError(code=1500, message="Application error in method handler")
            elif request.method == "lk.playback_started" and not self.supports_started:
                error = models.RpcError(code=1400, message="Method not supported at destination")
            answer = models.RpcResponse(request_id=request.id, error=error) if error else models.RpcResponse(request_id=request.id, payload="ok")
            self.me.say(packet.participant_identity, rpc_response=answer)
        elif kind == "rpc_ack":
            self.acks[packet.rpc_ack.request_id] = now
        elif kind == "rpc_response":
            answer = packet.rpc_response
            self.answers[answer.request_id] = answer.payload or answer.error.code

    def named(self, method):
        return [c for c in self.calls if c[1] == method]

    def finished(self):
        return [json.loads(c[2]) for c in self.named("lk.playback_finished")]

    def header(self, stream, rate=24_000, channels=1, **more):
        attributes = {"sample_rate": str(rate), "num_channels": str(channels)}
        head = models.DataStream.Header(
            stream_id=stream, timestamp=int(time.time() * 1000), topic="lk.audio_stream", mime_type="application/octet-stream",
            attributes=attributes, byte_header=models.DataStream.ByteHeader(name=f"AUDIO_{stream}"),
        )
        head.MergeFrom(models.DataStream.Header(**more))
        self.me.say(AVATAR, stream_header=head)

    def chunk(self, stream, index, content):
        self.me.say(AVATAR, stream_chunk=models.DataStream.Chunk(stream_id=stream, chunk_index=index, content=content))

    def trailer(self, stream):
        self.me.say(AVATAR, stream_trailer=models.DataStream.Trailer(stream_id=stream))

    def speak(self, pcm, rate=24_000, channels=1, end=True):
        """One segment, as fast as it goes; returns its stream's id."""
        self.streams += 1
        stream = f"{self.me.identity}-{self.streams}"
        self.header(stream, rate, channels)
        for index, at in enumerate(range(0, len(pcm), 15_000)):
            self.chunk(stream, index, pcm[at : at + 15_000])
        if end:
            self.trailer(stream)
        return stream

    async def call(self, method="lk.clear_buffer", **more):
        """The answer to a call, and the seconds until acknowledged."""
        request = models.RpcRequest(**{"id": os.urandom(8).hex(), "method": method, "version": 1, "response_timeout_ms": 8000, **more})
        began = time.monotonic()
        self.me.say(AVATAR, rpc_request=request)
        await until(lambda: request.id in self.answers, 8)
        return self.answers.get(request.id), self.acks.get(request.id, began + 99) - began


def loud(avatar, since=0.0):
    """Seconds of sound that the room heard of the avatar."""
    return sum(0.02 for at, _, level in list(avatar.voice) if at > since and level > 0.05)


def longest_gap(avatar, since):
    times = [at for at, _, _ in list(avatar.pictures) if at > since] + [time.monotonic()]
    return max(b - a for a, b in zip([since] + times, times))


def png(width=64, height=64):
    """A picture, made here."""
    rows = b"".join(b"\0" + bytes((40 + 2 * x, 90, 200 - 2 * y)[c] for x in range(width) for c in range(3)) for y in range(height))
    part = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def form(**fields):
    """multipart/form-data: (content type, body). A field is text or (file name, type, bytes)."""
    edge = "----" + os.urandom(8).hex()
    body = b""
    for name, value in fields.items():
        file, kind, data = value if isinstance(value, tuple) else (None, None, value.encode())
        extra = f'; filename="{file}"\r\nContent-Type: {kind}' if file else ""
        body += f'--{edge}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + data + b"\r\n"
    return f"multipart/form-data; boundary={edge}", body + f"--{edge}--\r\n".encode()


def token(**more):
    return lk.token(AVATAR, ROOM, attributes={"lk.publish_on_behalf": AGENT}, **more)


async def refusals(loquent, server):
    good = {"livekit_url": server.url, "livekit_token": token(), "avatar_id": "b9be11b8-89fb-4227-8f86-4a881393cbdb"}
    for what, change, status, code in [
        ("no JSON", None, 400, "malformed_json"),
        ("no room", {"livekit_url": None}, 400, "no_room"),
        ("a URL that is none", {"livekit_url": "ftp://x"}, 400, "bad_livekit_url"),
        ("a token that is none", {"livekit_token": "x.y"}, 400, "bad_livekit_token"),
        ("a token that has expired", {"livekit_token": token(lifetime=-5)}, 400, "bad_livekit_token"),
        ("a token that may not publish", {"livekit_token": token(canPublish=False)}, 400, "bad_livekit_token"),
        ("a token with a wrong signature", {"livekit_token": token(secret="other")}, 400, "livekit_token_refused"),
        ("nobody there", {"livekit_url": "ws://127.0.0.1:9"}, 502, "livekit_unreachable"),
        ("no LiveKit there", {"livekit_url": loquent.base}, 502, "livekit_failed"),
        ("an unknown presenter", {"avatar_id": "nobody"}, 404, "no_such_presenter"),
        ("a picture by URL", {"agent_image_url": "http://169.254.169.254/"}, 422, "picture_by_url"),
    ]:
        got, told = await loquent.start(b"{" if change is None else {**good, **change})
        check(f"refused: {what}", f"{got} {told['error']['code']}", f"{status} {code}", (got, told["error"]["code"]) == (status, code))
    kind, body = form(livekit_url=server.url, livekit_token=token(), avatar_image=("a.png", "image/png", b"no picture"))
    got, told = await loquent.start(body, "/v1/livekit", kind=kind)
    check("refused: a picture that is none", f"{got} {told['error']['code']}", "422 unusable_picture", (got, told["error"]["code"]) == (422, "unusable_picture"))
    check("places after refusals", await loquent.free(3), "all free", await loquent.free(3))


async def conversation(loquent, server):
    """The whole life of one worker."""
    agent = Agent(server)
    began = time.monotonic()
    status, told = await loquent.start({"livekit_url": server.url.replace("ws:", "http:"), "livekit_token": token(), "avatar_id": ""})
    check("joined", f"{status} {sorted(told)}", "201 with session_id", status == 201 and "session_id" in told)
    avatar = server.participants.get(AVATAR)
    if not avatar:
        return check("the avatar in the room", None, "there", False)
    query = {k: avatar.query.get(k) for k in ("protocol", "client_protocol", "auto_subscribe")}
    check("what it says of itself", query, "17, 0, 0", query == {"protocol": "17", "client_protocol": "0", "auto_subscribe": "0"})
    published = await until(lambda: len(avatar.pictures) > 25 and len(avatar.voice) > 25, 10)
    check("picture and voice before any speech", f"{len(avatar.pictures)} and {len(avatar.voice)} frames after {time.monotonic() - began:.1f} s",
          "more than 25 within 10 s", published)
    tracks = [(t.name, t.source, t.type) for t in avatar.tracks]
    wanted = [("avatar_audio", models.TrackSource.MICROPHONE, models.TrackType.AUDIO), ("avatar_video", models.TrackSource.CAMERA, models.TrackType.VIDEO)]
    check("tracks", tracks, "avatar_audio from a microphone, avatar_video from a camera", tracks == wanted)
    before = avatar.received.index("offer")
    check("order", avatar.received[:before + 1], "both tracks announced before the offer", sum("add_track" in r for r in avatar.received[:before]) == 2)
    check("voice while idle", f"{loud(avatar):.2f} s loud", "silence", loud(avatar) == 0)

    # First segment: everything is played.
    spoke = time.monotonic()
    agent.speak(tone(2.0))
    ended = await until(lambda: agent.finished(), 8)
    check("first segment finished", agent.finished(), "position 2.0 s, not interrupted, no other key",
          ended and set(agent.finished()[0]) == {"playback_position", "interrupted"}
          and abs(agent.finished()[0]["playback_position"] - 2.0) < 0.06 and agent.finished()[0]["interrupted"] is False)
    started = agent.named("lk.playback_started")
    check("told when it started", [(c[2], c[3]) for c in started], "once, empty payload, version 1", [(c[2], c[3]) for c in started] == [("", 1)])
    if ended and started:
        took = agent.named("lk.playback_finished")[0][0] - started[0][0]
        check("from start to end", f"{took:.2f} s", "about 2 s; more on a busy machine, never less", 1.6 < took < 4)
    await asyncio.sleep(0.5)
    check("heard in the room", f"{loud(avatar, spoke):.2f} s", "about 2 s", 1.8 < loud(avatar, spoke) < 2.2)

    # Second segment: interrupted, with more of it on the way.
    spoke = time.monotonic()
    agent.speak(tone(6.0), end=False)
    stream = f"{AGENT}-{agent.streams}"
    await until(lambda: len(agent.named("lk.playback_started")) > 1, 6)
    await asyncio.sleep(1.5)
    stranger = Agent(server, lk.Kind.STANDARD, "stranger")
    answer, _ = await stranger.call()
    check("interrupted by a stranger", answer, "reject", answer == "reject" and len(agent.finished()) == 1)
    cut = time.monotonic()
    answer, ack = await agent.call()
    check("interrupted by the agent", f"{answer}, acknowledged after {1000 * ack:.0f} ms", "ok, within 7 s", answer == "ok" and ack < 7)
    ended = await until(lambda: len(agent.finished()) > 1, 3)
    told_after = time.monotonic() - cut
    position = agent.finished()[1]["playback_position"] if ended else -1
    for index in range(20, 24):
        agent.chunk(stream, index, tone(0.3))
    agent.trailer(stream)
    await asyncio.sleep(1.2)
    heard = loud(avatar, spoke)
    played = cut - agent.named("lk.playback_started")[1][0]
    check("told how far it came", f"{agent.finished()[1:]}, {told_after:.2f} s after", f"interrupted at about {played:.2f} s, told within 2 s",
          ended and agent.finished()[1]["interrupted"] and abs(position - played) < 0.8 and told_after < 2)
    check("heard of it", f"{heard:.2f} s, position {position:.2f} s", "as much as it said, within 0.25 s", ended and abs(heard - position) < 0.25)
    late = loud(avatar, cut + 1.0)
    check("silent after the interruption", f"{late:.2f} s loud", "from 1 s on, but for a straggler", late < 0.05)

    # A third at once, by stereo at another rate; the agent answers with errors at first.
    agent.fail = 2
    stereo = np.repeat(np.frombuffer(tone(1.0, 48_000), "<i2"), 2).astype("<i2").tobytes()
    agent.speak(stereo, 48_000, 2)
    ended = await until(lambda: any(abs(f["playback_position"] - 1.0) < 0.06 for f in agent.finished()[2:]), 8)
    check("a call that failed is made again", [c[1] for c in agent.calls[-4:]], "up to three times, then ok", ended)

    await broken_line(loquent, server, agent, avatar)
    await hostile(server, agent, avatar)

    # The server sends everybody away for a moment.
    for participant in (avatar,):
        leave = rtc.LeaveRequest(reason=models.DisconnectReason.SERVER_SHUTDOWN, action=rtc.LeaveRequest.Action.RECONNECT)
        await participant.send(leave=leave)
    back = await until(lambda: server.participants.get(AVATAR) not in (None, avatar), 8)
    avatar = server.participants.get(AVATAR)
    back = back and await until(lambda: len(avatar.pictures) > 10, 8)
    check("sent away and back", back, "a new join with pictures", back)
    many = len(agent.finished())
    agent.speak(tone(0.6))
    ended = await until(lambda: len(agent.finished()) > many, 6)
    check("speaks after that", agent.finished()[many:], "0.6 s", ended and abs(agent.finished()[-1]["playback_position"] - 0.6) < 0.06)

    # The agent leaves for good.
    server.remove(stranger.me)
    update = agent.me.info(lk.State.DISCONNECTED)
    update.disconnect_reason = models.DisconnectReason.CLIENT_INITIATED
    await avatar.send(update=rtc.ParticipantUpdate(participants=[update]))
    left = await until(lambda: avatar.left is not None, 4)
    check("the agent leaves", f"worker left with reason {avatar.left}", "1, client initiated", left and avatar.left == 1)
    check("its place", await loquent.free(4), "free", await loquent.free(4))
    del server.participants[AGENT]


async def broken_line(loquent, server, agent, avatar):
    """The signalling breaks; pictures go on, and the session is resumed, then speech as well."""
    cut = time.monotonic()
    avatar.socket.transport.abort()
    resumed = await until(lambda: avatar.joins == 2, 5)
    synced = await until(lambda: avatar.sync is not None, 3)
    check("signalling cut", f"resumed after {time.monotonic() - cut:.2f} s", "with reconnect=1 and its sid", resumed and avatar.query.get("reconnect") == "1")
    sync = avatar.sync
    check("what it tells after", sync and (len(sync.publish_tracks), sync.answer.type, len(sync.data_channels)), "two tracks, its answer, data channels",
          synced and len(sync.publish_tracks) == 2 and sync.answer.type == "answer" and len(sync.data_channels) == 4)
    await asyncio.sleep(1.0)
    gap = longest_gap(avatar, cut)
    check("pictures meanwhile", f"longest gap {gap:.2f} s", "below 1 s: nothing was begun anew", gap < 1)
    many = len(agent.finished())
    agent.speak(tone(0.6))
    ended = await until(lambda: len(agent.finished()) > many, 6)
    check("speaks after that", agent.finished()[many:], "0.6 s", ended and abs(agent.finished()[-1]["playback_position"] - 0.6) < 0.06)


async def hostile(server, agent, avatar):
    """Packets nobody should send."""
    channel = avatar.channels["_reliable"]
    random = np.random.default_rng(1)
    many = len(agent.finished())
    for _ in range(100):
        channel.send(random.bytes(int(random.integers(1, 400))))
    channel.send(b"")
    channel.send("a text")
    channel.send(bytes(65_000))
    good = models.DataPacket(stream_chunk=models.DataStream.Chunk(stream_id="x", content=bytes(50))).SerializeToString()
    for _ in range(100):
        spoilt = bytearray(good)
        spoilt[random.integers(len(spoilt))] ^= int(random.integers(1, 256))
        channel.send(bytes(spoilt))
    # Streams as they must not be.
    for number, (rate, channels) in enumerate([("", "1"), ("24000", "0"), ("-1", "1"), ("9" * 30, "1"), ("24000", "64")]):
        agent.header(f"bad{number}", rate, channels)
        agent.chunk(f"bad{number}", 0, bytes(1000))
    agent.header("inline", inline_content=bytes(10))
    agent.header("packed", compression=models.DataStream.CompressionType.DEFLATE_RAW)
    agent.header("gap")
    agent.chunk("gap", 5, bytes(1000))
    agent.chunk("nobody", 2**64 - 1, bytes(1000))
    agent.trailer("nobody")
    agent.header("elsewhere", topic="lk.other")
    answers = [
        (await agent.call("lk.no_such_method"))[0],
        (await agent.call(version=7))[0],
        (await agent.call(payload="x" * 16_000))[0],
        (await agent.call("x" * 300, payload="\x00\xff"))[0],
    ]
    check("calls as they must not be", answers, "1400, 1404, 1402, 1400", answers == [1400, 1404, 1402, 1400])
    refused = await until(lambda: len(agent.finished()) >= many + 7, 6)
    told = agent.finished()[many:]
    check("streams as they must not be", f"{len(told)} told as not played", "7, each at 0 s and interrupted",
          refused and len(told) == 7 and all(f == {"playback_position": 0.0, "interrupted": True} for f in told))
    # Whoever is not the agent is not heard.
    stranger = server.participants["stranger"]
    stranger.say(AVATAR, stream_header=models.DataStream.Header(stream_id="s", topic="lk.audio_stream", attributes={"sample_rate": "24000", "num_channels": "1"}, byte_header=models.DataStream.ByteHeader(name="s")))
    spoke = time.monotonic()
    stranger.say(AVATAR, stream_chunk=models.DataStream.Chunk(stream_id="s", content=tone(0.3)))
    # A signalling server that talks nonsense is left alone, and the line is resumed.
    joins = avatar.joins
    await avatar.socket.send(b"\xff\xff\xff\xff")
    resumed = await until(lambda: avatar.joins > joins, 5)
    check("nonsense from the server", f"{avatar.joins - joins} resumes", "resumed", resumed)
    await asyncio.sleep(0.8)
    check("a stranger's speech", f"{loud(avatar, spoke):.2f} s heard", "not heard, but for a straggler of the agent's", loud(avatar, spoke) < 0.05)
    many = len(agent.finished())
    agent.speak(tone(0.6))
    ended = await until(lambda: len(agent.finished()) > many, 6)
    check("speaks after all that", agent.finished()[many:], "0.6 s", ended and abs(agent.finished()[-1]["playback_position"] - 0.6) < 0.06)


async def shapes(loquent, server):
    """The other plugins' calls, an agent without playback_started, and one that is found by its kind."""
    picture = png()
    payload = {"transport_type": "livekit", "properties": {"livekit_url": server.url, "livekit_token": lk.token("lemonslice-avatar-agent", ROOM), "livekit_session_id": "RM_1"},
               "agent_prompt": "smile", "idle_timeout": 60}
    lemon = form(payload=json.dumps(payload), image=("image.png", "image/png", picture))
    human = form(livekit_url=server.url, livekit_token=lk.token("bithuman-avatar-agent", ROOM), room_name=ROOM, async_mode="true",
                 avatar_image=("avatar.jpg", "image/jpeg", picture))
    bey = {"transport": "livekit", "avatar_id": "b9be11b8-89fb-4227-8f86-4a881393cbdb", "url": server.url, "token": lk.token("bey-avatar-agent", ROOM)}
    own = {"livekit": {"url": server.url, "token": lk.token("own", ROOM), "agent": AGENT}}
    calls = [
        ("Beyond Presence's JSON since 1.8", "bey-avatar-agent", "/v1/livekit/v1/sessions", bey, {}),
        ("LemonSlice's form with a picture", "lemonslice-avatar-agent", "/v1/livekit", lemon[1], {"kind": lemon[0]}),
        ("bitHuman's form with a picture", "bithuman-avatar-agent", "/v1/livekit", human[1], {"kind": human[0], "authorization": "Bearer t"}),
        ("our own JSON", "own", "/v1/livekit", own, {}),
    ]
    for what, identity, path, body, more in calls:
        global AVATAR
        AVATAR = identity
        agent = Agent(server, supports_started=False)
        status, told = await loquent.start(body, path, **more)
        avatar = server.participants.get(identity)
        seen = avatar is not None and await until(lambda: len(avatar.pictures) > 5, 10)
        if seen:
            agent.speak(tone(0.4))
            agent.speak(tone(0.4))
        ended = seen and await until(lambda: len(agent.finished()) == 2, 6)
        check(what, f"{status} {told.get('error', '')}, {agent.finished()}", "201, seen, two segments of 0.4 s",
              status == 201 and ended and all(abs(f["playback_position"] - 0.4) < 0.06 for f in agent.finished()))
        tries = len(agent.named("lk.playback_started"))
        check("an agent without playback_started", f"called {tries} times", "once", tries == 1)
        # The room ends.
        if avatar:
            await avatar.send(leave=rtc.LeaveRequest(reason=models.DisconnectReason.ROOM_DELETED, action=rtc.LeaveRequest.Action.DISCONNECT))
        check("the room ends", await loquent.free(5), "the place is free", await loquent.free(5))
        server.participants.clear()
    AVATAR = "bey-avatar-agent"


async def main(binary, engine, sdk):
    async with lk.Server() as server:
        closed = Loquent(binary, engine)
        got, told = await closed.start({"livekit_url": server.url, "livekit_token": token()})
        check("an address inside, by default", f"{got} {told['error']['code']}", "403 livekit_host_not_allowed", (got, told["error"]["code"]) == (403, "livekit_host_not_allowed"))
        closed.stop()
        loquent = Loquent(binary, engine, LOQUENT__LIVEKIT__ALLOW_PRIVATE="true", LOQUENT__LIVEKIT__AGENT_TIMEOUT_S="5")
        try:
            await refusals(loquent, server)
            await conversation(loquent, server)
            await shapes(loquent, server)
            if sdk:
                import sdk as real

                await real.run(loquent, server, check)
        finally:
            loquent.stop()
        check("mistakes of the test server", server.errors, "none", not server.errors)
        if failed:
            print("".join(loquent.log)[-6000:])
    print(f"\n{passed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/livekit/run.py PATH/TO/loquent [card|pocket] [sdk]")
    chosen = [a for a in sys.argv[2:] if a in ("card", "pocket")]
    sys.exit(1 if asyncio.run(main(sys.argv[1], (chosen or ["card"])[0], "sdk" in sys.argv[2:])) else 0)
