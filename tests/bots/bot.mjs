// A bot that speaks: node bot.mjs http://127.0.0.1:8080 (Node 22; Node 20 with --experimental-websocket). Each line typed is
// answered aloud; a new one interrupts.
import { execFileSync } from 'node:child_process';
import readline from 'node:readline';

const service = process.argv[2].replace(/\/$/, '');

const answer = (line) => `You said: ${line}`; // Put your language model here.

// Put your voice here; this one is espeak-ng: PCM16 at 22050 Hz, after a header of 44 bytes.
const voice = (text) => execFileSync('espeak-ng', ['--stdout', text], { maxBuffer: 1 << 26 }).subarray(44);

const begun = await fetch(`${service}/v1/sessions`, {
  method: 'POST', headers: { 'content-type': 'application/json' }, body: '{}',
});
const session = await begun.json();
console.log(`watch: ${service}${session.urls.overlay}`);
const ws = new WebSocket(`${service.replace('http', 'ws')}${session.urls.websocket}&rate=22050`);
ws.onmessage = ({ data }) => {
  const event = JSON.parse(data);
  if (event.type !== 'metrics') console.log(event);
};
ws.onopen = async () => {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    ws.send(JSON.stringify({ type: 'interrupt' }));
    const speech = voice(answer(line));
    // A second at a time: faster than it is played is fine.
    for (let at = 0; at < speech.length; at += 44_100) ws.send(speech.subarray(at, at + 44_100));
    ws.send(JSON.stringify({ type: 'speak_end' }));
  }
};
