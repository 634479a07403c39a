// Scenarios in a real browser. `node tests/browser/run.mjs SCENARIO… [seconds=N] [engine=card|pocket]`; `ci` is what
// tests/run runs, `all` everything at full length. Figures also go to tests/browser/out/*.json.

import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { spawnSync } from 'node:child_process';
import {
  BINARY, Checks, OUT, ROOT, TOOLS, browser, bursts, following, gaps, link, onsets, percentile, round, row, serve, shift, sleep,
  speech, start, visit,
} from './lib.mjs';
import { design } from './design.mjs';
import * as guarded from './guarded.mjs';
import * as pages from './pages.mjs';

import { bot as cuts } from './bot.mjs';

const words = process.argv.slice(2);
const options = Object.fromEntries(words.filter((w) => w.includes('=')).map((w) => w.split('=')));
const secondsOr = (usual) => Number(options.seconds || usual);
const engineOr = (usual) => options.engine || usual;
/** In `ci` nobody knows what else the machine does: figures of time are told there, and checked in every other run. */
const timed = (checks, what, value, promised, held) => (words.includes('ci')
  ? checks.note(what, `${value}   (promised: ${promised}; ${held ? 'kept' : 'missed here and now'})`)
  : checks.add(what, value, promised, held));

/** Service, browser and page for one scenario, put away in any case. */
async function live({ engine, wav, settings, probe, bend, size, seconds }, scenario) {
  const service = await serve({ engine, settings, seconds: seconds + 120 });
  let chromium;
  try {
    chromium = await browser(wav, size);
    const { page, said } = await visit(chromium.context, service.base, probe, bend);
    const first = await start(page);
    return await scenario({ service, page, said, first, context: chromium.context });
  } finally {
    await chromium?.close();
    await service.stop();
  }
}

const report = (page) => page.evaluate(() => window.__probe.report());
const frames = (page) => page.evaluate(() => window.__probe.frames);
const waits = (page) => page.evaluate(() => window.__probe.waits);

// ---- a conversation ------------------------------------------------------------------------------------------------

/** Pictures, losses, freezes and memory while somebody speaks. */
async function talk(checks) {
  const [seconds, engine] = [secondsOr(25), engineOr('pocket')];
  const voice = speech();
  checks.note('speech', `${voice.human ? 'human recordings' : 'espeak-ng'}, ${round(voice.seconds)} s, repeated`);
  await live({ engine, wav: voice.file, probe: {}, seconds }, async ({ service, page, said, first }) => {
    const info = await (await fetch(`${service.base}/v1/info`)).json();
    const fps = info.engine.fps;
    await sleep(5000);
    const [early, cpu] = [await report(page), service.cpu()];
    const memory = [];
    const panel = [];
    for (let second = 0; second < seconds; second += 1) {
      await sleep(1000);
      memory.push(service.memory());
      if (second % 5 === 4) panel.push((await report(page)).numbers);
      if (second === Math.min(20, seconds - 3)) await page.screenshot({ path: path.join(OUT, `${engine}-talk.png`) });
    }
    const late = await report(page);
    const shown = await frames(page);
    const [a, b] = [row(early, 'inbound-rtp', 'video'), row(late, 'inbound-rtp', 'video')];
    const voiceIn = row(late, 'inbound-rtp', 'audio');
    const took = (late.now - early.now) / 1000;
    const decoded = b.framesDecoded - a.framesDecoded;
    const span = shown.filter((f) => f[0] >= early.now && f[0] <= late.now);
    checks.note('first picture after pressing Start', `${first} ms`);
    checks.add('picture', `${b.frameWidth}×${b.frameHeight}`, 'at least 256×256', b.frameWidth >= 256 && b.frameHeight >= 256);
    checks.add('the picture lives', `${decoded} frames decoded`, 'at least 5 a second', decoded >= 5 * took);
    timed(checks, 'frames decoded', `${decoded} of ${round(fps * took)} (${round((100 * decoded) / (fps * took), 1)} %)`, 'at least 95 %', decoded >= 0.95 * fps * took);
    timed(checks, 'freezes after 5 s', b.freezeCount - a.freezeCount, 'none', b.freezeCount === a.freezeCount);
    checks.note('largest gap between pictures', `${round(gaps(span).largest)} ms`);
    const lost = (b.packetsLost || 0) + (voiceIn.packetsLost || 0);
    const lostIn = late.numbers.server?.lost_in;
    checks.add('packets lost down · up', `${lost} · ${lostIn ?? '–'}`, '0 · 0', lost === 0 && (lostIn ?? 0) === 0);
    checks.add('voice heard', `energy ${round(voiceIn.totalAudioEnergy, 3)}`, 'above 0.001', voiceIn.totalAudioEnergy > 0.001);
    // The first part fills caches and the allocator's pools.
    const [settled, end] = [percentile(memory.slice(seconds > 60 ? 30 : 5), 0.1), percentile(memory.slice(-5), 0.5)];
    const allowed = Math.max(8, seconds / 30);
    checks.add('memory of the service', `${round(settled, 1)} → ${round(end, 1)} MiB`, `grows at most ${round(allowed)} MiB`, end - settled <= allowed);
    checks.note('processor of the service', `${round((100 * (service.cpu() - cpu)) / took)} % of one core`);
    const factor = percentile(panel.map((n) => n.server?.real_time_factor), 0.5);
    if (engine === 'pocket') timed(checks, 'real-time factor (panel)', round(factor, 3), 'at most 0.5', factor <= 0.5);
    else checks.note('real-time factor (panel)', round(factor, 4));
    checks.note('delay (panel)', `${round(percentile(panel.map((n) => n.delayMs), 0.5))} ms, ${round(b.bytesReceived * 8 / late.now)} kbit/s video`);
    checks.note('stages (panel)', JSON.stringify(late.numbers.server?.stages ?? {}));
    checks.note('frames held · skipped', `${late.numbers.server?.frames_held} · ${late.numbers.server?.frames_skipped}`);
    checks.add('errors in the page', JSON.stringify([...said, ...late.problems].slice(0, 3)), 'none', said.length + late.problems.length === 0);
  });
}

// ---- delay, and lips against voice ---------------------------------------------------------------------------------

/** Bursts at the microphone: when they are heard, when the test card's meter shows them, what the panel says. */
async function timing(checks) {
  const [seconds, engine] = [secondsOr(30), engineOr('card')];
  const card = engine === 'card';
  const probe = { raw: true, levels: true, meter: card, mouth: !card };
  await live({ engine, wav: bursts(), probe, seconds }, async ({ page }) => {
    await sleep(6000);
    const began = await page.evaluate(() => performance.now());
    const panel = [];
    for (let second = 0; second < seconds; second += 1) {
      await sleep(1000);
      panel.push((await report(page)).numbers.delayMs);
    }
    const { levels, clock } = await page.evaluate(() => ({ levels: window.__probe.levels, clock: window.__probe.clock }));
    const sound = levels.map(([t, microphone, voice]) => [t * 1000 + clock, microphone, voice]).filter((r) => r[0] >= began);
    const seen = (await frames(page)).filter((f) => f[0] >= began);
    const spoken = onsets(sound.map((r) => [r[0], r[1]]), 0.03, 0.01, 150);
    const heard = onsets(sound.map((r) => [r[0], r[2]]), 0.03, 0.01, 150);
    const shown = card ? onsets(seen.map((f) => [f[1], f[6]]), 0.4, 0.2, 120) : [];
    checks.note('bursts spoken · heard · shown', `${spoken.length} · ${heard.length} · ${shown.length}`);
    const toVoice = following(spoken, heard, [30, 1500]).map(([a, b]) => b - a);
    if (!card) {
      // Lips have no onset to the millisecond: what is measured is the shift at which they follow the voice best.
      const { lag, r } = shift(seen.map((f) => [f[1] + 20, f[8]]), sound.map((s) => [s[0], s[2]]));
      checks.add('bursts heard', `${toVoice.length} of ${spoken.length}`, 'at least 80 %', toVoice.length >= 0.8 * spoken.length && toVoice.length >= 8);
      checks.note('microphone to voice', `p50 ${round(percentile(toVoice, 0.5))} ms, p95 ${round(percentile(toVoice, 0.95))} ms`);
      const lips = toVoice.map((d) => d + lag);
      timed(checks, 'delay to voice and lips', `p50 ${round(percentile([...toVoice, ...lips], 0.5))} ms, p95 ${round(percentile([...toVoice, ...lips], 0.95))} ms`,
        'at most 600 and 800', percentile([...toVoice, ...lips], 0.5) <= 600 && percentile([...toVoice, ...lips], 0.95) <= 800);
      const told = percentile(panel, 0.5);
      timed(checks, 'delay on the panel', `${round(told)} ms against ${round(percentile(toVoice, 0.5))} ms of the voice from outside`, 'within 50 ms',
        Math.abs(told - percentile(toVoice, 0.5)) <= 50);
      checks.note('mouth against voice', `${lag} ms (r ${round(r, 2)}; mouths open and close over several frames)`);
      return;
    }
    // A frame shows the 40 ms that it spans, so its burst began 20 ms after the frame's own time on average.
    const toLips = following(spoken, shown, [0, 1500]).map(([a, b]) => b - a + 20);
    const offset = following(heard, shown, [-250, 250]).map(([a, b]) => b - a + 20);
    const enough = Math.min(toVoice.length, toLips.length, offset.length);
    checks.add('bursts that could be followed', `${enough} of ${spoken.length}`, 'at least half', enough >= 0.5 * spoken.length && enough >= 6);
    const both = [...toVoice, ...toLips];
    checks.note('microphone to voice', `p50 ${round(percentile(toVoice, 0.5))} ms, p95 ${round(percentile(toVoice, 0.95))} ms`);
    checks.note('microphone to lips', `p50 ${round(percentile(toLips, 0.5))} ms, p95 ${round(percentile(toLips, 0.95))} ms`);
    timed(checks, 'delay', `p50 ${round(percentile(both, 0.5))} ms, p95 ${round(percentile(both, 0.95))} ms`, 'at most 600 and 800',
      percentile(both, 0.5) <= 600 && percentile(both, 0.95) <= 800);
    const told = percentile(panel, 0.5);
    const outside = percentile(toLips, 0.5);
    timed(checks, 'delay on the panel', `${round(told)} ms against ${round(outside)} ms from outside`, 'within 50 ms', Math.abs(told - outside) <= 50);
    timed(checks, 'lips against voice', `median ${round(percentile(offset, 0.5))} ms (p5 ${round(percentile(offset, 0.05))}, p95 ${round(percentile(offset, 0.95))})`,
      'within ±40 ms', Math.abs(percentile(offset, 0.5)) <= 40);
    fs.writeFileSync(path.join(OUT, 'timing-rows.json'), JSON.stringify({ spoken, heard, shown, panel }));
  });
}

// ---- places, goodbye, files ----------------------------------------------------------------------------------------

/** A full house says so at once; a closed tab frees its place; Ctrl-C says goodbye. */
async function places(checks) {
  await live({ engine: 'card', wav: bursts(4), probe: {}, seconds: 60 }, async ({ service, page, context }) => {
    const second = await visit(context, service.base, {});
    await second.page.click('#start');
    await second.page.waitForSelector('#notice:not([hidden])', { timeout: 5000 });
    const told = await second.page.textContent('#notice-title');
    checks.add('a second visitor is told', JSON.stringify(told), 'places are taken', /taken/i.test(told));
    const raw = await fetch(`${service.base}/v1/live`, { method: 'POST', headers: { 'content-type': 'application/sdp' },
      body: await page.evaluate(() => window.__probe.peers[0].localDescription.sdp) });
    checks.add('a full house answers', `${raw.status}, Retry-After ${raw.headers.get('retry-after')}`, '503 with Retry-After',
      raw.status === 503 && Number(raw.headers.get('retry-after')) > 0);
    const gone = Date.now();
    await page.goto('about:blank');
    await page.close();
    await second.page.waitForFunction(() => window.__probe.frames.length > 0, null, { timeout: 20_000 });
    timed(checks, 'the place was free again after', `${Date.now() - gone} ms`, 'at most 10 s', Date.now() - gone <= 10_000);
    service.child.kill('SIGINT');
    await second.page.waitForSelector('#notice:not([hidden])', { timeout: 10_000 });
    const goodbye = await second.page.textContent('#notice-text');
    checks.add('Ctrl-C tells the page', JSON.stringify(goodbye), 'a sentence', goodbye.length > 10);
    const how = await service.stop();
    checks.add('the service ended with', how.code, '0', how.code === 0);
  });
}

/** What `generate` writes plays in the browser, to its end. */
async function file(checks) {
  const voice = speech();
  const out = path.join(OUT, 'generated.mp4');
  const input = path.join(OUT, 'short.wav');
  // Three seconds and a bit of the speech.
  const bytes = fs.readFileSync(voice.file);
  const short = Buffer.from(bytes.subarray(0, 44 + 2 * 48_000 * 3 + 2 * 1234));
  short.writeUInt32LE(short.length - 8, 4);
  short.writeUInt32LE(short.length - 44, 40);
  fs.writeFileSync(input, short);
  const made = spawnSync(BINARY, ['generate', '--engine', engineOr('card'), '--audio', input, '--out', out, '--quiet'], { encoding: 'utf8' });
  checks.add('generate', made.status === 0 ? `${fs.statSync(out).size} bytes` : made.stderr, 'ends well', made.status === 0);
  const server = http.createServer((request, response) => {
    if (!request.url.startsWith('/v.mp4')) return response.setHeader('content-type', 'text/html').end('<!doctype html><video></video>');
    const video = fs.readFileSync(out);
    const [, from, to] = /bytes=(\d+)-(\d*)/.exec(request.headers.range || '') || [];
    response.setHeader('content-type', 'video/mp4').setHeader('accept-ranges', 'bytes');
    if (from === undefined) return response.end(video);
    const last = to ? Number(to) : video.length - 1;
    response.writeHead(206, { 'content-range': `bytes ${from}-${last}/${video.length}` });
    return response.end(video.subarray(Number(from), last + 1));
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  const chromium = await browser(null);
  try {
    const page = await chromium.context.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    const played = await page.evaluate(() => new Promise((done) => {
      const video = document.querySelector('video');
      const end = (how) => done({ how, duration: video.duration, width: video.videoWidth, height: video.videoHeight,
        frames: video.getVideoPlaybackQuality().totalVideoFrames, sound: video.webkitAudioDecodedByteCount, at: video.currentTime });
      video.onended = () => end('ended');
      video.onerror = () => end(`error ${video.error.code}: ${video.error.message}`);
      setTimeout(() => end('stuck'), 15_000);
      video.src = '/v.mp4';
      video.play();
    }));
    const length = 3 + 1234 / 48_000;
    checks.add('Chromium plays it', `${played.how} at ${round(played.at, 3)} s, ${played.width}×${played.height}, ${played.frames} frames`,
      'to the end', played.how === 'ended' && played.frames >= 70 && played.width >= 256);
    checks.add('its length', `${round(played.duration, 4)} s`, `${round(length, 4)} s ± 1 ms`, Math.abs(played.duration - length) <= 0.001);
    checks.add('its sound is decoded', `${played.sound} bytes`, 'more than none', played.sound > 0);
  } finally {
    await chromium.close();
    server.close();
  }
}

// ---- WHIP and WHEP with the npm package whip-whep -----------------------------------------------------------------------

/** A page of another site publishes the microphone and plays the presenter, by clients that are not ours. */
async function whip(checks) {
  const service = await serve({ engine: engineOr('card'), settings: { 'server.cors_origins': '*' }, seconds: 120 });
  const folder = path.join(TOOLS, 'node_modules/whip-whep');
  const site = http.createServer((request, response) => {
    const script = /^\/(whip|whep)\.js$/.exec(request.url);
    if (script) return response.setHeader('content-type', 'text/javascript').end(fs.readFileSync(path.join(folder, script[0])));
    return response.setHeader('content-type', 'text/html').end('<!doctype html><video autoplay></video>');
  });
  await new Promise((done) => site.listen(0, '127.0.0.1', done));
  const chromium = await browser(bursts(24));
  try {
    const made = await fetch(`${service.base}/v1/sessions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{}' });
    const session = await made.json();
    checks.add('session', made.status, '201', made.status === 201);
    const page = await chromium.context.newPage();
    const said = [];
    page.on('pageerror', (e) => said.push(String(e)));
    await page.goto(`http://127.0.0.1:${site.address().port}/`);
    const seen = await page.evaluate(async ({ here, token }) => {
      const { WHIPClient } = await import('/whip.js');
      const { WHEPClient } = await import('/whep.js');
      const asked = [];
      const plain = window.fetch;
      window.fetch = async (url, options = {}) => {
        const answer = await plain(url, options);
        asked.push([options.method || 'GET', new URL(url).pathname.split('/')[4], answer.status, options.headers?.['If-Match'] || '', answer.headers.get('etag') || '']);
        return answer;
      };
      const wait = (ms) => new Promise((done) => setTimeout(done, ms));
      const connected = async (pc) => {
        for (let i = 0; i < 100 && pc.connectionState !== 'connected'; i++) await wait(100);
        return pc.connectionState;
      };
      // A camera as well: its picture is taken and not looked at.
      const own = await navigator.mediaDevices.getUserMedia({ audio: true, video: true });
      const up = new RTCPeerConnection({ bundlePolicy: 'max-bundle' });
      for (const track of [...own.getAudioTracks(), ...own.getVideoTracks()]) up.addTransceiver(track, { direction: 'sendonly', streams: [own] });
      const publisher = new WHIPClient();
      await publisher.publish(up, `${here}/whip`, token);
      const down = new RTCPeerConnection({ bundlePolicy: 'max-bundle' });
      down.addTransceiver('audio', { direction: 'recvonly' });
      down.addTransceiver('video', { direction: 'recvonly' });
      const stream = new MediaStream();
      down.ontrack = (event) => stream.addTrack(event.track);
      const player = new WHEPClient();
      await player.view(down, `${here}/whep`, token);
      const states = [await connected(up), await connected(down)];
      const video = document.querySelector('video');
      video.srcObject = stream;
      await video.play();
      let frames = 0;
      const count = () => { frames += 1; video.requestVideoFrameCallback(count); };
      video.requestVideoFrameCallback(count);
      const sound = new AudioContext();
      const ear = sound.createAnalyser();
      sound.createMediaStreamSource(stream).connect(ear);
      const level = () => {
        const samples = new Float32Array(ear.fftSize);
        ear.getFloatTimeDomainData(samples);
        return Math.max(...samples.map(Math.abs));
      };
      let loud = 0;
      const listen = async (ms) => {
        for (let i = 0; i < ms / 20; i++) {
          loud += level() > 0.05;
          await wait(20);
        }
      };
      await listen(5000);
      const sent = [...(await up.getStats()).values()].filter((r) => r.type === 'outbound-rtp' && r.kind === 'video').reduce((n, r) => n + r.bytesSent, 0);
      const first = { frames, loud, sent, size: [video.videoWidth, video.videoHeight] };
      await publisher.restart();
      await player.restart();
      await wait(1500);
      [frames, loud] = [0, 0];
      await listen(4000);
      const second = { frames, loud, states: [up.connectionState, down.connectionState] };
      await publisher.stop();
      await player.stop();
      await wait(300);
      return { asked, states, first, second };
    }, { here: `${service.base}/v1/sessions/${session.id}`, token: session.token });
    const calls = (method, kind) => seen.asked.filter((a) => a[0] === method && a[1] === kind);
    for (const kind of ['whip', 'whep']) {
      checks.add(`${kind}: POST`, calls('POST', kind).map((a) => a[2]), '201', calls('POST', kind)[0]?.[2] === 201);
      checks.add(`${kind}: the ETag can be read by the page`, calls('POST', kind)[0]?.[4], 'a strong tag', /^"\w+"$/.test(calls('POST', kind)[0]?.[4]));
      const restart = calls('PATCH', kind).find((a) => a[3] === '*');
      checks.add(`${kind}: restart with If-Match *`, restart?.[2], '200 and a new tag', restart?.[2] === 200 && restart[4] !== calls('POST', kind)[0][4]);
      checks.add(`${kind}: DELETE`, calls('DELETE', kind).map((a) => a[2]), '200', calls('DELETE', kind)[0]?.[2] === 200);
    }
    const trickle = calls('PATCH', 'whip').filter((a) => a[3] !== '*');
    checks.add('whip: trickle with If-Match', trickle.map((a) => a[2]), '204', trickle.length > 0 && trickle.every((a) => a[2] === 204 && a[3]));
    // This version of the player forgets the tag it was given, so its trickle must be refused; it needs none here.
    checks.note('whep: trickle without If-Match', calls('PATCH', 'whep').filter((a) => a[3] !== '*').map((a) => a[2]));
    checks.add('connected', seen.states, 'both', seen.states.every((s) => s === 'connected'));
    checks.add('pictures in 5 s', `${seen.first.frames}, ${seen.first.size}`, 'at least 50', seen.first.frames >= 50 && seen.first.size[0] >= 256);
    checks.note('the camera sends', `${round(seen.first.sent * 8 / 5000)} kbit/s`);
    checks.add('the voice is heard', `${seen.first.loud} of 250 looks`, 'bursts', seen.first.loud > 15 && seen.first.loud < 200);
    checks.add('pictures in 4 s after ICE restarts', seen.second.frames, 'at least 40', seen.second.frames >= 40);
    checks.add('…and the voice', `${seen.second.loud} of 200 looks`, 'bursts', seen.second.loud > 10);
    checks.add('errors in the page', said.filter((s) => !/428/.test(s)), 'none but the refused trickle', said.every((s) => /428/.test(s)));
  } finally {
    await chromium.close();
    site.close();
    await service.stop();
  }
}

// ---- bad networks --------------------------------------------------------------------------------------------------

/** A conversation over the link; `script` bends the network. */
async function bent(checks, seconds, script) {
  let bad;
  const bend = async (port) => {
    // An ICE restart keeps the service's port; only another port needs another link.
    if (bad?.to !== port) {
      bad?.stop();
      bad = Object.assign(await link(port, 7), { to: port });
    }
    return bad.port;
  };
  try {
    await live({ engine: engineOr('card'), wav: speech().file, probe: { raw: true }, bend, seconds }, async (all) => {
      await sleep(6000);
      await script({ ...all, bad: () => bad, now: () => all.page.evaluate(() => performance.now()) });
      checks.note('the link', JSON.stringify(await bad.stats()));
    });
  } finally {
    bad?.stop();
  }
}

/**
 * Delays of the pictures shown in [from, to] beyond the least one before `calm`, in ms. A picture's RTP time is when its
 * speech was spoken; what the service itself waits before it sends (told once a second) is taken out.
 */
async function delays(page, calm, from, to = Infinity) {
  const waited = await waits(page);
  let [last, wraps, w] = [null, 0, 0];
  const rows = (await frames(page)).filter((f) => f[4]).map((f) => {
    if (last !== null && last - f[4] > 2 ** 31) wraps += 2 ** 32;
    last = f[4];
    while (w + 1 < waited.length && waited[w + 1][0] <= f[0]) w += 1;
    return [f[0], f[0] - (f[4] + wraps) / 90 - (waited[w]?.[1] ?? 0)];
  });
  const base = percentile(rows.filter((r) => r[0] < calm).map((r) => r[1]), 0.05);
  return rows.filter((r) => r[0] >= from && r[0] <= to).map((r) => r[1] - base);
}

async function loss(checks) {
  const seconds = secondsOr(60);
  await bent(checks, seconds, async ({ page, bad, now }) => {
    const calm = await now();
    bad().say('up loss=5 delay=20');
    bad().say('down loss=5 delay=20');
    await sleep(1000);
    const before = row(await report(page), 'inbound-rtp', 'video');
    const from = await now();
    await sleep(seconds * 1000);
    const after = row(await report(page), 'inbound-rtp', 'video');
    const shown = await frames(page);
    const freezes = after.freezeCount - before.freezeCount;
    checks.add('5 % loss both ways: freezes', `${freezes} in ${seconds} s (${round(after.totalFreezesDuration - before.totalFreezesDuration, 2)} s)`,
      'at most one a minute', freezes <= Math.max(1, seconds / 60));
    checks.note('largest gap', `${round(gaps(shown.filter((f) => f[0] >= from)).largest)} ms`);
    checks.note('frames', `${round((after.framesDecoded - before.framesDecoded) / seconds, 1)} a second, PLI ${after.pliCount - before.pliCount}, repaired ${after.retransmittedPacketsReceived - before.retransmittedPacketsReceived}`);
    checks.note('transport delay p95', `${round(percentile(await delays(page, calm, from), 0.95))} ms`);
  });
}

async function bottleneck(checks) {
  const seconds = secondsOr(40);
  await bent(checks, seconds, async ({ page, bad, now }) => {
    const calm = await now();
    bad().say('up delay=20');
    bad().say('down delay=20 rate=700 queue=300');
    await sleep(1000);
    const from = await now();
    await sleep(seconds * 1000);
    const shown = await frames(page);
    const d = await delays(page, calm, from);
    const gap = gaps(shown.filter((f) => f[0] >= from));
    checks.add('700 kbit/s, 300 ms queue, 40 ms round trip: transport delay',
      `p50 ${round(percentile(d, 0.5))}, p95 ${round(percentile(d, 0.95))}, most ${round(Math.max(...d))} ms`, 'p95 at most 400 ms', percentile(d, 0.95) <= 400);
    checks.add('700 kbit/s: longest freeze', `${round(gap.largest)} ms`, 'none above 500 ms', gap.long.length === 0);
    checks.note('panel', JSON.stringify((await report(page)).numbers.server));
  });
}

async function step(checks) {
  await bent(checks, 60, async ({ page, bad, now }) => {
    const calm = await now();
    bad().say('up delay=20');
    bad().say('down delay=20 rate=2000 queue=300');
    await sleep(12_000);
    const rate = async () => (await report(page)).numbers.server?.bitrate;
    const before = await rate();
    const from = await now();
    bad().say('down rate=500');
    await sleep(12_000);
    const low = await rate();
    bad().say('down rate=2000');
    let recovered = null;
    for (let ms = 0; ms <= 20_000 && recovered === null; ms += 500) {
      await sleep(500);
      if ((await rate()) >= 0.8 * before) recovered = ms + 500;
    }
    const shown = await frames(page);
    const gap = gaps(shown.filter((f) => f[0] >= from));
    const d = await delays(page, calm, from);
    checks.add('2000 → 500 → 2000 kbit/s: longest freeze', `${round(gap.largest)} ms`, 'none above 500 ms', gap.long.length === 0);
    checks.add('bitrate', `${round(before / 1000)} → ${round(low / 1000)} → back after ${recovered === null ? 'more than 20 000' : recovered} ms`,
      'back within 15 s', recovered !== null && recovered <= 15_000);
    checks.note('transport delay', `p50 ${round(percentile(d, 0.5))}, p95 ${round(percentile(d, 0.95))}, most ${round(Math.max(...d))} ms`);
  });
}

async function dark(checks) {
  await bent(checks, 30, async ({ page, bad, now }) => {
    bad().say('up delay=20');
    bad().say('down delay=20');
    await sleep(4000);
    const from = await now();
    bad().say('dark 2000');
    await sleep(9000);
    const shown = await frames(page);
    const back = shown.find((f) => f[0] >= from + 2000);
    const after = back ? back[0] - from - 2000 : NaN;
    checks.add('2 s blackout: the picture comes back', `after ${round(after)} ms`, 'it does', Number.isFinite(after));
    timed(checks, '2 s blackout: picture back after', `${round(after)} ms`, 'at most 1000 ms', after <= 1000);
    const later = shown.filter((f) => f[0] >= from + 3000 && f[0] < from + 9000).length;
    checks.note('pictures in the 6 s after', `${later} of 150 (fewer while the estimate climbs back)`);
    checks.note('connection', await page.evaluate(() => window.__probe.peers.map((p) => p.connectionState).join(', ')));
  });
}

// ---- which and how -------------------------------------------------------------------------------------------------

/** Interruptions of a bot; 100 unless `ci` asks. */
const interrupt = (checks) => cuts(checks, { engine: engineOr('card'), count: Number(options.count || (words.includes('ci') ? 8 : 100)), timed });
const of = (scenario) => (checks) => scenario(checks, options);
const SCENARIOS = { talk, timing, places, file, whip, loss, bottleneck, step, dark, interrupt,
  overlay: of(pages.overlay), bot: of(pages.bot), recording: of(pages.recording), looks: of(pages.looks),
  relay: of(guarded.relay), status: of(guarded.status), design };
const SETS = { ci: ['talk', 'timing', 'places', 'file', 'whip', 'recording', 'interrupt', 'overlay', 'dark', 'relay', 'status', 'design'], network: ['loss', 'bottleneck', 'step', 'dark'], all: Object.keys(SCENARIOS) };
const asked = words.filter((w) => !w.includes('=')).flatMap((w) => SETS[w] || [w]);
if (!asked.length || asked.some((w) => !SCENARIOS[w])) {
  console.error(`usage: node ${path.relative(ROOT, process.argv[1])} ${[...Object.keys(SETS), ...Object.keys(SCENARIOS)].join(' | ')} [seconds=N] [engine=card|pocket]`);
  process.exit(2);
}
let [passed, failed] = [0, 0];
for (const name of asked) {
  console.log(`\n${name}`);
  const checks = new Checks(name);
  try {
    await SCENARIOS[name](checks);
  } catch (error) {
    checks.add('the scenario', String(error.stack || error), 'runs to its end', false);
  }
  fs.writeFileSync(path.join(OUT, `${name}.json`), JSON.stringify(checks.rows, null, 1));
  passed += checks.passed;
  failed += checks.failed;
}
console.log(`\n${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
