"""What the fuzzer begins with: one or a few sound inputs for each target, made here. `python tests/fuzz/seeds.py DIR`"""

import io
import json
import pathlib
import struct
import sys
import zipfile
import zlib

HERE = pathlib.Path(__file__).parent
OFFER = "\r\n".join("""v=0
o=- 1 2 IN IP4 127.0.0.1
s=-
t=0 0
a=group:BUNDLE 0 1 2
a=ice-ufrag:abcd
a=ice-pwd:abcdefghijklmnopqrstuvwx
a=fingerprint:sha-256 00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF
m=audio 9 UDP/TLS/RTP/SAVPF 111
c=IN IP4 0.0.0.0
a=mid:0
a=sendrecv
a=rtcp-mux
a=setup:actpass
a=rtpmap:111 opus/48000/2
a=ssrc:1 cname:a
a=candidate:1 1 udp 2122260223 127.0.0.1 50000 typ host
m=video 9 UDP/TLS/RTP/SAVPF 102
c=IN IP4 0.0.0.0
a=mid:1
a=recvonly
a=rtcp-mux
a=rtpmap:102 H264/90000
a=fmtp:102 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f
a=rtcp-fb:102 nack pli
m=application 9 UDP/DTLS/SCTP webrtc-datachannel
c=IN IP4 0.0.0.0
a=mid:2
a=sctp-port:5000
""".splitlines()) + "\r\n"
FRAGMENT = "a=ice-ufrag:abcd\r\na=ice-pwd:abcdefghijklmnopqrstuvwx\r\nm=audio 9 RTP/AVP 0\r\na=mid:0\r\n" \
    "a=candidate:1 1 udp 2122260223 192.0.2.1 50000 typ host\r\na=end-of-candidates\r\n"


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, value):
    """One protobuf field: a number or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def packet(kind, body):
    return bytes([kind]) + struct.pack(">H", len(body)) + body


def rtp(sequence, payload):
    raw = struct.pack(">BBHII", 128, 111, sequence, sequence * 960 & 0xFFFFFFFF, 1) + payload
    return bytes([210, len(raw)]) + raw


def rtcp(kind, count, body):
    raw = struct.pack(">BBH", 128 | count, kind, len(body) // 4) + body
    return bytes([2, len(raw)]) + raw


def png(width=64, height=64):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = b"".join(b"\0" + bytes((x * y) % 256 for x in range(3 * width)) for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def wav(samples=800, rate=16000):
    data = b"".join(struct.pack("<h", (i * 331) % 20000 - 10000) for i in range(samples))
    head = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" \
        + struct.pack("<I", len(data)) + data


def safetensors():
    head = json.dumps({"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                       "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(32)


def gguf():
    def text(t):
        return struct.pack("<Q", len(t)) + t.encode()
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 2)
    head += text("general.architecture") + struct.pack("<I", 8) + text("wan")
    head += text("general.alignment") + struct.pack("<II", 4, 32)
    head += text("a.weight") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    head += text("b") + struct.pack("<IQIQ", 1, 4, 0, 96)
    return head + bytes(-len(head) % 32) + bytes(96 + 16)


def torch_zip():
    """What torch.save writes for one tensor, without torch."""
    # Protocol 2 by hand: {"a.weight": torch._utils._rebuild_tensor_v2(storage, 0, (2, 3), (3, 1), False, OrderedDict())}
    p = b"\x80\x02}q\x00X\x08\x00\x00\x00a.weightq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02(("
    p += b"X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06tq\x07Q"
    p += b"K\x00K\x02K\x03\x86q\x08K\x03K\x01\x86q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rs."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", p)
        archive.writestr("archive/data/0", bytes(24))
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def seeds():
    sample = struct.pack("<h", 1000) * 400
    header = field(1, "s1") + field(4, "lk.audio_stream") + field(10, b"") + field(8, field(1, "sample_rate") + field(2, "24000")) \
        + field(8, field(1, "num_channels") + field(2, "1"))
    stream = packet(1, field(2, "") + field(13, header)) + packet(1, field(14, field(1, "s1") + field(2, 0) + field(3, sample))) \
        + packet(7, field(15, field(1, "s1")))
    call = field(10, field(1, "r1") + field(2, "lk.clear_buffer") + field(3, "{}") + field(4, 5000) + field(5, 1))
    token = "e30." + "eyJleHAiOjIwMDAwMDAwMDAsInZpZGVvIjp7InJvb20iOiJyIiwicm9vbUpvaW4iOnRydWV9fQ" + ".c2ln"
    twcc = struct.pack(">IIHHI", 9, 2, 65530, 4, 1 << 8) + struct.pack(">H", 4 | 1 << 13) + bytes([4, 4, 4, 4, 0, 0])
    talk = packet(0, sample) + packet(2, b'{"type":"set","rate":16000}') + packet(2, b'{"type":"interrupt"}') \
        + packet(1, b"ping") + packet(2, b'{"type":"say","text":"hello"}') + packet(2, b'{"type":"speak_end"}')
    asked = packet(2, b'{"type":"start","rate":8000,"liveliness":0.5}') + packet(0, sample[:80]) + packet(2, b'{"type":"ping","t":[1]}') \
        + packet(2, b'{"type":"gesture","gesture":"look_left","strength":1,"seconds":2}') \
        + packet(7, b"\x81\x85\0\0\0\0hello\x89\x80\0\0\0\0")
    body = b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.png\"\r\n\r\n" + png() + b"\r\n--b--\r\n"
    frame = bytes(16 * 16 * 3 // 2)
    data = HERE.parent / "it" / "data"
    return {
        "descriptions": [OFFER, FRAGMENT, OFFER.replace("sendrecv", "sendonly"), OFFER.replace("sendrecv", "recvonly")],
        "feedback": [bytes([1, 9, 9, 0, 0, 3, 232]) * 4 + rtcp(201, 0, struct.pack(">I", 9)) + rtcp(206, 1, struct.pack(">II", 9, 2))
                     + rtcp(205, 1, struct.pack(">IIHH", 9, 2, 65530, 7)) + rtcp(205, 15, twcc),
                     rtcp(201, 1, struct.pack(">IIIIIII", 9, 2, 1 << 24 | 5, 70000, 30, 1 << 16, 1000))],
        "speech": [b"".join(rtp(65530 + i & 65535, b"\xfc\xff\xfe") for i in range(30))],
        "livekit": [stream, packet(1, call), token, "wss://rooms.example.org/rtc"],
        "voice": [b"".join(bytes([200]) + wav()[i:i + 200] for i in range(0, 1644, 200))],
        "service": [b"\0" + OFFER.encode(), b'\1{"presenter":"card","seed":7,"background":"green"}', b"\2" + png(), b"\3" + body,
                    b'\4{"prompt":"smile"}', b"\5GET /v1/info HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        "websocket": [talk, asked],
        "config": [(HERE.parents[1] / "config" / "loquent.toml").read_text(), "name control,live sha256:" + "0" * 64 + "\n"],
        "text": ["Hello there. How are you? &amp;  Fine\u3000thanks\u3002 \u4f60\u597d\uff01"],
        "portrait": [png(), (HERE.parents[1] / "web" / "card.png").read_bytes()],
        "pose": [b"YUV4MPEG2 W16 H16 F25:1 Ip A1:1 C420jpeg\n" + (b"FRAME\n" + frame) * 2],
        "sound": [wav()] + [p.read_bytes() for p in sorted(data.glob("tone*"))],
        "checkpoint": [safetensors(), gguf(), torch_zip()],
    }


def write(folder):
    for target, inputs in seeds().items():
        at = pathlib.Path(folder) / target
        at.mkdir(parents=True, exist_ok=True)
        for i, one in enumerate(inputs):
            (at / f"seed-{i}").write_bytes(one.encode() if isinstance(one, str) else one)
    return list(seeds())


if __name__ == "__main__":
    print(*write(sys.argv[1]))
