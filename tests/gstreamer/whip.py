"""GStreamer's webrtcbin as publisher (WHIP) and player (WHEP) of a running Loquent.

    /usr/bin/python3 tests/gstreamer/whip.py http://127.0.0.1:8080 [seconds]

Needs Debian's python3-gi, gir1.2-gst-plugins-bad-1.0, gstreamer1.0-nice, gstreamer1.0-plugins-{good,bad} and
gstreamer1.0-libav. Makes a session, speaks a beep into it, counts decoded pictures and the returned voice, deletes
both connections, and ends with `N passed, N failed`.
"""

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstSdp", "1.0")
gi.require_version("GstWebRTC", "1.0")
from gi.repository import GLib, Gst, GstSdp, GstWebRTC  # noqa: E402

passed = failed = 0
AGENTS = []


def check(what, value, limit, held):
    global passed, failed
    passed, failed = passed + bool(held), failed + (not held)
    print(f"{'  ok  ' if held else 'FAILED'}  {what}: {value}   ({limit})", flush=True)


def request(url, method, body=None, **headers):
    names = {k.replace("_", "-"): v for k, v in headers.items() if v}
    asked = urllib.request.Request(url, data=body, method=method, headers=names)
    try:
        with urllib.request.urlopen(asked, timeout=15) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


class Peer:
    """A pipeline with one webrtcbin called `rtc`."""

    def __init__(self, pipeline):
        self.pipe = Gst.parse_launch(pipeline)
        if not isinstance(self.pipe, Gst.Pipeline):
            # One element alone comes without a pipeline.
            element, self.pipe = self.pipe, Gst.Pipeline.new()
            self.pipe.add(element)
        self.rtc = self.pipe.get_by_name("rtc")
        # libnice leaves loopback out by itself; here it is the only address that is meant.
        # (The agent comes without a reference of our own, so the wrapper must never be let go.)
        AGENTS.append(self.rtc.get_property("ice-agent"))
        AGENTS[-1].emit("add-local-ip-address", "127.0.0.1")
        self.gathered = threading.Event()
        self.rtc.connect("notify::ice-gathering-state", self.on_gathering)
        self.location = None

    def on_gathering(self, rtc, _):
        if rtc.get_property("ice-gathering-state") == GstWebRTC.WebRTCICEGatheringState.COMPLETE:
            self.gathered.set()

    def negotiate(self, url, token):
        """Offers, posts, takes the answer; returns the status."""
        self.pipe.set_state(Gst.State.PLAYING)
        self.pipe.get_state(5 * Gst.SECOND)
        promise = Gst.Promise.new()
        self.rtc.emit("create-offer", None, promise)
        promise.wait()
        # The description is the reply's, and gone with it.
        reply = promise.get_reply()
        offer = reply.get_value("offer")
        done = Gst.Promise.new()
        self.rtc.emit("set-local-description", offer, done)
        done.wait()
        self.gathered.wait(10)
        sdp = self.rtc.get_property("local-description").sdp.as_text()
        status, headers, text = request(url, "POST", sdp.encode(), Content_Type="application/sdp", Authorization=f"Bearer {token}")
        if status != 201:
            print(text)
            return status
        self.location = urllib.parse.urljoin(url, headers["Location"])
        _, message = GstSdp.SDPMessage.new_from_text(text)
        answer = GstWebRTC.WebRTCSessionDescription.new(GstWebRTC.WebRTCSDPType.ANSWER, message)
        promise = Gst.Promise.new()
        self.rtc.emit("set-remote-description", answer, promise)
        promise.wait()
        return status

    def end(self):
        status = request(self.location, "DELETE")[0] if self.location else 0
        self.pipe.set_state(Gst.State.NULL)
        return status


class Player(Peer):
    def __init__(self):
        super().__init__("webrtcbin name=rtc bundle-policy=max-bundle")
        self.pictures, self.voice, self.size, self.loud = 0, 0, None, 0
        recvonly = GstWebRTC.WebRTCRTPTransceiverDirection.RECVONLY
        for caps in (
            "application/x-rtp,media=audio,encoding-name=OPUS,payload=111,clock-rate=48000,encoding-params=(string)2",
            "application/x-rtp,media=video,encoding-name=H264,payload=102,clock-rate=90000,packetization-mode=(string)1,"
            "profile-level-id=(string)42e01f",
        ):
            self.rtc.emit("add-transceiver", recvonly, Gst.Caps.from_string(caps))
        self.rtc.connect("pad-added", self.on_pad)

    def on_pad(self, _, pad):
        if pad.get_direction() != Gst.PadDirection.SRC:
            return
        video = pad.get_current_caps().get_structure(0).get_string("media") == "video"
        chain = (
            "rtph264depay ! h264parse ! avdec_h264 ! videoconvert ! video/x-raw,format=I420 ! fakesink name=end signal-handoffs=true"
            if video
            else "rtpopusdepay ! opusdec ! audioconvert ! audio/x-raw,format=S16LE,channels=1 ! fakesink name=end signal-handoffs=true"
        )
        part = Gst.parse_bin_from_description(chain, True)
        part.get_by_name("end").connect("handoff", self.on_picture if video else self.on_voice)
        self.pipe.add(part)
        part.sync_state_with_parent()
        pad.link(part.get_static_pad("sink"))

    def on_picture(self, _, buffer, pad):
        self.pictures += 1
        caps = pad.get_current_caps().get_structure(0)
        self.size = (caps.get_int("width")[1], caps.get_int("height")[1])

    def on_voice(self, _, buffer, pad):
        ok, data = buffer.map(Gst.MapFlags.READ)
        if ok:
            samples = memoryview(bytes(data.data)).cast("h")
            self.voice += 1
            self.loud += max((abs(s) for s in samples[::8]), default=0) > 1000
            buffer.unmap(data)


def main(base, seconds):
    Gst.init(None)
    loop = GLib.MainLoop()
    threading.Thread(target=loop.run, daemon=True).start()
    status, _, text = request(f"{base}/v1/sessions", "POST", b"{}", Content_Type="application/json")
    check("session", status, "201", status == 201)
    session = json.loads(text)
    here = f"{base}/v1/sessions/{session['id']}"
    publisher = Peer(
        "webrtcbin name=rtc bundle-policy=max-bundle audiotestsrc is-live=true wave=sine freq=220 ! audioconvert ! opusenc ! "
        "rtpopuspay pt=111 ! application/x-rtp,media=audio,encoding-name=OPUS,payload=111,clock-rate=48000,"
        "encoding-params=(string)2 ! rtc."
    )
    publisher.rtc.emit("get-transceiver", 0).set_property("direction", GstWebRTC.WebRTCRTPTransceiverDirection.SENDONLY)
    status = publisher.negotiate(f"{here}/whip", session["token"])
    check("WHIP answer to webrtcbin", status, "201", status == 201)
    player = Player()
    status = player.negotiate(f"{here}/whep", session["token"])
    check("WHEP answer to webrtcbin", status, "201", status == 201)
    end = time.monotonic() + 20
    while not player.pictures and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(seconds)
    check("pictures", f"{player.pictures} of {player.size}", f"at least {10 * seconds:.0f}", player.pictures >= 10 * seconds)
    check("voice", f"{player.loud} of {player.voice} buffers loud", "at least half", player.loud > player.voice / 2 > 20)
    for who, peer in (("publisher", publisher), ("player", player)):
        status = peer.end()
        check(f"farewell of the {who}", status, "200", status == 200)
    request(f"{base}/v1/sessions/{session['id']}", "DELETE")
    loop.quit()
    print(f"\n{passed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    code = 1 if main(sys.argv[1].rstrip("/"), float(sys.argv[2]) if len(sys.argv) > 2 else 5.0) else 0
    sys.stdout.flush()
    os._exit(code)
