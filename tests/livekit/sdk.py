"""The agent played by LiveKit's own packages: their room client (a native library), their `DataStreamAudioOutput` and
their Beyond Presence plugin, with nothing changed but the plugin's URL.

Not tried here: LiveKit's own server, which cannot be had where these tests run; our test server stands in for it.
"""

import asyncio
import time

import aiohttp
import numpy as np
from livekit import rtc
from PIL import Image
from livekit.protocol import models
from livekit.protocol import rtc as wire
from livekit.agents.voice.avatar import DataStreamAudioOutput
from livekit.plugins import bey
from livekit.plugins.lemonslice.api import LemonSliceAPI

import server as lk

ROOM = "sdk"
AVATAR, AGENT = "bey-avatar-agent", "real-agent"
RATE = 24_000
LEAVE = wire.LeaveRequest(reason=models.DisconnectReason.ROOM_DELETED, action=wire.LeaveRequest.Action.DISCONNECT)


def frames(seconds, hertz=220):
    """20 ms each, as a voice would come from a synthesiser: faster than it is spoken."""
    for n in range(int(seconds * 50)):
        t = (n * RATE // 50 + np.arange(RATE // 50)) / RATE
        sound = (np.sin(2 * np.pi * hertz * t) * 0.5 * 32767).astype("<i2")
        yield rtc.AudioFrame(sound.tobytes(), RATE, 1, RATE // 50)


async def run(loquent, server, check):
    server.participants.clear()
    room = rtc.Room()
    await asyncio.wait_for(room.connect(server.url, lk.token(AGENT, ROOM)), 15)
    check("LiveKit's own client in the test server", room.local_participant.identity, "connected", room.isconnected())
    events = []
    output = DataStreamAudioOutput(
        room, destination_identity=AVATAR, sample_rate=RATE, wait_remote_track=rtc.TrackKind.KIND_VIDEO, wait_playback_start=True
    )
    output.on("playback_finished", lambda e: events.append(("finished", round(e.playback_position, 3), e.interrupted, time.monotonic())))
    output.on("playback_started", lambda e: events.append(("started", time.monotonic())))

    # The plugin's own call, to our URL. (Its `start` needs a running agent job; this is the part of it that reaches us.)
    plugin = bey.AvatarSession(api_url=f"{loquent.base}/v1/livekit", api_key="k")
    plugin._http_session = aiohttp.ClientSession()
    await plugin._start_agent(server.url, lk.token(AVATAR, ROOM, attributes={"lk.publish_on_behalf": AGENT}))
    await plugin._http_session.close()
    check("their plugin's call", AVATAR in server.participants, "the avatar is in the room", AVATAR in server.participants)

    async def speak(seconds):
        for frame in frames(seconds):
            await output.capture_frame(frame)
        output.flush()

    await asyncio.wait_for(speak(1.5), 20)
    finished = await asyncio.wait_for(output.wait_for_playout(), 10)
    check("their audio output: played", finished, "1.5 s, not interrupted", abs(finished.playback_position - 1.5) < 0.06 and not finished.interrupted)
    check("their audio output: started", [e[0] for e in events], "started, finished", [e[0] for e in events] == ["started", "finished"])

    await speak(6.0)
    while len([e for e in events if e[0] == "started"]) < 2:
        await asyncio.sleep(0.02)
    await asyncio.sleep(1.0)
    cut = time.monotonic()
    output.clear_buffer()
    finished = await asyncio.wait_for(output.wait_for_playout(), 10)
    took = time.monotonic() - cut
    check("their audio output: interrupted", f"{finished}, after {took:.2f} s", "at about 1 s, told before their 2 s of patience are over",
          finished.interrupted and 0.7 < finished.playback_position < 2.0 and took < 1.5)

    await speak(0.5)
    finished = await asyncio.wait_for(output.wait_for_playout(), 10)
    check("their audio output: after that", finished, "0.5 s, not interrupted", abs(finished.playback_position - 0.5) < 0.06 and not finished.interrupted)

    # Another plugin's call, with a picture.
    other = "lemonslice-avatar-agent"
    async with LemonSliceAPI(api_key="k", api_url=f"{loquent.base}/v1/livekit") as api:
        given = {"livekit_url": server.url, "livekit_token": lk.token(other, ROOM), "livekit_session_id": "RM_1"}
        try:
            await api.start_agent_session(agent_image=Image.new("RGB", (64, 64), "tan"), **given)
            full = None
        except Exception as error:
            full = error
        check("LemonSlice's call in a full house", full, "refused, after its own retries", full is not None)
        await server.participants[AVATAR].send(leave=LEAVE)
        check("the room is closed for the first", await loquent.free(8), "its place is free", await loquent.free(8))
        session = await api.start_agent_session(agent_image=Image.new("RGB", (64, 64), "tan"), agent_prompt="smile", idle_timeout=60, **given)
        check("LemonSlice's call with a picture", f"session {session[:8]}…", "in the room", bool(session) and other in server.participants)

    await room.disconnect()
    check("their client leaves", await loquent.free(8), "the place is free", await loquent.free(8))
