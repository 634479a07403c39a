"""A LiveKit server for tests: signalling as the protocol says, WebRTC by aiortc, messages by LiveKit's own protobufs.

Written from livekit/protocol (livekit_rtc.proto, livekit_models.proto) and from what the SDKs expect. It forwards data
packets between participants and decodes what they publish, but forwards no media. Two peer connections for each
participant, as with `/rtc`; `/rtc/v1` (one connection) is answered 404, upon which SDKs fall back.

Candidates of our publisher answers are sent by trickle only, so that a client must take them.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import time
import urllib.parse

import aioice.ice
import numpy as np
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from livekit.protocol import models, rtc
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

KEY, SECRET = "devkey", "a secret for tests only, 32 bytes"
Kind = models.ParticipantInfo.Kind
State = models.ParticipantInfo.State

# Loopback is left out of the addresses by default; here it is the only one that is meant.
aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]


def _part(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(identity, room="room", kind="agent", attributes=None, lifetime=600, secret=SECRET, **grants):
    """An access token, as livekit-api makes it."""
    now = int(time.time())
    claims = {
        "iss": KEY, "sub": identity, "name": identity, "nbf": now, "exp": now + lifetime, "kind": kind,
        "video": {"roomJoin": True, "room": room, **grants}, "attributes": attributes or {},
    }
    head = _part(b'{"alg":"HS256","typ":"JWT"}') + "." + _part(json.dumps(claims).encode())
    return head + "." + _part(hmac.new(secret.encode(), head.encode(), hashlib.sha256).digest())


def claims_of(text):
    """The claims of a token with a right signature, else None."""
    try:
        head, _, signature = text.rpartition(".")
        wanted = _part(hmac.new(SECRET.encode(), head.encode(), hashlib.sha256).digest())
        if not hmac.compare_digest(wanted, signature):
            return None
        middle = head.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
        return claims if claims["exp"] > time.time() else None
    except (ValueError, KeyError, IndexError):
        return None


class Participant:
    """Somebody in the room. Without a socket it is played by the test (an agent made of packets)."""

    def __init__(self, server, identity, kind, attributes=None):
        self.server, self.identity, self.kind = server, identity, kind
        self.sid = f"PA_{identity}_{server.next_id()}"
        self.attributes = attributes or {}
        self.tracks = []
        # Kinds of media that have arrived: others are told of a track only then.
        self.live = set()
        self.query = {}
        self.joins = 0
        self.socket = None
        self.publisher = self.subscriber = None
        self.channels = {}
        self.received = []
        self.left = None
        self.sync = None
        self.pictures, self.voice = [], []
        self.last_picture = None
        self.sequence = 0
        self.sequences = []
        self.on_packet = None
        self.restarts = 0

    def info(self, state=State.ACTIVE):
        tracks = [t for t in self.tracks if t.type in self.live]
        return models.ParticipantInfo(
            sid=self.sid, identity=self.identity, name=self.identity, kind=self.kind, state=state, tracks=tracks,
            attributes=self.attributes, is_publisher=bool(tracks), client_protocol=int(self.query.get("client_protocol", 0)),
        )

    async def send(self, **message):
        if self.socket:
            try:
                await self.socket.send(rtc.SignalResponse(**message).SerializeToString())
            except ConnectionClosed:
                pass

    def deliver(self, packet, label="_reliable"):
        """A data packet from somebody else in the room."""
        if self.on_packet:
            self.on_packet(packet)
        channel = self.channels.get(label)
        if channel and channel.readyState == "open":
            channel.send(packet if isinstance(packet, bytes) else packet.SerializeToString())
            return True
        return bool(self.on_packet)

    def say(self, to, **value):
        """Sends a packet as if over this participant's data channel."""
        self.sequence += 1
        packet = models.DataPacket(destination_identities=[to] if to else [], sequence=self.sequence, **value)
        self.server.forward(self, packet)

    async def watch(self, track):
        try:
            while True:
                frame = await track.recv()
                now = time.monotonic()
                kind = models.TrackType.VIDEO if track.kind == "video" else models.TrackType.AUDIO
                if kind not in self.live:
                    self.live.add(kind)
                    self.server.tell(self)
                if track.kind == "video":
                    grey = frame.to_ndarray(format="gray")
                    self.pictures.append((now, frame.pts, grey.shape))
                    self.last_picture = grey
                else:
                    samples = frame.to_ndarray().astype(np.float64).ravel() / 32768
                    self.voice.append((now, frame.pts / 48000, float(np.sqrt((samples**2).mean()))))
        except MediaStreamError:
            pass


class Server:
    """The room and its door. `async with Server() as server: … server.url`."""

    def __init__(self):
        self.participants = {}
        self.gone = []
        self.ids = 0
        self.refuse_resume = False
        self.tasks = set()
        self.errors = []
        self.opened = asyncio.Event()

    def next_id(self):
        self.ids += 1
        return self.ids

    async def __aenter__(self):
        self.listener = await serve(self.handle, "127.0.0.1", 0, process_request=self.door, max_size=2**20)
        self.port = self.listener.sockets[0].getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_):
        for participant in list(self.participants.values()) + self.gone:
            await self.hang_up(participant)
        self.listener.close()
        for task in self.tasks:
            task.cancel()

    def spawn(self, work):
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.done)

    def done(self, task):
        self.tasks.discard(task)
        if not task.cancelled() and task.exception():
            self.errors.append(repr(task.exception()))

    def door(self, connection, request):
        """401 and 404 as the real one gives them; None lets in."""
        url = urllib.parse.urlsplit(request.path)
        if url.path != "/rtc":
            return connection.respond(404, "not found\n")
        query = dict(urllib.parse.parse_qsl(url.query))
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ") or query.get("access_token", "")
        claims = claims_of(bearer)
        if not claims or not claims["video"].get("roomJoin"):
            return connection.respond(401, "invalid token: no permissions to access the room\n")
        connection.claims, connection.query = claims, query
        return None

    def add(self, identity, kind=Kind.AGENT, attributes=None):
        """Somebody without a socket joins."""
        participant = Participant(self, identity, kind, attributes)
        self.participants[identity] = participant
        self.tell(participant)
        return participant

    def tell(self, participant, state=State.ACTIVE):
        update = rtc.ParticipantUpdate(participants=[participant.info(state)])
        for other in self.participants.values():
            self.spawn(other.send(update=update))

    def remove(self, participant):
        """It leaves; the others are told."""
        if self.participants.get(participant.identity) is participant:
            del self.participants[participant.identity]
            self.gone.append(participant)
            self.tell(participant, State.DISCONNECTED)

    async def hang_up(self, participant):
        for peer in (participant.publisher, participant.subscriber):
            if peer:
                await peer.close()

    async def handle(self, socket):
        claims, query = socket.claims, socket.query
        identity = claims["sub"]
        participant = self.participants.get(identity)
        if query.get("reconnect") == "1":
            if not participant or participant.sid != query.get("sid") or self.refuse_resume:
                self.refuse_resume = False
                leave = rtc.LeaveRequest(reason=models.DisconnectReason.STATE_MISMATCH, action=rtc.LeaveRequest.Action.RECONNECT)
                await socket.send(rtc.SignalResponse(leave=leave).SerializeToString())
                return
            participant.socket, participant.query = socket, query
            participant.joins += 1
            await participant.send(reconnect=rtc.ReconnectResponse(last_message_seq=max(participant.sequences, default=0)))
            everybody = [p.info() for p in self.participants.values()]
            await participant.send(update=rtc.ParticipantUpdate(participants=everybody))
        else:
            if participant:
                self.remove(participant)
                await self.hang_up(participant)
            kind = {"agent": Kind.AGENT}.get(claims.get("kind"), Kind.STANDARD)
            participant = Participant(self, identity, kind, claims.get("attributes"))
            participant.socket, participant.query = socket, query
            participant.joins = 1
            others = [p.info() for p in self.participants.values()]
            self.participants[identity] = participant
            await participant.send(join=rtc.JoinResponse(
                room=models.Room(sid="RM_1", name=claims["video"]["room"]), participant=participant.info(State.JOINED),
                other_participants=others, subscriber_primary=True, ping_interval=1, ping_timeout=5, server_version="1.9.0",
                server_info=models.ServerInfo(version="1.9.0", protocol=16, edition=models.ServerInfo.Edition.Standard),
                enabled_publish_codecs=[models.Codec(mime="video/H264"), models.Codec(mime="audio/opus")],
            ))
            self.tell(participant)
            await self.offer(participant)
        self.opened.set()
        try:
            async for data in socket:
                if participant.socket is not socket:
                    return
                request = rtc.SignalRequest()
                request.ParseFromString(data)
                await self.signal(participant, request)
        except ConnectionClosed:
            pass

    async def offer(self, participant):
        """The subscriber's connection: data channels only, for nobody forwards media here."""
        peer = participant.subscriber = RTCPeerConnection()
        participant.channels = {
            "_reliable": peer.createDataChannel("_reliable"),
            "_lossy": peer.createDataChannel("_lossy", ordered=False, maxRetransmits=0),
        }
        await peer.setLocalDescription(await peer.createOffer())
        await participant.send(offer=rtc.SessionDescription(type="offer", sdp=peer.localDescription.sdp))

    async def signal(self, participant, request):
        kind = request.WhichOneof("message")
        participant.received.append(kind)
        if kind == "offer":
            await self.answer(participant, request.offer.sdp)
        elif kind == "answer":
            await participant.subscriber.setRemoteDescription(RTCSessionDescription(request.answer.sdp, "answer"))
        elif kind == "add_track":
            wanted = request.add_track
            track = models.TrackInfo(
                sid=f"TR_{self.next_id()}", type=wanted.type, name=wanted.name, source=wanted.source,
                width=wanted.width, height=wanted.height, layers=wanted.layers,
            )
            participant.tracks.append(track)
            participant.received[-1] = f"add_track {wanted.name} {wanted.source} cid={wanted.cid}"
            await participant.send(track_published=rtc.TrackPublishedResponse(cid=wanted.cid, track=track))
        elif kind == "ping_req":
            pong = rtc.Pong(last_ping_timestamp=request.ping_req.timestamp, timestamp=int(time.time() * 1000))
            await participant.send(pong_resp=pong)
        elif kind == "leave":
            participant.left = request.leave.reason
            self.remove(participant)
            await participant.socket.close()
        elif kind == "sync_state":
            participant.sync = request.sync_state

    async def answer(self, participant, sdp):
        peer = participant.publisher
        if peer is None:
            peer = participant.publisher = RTCPeerConnection()
            peer.on("track", lambda track: self.spawn(participant.watch(track)))
            peer.on("datachannel", lambda channel: channel.on("message", lambda data: self.data(participant, data)))
        else:
            participant.restarts += 1
        await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        await peer.setLocalDescription(await peer.createAnswer())
        lines = peer.localDescription.sdp.split("\r\n")
        bare = "\r\n".join(l for l in lines if not l.startswith(("a=candidate", "a=end-of-candidates")))
        await participant.send(answer=rtc.SessionDescription(type="answer", sdp=bare))
        mid = next(l for l in lines if l.startswith("a=mid:"))[6:]
        for candidate in dict.fromkeys(l[2:] for l in lines if l.startswith("a=candidate")):
            init = json.dumps({"candidate": candidate, "sdpMid": mid, "sdpMLineIndex": 0})
            await participant.send(trickle=rtc.TrickleRequest(candidateInit=init, target=rtc.SignalTarget.PUBLISHER))

    def data(self, sender, data):
        packet = models.DataPacket()
        packet.ParseFromString(data)
        if packet.sequence:
            if packet.sequence in sender.sequences:
                return
            sender.sequences.append(packet.sequence)
        self.forward(sender, packet)

    def forward(self, sender, packet):
        packet.participant_identity, packet.participant_sid = sender.identity, sender.sid
        for other in list(self.participants.values()):
            if other is not sender and (not packet.destination_identities or other.identity in packet.destination_identities):
                other.deliver(packet)
