// What all browser tests share: the service, Chromium, the bad network, sounds, and arithmetic on what was measured.

import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

export const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../..');
const TARGET = process.env.CARGO_TARGET_DIR || path.join(ROOT, 'target');
export const BINARY = process.env.LOQUENT_BIN || path.join(TARGET, 'release/loquent');
export const LINK = process.env.LOQUENT_LINK || path.join(TARGET, 'release/examples/link');
export const TOOLS = process.env.LOQUENT_TEST_TOOLS || path.join(TARGET, 'test-tools');
export const OUT = path.join(path.dirname(fileURLToPath(import.meta.url)), 'out');
fs.mkdirSync(OUT, { recursive: true });

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

async function until(what, ms, check) {
  for (const end = Date.now() + ms; Date.now() < end; await sleep(50)) {
    const value = await check();
    if (value) return value;
  }
  throw new Error(`waited ${ms} ms in vain for ${what}`);
}

// ---- the service ---------------------------------------------------------------------------------------------------

/** Starts `loquent serve` on a free port of this machine; resolves when it is ready. */
export async function serve({ engine = 'card', sessions = 1, settings = {}, seconds = 600, binary = BINARY } = {}) {
  const env = { ...process.env, LOQUENT__NET__BIND: '127.0.0.1' };
  for (const [key, value] of Object.entries(settings)) env[`LOQUENT__${key.toUpperCase().replace('.', '__')}`] = String(value);
  const args = ['serve', '--listen', '127.0.0.1:0', '--engine', engine, '--sessions', String(sessions), '--stop-after', String(seconds)];
  const child = spawn(binary, args, { env, stdio: ['ignore', 'pipe', 'pipe'] });
  const service = { child, log: '', told: '' };
  child.stdout.on('data', (d) => { service.told += d; });
  child.stderr.on('data', (d) => { service.log += d; });
  const ended = new Promise((done) => child.once('exit', (code, signal) => done({ code, signal })));
  try {
    service.base = await until('the service to say its address', 90_000, () => {
      if (child.exitCode !== null) throw new Error(`the service ended with ${child.exitCode}: ${service.log.slice(-2000)}`);
      return (service.told.match(/http:\/\/127\.0\.0\.1:\d+/) || [])[0];
    });
    await until('the service to be ready', 60_000, async () => (await fetch(`${service.base}/readyz`).catch(() => null))?.status === 200);
  } catch (error) {
    child.kill('SIGKILL');
    throw error;
  }
  /** Resident memory in MiB. */
  service.memory = () => Number(fs.readFileSync(`/proc/${child.pid}/statm`, 'utf8').split(' ')[1]) * 4096 / 2 ** 20;
  /** Processor seconds used so far. */
  service.cpu = () => {
    const fields = fs.readFileSync(`/proc/${child.pid}/stat`, 'utf8').replace(/^.*\) /, '').split(' ');
    return (Number(fields[11]) + Number(fields[12])) / 100;
  };
  service.metrics = async () => (await fetch(`${service.base}/metrics`)).text();
  service.stop = async () => {
    if (child.exitCode === null) child.kill('SIGINT');
    const late = setTimeout(() => child.kill('SIGKILL'), 15_000);
    const how = await ended;
    clearTimeout(late);
    fs.writeFileSync(path.join(OUT, `service-${child.pid}.log`), service.told + service.log);
    if (/panicked at/.test(service.log)) throw new Error(`the service panicked: ${service.log.match(/.*panicked at[^]{0,400}/)[0]}`);
    return how;
  };
  return service;
}

// ---- the bad network -----------------------------------------------------------------------------------------------

/** Starts the link before `port`; `say` takes a line such as "down loss=5 delay=20". */
export async function link(port, seed = 1) {
  const child = spawn(LINK, ['--to', String(port), '--seed', String(seed)], { stdio: ['pipe', 'pipe', 'inherit'] });
  let told = '';
  child.stdout.on('data', (d) => { told += d; });
  const own = await until('the link', 5000, () => (told.match(/^port (\d+)/) || [])[1]);
  return {
    port: Number(own),
    say: (line) => child.stdin.write(`${line}\n`),
    stats: async () => {
      const before = told.length;
      child.stdin.write('stats\n');
      await until('the link’s counters', 5000, () => told.slice(before).includes('\n'));
      return JSON.parse(told.slice(before).trim().split('\n').pop());
    },
    stop: () => child.stdin.end(),
  };
}

// ---- Chromium ------------------------------------------------------------------------------------------------------

const ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream',
  '--autoplay-policy=no-user-gesture-required', '--disable-background-timer-throttling', '--disable-renderer-backgrounding'];

/** A Chromium whose microphone plays `wav` over and over. */
export async function browser(wav, { width = 1100, height = 760 } = {}) {
  let playwright;
  for (const base of [path.join(TOOLS, 'package.json'), import.meta.url]) {
    try {
      playwright = createRequire(base)('playwright-core');
      break;
    } catch { /* the other place */ }
  }
  if (!playwright) throw new Error('playwright-core is not installed; tests/run installs it');
  const chromium = process.env.CHROMIUM || ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find((f) => fs.existsSync(f));
  if (!chromium) throw new Error('no Chromium on this machine: apt-get install -y chromium');
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'loquent-chromium-'));
  const context = await playwright.chromium.launchPersistentContext(folder, {
    executablePath: chromium, headless: true, bypassCSP: true, viewport: { width, height },
    args: wav ? [...ARGS, `--use-file-for-fake-audio-capture=${wav}`] : ARGS,
  });
  return {
    context,
    close: async () => {
      await context.close();
      fs.rmSync(folder, { recursive: true, force: true });
    },
  };
}

/** What the page complains of from now on. That a connection is gone before the goodbye to it is no complaint. */
export function complaints(page, levels = ['error']) {
  const [said, left] = [[], new Set()];
  page.on('request', (r) => { if (r.method() === 'DELETE') left.add(r.url()); });
  page.on('console', (m) => {
    const { url } = m.location();
    if (levels.includes(m.type()) && !(left.has(url) && /status of (404|410)/.test(m.text()))) said.push(`${m.text()} ${url}`);
  });
  page.on('pageerror', (e) => said.push(String(e)));
  return said;
}

/** Opens the service's page with the probe in it. `bend(port)` may put something between: it answers another port. */
export async function visit(context, base, options = {}, bend = null) {
  const page = await context.newPage();
  const said = complaints(page, ['error', 'warning']);
  if (bend) {
    options.rewrite = true;
    await page.exposeFunction('__rewrite', async (sdp) => {
      const candidates = [...sdp.matchAll(/^a=candidate:\S+ 1 udp \d+ 127\.0\.0\.1 (\d+) typ host.*$/gim)];
      if (!candidates.length) throw new Error(`no UDP candidate on 127.0.0.1 in the answer:\n${sdp}`);
      const port = await bend(Number(candidates[0][1]));
      const kept = candidates[0][0].replace(` 127.0.0.1 ${candidates[0][1]} `, ` 127.0.0.1 ${port} `).trim();
      let first = true;
      return sdp.split('\r\n').flatMap((line) => {
        if (!line.startsWith('a=candidate:')) return [line];
        if (!first) return [];
        first = false;
        return [kept];
      }).join('\r\n');
    });
    // The service must learn this browser through the link only.
    await page.route('**/v1/live/**', async (route) => {
      const request = route.request();
      if (request.method() !== 'PATCH') return route.continue();
      const body = (request.postData() || '').split('\r\n').filter((l) => !l.startsWith('a=candidate:')).join('\r\n');
      return route.continue({ postData: body });
    });
  }
  await page.addInitScript(`window.__options = ${JSON.stringify(options)};`);
  await page.addInitScript({ path: path.join(path.dirname(fileURLToPath(import.meta.url)), 'probe.js') });
  await page.goto(base);
  return { page, said };
}

/** Presses Start and waits for the first picture; milliseconds that took. */
export async function start(page, ms = 30_000) {
  await page.waitForSelector('#start:not([disabled])');
  const began = Date.now();
  await page.click('#start');
  await page.waitForFunction(() => window.__probe.frames.length > 0, null, { timeout: ms, polling: 20 });
  return Date.now() - began;
}

// ---- sounds --------------------------------------------------------------------------------------------------------

function writeWav(name, samples, rate = 48_000) {
  const file = path.join(OUT, name);
  const data = Buffer.alloc(44 + samples.length * 2);
  data.write('RIFF', 0);
  data.writeUInt32LE(36 + samples.length * 2, 4);
  data.write('WAVEfmt ', 8);
  data.writeUInt32LE(16, 16);
  data.writeUInt16LE(1, 20);
  data.writeUInt16LE(1, 22);
  data.writeUInt32LE(rate, 24);
  data.writeUInt32LE(rate * 2, 28);
  data.writeUInt16LE(2, 32);
  data.writeUInt16LE(16, 34);
  data.write('data', 36);
  data.writeUInt32LE(samples.length * 2, 40);
  samples.forEach((s, i) => data.writeInt16LE(Math.max(-32768, Math.min(32767, Math.round(s * 32767))), 44 + i * 2));
  fs.writeFileSync(file, data);
  return file;
}

function readWav(file) {
  const bytes = fs.readFileSync(file);
  let [at, rate, channels, bits, kindOf] = [12, 0, 1, 16, 1];
  while (at + 8 <= bytes.length) {
    const kind = bytes.toString('latin1', at, at + 4);
    const size = bytes.readUInt32LE(at + 4);
    if (kind === 'fmt ') {
      kindOf = bytes.readUInt16LE(at + 8);
      channels = bytes.readUInt16LE(at + 10);
      rate = bytes.readUInt32LE(at + 12);
      bits = bytes.readUInt16LE(at + 22);
    } else if (kind === 'data') {
      const float = kindOf === 3 && bits === 32;
      if (!float && bits !== 16) throw new Error(`${file}: neither 16 bits nor 32-bit float`);
      const step = (bits / 8) * channels;
      const one = float ? (i) => bytes.readFloatLE(i) : (i) => bytes.readInt16LE(i) / 32768;
      const count = Math.floor(Math.min(size, bytes.length - at - 8) / step);
      return { rate, samples: Float32Array.from({ length: count }, (_, i) => one(at + 8 + i * step)) };
    }
    at += 8 + size + (size & 1);
  }
  throw new Error(`${file} is not a WAV file`);
}

/** Band-limited resampling, a 32-tap windowed sinc: good enough to feed a microphone. */
function resample({ rate, samples }, to = 48_000) {
  if (rate === to) return samples;
  const ratio = rate / to;
  const cut = Math.min(1, 1 / ratio);
  return Float32Array.from({ length: Math.floor(samples.length / ratio) }, (_, i) => {
    const x = i * ratio;
    let sum = 0;
    for (let k = Math.ceil(x - 16); k < x + 16; k++) {
      const d = x - k;
      const sinc = d === 0 ? cut : Math.sin(Math.PI * cut * d) / (Math.PI * d);
      sum += (samples[k] || 0) * sinc * (0.5 + 0.5 * Math.cos((Math.PI * d) / 16));
    }
    return sum;
  });
}

/** Speech for the microphone: human recordings where there are any (`LOQUENT_SPEECH`, ../shared/speech), else espeak-ng. */
export function speech() {
  const folder = process.env.LOQUENT_SPEECH || path.join(ROOT, '../shared/speech');
  const found = fs.existsSync(folder) ? fs.readdirSync(folder).filter((f) => f.endsWith('.wav')).sort() : [];
  const parts = found.map((f) => readWav(path.join(folder, f)));
  if (!parts.length) {
    const file = path.join(OUT, 'espeak.wav');
    const text = 'Good morning. My name is Loquent, and I say aloud whatever you say to me. Please, open a window: '
      + 'the weather may be warm, but a bit of fresh air would be most welcome. How are you today?';
    const made = spawnSync('espeak-ng', ['-v', 'en', '-s', '150', '-w', file, text]);
    if (made.status !== 0) throw new Error('espeak-ng is needed to make speech: apt-get install -y espeak-ng');
    parts.push(readWav(file));
  }
  const gap = new Float32Array(48_000 * 0.6);
  const all = parts.flatMap((p) => [resample(p), gap]);
  const samples = new Float32Array(all.reduce((n, p) => n + p.length, 0));
  all.reduce((at, p) => (samples.set(p, at), at + p.length), 0);
  return { file: writeWav('speech.wav', samples), human: found.length > 0, seconds: samples.length / 48_000 };
}

/** Short voiced bursts at irregular times, on silence: every onset can be found again. */
export function bursts(count = 24) {
  let seed = 12345;
  const random = () => (seed = (seed * 1_103_515_245 + 12_345) % 2 ** 31) / 2 ** 31;
  const parts = [];
  for (let i = 0; i < count; i++) {
    parts.push(new Float32Array(Math.round(48_000 * (0.75 + 0.4 * random()))));
    const burst = new Float32Array(48_000 * 0.18);
    for (let n = 0; n < burst.length; n++) {
      const t = n / 48_000;
      // 140 Hz with its harmonics falling off, as a throat makes them; full at once, gone gently.
      let s = 0;
      for (let h = 1; h <= 12; h++) s += Math.sin(2 * Math.PI * 140 * h * t) / h;
      burst[n] = 0.35 * s * Math.min(1, t / 0.002) * Math.min(1, (0.18 - t) / 0.03);
    }
    parts.push(burst);
  }
  const samples = new Float32Array(parts.reduce((n, p) => n + p.length, 0));
  parts.reduce((at, p) => (samples.set(p, at), at + p.length), 0);
  return writeWav('bursts.wav', samples);
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

export function percentile(values, q) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : NaN;
}

/** Times at which a level rises above `high` after `quiet` ms below `low`; rows of [ms, level]. */
export function onsets(rows, high, low, quiet) {
  const out = [];
  let calm = -Infinity;
  let below = null;
  for (const [at, level] of rows) {
    if (level < low) {
      below ??= at;
      calm = at - below;
    } else if (level > high) {
      if (below !== null && calm >= quiet) out.push(at);
      below = null;
      calm = -Infinity;
    }
  }
  return out;
}

/** For each time in `from` the first of `to` in the window after it. */
export function following(from, to, [least, most]) {
  return from.map((a) => [a, to.find((b) => b - a >= least && b - a <= most)]).filter(([, b]) => b !== undefined);
}

/** The lag in ms at which rows `late` ([ms, value]) follow rows `early` best, and the correlation there. */
export function shift(late, early) {
  const step = 10;
  const from = Math.max(late[0][0], early[0][0]) + 400;
  const count = Math.floor((Math.min(late[late.length - 1][0], early[early.length - 1][0]) - 400 - from) / step);
  // Mean loudness of 40 ms for the sound, the picture shown at the moment for the other.
  const sampled = (rows, lag, width) => {
    let at = 0;
    return Array.from({ length: count }, (_, i) => {
      const t = from + i * step + lag;
      while (at + 1 < rows.length && rows[at + 1][0] <= t - width / 2) at += 1;
      let [sum, n] = [0, 0];
      for (let k = at; k < rows.length && rows[k][0] <= t + width / 2; k++, n++) sum += rows[k][1];
      return n ? sum / n : rows[at][1];
    });
  };
  const correlation = (a, b) => {
    const mean = (v) => v.reduce((s, x) => s + x, 0) / v.length;
    const [ma, mb] = [mean(a), mean(b)];
    let [ab, aa, bb] = [0, 0, 0];
    a.forEach((x, i) => {
      ab += (x - ma) * (b[i] - mb);
      aa += (x - ma) ** 2;
      bb += (b[i] - mb) ** 2;
    });
    return ab / Math.sqrt(aa * bb || 1);
  };
  const sound = sampled(early, 0, 40);
  let best = { lag: NaN, r: -2 };
  for (let lag = -300; lag <= 300; lag += step) {
    const r = correlation(sampled(late, lag, 0), sound);
    if (r > best.r) best = { lag, r };
  }
  return best;
}

/** Gaps between shown pictures in ms, after the first `skip` ms: [largest, [every gap above 500]]. */
export function gaps(frames, skip = 0) {
  const times = frames.map((f) => f[0]).filter((t) => t >= frames[0][0] + skip);
  const between = times.slice(1).map((t, i) => t - times[i]);
  return { largest: Math.max(0, ...between), long: between.filter((g) => g > 500) };
}

export const row = (report, type, kind) => report.rows.find((r) => r.type === type && (!kind || r.kind === kind)) || {};
export const round = (value, digits = 0) => (Number.isFinite(value) ? Number(value.toFixed(digits)) : null);

/** Collects checks, prints them as a table, and says how many held. */
export class Checks {
  constructor(title) {
    this.title = title;
    this.rows = [];
  }
  /** `limit` in words; `held` decides. */
  add(what, value, limit, held) {
    this.rows.push({ what, value, limit, held: held === true });
    console.log(`${held === true ? '  ok  ' : 'FAILED'}  ${what}: ${value}${limit ? `   (${limit})` : ''}`);
  }
  note(what, value) {
    this.rows.push({ what, value, limit: '', held: null });
    console.log(`        ${what}: ${value}`);
  }
  get failed() {
    return this.rows.filter((r) => r.held === false).length;
  }
  get passed() {
    return this.rows.filter((r) => r.held === true).length;
  }
}
