"""A WHIP and WHEP server that is not ours (aiortc, aiohttp): takes one publisher, shows it to many players.

    python tests/aiortc/whip_server.py [port]

`POST /whip` publishes (Bearer token `secret`), `POST /old` redirects there with 307, `POST /whep` plays. As a relay it
decodes what comes and encodes it anew for each player, which is what aiortc does. `Server` is used by `whip.py`.
"""

import asyncio
import sys
import uuid

import aioice.ice
from aiohttp import web
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.contrib.media import MediaRelay
from aiortc.mediastreams import MediaStreamError

TOKEN = "secret"
# Loopback is left out of the addresses by default; here it is the only one that is meant.
aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]


class Server:
    def __init__(self):
        self.peers, self.tracks, self.relay = {}, {}, MediaRelay()
        self.frames = {"audio": 0, "video": 0}
        self.asked, self.away = [], False
        app = web.Application()
        app.router.add_route("OPTIONS", "/{any}", self.options)
        app.router.add_post("/old", self.old)
        app.router.add_post("/whip", self.publish)
        app.router.add_post("/whep", self.play)
        app.router.add_delete("/resource/{id}", self.delete)
        self.runner = web.AppRunner(app)

    async def start(self, port=0):
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", port)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    async def stop(self):
        await self.leave()
        await self.runner.cleanup()

    async def leave(self):
        """Closes every connection, as a server that is started again does."""
        peers, self.peers = self.peers, {}
        await asyncio.gather(*(peer.close() for peer in peers.values()))

    async def options(self, request):
        self.asked.append("OPTIONS " + request.path)
        link = '<stun:127.0.0.1:9>; rel="ice-server"'
        return web.Response(headers={"Accept-Post": "application/sdp", "Link": link})

    async def old(self, request):
        self.asked.append("POST /old")
        return web.Response(status=307, headers={"Location": "/whip"})

    async def answer(self, request, peer):
        await peer.setLocalDescription(await peer.createAnswer())
        name = uuid.uuid4().hex
        self.peers[name] = peer
        return web.Response(status=201, text=peer.localDescription.sdp, content_type="application/sdp",
                            headers={"Location": f"/resource/{name}", "ETag": f'"{name}"'})

    async def publish(self, request):
        self.asked.append("POST /whip")
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        if self.away:
            return web.Response(status=503, headers={"Retry-After": "1"})
        peer = RTCPeerConnection()
        peer.on("track", lambda track: asyncio.ensure_future(self.take(track)))
        await peer.setRemoteDescription(RTCSessionDescription(await request.text(), "offer"))
        return await self.answer(request, peer)

    async def take(self, track):
        self.tracks[track.kind] = track
        mine = self.relay.subscribe(track, buffered=False)
        try:
            while True:
                frame = await mine.recv()
                self.frames[track.kind] += 1
                if track.kind == "video":
                    self.size = (frame.width, frame.height)
        except MediaStreamError:
            pass

    async def play(self, request):
        peer = RTCPeerConnection()
        await peer.setRemoteDescription(RTCSessionDescription(await request.text(), "offer"))
        for kind in ("audio", "video"):
            peer.addTrack(self.relay.subscribe(self.tracks[kind], buffered=False))
        return await self.answer(request, peer)

    async def delete(self, request):
        self.asked.append("DELETE")
        peer = self.peers.pop(request.match_info["id"], None)
        if peer is None:
            return web.Response(status=404)
        await peer.close()
        return web.Response()


async def main(port):
    server = Server()
    print(f"http://127.0.0.1:{await server.start(port)}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
