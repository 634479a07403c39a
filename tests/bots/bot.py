"""A bot that speaks: python bot.py http://127.0.0.1:8080. Each line typed is answered aloud; a new one interrupts."""
import asyncio, json, subprocess, sys, urllib.request
import websockets

SERVICE = sys.argv[1].rstrip("/")


def answer(line):  # Put your language model here.
    return f"You said: {line}"


def voice(text):  # Put your voice here; this one is espeak-ng: PCM16 at 22050 Hz, after a header of 44 bytes.
    return subprocess.run(["espeak-ng", "--stdout", text], capture_output=True, check=True).stdout[44:]


async def main():
    request = urllib.request.Request(SERVICE + "/v1/sessions", b"{}", {"Content-Type": "application/json"})
    session = json.load(urllib.request.urlopen(request))
    print("watch:", SERVICE + session["urls"]["overlay"], flush=True)
    async with websockets.connect(SERVICE.replace("http", "ws", 1) + session["urls"]["websocket"] + "&rate=22050") as ws:
        async def listen():
            async for message in ws:
                event = json.loads(message)
                if event["type"] != "metrics":
                    print(event, flush=True)
        listening = asyncio.create_task(listen())
        while line := await asyncio.to_thread(sys.stdin.readline):
            await ws.send(json.dumps({"type": "interrupt"}))
            speech = await asyncio.to_thread(voice, answer(line.strip()))
            for at in range(0, len(speech), 44100):  # A second at a time: faster than it is played is fine.
                await ws.send(speech[at : at + 44100])
            await ws.send(json.dumps({"type": "speak_end"}))
        listening.cancel()


asyncio.run(main())
