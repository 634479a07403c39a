// The pages without controls, and recordings: overlay, bot, recording. See run.mjs for how they are called.

import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { BINARY, OUT, browser, bursts, complaints, percentile, round, serve, sleep, speech } from './lib.mjs';

/** A session of the service: what POST answered. */
async function session(base, wanted = {}) {
  const response = await fetch(`${base}/v1/sessions`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(wanted),
  });
  if (response.status !== 201) throw new Error(`POST /v1/sessions answered ${response.status}: ${await response.text()}`);
  return response.json();
}

const call = (base, { token }, method, at, body) => fetch(`${base}${at}`, {
  method, headers: { authorization: `Bearer ${token}`, ...(body ? { 'content-type': 'application/json' } : {}) }, body: body && JSON.stringify(body),
});

const live = (page, ms = 30_000) => page.waitForFunction(() => window.loquent?.video?.videoWidth > 0, null, { timeout: ms, polling: 50 });

/** What is on screen as a PNG, with a colour laid under the page. */
async function screen(page, colour) {
  await page.evaluate((c) => { document.documentElement.style.background = c; }, colour);
  await sleep(120);
  return page.screenshot({ type: 'png' });
}

/** A PNG as RGBA. */
const pixels = (page, png) => page.evaluate(async (base64) => {
  const image = await createImageBitmap(await (await fetch(`data:image/png;base64,${base64}`)).blob());
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  return { width: image.width, height: image.height, data: Array.from(context.getImageData(0, 0, image.width, image.height).data) };
}, png.toString('base64'));

/**
 * Per pixel: how much of the page shows through, and the presenter's colour, from one frame before black and white. The
 * picture moves on before either is read, which is slow: after six seconds without one the page begins a new connection.
 */
async function cutout(page) {
  await page.evaluate(() => window.loquent.video.pause());
  await sleep(200);
  const shots = [await screen(page, '#000'), await screen(page, '#fff')];
  await page.evaluate(() => window.loquent.video.play());
  const [black, white] = [await pixels(page, shots[0]), await pixels(page, shots[1])];
  const count = black.width * black.height;
  const alpha = Array.from({ length: count }, (_, i) => 1 - (white.data[4 * i + 1] - black.data[4 * i + 1]) / 255);
  const colour = (i) => [0, 1, 2].map((c) => (alpha[i] > 0.02 ? Math.min(255, black.data[4 * i + c] / alpha[i]) : 0));
  return { width: black.width, height: black.height, alpha, colour };
}

/** Mean distance (of 255, per channel) of the colours of soft pixels from the nearest wholly opaque pixel's. */
function fringe({ width, height, alpha, colour }, top, bottom) {
  const errors = [];
  for (let y = top; y < bottom; y += 1) {
    for (let x = 8; x < width - 8; x += 1) {
      const i = y * width + x;
      if (alpha[i] < 0.15 || alpha[i] > 0.85) continue;
      const own = colour(i);
      let least = Infinity;
      for (let dy = -6; dy <= 6; dy += 1) {
        for (let dx = -6; dx <= 6; dx += 1) {
          const j = i + dy * width + dx;
          if (!(alpha[j] > 0.97)) continue;
          const other = colour(j);
          least = Math.min(least, own.reduce((sum, v, c) => sum + Math.abs(v - other[c]) / 3, 0));
        }
      }
      if (least < Infinity) errors.push(least);
    }
  }
  return errors;
}

/** A presenter over a striped page: what lies below is seen, edges are soft, nothing of the background clings to them. */
export async function overlay(checks, options) {
  const engine = options.engine || 'pocket';
  const service = await serve({ engine, seconds: 240 });
  let chromium;
  try {
    const made = await session(service.base, engine === 'pocket' ? { presenter: options.presenter || 'farah' } : {});
    chromium = await browser(null, { width: 512, height: 512 });
    const page = await chromium.context.newPage();
    const said = complaints(page);
    await page.goto(`${service.base}${made.urls.overlay}`);
    await live(page);
    await sleep(2500);
    const size = await page.evaluate(() => [window.loquent.video.videoWidth, window.loquent.video.videoHeight, window.loquent.view]);
    checks.add('the stream', size.join(' '), 'twice as high as wide, stacked', size[2] === 'stacked' && size[1] === 2 * size[0]);
    await page.addStyleTag({ content: 'html.striped { background: repeating-linear-gradient(90deg, #e0218a 0 24px, #1fd655 24px 48px) !important; }' });
    await page.evaluate(() => document.documentElement.classList.add('striped'));
    await sleep(200);
    await page.screenshot({ path: path.join(OUT, `overlay-${engine}.png`) });
    await page.evaluate(() => document.documentElement.classList.remove('striped'));
    const cut = await cutout(page);
    const { width, height, alpha } = cut;
    const at = (x, y) => alpha[Math.round(y * height) * width + Math.round(x * width)];
    const clear = alpha.filter((a) => a < 0.01).length / alpha.length;
    const soft = alpha.filter((a) => a > 0.05 && a < 0.95).length / alpha.length;
    checks.add('what lies below is seen', `in the corners ${round(1 - at(0.02, 0.02), 3)}, ${round(1 - at(0.98, 0.3), 3)}; in ${round(100 * clear)} % of the page`,
      'wholly, in 15 % or more', at(0.02, 0.02) < 0.01 && at(0.98, 0.3) < 0.01 && clear > 0.15);
    checks.add('the presenter is opaque', round(at(0.5, 0.45), 3), 'at least 0.98', at(0.5, 0.45) >= 0.98);
    const inside = alpha.filter((_, i) => {
      const [x, y] = [(i % width) / width, Math.floor(i / width) / height];
      return x > 0.38 && x < 0.62 && y > 0.34 && y < 0.58;
    });
    const least = inside.reduce((a, b) => Math.min(a, b), 1);
    checks.add('nothing shines through the face', `at its clearest ${round(least, 3)} of ${inside.length} pixels`, 'at least 0.95', engine !== 'pocket' || least >= 0.95);
    checks.add('edges are soft', `${round(100 * soft, 2)} % of the pixels are neither`, 'some', soft > 0.002);
    if (engine === 'pocket') {
      const errors = fringe(cut, 0, Math.round(height * 0.6));
      const mean = errors.reduce((a, b) => a + b, 0) / Math.max(1, errors.length);
      checks.add('fringe at head and hair', `mean ${round(mean, 1)} of 255, p95 ${round(percentile(errors, 0.95), 1)} (${errors.length} soft pixels)`, 'mean at most 6', errors.length > 50 && mean <= 6);
    }
    // The server lets go: the page comes back by itself.
    const tries = await page.evaluate(async (token) => {
      while (!window.loquent.kept.resource) await new Promise((done) => setTimeout(done, 50));
      const { resource, tries: before } = window.loquent.kept;
      const { status } = await fetch(resource, { method: 'DELETE', headers: { authorization: `Bearer ${token}` } });
      if (status !== 200) throw new Error(`DELETE ${resource} was answered ${status}`);
      return before;
    }, made.token);
    await page.waitForFunction((n) => window.loquent.kept.tries > n && window.loquent.video.readyState >= 2 && !window.loquent.video.paused, tries, { timeout: 40_000 });
    const before = await page.evaluate(() => window.loquent.cutout.drawn);
    await sleep(3000);
    const after = await page.evaluate(() => window.loquent.cutout.drawn);
    checks.add('after a lost connection', `${after - before} pictures in 3 s`, 'pictures come again', after > before + 10);
    // Another place and size.
    await page.goto(`${service.base}${made.urls.overlay}&width=50%25&align=top-right&x=10px&crop=0,10,20,10`);
    await live(page);
    const box = await page.evaluate(() => document.getElementById('place').getBoundingClientRect().toJSON());
    checks.add('width=50%, align=top-right, x=10px, crop=0,10,20,10', `${round(box.left)}…${round(box.right)} × ${round(box.top)}…${round(box.bottom)}`,
      '246…502 × 0…256', Math.abs(box.right - 502) < 2 && Math.abs(box.width - 256) < 2 && box.top === 0 && Math.abs(box.height - 256) < 3);
    await page.screenshot({ path: path.join(OUT, `overlay-${engine}-placed.png`) });
    // Without the page: a green background from the service, keyed by the player.
    await page.goto(`${service.base}${made.urls.overlay}&view=green&key=green`);
    await live(page);
    await sleep(2500);
    const keyed = await cutout(page);
    const corner = keyed.alpha[20 * keyed.width + 20];
    const middle = keyed.alpha[Math.round(keyed.height * 0.45) * keyed.width + keyed.width / 2];
    checks.add('chroma key', `corner ${round(corner, 3)}, middle ${round(middle, 3)}`, 'clear and opaque', corner < 0.03 && middle > 0.95);
    checks.add('errors in the page', JSON.stringify(said.slice(0, 3)), 'none', said.length === 0);
    await call(service.base, made, 'DELETE', made.urls.session);
  } finally {
    await chromium?.close();
    await service.stop();
  }
}

/** A meeting bot opens the page: no press of a button, the microphone speaks, the presenter fills the frame. */
export async function bot(checks) {
  const service = await serve({ engine: 'card', sessions: 2, seconds: 180 });
  let chromium;
  try {
    chromium = await browser(bursts(), { width: 640, height: 360 });
    const page = await chromium.context.newPage();
    await page.goto(`${service.base}/bot?presenter=ada`);
    await live(page);
    await page.waitForFunction(() => document.body.classList.contains('showing'), null, { timeout: 20_000 });
    await sleep(4000);
    const seen = await page.evaluate(async () => {
      const { video } = window.loquent;
      const box = video.getBoundingClientRect();
      const context = new AudioContext();
      const analyser = context.createAnalyser();
      context.createMediaStreamSource(video.srcObject).connect(analyser);
      let loudest = 0;
      const samples = new Float32Array(analyser.fftSize);
      for (let i = 0; i < 60; i += 1) {
        await new Promise((done) => { setTimeout(done, 50); });
        analyser.getFloatTimeDomainData(samples);
        loudest = Math.max(loudest, ...samples.map(Math.abs));
      }
      return { muted: video.muted, width: box.width, height: box.height, loudest, buttons: document.querySelectorAll('button, select, input').length };
    });
    await page.screenshot({ path: path.join(OUT, 'bot.png') });
    checks.add('the presenter', `${seen.width}×${seen.height}`, 'fills the page', seen.width === 640 && seen.height === 360);
    checks.add('the microphone comes back as voice, unasked', `loudest ${round(seen.loudest, 3)}, muted: ${seen.muted}`, 'heard', !seen.muted && seen.loudest > 0.02);
    checks.add('controls', seen.buttons, 'none', seen.buttons === 0);
    const made = await session(service.base);
    const guest = await chromium.context.newPage();
    await guest.goto(`${service.base}${made.urls.bot}&speech=ws`);
    await live(guest);
    checks.add('speech=ws: a session of somebody else', await guest.evaluate(() => `${window.loquent.kept.length} connection`), 'plays without a microphone',
      await guest.evaluate(() => window.loquent.kept.length === 1));
  } finally {
    await chromium?.close();
    await service.stop();
  }
}

function probe(file, entries, streams = '') {
  const done = spawnSync('ffprobe', ['-v', 'error', '-count_packets', ...(streams ? ['-select_streams', streams] : []), '-show_entries', entries, '-of', 'json', file], { encoding: 'utf8' });
  if (done.status !== 0) throw new Error(`ffprobe ${file}: ${done.stderr}`);
  return JSON.parse(done.stdout);
}

/** Seconds from the beginning at which ffmpeg sees the test card's meter rise, and hears sound. */
function onsets(file) {
  const run = (args) => spawnSync('ffmpeg', ['-v', 'error', '-i', file, ...args, '-'], { maxBuffer: 1 << 28 }).stdout;
  const grey = run(['-vf', 'fps=100,crop=20:2:16:100,scale=1:1,format=gray', '-f', 'rawvideo']);
  const raw = run(['-af', 'aresample=async=1:first_pts=0', '-ac', '1', '-ar', '48000', '-f', 's16le']);
  const sound = new Int16Array(raw.buffer, raw.byteOffset, raw.length >> 1);
  const [seen, heard] = [[], []];
  let quiet = 0;
  for (let i = 1; i < grey.length; i += 1) if (grey[i] > 100 && grey[i - 1] <= 100) seen.push(i / 100);
  for (let i = 0; i < sound.length; i += 1) {
    if (Math.abs(sound[i]) > 1500) {
      if (quiet > 9600) heard.push(i / 48_000);
      quiet = 0;
    } else quiet += 1;
  }
  return { seen, heard };
}

/** Begun and ended by API; plays in ffprobe and Chromium; lips and voice together; survives a kill in the middle. */
export async function recording(checks) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'loquent-recording-'));
  const settings = { 'server.recordings_dir': folder, 'server.recording_max_mb': 50 };
  const wav = bursts();
  let service = await serve({ engine: 'card', settings, seconds: 240 });
  const chromium = await browser(wav, { width: 400, height: 400 });
  try {
    const made = await session(service.base);
    const page = await chromium.context.newPage();
    await page.goto(`${service.base}${made.urls.bot}`);
    await live(page);
    const at = `${made.urls.session}/recording`;
    const begun = await call(service.base, made, 'POST', at);
    const again = await call(service.base, made, 'POST', at);
    checks.add('POST, and again', `${begun.status}, ${again.status}`, '201, 409', begun.status === 201 && again.status === 409);
    const [{ url, file }] = (await begun.json()).parts;
    await sleep(9000);
    const ended = await call(service.base, made, 'DELETE', at);
    const told = await ended.json();
    checks.add('DELETE', `${ended.status} ${JSON.stringify(told).slice(0, 160)}`, '200, over, about 9 s', ended.status === 200 && told.state === 'over' && told.length_s > 6 && !told.error);
    const download = await call(service.base, made, 'GET', url);
    const bytes = Buffer.from(await download.arrayBuffer());
    const part = await fetch(`${service.base}${url}?token=${made.token}`, { headers: { range: 'bytes=4-7' } });
    checks.add('download', `${download.status} ${bytes.length} bytes; a range: ${part.status} ${await part.text()}`, '200; 206 ftyp', download.status === 200 && bytes.length === told.bytes && part.status === 206);
    const refused = await fetch(`${service.base}${url}`);
    checks.add('without the token', refused.status, '401', refused.status === 401);
    const whole = path.join(folder, file);
    const streams = probe(whole, 'stream=codec_name,nb_read_packets,width,height').streams;
    checks.add('ffprobe', JSON.stringify(streams.map((s) => [s.codec_name, s.nb_read_packets])), 'h264 and opus, 25 and 50 a second',
      streams.some((s) => s.codec_name === 'h264' && s.nb_read_packets > 20 * told.length_s) && streams.some((s) => s.codec_name === 'opus' && s.nb_read_packets > 45 * told.length_s));
    const { seen, heard } = onsets(whole);
    // A picture shows the 40 ms that it spans: its burst began 20 ms after the picture on average.
    const offsets = heard.flatMap((h) => seen.filter((s) => Math.abs(s + 0.02 - h) < 0.25).map((s) => (s + 0.02 - h) * 1000));
    checks.add('lips against voice in the file', `median ${round(percentile(offsets, 0.5))} ms of ${offsets.length} bursts (p5 ${round(percentile(offsets, 0.05))}, p95 ${round(percentile(offsets, 0.95))})`,
      'within ±40 ms', offsets.length >= 4 && Math.abs(percentile(offsets, 0.5)) <= 40);
    const text = bytes.toString('latin1');
    const messages = text.split('"ai_generated":true').length - 1;
    checks.add('the file says that it is computer-made', text.includes('trainedAlgorithmicMedia'), 'XMP', text.includes('trainedAlgorithmicMedia'));
    const keyframes = probe(whole, 'packet=pts_time,flags', 'v').packets.filter((p) => p.flags.startsWith('K')).map((p) => Number(p.pts_time));
    const apart = Math.max(...[...keyframes, told.length_s].map((t, i, all) => t - (all[i - 1] ?? t)));
    checks.add('keyframes, and SEI messages', `${keyframes.length}, at most ${round(apart, 2)} s apart; ${messages}`, 'at most 2 s; one in each',
      apart <= 2.02 && keyframes.length >= 4 && messages === keyframes.length);
    // Killed in the middle.
    const second = await (await call(service.base, made, 'POST', at)).json();
    await sleep(6500);
    service.child.kill('SIGKILL');
    await sleep(300);
    const cut = path.join(folder, second.parts[0].file);
    const left = probe(cut, 'stream=codec_name,nb_read_packets').streams;
    const pictures = Number(left.find((s) => s.codec_name === 'h264')?.nb_read_packets || 0);
    checks.add('after kill -9 at about 6.5 s', `${pictures} pictures`, 'at least 4.5 s of them', pictures >= 110);
    for (const [name, target] of [['whole', whole], ['killed', cut]]) {
      const shown = await plays(chromium.context, target);
      checks.add(`Chromium plays the ${name} one`, JSON.stringify(shown), 'to its end', shown.how === 'ended' && shown.frames > 90 && shown.sound > 0);
    }
    await service.stop().catch(() => {});
    // A disk that takes no more: the recording ends with a reason, the session goes on.
    const full = fs.mkdtempSync(path.join(os.tmpdir(), 'loquent-full-'));
    service = await limited(full, 200);
    const small = await session(service.base);
    await call(service.base, small, 'POST', `${small.urls.session}/recording`);
    let row = null;
    for (let i = 0; i < 60 && !(row?.state === 'over'); i += 1) {
      await sleep(500);
      row = (await (await call(service.base, small, 'GET', `${small.urls.session}/recording`)).json()).recordings[0];
    }
    const alive = await fetch(`${service.base}${small.urls.session}`);
    checks.add('a full disk', `${row?.state}: ${row?.error}; the session: ${alive.status}`, 'over with a reason; 200', row?.state === 'over' && /recording|large|write/i.test(row?.error || '') && alive.status === 200);
    fs.rmSync(full, { recursive: true, force: true });
  } finally {
    await chromium.close();
    await service.stop().catch(() => {});
    fs.rmSync(folder, { recursive: true, force: true });
  }
}

/** A service whose files may not grow beyond `kib`: what a full disk looks like to it. */
async function limited(folder, kib) {
  const script = path.join(folder, 'limited.sh');
  fs.writeFileSync(script, `#!/bin/bash\ntrap '' XFSZ\nulimit -f ${kib}\nexec ${JSON.stringify(BINARY)} "$@"\n`, { mode: 0o755 });
  return serve({ engine: 'card', settings: { 'server.recordings_dir': folder }, seconds: 120, binary: script });
}

/** Plays a file of this machine in Chromium. */
async function plays(context, file) {
  const page = await context.newPage();
  try {
    const server = spawn('python3', ['-m', 'http.server', '0', '--bind', '127.0.0.1', '--directory', path.dirname(file)], { stdio: ['ignore', 'pipe', 'pipe'] });
    try {
      const port = await new Promise((done) => {
        let text = '';
        const hear = (d) => {
          text += d;
          const found = /port (\d+)/.exec(text);
          if (found) done(found[1]);
        };
        server.stdout.on('data', hear);
        server.stderr.on('data', hear);
      });
      await page.goto(`http://127.0.0.1:${port}/`);
      return await page.evaluate((name) => new Promise((done) => {
        const video = document.createElement('video');
        document.body.append(video);
        const end = (how) => done({ how, at: Math.round(video.currentTime * 100) / 100, frames: video.getVideoPlaybackQuality().totalVideoFrames, sound: video.webkitAudioDecodedByteCount });
        video.onended = () => end('ended');
        video.onerror = () => end(`error ${video.error.code}: ${video.error.message}`);
        setTimeout(() => end('stuck'), 25_000);
        video.playbackRate = 2;
        video.src = `/${name}`;
        video.play();
      }), path.basename(file));
    } finally {
      server.kill();
    }
  } finally {
    await page.close();
  }
}

/** The pages at the sizes of a desk and a phone, in both languages: pictures to look at, and nothing wider than the page. */
export async function looks(checks) {
  const service = await serve({ engine: 'pocket', seconds: 180 });
  const chromium = await browser(speech().file);
  try {
    for (const [size, width, height] of [['desk', 1280, 800], ['phone', 390, 844]]) {
      for (const lang of ['en', 'zh']) {
        const page = await chromium.context.newPage();
        await page.setViewportSize({ width, height });
        await page.goto(`${service.base}/?lang=${lang}`);
        await page.waitForSelector('.presenter');
        if (lang === 'zh' || size === 'desk') {
          await page.click('#start');
          await page.waitForSelector('.showing', { timeout: 30_000 });
          await sleep(2500);
        }
        await page.screenshot({ path: path.join(OUT, `page-${size}-${lang}.png`), fullPage: size === 'phone' });
        const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        const english = lang === 'zh' ? await page.evaluate(() => [...document.querySelectorAll('body :not(option):not(script):not(style)')]
          .flatMap((e) => [...e.childNodes].filter((n) => n.nodeType === 3 && e.checkVisibility?.() !== false).map((n) => n.data.trim())).filter((l) => /[a-z]{4,} [a-z]{3,}/i.test(l))) : [];
        checks.add(`${size}, ${lang}`, `${wide} px too wide; English left: ${JSON.stringify(english.slice(0, 3))}`, 'none', wide <= 0 && english.length === 0);
        await page.close();
        await sleep(600);
      }
    }
  } finally {
    await chromium.close();
    await service.stop();
  }
}
