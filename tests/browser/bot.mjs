// A bot in a page: it speaks over the WebSocket, interrupts itself, and watches itself by WHEP, all on one clock.

import fs from 'node:fs';
import path from 'node:path';
import { OUT, browser, percentile, round, serve, sleep, speech } from './lib.mjs';

/** Runs in the page. Begins a session, opens its WebSocket and its picture; `bot.cut(k)` speaks and interrupts once. */
async function live({ card, wav }) {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const session = await (await fetch('/v1/sessions', { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{}' })).json();
  const pc = new RTCPeerConnection();
  const video = document.createElement('video');
  Object.assign(video, { muted: true, autoplay: true });
  document.body.replaceChildren(video);
  const stream = new MediaStream();
  pc.ontrack = ({ track }) => { stream.addTrack(track); video.srcObject = stream; };
  ['audio', 'video'].forEach((kind) => pc.addTransceiver(kind, { direction: 'recvonly' }));
  await pc.setLocalDescription(await pc.createOffer());
  const answer = await fetch(session.urls.whep, { method: 'POST', body: pc.localDescription.sdp,
    headers: { 'content-type': 'application/sdp', authorization: `Bearer ${session.token}` } });
  await pc.setRemoteDescription({ type: 'answer', sdp: await answer.text() });
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [16, 160];
  const context = canvas.getContext('2d', { willReadFrequently: true });
  const frames = [];
  let rest = null;
  const seen = (now, frame) => {
    video.requestVideoFrameCallback(seen);
    const scale = video.videoWidth / 256;
    let level = 0;
    if (card) {
      // The level meter stands at x 14–38, y 22–182 of 256.
      context.drawImage(video, 26 * scale, 22 * scale, scale, 160 * scale, 0, 0, 1, 160);
      const pixels = context.getImageData(0, 0, 1, 160).data;
      for (let y = 0; y < 160; y++) level += pixels[4 * y] > 130 || pixels[4 * y + 1] > 110 ? 1 / 160 : 0;
    } else {
      // How far the lower face is from what it looked like at rest.
      context.drawImage(video, 96 * scale, 132 * scale, 64 * scale, 48 * scale, 0, 0, 16, 12);
      const pixels = context.getImageData(0, 0, 16, 12).data;
      rest ??= pixels;
      for (let i = 0; i < pixels.length; i++) level += Math.abs(pixels[i] - rest[i]);
    }
    frames.push([frame.expectedDisplayTime, level]);
  };
  video.requestVideoFrameCallback(seen);
  const ws = new WebSocket(`${location.origin.replace('http', 'ws')}${session.urls.websocket}&rate=48000`);
  ws.binaryType = 'arraybuffer';
  const events = [];
  ws.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    if (event.type !== 'metrics') events.push([performance.now(), event]);
  };
  await new Promise((done, failed) => { ws.onopen = done; ws.onerror = failed; });
  for (let i = 0; i < 200 && frames.length < 50; i++) await wait(50);
  const sound = Uint8Array.from(atob(wav), (c) => c.charCodeAt(0)).buffer;
  const heard = async (type, from) => {
    for (let i = 0; i < 500; i++) {
      if (events.slice(from).some(([, e]) => e.type === type)) return true;
      await wait(10);
    }
    return false;
  };
  window.bot = {
    frames, events,
    cut: async (k) => {
      const from = events.length;
      for (let at = 0; at < sound.byteLength; at += 96_000) ws.send(sound.slice(at, at + 96_000));
      const spoke = performance.now();
      const started = await heard('speak_started', from);
      await wait(600 + 37 * (k % 11));
      const cut = performance.now();
      ws.send(JSON.stringify({ type: 'interrupt' }));
      await wait(900);
      const ended = events.slice(from).find(([, e]) => e.type === 'speak_ended')?.[1];
      return { spoke, cut, started, ended };
    },
  };
}

/** Delay from the message to new silence on the screen; nothing of what was cut off after it. */
export async function bot(checks, { engine, count, timed }) {
  const card = engine === 'card';
  const service = await serve({ engine, seconds: 60 + 4 * count });
  const chromium = await browser(null);
  try {
    const page = await chromium.context.newPage();
    const said = [];
    page.on('pageerror', (e) => said.push(String(e)));
    await page.goto(service.base);
    let pcm;
    if (card) {
      // Always loud, so that each of its pictures can be told from silence.
      const samples = Int16Array.from({ length: 48_000 * 5 }, (_, i) => 20_000 * Math.sin(i * 0.06));
      pcm = Buffer.from(samples.buffer);
    } else {
      pcm = fs.readFileSync(speech().file).subarray(44, 44 + 2 * 48_000 * 5);
    }
    await page.evaluate(live, { card, wav: pcm.toString('base64') });
    const cuts = [];
    for (let k = 0; k < count; k++) cuts.push(await page.evaluate((i) => window.bot.cut(i), k));
    await sleep(300);
    const frames = await page.evaluate(() => window.bot.frames);
    fs.writeFileSync(path.join(OUT, `bot-${engine}-rows.json`), JSON.stringify({ cuts, frames }));
    checks.add('segments begun · told as interrupted', `${cuts.filter((c) => c.started).length} · ${cuts.filter((c) => c.ended?.interrupted).length}`,
      `${count} · ${count}`, cuts.every((c) => c.started && c.ended?.interrupted));
    const [delays, toLips] = [[], []];
    let stale = 0;
    // A mouth at rest moves a little: silent is what is nearer to rest than to speech.
    const during = cuts.flatMap((c) => frames.filter((f) => f[0] > c.cut - 400 && f[0] < c.cut).map((f) => f[1]));
    const calm = cuts.flatMap((c) => frames.filter((f) => f[0] > c.cut + 600 && f[0] < c.cut + 900).map((f) => f[1]));
    const border = card ? 0.1 : (percentile(during, 0.5) + percentile(calm, 0.5)) / 2;
    for (const { spoke, cut } of cuts) {
      const after = frames.filter((f) => f[0] >= cut && f[0] < cut + 850);
      const last = after.findLastIndex((f) => f[1] > border);
      const silent = after[last + 1];
      const first = after.findIndex((f) => f[1] <= border);
      if (silent) delays.push(silent[0] - cut);
      // Speech again after silence was shown once: a picture of what was cut off.
      if (card && last > first && first >= 0) stale += 1;
      const lips = frames.find((f) => f[0] >= spoke && f[1] > border);
      if (lips) toLips.push(lips[0] - spoke);
    }
    checks.add('interruptions followed on the screen', `${delays.length} of ${count}`, 'all', delays.length === count);
    if (card) checks.add('pictures of what was cut off after silence', stale, 'none', stale === 0);
    timed(checks, 'interrupt to silence on the screen', `p50 ${round(percentile(delays, 0.5))} ms, p95 ${round(percentile(delays, 0.95))} ms, most ${round(Math.max(...delays))} ms`,
      'p95 at most 200 ms', percentile(delays, 0.95) <= 200);
    checks.note('speech sent to moving picture', `p50 ${round(percentile(toLips, 0.5))} ms, p95 ${round(percentile(toLips, 0.95))} ms`);
    checks.add('errors in the page', JSON.stringify(said.slice(0, 3)), 'none', said.length === 0);
  } finally {
    await chromium.close();
    await service.stop();
  }
}
