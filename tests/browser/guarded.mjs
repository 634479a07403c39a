// A service for strangers: a page that needs a key, media by coturn alone, the status page. See run.mjs for how they are called.

import { spawn, spawnSync } from 'node:child_process';
import dgram from 'node:dgram';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { BINARY, OUT, browser, serve, sleep, speech } from './lib.mjs';

/** A key in a file of its own. */
function key(folder, ...scopes) {
  const file = path.join(folder, 'keys');
  const made = spawnSync(BINARY, ['key', 'new', 'test', '--scopes', scopes.join(','), '--file', file], { encoding: 'utf8' });
  if (made.status !== 0) throw new Error(made.stderr);
  return { file, secret: made.stdout.trim() };
}

async function freePort() {
  const socket = dgram.createSocket('udp4');
  await new Promise((done) => socket.bind(0, '127.0.0.1', done));
  const { port } = socket.address();
  socket.close();
  return port;
}

/** Debian's coturn, which takes credentials made with `secret`. */
async function turn(folder, secret) {
  const port = await freePort();
  const args = ['-n', '--use-auth-secret', `--static-auth-secret=${secret}`, '--realm=loquent', '--listening-ip=127.0.0.1', '--relay-ip=127.0.0.1',
    '--allow-loopback-peers', '--no-tls', '--no-dtls', '--no-cli', `--listening-port=${port}`, '--log-file=stdout', '--verbose',
    `--pidfile=${path.join(folder, 'pid')}`, `--userdb=${path.join(folder, 'db')}`];
  const child = spawn('turnserver', args, { stdio: ['ignore', 'pipe', 'pipe'] });
  const server = { port, log: '', stop: () => child.kill('SIGKILL') };
  child.on('error', (e) => { server.log += `turnserver cannot be started (apt-get install -y coturn): ${e}`; });
  child.stdout.on('data', (d) => { server.log += d; });
  child.stderr.on('data', (d) => { server.log += d; });
  await sleep(1500);
  if (!child.pid || child.exitCode !== null) throw new Error(`coturn does not run: ${server.log.slice(-600)}`);
  return server;
}

/** Debian's nats-server. */
async function bus() {
  const port = await freePort();
  const program = ['/usr/sbin/nats-server', '/usr/bin/nats-server'].find((at) => fs.existsSync(at));
  if (!program) throw new Error('nats-server is missing: apt-get install -y nats-server');
  const child = spawn(program, ['--addr', '127.0.0.1', '--port', String(port)], { stdio: 'ignore' });
  return { nats: JSON.stringify([`nats://127.0.0.1:${port}`]), stop: () => child.kill('SIGKILL') };
}

/** Host candidates are blocked: the browser may use the relay alone. Keys, relay and media together. */
export async function relay(checks) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'loquent-relay-'));
  const { file, secret } = key(folder, 'live');
  let [server, service, chromium] = [];
  try {
    server = await turn(folder, 'north');
    service = await serve({ engine: 'card', settings: { 'server.keys_file': file, 'net.turn_urls': `["turn:127.0.0.1:${server.port}"]`, 'net.turn_secret': 'north' } });
    const told = async (headers) => (await (await fetch(`${service.base}/v1/info`, { headers })).json()).ice_servers;
    const [strangers, ours] = [await told({}), await told({ authorization: `Bearer ${secret}` })];
    checks.add('credentials for whoever asks', strangers.length, 'none', strangers.length === 0);
    const until = Number(ours[0]?.username.split(':')[0]) - Date.now() / 1000;
    checks.add('credentials for whoever has a key hold', `${Math.round(until)} s`, 'about 7200', Math.abs(until - 7200) < 60);
    chromium = await browser(speech().file);
    const page = await chromium.context.newPage();
    await page.addInitScript(() => {
      const Real = window.RTCPeerConnection;
      window.peers = [];
      window.RTCPeerConnection = class extends Real {
        constructor(config) {
          super({ ...config, iceTransportPolicy: 'relay' });
          window.peers.push(this);
        }
      };
    });
    await page.goto(service.base);
    await page.waitForSelector('#start:not([disabled])');
    await page.click('#start');
    await page.waitForFunction(() => /key/.test(document.body.innerText), null, { timeout: 10_000 });
    checks.add('the page without a key', 'says that it needs one', 'it does', true);
    await page.goto('about:blank');
    await page.goto(`${service.base}/#key=${secret}`);
    await page.waitForSelector('#start:not([disabled])');
    await page.click('#start');
    await page.waitForFunction(() => document.querySelector('video').videoWidth > 0, null, { timeout: 20_000 });
    await sleep(5000);
    const seen = await page.evaluate(async () => {
      const rows = [...(await window.peers.at(-1).getStats()).values()];
      const pair = rows.find((r) => r.type === 'candidate-pair' && r.nominated && r.state === 'succeeded');
      const local = rows.find((r) => r.id === pair?.localCandidateId);
      const video = rows.find((r) => r.type === 'inbound-rtp' && r.kind === 'video');
      const audio = rows.find((r) => r.type === 'inbound-rtp' && r.kind === 'audio');
      return { type: local?.candidateType, frames: video?.framesDecoded, lost: video?.packetsLost + audio?.packetsLost, bytes: pair?.bytesReceived };
    });
    checks.add('way of the media', seen.type, 'relay', seen.type === 'relay');
    checks.add('pictures by the relay', seen.frames, 'at least 60 in 5 s', seen.frames >= 60);
    checks.add('lost', seen.lost, 'nothing', seen.lost === 0);
    const name = ours[0].username.split(':')[0].slice(0, 6);
    checks.add("coturn's log", `${server.log.match(/ALLOCATE processed, success/g)?.length || 0} allocations`, 'at least one, with a name of ours',
      /ALLOCATE processed, success/.test(server.log) && server.log.includes(`<${name}`));
  } finally {
    await chromium?.close();
    const how = await service?.stop();
    if (how) checks.add('secrets in the log', service.log.includes(secret) || service.log.includes('north') ? 'there' : 'none', 'none', !service.log.includes(secret) && !service.log.includes('north'));
    server?.stop();
    fs.rmSync(folder, { recursive: true, force: true });
  }
}

/** The status page: with a key, in both languages, while somebody talks. */
export async function status(checks) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'loquent-status-'));
  const { file, secret } = key(folder, 'live', 'metrics');
  let [nats, service, front, chromium] = [];
  try {
    nats = await bus();
    const settings = { 'server.keys_file': file, 'cluster.nats': nats.nats };
    service = await serve({ engine: 'card', sessions: 2, settings });
    front = await serve({ engine: 'card', sessions: 0, settings });
    chromium = await browser(speech().file);
    const said = [];
    const talk = await chromium.context.newPage();
    await talk.goto(`${service.base}/#key=${secret}`);
    await talk.waitForSelector('#start:not([disabled])');
    await talk.click('#start');
    await talk.waitForFunction(() => document.querySelector('video').videoWidth > 0, null, { timeout: 20_000 });
    const page = await chromium.context.newPage();
    page.on('pageerror', (e) => said.push(String(e)));
    await page.goto(`${service.base}/status`);
    await page.waitForFunction(() => /wants a key/.test(document.body.innerText), null, { timeout: 10_000 });
    checks.add('without a key', 'says so', 'it does', true);
    for (const [language, word, bound] of [['en', 'Real-time factor', 'Connected'], ['zh', '实时系数', '已连接']]) {
      await page.goto('about:blank');
      await page.goto(`${service.base}/status?lang=${language}#key=${secret}`);
      await page.waitForFunction(() => document.querySelectorAll('#rows tr').length === 1, null, { timeout: 10_000 });
      await sleep(3000);
      const text = await page.evaluate(() => document.body.innerText);
      checks.add(`status, ${language}`, text.includes(word) && text.includes('1 / 2') ? 'told' : text, 'one of two places taken', text.includes(word) && text.includes('1 / 2'));
      const nodes = await page.evaluate(() => Array.from(document.querySelectorAll('#nodes tr'), (row) => row.innerText.replace(/\s+/g, ' ')));
      checks.add(`cluster, ${language}`, `${text.includes(bound) ? bound : text}; ${nodes.join('; ')}`, 'two nodes, with places and without',
        text.includes(bound) && nodes.length === 2 && nodes.some((n) => n.includes('1 / 2')) && nodes.some((n) => n.includes('0 / 0')));
      await page.screenshot({ path: path.join(OUT, `status-${language}.png`), fullPage: true });
    }
    nats.stop();
    await page.waitForFunction(() => /已断开 [2-9] s/.test(document.body.innerText), null, { timeout: 15_000 });
    await page.screenshot({ path: path.join(OUT, 'status-away.png'), fullPage: true });
    checks.add('without NATS', 'says so', 'it does', true);
    checks.add('mistakes of the page', said.join(' ') || 'none', 'none', said.length === 0);
  } finally {
    await chromium?.close();
    await service?.stop();
    await front?.stop();
    nats?.stop();
    fs.rmSync(folder, { recursive: true, force: true });
  }
}
