"""WHIP and WHEP with aiortc on the other side: a publisher, a player, and a server that we publish to.

    python tests/aiortc/whip.py target/release/loquent [card|pocket]

Ends with `N passed, N failed`.
"""

import asyncio
import sys
import time

import aiohttp
from aiortc import RTCPeerConnection, RTCSessionDescription
from client import Checks, Voice, watch
from run import service
from whip_server import TOKEN, Server

SDP = "application/sdp"


async def until(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if await condition() if asyncio.iscoroutinefunction(condition) else condition():
            return True
        await asyncio.sleep(0.1)
    return False


async def negotiate(http, url, token, peer):
    """Posts the offer of `peer`, takes the answer; returns status, headers and answer."""
    await peer.setLocalDescription(await peer.createOffer())
    headers = {"Authorization": f"Bearer {token}", "Content-Type": SDP}
    async with http.post(url, data=peer.localDescription.sdp, headers=headers) as answer:
        text = await answer.text()
        if answer.status == 201:
            await peer.setRemoteDescription(RTCSessionDescription(text, "answer"))
        return answer.status, answer.headers, text


async def talk(http, base, session, checks):
    """An aiortc publisher speaks, an aiortc player hears and sees."""
    seen = {"pictures": [], "voice": []}
    publisher, player = RTCPeerConnection(), RTCPeerConnection()
    tasks = []
    player.on("track", lambda track: tasks.append(asyncio.ensure_future(watch(track, seen))))
    publisher.addTransceiver(Voice(), direction="sendonly")
    for kind in ("audio", "video"):
        player.addTransceiver(kind, direction="recvonly")
    status, whip, answer = await negotiate(http, base + session["whip"], session["token"], publisher)
    checks("WHIP answer", status, "201", status == 201)
    checks("its direction", answer.count("a=recvonly"), "recvonly", "a=recvonly" in answer and "a=sendrecv" not in answer)
    status, whep, answer = await negotiate(http, base + session["whep"], session["token"], player)
    checks("WHEP answer", status, "201", status == 201)
    checks("its direction", answer.count("a=sendonly"), "sendonly twice", answer.count("a=sendonly") == 2)
    await until(20, lambda: len(seen["pictures"]) > 0)
    await asyncio.sleep(6)
    pictures, voice = seen["pictures"], seen["voice"]
    loud = sum(v[1] > 0.02 for v in voice)
    checks("pictures", len(pictures), "at least 60 in 6 s", len(pictures) >= 60)
    checks("voice", f"{loud} of {len(voice)} frames loud", "at least a quarter", loud > len(voice) / 4 > 10)
    checks("contrast", f"{pictures[-1][3]:.1f}" if pictures else "-", "not one grey", pictures and pictures[-1][3] > 5)
    for what, headers in (("publisher", whip), ("player", whep)):
        async with http.delete(base + headers["Location"], headers={"If-Match": '"any"'}) as gone:
            checks(f"farewell of the {what}", gone.status, "200", gone.status == 200)
    await asyncio.sleep(0.3)
    count = len(pictures)
    await asyncio.sleep(0.5)
    checks("pictures after it", len(seen["pictures"]) - count, "none", len(seen["pictures"]) == count)
    await publisher.close()
    await player.close()
    for task in tasks:
        task.cancel()


async def vanish(http, base, session, checks):
    """A publisher whose program dies is let go after the time that net.*_after_ms say, and another one may come before."""
    doomed = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--speak", base + session["whip"], session["token"], stdout=asyncio.subprocess.PIPE)
    location = (await doomed.stdout.readline()).decode().strip()
    await asyncio.sleep(1)
    doomed.kill()
    await doomed.wait()
    died = time.monotonic()

    async def gone():
        # Without If-Match: 428 from a connection that is there, 404 from one that is not.
        async with http.patch(base + location, data="", headers={"Content-Type": "application/trickle-ice-sdpfrag"}) as answer:
            return answer.status == 404

    checks("a publisher that was killed is still listed at once", await gone(), "it is", not await gone())
    done = await until(30, gone)
    checks("and let go after", f"{time.monotonic() - died:.1f} s", "3 s + 8 s, a little more", done and time.monotonic() - died < 16)


async def speak(url, token):
    """Publishes until it is killed."""
    peer = RTCPeerConnection()
    peer.addTransceiver(Voice(), direction="sendonly")
    async with aiohttp.ClientSession() as http:
        _, headers, _ = await negotiate(http, url, token, peer)
    await until(10, lambda: peer.connectionState == "connected")
    print(headers["Location"], flush=True)
    await asyncio.sleep(3600)


async def publish(http, base, session, checks):
    """We publish to a server that redirects, wants a token, goes away and comes back."""
    server = Server()
    port = await server.start()
    url, headers = f"{base}/v1/sessions/{session['id']}/publish", {"Authorization": f"Bearer {session['token']}"}

    async def begin(path, token):
        body = {"url": f"http://127.0.0.1:{port}{path}", "token": token}
        async with http.post(url, json=body, headers=headers) as answer:
            return answer.status, answer.headers.get("Location"), await answer.json()

    async def state(location):
        async with http.get(base + location, headers=headers) as answer:
            return await answer.json()

    status, refused, _ = await begin("/whip", "wrong")
    checks("publication", status, "201", status == 201)

    async def failed():
        return (await state(refused))["state"] == "failed"

    checks("with a wrong token", (await until(10, failed), await state(refused)), "failed, and says 401",
           "401" in (await state(refused)).get("reason", ""))
    _, location, _ = await begin("/old", TOKEN)
    checks("pictures at the other server", await until(15, lambda: server.frames["video"] > 50), "50 within 15 s",
           server.frames["video"] > 50)
    checks("voice there", server.frames["audio"], "at least 50", server.frames["audio"] >= 50)
    told = await state(location)
    checks("its state", told["state"], "live", told["state"] == "live")
    checks("the redirect was followed", server.asked[-2:], "POST /old, POST /whip", server.asked[-2:] == ["POST /old", "POST /whip"])
    server.away = True
    await server.leave()

    async def waiting():
        return (await state(location))["state"] == "waiting"

    checks("state while the server is away", await until(20, waiting), "waiting", (await state(location))["state"] != "live")
    server.away, before = False, server.frames["video"]
    checks("pictures after it came back", await until(40, lambda: server.frames["video"] > before + 25), "25 within 40 s",
           server.frames["video"] > before + 25)
    async with http.delete(base + location, headers=headers) as answer:
        checks("stopping", (answer.status, (await answer.json())["state"]), "200, stopped", answer.status == 200)
    checks("the other server was told", server.asked[-1], "DELETE", server.asked[-1] == "DELETE" and not server.peers)
    await server.stop()


async def main(base):
    checks = Checks()
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{base}/v1/sessions", json={}) as answer:
            told = await answer.json()
            checks("session", answer.status, "201", answer.status == 201)
        session = {"id": told["id"], "token": told["token"],
                   "whip": f"/v1/sessions/{told['id']}/whip", "whep": f"/v1/sessions/{told['id']}/whep"}
        await talk(http, base, session, checks)
        await vanish(http, base, session, checks)
        await publish(http, base, session, checks)
    return checks.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--speak"]:
        asyncio.run(speak(*sys.argv[2:4]))
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/aiortc/whip.py PATH/TO/loquent [card|pocket]")
    with service(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "card") as base:
        sys.exit(1 if asyncio.run(main(base)) else 0)
