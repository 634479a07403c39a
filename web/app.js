// The page: what the visitor sees and presses. The conversation itself is in live.js.

import { openDesigner, pictureOf } from './design.js';
import { Live, LiveProblem, canPlay, keyHeader } from './live.js';
import { t, told as toldBy, translate } from './i18n.js';
import { Meter, microphoneProblem, microphones, openMicrophone } from './meter.js';

const $ = (id) => document.getElementById(id);
const page = document.body;
const stage = $('stage');
const video = $('video');

/** From a sound at the microphone to its packet: half a device buffer and one 20 ms Opus packet. */
const CAPTURE_MS = 25;
/** New conversations tried by ourselves after a lost one. */
const SECOND_CHANCES = 3;

let info = { engine: { fps: 25, block_ms: 160 }, ice_servers: [] };
let live = null;
let microphone = null;
let server = {};
/** What the server last said the conversation is doing. */
let state = '';
let chances = 0;
let retryTimer = 0;
let ticker = 0;
let wake = null;
/** Names of presenters by id, for sentences. */
const names = new Map();

const HINTS = {
  idle: 'Choose a presenter, press Start and speak.',
  starting: 'Your browser may ask for the microphone.',
  live: 'Speak: the presenter speaks with you.',
};

function say(text) {
  if ($('status').textContent !== text) $('status').textContent = text;
}

function phase(name, words) {
  page.dataset.phase = name;
  const running = ['live', 'reconnecting', 'starting', 'waiting'].includes(name);
  const had = document.activeElement;
  $('start').hidden = running;
  document.querySelectorAll('[data-live]').forEach((b) => { b.hidden = !running; });
  // The button that was pressed has gone: focus must not fall back to the top of the page.
  if (running && had === $('start')) $('stop').focus();
  if (!running && had && had.hidden) $('start').focus();
  $('hint').textContent = t(HINTS[name] ?? '');
  if (name !== 'problem' && name !== 'waiting') $('notice').hidden = true;
  if (words) say(words);
}

function notice(title, text, action, onAction) {
  $('notice-count').hidden = true;
  $('notice-title').textContent = title;
  $('notice-text').textContent = text;
  const button = $('notice-action');
  button.hidden = !action;
  button.textContent = action || '';
  button.onclick = onAction || null;
  $('notice').hidden = false;
}

function fail(problem) {
  hangUp();
  phase('problem', problem.title);
  notice(problem.title, problem.text, problem.code === 'insecure' || problem.code === 'no_h264' ? '' : t('Try again'), start);
  offerNearest(problem.code === 'portrait_refused');
}

// ---- presenters ----------------------------------------------------------------------------------------------------

const chosen = () => document.querySelector('input[name="presenter"]:checked');

function addPresenter({ id, name, description, thumbnail }, checked) {
  const label = document.createElement('label');
  label.className = 'presenter';
  const input = Object.assign(document.createElement('input'), { type: 'radio', name: 'presenter', value: id });
  const image = Object.assign(document.createElement('img'), { src: thumbnail, alt: '', loading: 'lazy' });
  const caption = Object.assign(document.createElement('span'), { textContent: name });
  if (description) {
    label.title = description;
    input.setAttribute('aria-label', `${name}: ${description}`);
  }
  input.checked = checked;
  label.append(input, image, caption);
  $('presenters').append(label);
  names.set(id, name);
  return input;
}

/** Adds a designed presenter to the list, or chooses it where it is there. */
async function useDesign(id) {
  const known = [...document.querySelectorAll('input[name="presenter"]')].find((i) => i.value === id);
  const input = known || addPresenter({ id, name: t('Your design'), thumbnail: pictureOf(id) }, true);
  input.checked = true;
  input.focus();
  await changedPresenter();
}

/** Designed looks by the uploaded pictures they are most like. */
const likenesses = new Map();

/** Offers the designed look that is nearest to the chosen picture, once the engine has refused that. */
function offerNearest(refused) {
  const look = refused && likenesses.get(chosen()?.value);
  $('nearest').hidden = !look;
  if (!look) return;
  $('nearest-picture').src = pictureOf(look);
  $('nearest-use').onclick = () => {
    $('nearest').hidden = true;
    useDesign(look);
  };
}

function showPoster() {
  const input = chosen();
  if (!input) return;
  const poster = $('poster');
  poster.src = input.nextElementSibling.src;
  poster.hidden = false;
}

async function changedPresenter() {
  showPoster();
  offerNearest(false);
  try {
    if (!/^(portrait|design):/.test(chosen().value)) localStorage.setItem('presenter', chosen().value);
  } catch { /* private windows may have no storage */ }
  // Another face is another conversation; the microphone stays open.
  if (live) {
    const talk = live;
    live = null;
    stage.classList.remove('showing');
    phase('starting', t('Changing the presenter…'));
    // The place must be free again before the next conversation asks for one.
    await talk.close();
    if (page.dataset.phase === 'starting' && !live) await converse();
  }
}

async function loadPresenters() {
  const response = await fetch('/v1/presenters');
  if (!response.ok) throw new Error(String(response.status));
  const list = await response.json();
  $('presenters').replaceChildren();
  let wanted = new URLSearchParams(location.search).get('presenter');
  try {
    wanted = wanted || localStorage.getItem('presenter');
  } catch { /* as above */ }
  const known = list.presenters.some((p) => p.id === wanted);
  for (const p of list.presenters) addPresenter(p, p.id === (known ? wanted : list.default));
  if (!list.presenters.length) {
    $('presenters').innerHTML = `<p class="quiet">${t('No presenters are built in. Use a picture of your own.')}</p>`;
  }
  showPoster();
}

async function upload(file) {
  const problem = (text) => {
    $('own-error').textContent = text;
    $('own-error').hidden = !text;
  };
  problem('');
  if (!file) return;
  if (!$('consent').checked) {
    problem(t('Please confirm first that the person in the picture has agreed.'));
    $('file').value = '';
    $('consent').focus();
    return;
  }
  if (file.size > info.portrait_max_bytes) {
    problem(t('The picture is larger than {mb} MB. Make it smaller and try again.', { mb: Math.round(info.portrait_max_bytes / 1048576) }));
    return;
  }
  $('upload-label').textContent = t('Sending…');
  try {
    const type = file.type.startsWith('image/') ? file.type : 'application/octet-stream';
    const response = await fetch(`/v1/portraits?consent=${encodeURIComponent($('consent').nextElementSibling.textContent)}`, { method: 'POST', headers: { 'content-type': type, ...keyHeader() }, body: file });
    const told = await response.json();
    if (response.status !== 201) {
      problem(toldBy(told.error?.code, told.error?.message) || t('The server did not accept this picture.'));
      return;
    }
    const input = addPresenter({ id: told.presenter, name: t('Your picture'), thumbnail: URL.createObjectURL(file) }, true);
    if (told.nearest) likenesses.set(told.presenter, told.nearest);
    input.focus();
    const [warning] = told.warnings || [];
    if (warning) problem(toldBy(warning.code, warning.message));
    await changedPresenter();
  } catch {
    problem(t('The picture could not be sent. Check the connection and try again.'));
  } finally {
    $('upload-label').textContent = t('Use a picture of your own…');
    $('file').value = '';
  }
}

// ---- microphone ----------------------------------------------------------------------------------------------------

const meter = new Meter((level, clipped) => {
  const muted = $('mute').getAttribute('aria-pressed') === 'true';
  const shown = muted ? 0 : level;
  $('level').style.setProperty('--level', shown.toFixed(3));
  $('level').classList.toggle('hot', clipped && !muted);
  $('level').setAttribute('aria-valuenow', String(Math.round(shown * 100)));
});

async function listDevices() {
  const devices = await microphones();
  const current = microphone?.getAudioTracks()[0]?.getSettings().deviceId;
  const select = $('device');
  select.replaceChildren(...devices.map((d, i) => {
    const option = new Option(d.label || t('Microphone {n}', { n: i + 1 }), d.deviceId);
    option.selected = d.deviceId === current;
    return option;
  }));
  select.disabled = devices.length === 0;
}

async function takeMicrophone(deviceId) {
  const stream = await openMicrophone(deviceId);
  microphone?.getTracks().forEach((t) => { t.onended = null; t.stop(); });
  microphone = stream;
  const [track] = stream.getAudioTracks();
  track.enabled = $('mute').getAttribute('aria-pressed') !== 'true';
  track.onended = async () => {
    // Unplugged: go on with whatever the browser has, or say so.
    try {
      await takeMicrophone('');
    } catch (error) {
      const problem = microphoneProblem(error);
      fail(new LiveProblem('microphone', problem.title, problem.text));
    }
  };
  meter.attach(stream);
  if (live) await live.replace(stream);
  await listDevices();
}

// ---- the conversation ----------------------------------------------------------------------------------------------

async function start() {
  clearInterval(retryTimer);
  chances = SECOND_CHANCES;
  if (!window.isSecureContext) {
    fail(new LiveProblem('insecure', t('This address is not secure'), t('Browsers give microphones only to https:// pages and to this same machine. Open the https:// address of this service, or on its own machine http://localhost:{port}/.', { port: location.port || 80 })));
    return;
  }
  if (!navigator.mediaDevices?.getUserMedia || !canPlay()) {
    fail(new LiveProblem('no_h264', t('This browser cannot hold the conversation'), t('It needs WebRTC with H.264. Use a current Chrome, Edge or Safari; Firefox fetches its H.264 add-on a minute after its first start.')));
    return;
  }
  phase('starting', t('Asking for the microphone…'));
  // Inside the press of the button: browsers let a page play sound only after one.
  video.muted = $('hear').getAttribute('aria-pressed') !== 'true';
  if (!microphone) {
    try {
      await takeMicrophone('');
    } catch (error) {
      const problem = microphoneProblem(error);
      fail(new LiveProblem('microphone', problem.title, problem.text));
      return;
    }
  }
  // Stop may have been pressed meanwhile.
  if (page.dataset.phase === 'starting') await converse();
}

async function converse() {
  phase('starting', t('Connecting…'));
  server = {};
  state = '';
  const talk = new Live({ presenter: chosen()?.value, stream: microphone, iceServers: info.ice_servers });
  live = talk;
  const mine = (handle) => (event) => { if (live === talk) handle(event.detail); };
  talk.addEventListener('phase', mine((name) => {
    if (name === 'live') {
      phase('live', t(STATES[state] || 'Connected'));
      stayAwake();
    } else if (name === 'reconnecting') {
      phase('reconnecting', t('Connection lost, reconnecting…'));
    }
  }));
  talk.addEventListener('media', mine((media) => {
    if (video.srcObject !== media) video.srcObject = media;
    video.play().catch(() => {
      // Sound was refused without a press: show the picture and let the visitor switch the voice on.
      video.muted = true;
      $('hear').setAttribute('aria-pressed', 'false');
      video.play().catch(() => {});
    });
  }));
  talk.addEventListener('message', mine(told));
  talk.addEventListener('ended', mine(ended));
  clearInterval(ticker);
  ticker = setInterval(tick, 1000);
  try {
    await talk.open();
  } catch (error) {
    if (live !== talk) return;
    talk.close();
    const problem = error instanceof LiveProblem ? error
      : new LiveProblem('browser', t('The connection could not be made'), t('The browser says: {words}', { words: error.message }));
    if (problem.retryAfter) wait(problem);
    else fail(problem);
  }
}

/** The house is full (or away): count down and try again, until the visitor stops it. */
function wait(problem) {
  clearInterval(retryTimer);
  live = null;
  phase('waiting', problem.title);
  let left = problem.retryAfter;
  const again = () => {
    clearInterval(retryTimer);
    converse();
  };
  // The seconds are for eyes only: a screen reader would read every one of them.
  const count = () => { $('notice-count').textContent = t('Trying again in {s} s.', { s: left }); };
  notice(problem.title, t('{text} This page tries again by itself.', { text: problem.text }), t('Try now'), again);
  $('notice-count').hidden = false;
  count();
  retryTimer = setInterval(() => {
    left -= 1;
    if (left <= 0) again();
    else count();
  }, 1000);
}

function ended(problem) {
  live = null;
  const lost = problem.code === 'lost' || problem.code === 'connection_lost';
  if (lost && chances > 0) {
    chances -= 1;
    phase('reconnecting', t('Connection lost, starting anew…'));
    converse();
    return;
  }
  if (lost) {
    fail(new LiveProblem('lost', t('The connection was lost'), t('Check the network, then try again.')));
    return;
  }
  fail(problem);
}

const STATES = {
  connecting: 'Connecting…', preparing: 'Preparing the presenter…', idle: 'Listening', speaking: 'Speaking', draining: 'Ending…', closed: 'Ended',
};

function told(message) {
  if (message.type === 'metrics') server = message;
  // Also in the numbers: the channel may have opened after the last change.
  if (message.state && message.state !== state) {
    state = message.state;
    if (page.dataset.phase === 'live') say(t(STATES[state] || 'Connected'));
  }
}

function hangUp() {
  clearInterval(retryTimer);
  clearInterval(ticker);
  live?.close();
  live = null;
  microphone?.getTracks().forEach((t) => { t.onended = null; t.stop(); });
  microphone = null;
  meter.detach();
  stage.classList.remove('showing');
  video.srcObject = null;
  wake?.release().catch(() => {});
  wake = null;
  if (document.fullscreenElement) document.exitFullscreen().catch(() => {});
}

function stop() {
  hangUp();
  phase('idle', t('Ready'));
}

async function stayAwake() {
  try {
    wake = await navigator.wakeLock?.request('screen');
  } catch { /* a wish, not a need */ }
}

// ---- numbers -------------------------------------------------------------------------------------------------------

/** Since the last tick: frames put on screen, and how long each took from its last packet to the screen. */
let presented = 0;
let playouts = [];
let lastPresented = 0;
const watchFrames = (now, frame) => {
  if (lastPresented && frame.presentedFrames > lastPresented) presented += frame.presentedFrames - lastPresented;
  lastPresented = frame.presentedFrames;
  if (frame.receiveTime) playouts.push(frame.expectedDisplayTime - frame.receiveTime);
  if (video.srcObject) stage.classList.add('showing');
  if (frame.width && frame.height) stage.style.setProperty('--aspect', String(frame.width / frame.height));
  video.requestVideoFrameCallback(watchFrames);
};
if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(watchFrames);
else video.addEventListener('playing', () => stage.classList.add('showing'));

const median = (values) => (values.length ? [...values].sort((a, b) => a - b)[values.length >> 1] : undefined);
const number = (value, digits = 0) => (Number.isFinite(value) ? value.toFixed(digits) : '–');
const put = (id, text) => { $(id).textContent = text; };
/** The newest numbers, also for tests: `window.loquent.numbers`. */
const numbers = {};

/** Seconds without a single packet. Browsers notice a dead path only after five or more. */
let dead = 0;

function watchSilence(talk, sample) {
  dead = sample.bitrate > 0 ? 0 : dead + 1;
  if (page.dataset.phase !== 'live') return;
  if (dead === 2) say(t('Picture interrupted…'));
  else if (dead === 0 && $('status').textContent === t('Picture interrupted…')) say(t(STATES[state] || 'Connected'));
  // A gap this long does not heal by itself more often than a new path is found.
  if (dead === 4) talk.restart();
}

async function tick() {
  const talk = live;
  const sample = talk && (await talk.sample());
  const shown = presented;
  const playout = median(playouts);
  const frames = playouts.length;
  presented = 0;
  playouts = [];
  if (!talk || talk !== live || !sample) return;
  watchSilence(talk, sample);
  // A hidden page draws no frames; what was decoded is then the honest number.
  const fps = document.hidden || !video.requestVideoFrameCallback ? sample.fps : shown;
  const ownPart = frames ? playout : sample.bufferMs;
  // The server's figure ends where the picture reaches this device; it is absent while nobody speaks.
  const delay = Number.isFinite(server.delay_ms) ? CAPTURE_MS + server.delay_ms + ownPart : numbers.delayMs;
  Object.assign(numbers, { ...sample, shown, fps, delayMs: delay, playoutMs: ownPart, server });
  put('n-fps', t('{n} of {of}', { n: number(fps, 0), of: info.engine.fps }));
  put('n-delay', Number.isFinite(delay) ? `${number(delay)} ms` : '–');
  put('n-held', Number.isFinite(server.frames_held) ? `${server.frames_held} · ${server.frames_skipped ?? 0}` : '–');
  put('n-lost', `${server.lost_in ?? sample.lostUp ?? '–'} · ${sample.lostDown}`);
  put('n-rate', `${number(sample.bitrate / 1000)} kbit/s`);
  put('n-load', Number.isFinite(server.real_time_factor) ? `${number(server.real_time_factor * 100)} %` : '–');
  for (const row of $('stages').children) {
    const ms = server.stages?.[row.dataset.stage];
    row.querySelector('dd').textContent = Number.isFinite(ms) ? `${number(ms, ms < 10 ? 1 : 0)} ms` : '–';
    row.style.setProperty('--share', Math.min(1, (ms || 0) / info.engine.block_ms).toFixed(3));
  }
  if (page.dataset.phase === 'live') {
    const muted = $('mute').getAttribute('aria-pressed') === 'true';
    const nothing = !muted && meter.silentFor() > 8;
    $('hint').textContent = t(muted ? 'You are muted.'
      : server.real_time_factor > 0.95 ? 'The engine cannot keep up on this machine just now: the picture stutters.'
      : nothing ? 'Nothing is heard from your microphone. Is it switched off, or is another one chosen?' : HINTS.live);
  }
}

// ---- buttons -------------------------------------------------------------------------------------------------------

$('start').addEventListener('click', start);
$('stop').addEventListener('click', stop);
$('mute').addEventListener('click', () => {
  const muted = $('mute').getAttribute('aria-pressed') !== 'true';
  $('mute').setAttribute('aria-pressed', String(muted));
  $('mute').lastElementChild.textContent = t(muted ? 'Muted' : 'Mute');
  microphone?.getAudioTracks().forEach((t) => { t.enabled = !muted; });
});
$('hear').addEventListener('click', () => {
  const on = $('hear').getAttribute('aria-pressed') !== 'true';
  $('hear').setAttribute('aria-pressed', String(on));
  video.muted = !on;
  if (on) video.play().catch(() => {});
});
$('full').addEventListener('click', () => {
  if (document.fullscreenElement) document.exitFullscreen();
  else if (stage.requestFullscreen) stage.requestFullscreen().catch(() => {});
  // Safari on phones gives full screen to videos only.
  else if (video.webkitEnterFullscreen) video.webkitEnterFullscreen();
});
$('device').addEventListener('change', async () => {
  try {
    await takeMicrophone($('device').value);
  } catch (error) {
    const problem = microphoneProblem(error);
    $('hint').textContent = `${problem.title}. ${problem.text}`;
    await listDevices();
  }
});
$('presenters').addEventListener('change', changedPresenter);
$('file').addEventListener('change', () => upload($('file').files[0]));
$('choice').addEventListener('submit', (e) => e.preventDefault());
navigator.mediaDevices?.addEventListener?.('devicechange', () => { if (microphone) listDevices(); });
addEventListener('online', () => live?.connected && live.pc?.connectionState !== 'connected' && live.restart());
addEventListener('pagehide', () => live?.close());
document.addEventListener('visibilitychange', () => { if (!document.hidden && live) stayAwake(); });
if (matchMedia('(max-width: 860px)').matches) $('numbers').open = false;

window.loquent = { numbers, get live() { return live; } };

(async () => {
  translate();
  try {
    const response = await fetch('/v1/info', { headers: keyHeader() });
    if (response.ok) info = await response.json();
    stage.style.setProperty('--aspect', String(info.engine.width / info.engine.height));
    put('n-block', t('({name} engine; a block lasts {ms} ms)', { name: info.engine.name, ms: info.engine.block_ms }));
    // The badge in the picture says it already.
    $('made').hidden = info.engine.badge === true;
    if (info.engine.name === 'card') $('own-note').textContent = t('The service runs its test card: no face is made, and a picture only appears in its corner.');
    if (info.engine.name === 's2v') $('own-note').textContent = t('The large model (Wan2.2-S2V) moves photographs and drawings of one person; a picture is cropped to {width} by {height}.', info.engine);
    await loadPresenters();
    if (info.engine.name === 'pocket') await openDesigner(useDesign);
  } catch {
    $('presenters').innerHTML = `<p class="quiet">${t('The server does not answer. Is it still running? Reload this page when it is.')}</p>`;
  }
})();
