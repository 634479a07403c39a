// The bot: a presenter full frame, the page's microphone is what it says. Meeting bots open this page as their camera.
//
// Query: presenter=ID (a conversation of its own), or session=ID and token=TOKEN (one that somebody else began);
// speech=mic (usual) or speech=ws (text and sound come over the API; no microphone); fit=contain (usual: all of the
// picture, and its colours around it) or fit=cover (nothing around it, and perhaps no badge either); words.

import { Live, canPlay, keyHeader } from './live.js';
import { openMicrophone } from './meter.js';
import { play, publish, sounding } from './player.js';
import { t } from './i18n.js';

const query = new URLSearchParams(location.search);
const $ = (id) => document.getElementById(id);
const [video, poster, word, around] = ['video', 'poster', 'word', 'around'].map($);
const session = query.get('session');
const token = query.get('token');
const microphone = query.get('speech') !== 'ws';
if (query.get('fit') === 'cover') document.body.classList.add('cover');
/** Pauses between two conversations: the first, and the longest. */
const PAUSES = [500, 10_000];

function say(text, always = false) {
  word.textContent = text;
  word.hidden = !text || !(always || query.has('words'));
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const watch = () => {
  document.body.classList.add('showing');
  video.requestVideoFrameCallback?.(watch);
};
if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(watch);
else video.addEventListener('playing', watch);

/** What the picture does not cover gets its colours: a few pixels now and then, for a meeting bot has little to draw with. */
function surround() {
  const source = video.videoWidth ? video : poster;
  const paper = around.getContext('2d');
  paper.filter = 'blur(5px) brightness(.75)';
  if (source === video || poster.complete) paper.drawImage(source, -6, -6, around.width + 12, around.height + 12);
}

/** A meeting's sound is nobody's room: nothing is to be cleaned, and an echo cannot come. */
async function listen() {
  for (let pause = PAUSES[0]; ; pause = Math.min(pause * 2, PAUSES[1])) {
    try {
      return await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false, channelCount: 1 } });
    } catch (error) {
      if (error?.name === 'OverconstrainedError') return openMicrophone('');
      say(`${t('No microphone')}: ${error?.message || error}`);
      await sleep(pause);
    }
  }
}

/** One conversation of its own, until it is lost. */
async function converse(info, stream) {
  const talk = new Live({ presenter: query.get('presenter') || undefined, stream, iceServers: info.ice_servers });
  window.loquent.live = talk;
  const over = new Promise((done) => talk.addEventListener('ended', (e) => done(e.detail)));
  talk.addEventListener('media', (e) => {
    if (video.srcObject !== e.detail) video.srcObject = e.detail;
    sounding(video);
  });
  talk.addEventListener('phase', (e) => say(e.detail === 'live' ? '' : t('Connecting…')));
  const leave = () => talk.close();
  addEventListener('pagehide', leave);
  try {
    await talk.open();
    return await over;
  } catch (problem) {
    talk.close();
    return problem;
  } finally {
    removeEventListener('pagehide', leave);
  }
}

async function own(info) {
  const stream = await listen();
  for (let pause = PAUSES[0]; ;) {
    const began = performance.now();
    const problem = await converse(info, stream);
    say(t(problem.title || problem.message || ''));
    if (performance.now() - began > 15_000) pause = PAUSES[0];
    await sleep(Math.max(pause, (problem.retryAfter || 0) * 1000));
    pause = Math.min(pause * 2, PAUSES[1]);
  }
}

async function guest(info) {
  const at = `/v1/sessions/${encodeURIComponent(session)}`;
  const watched = play(video, { url: `${at}/whep`, token, iceServers: info.ice_servers });
  watched.addEventListener('state', ({ detail: { state, error } }) => {
    say(state === 'live' ? '' : `${t('Waiting for the presenter…')}${error ? ` (${error.message})` : ''}`);
  });
  const kept = [watched];
  if (microphone) kept.push(publish(listen, { url: `${at}/whip`, token, iceServers: info.ice_servers }));
  window.loquent.kept = kept;
  addEventListener('pagehide', () => kept.forEach((k) => k.stop()));
  await Promise.all(kept.map((k) => k.run()));
}

async function begin() {
  window.loquent = { video };
  setInterval(surround, 1000);
  video.addEventListener('resize', surround);
  poster.addEventListener('load', surround);
  if (!canPlay()) return say(t('This browser cannot play the video'), true);
  if (!session && !microphone) return say(t('This address names no session: add ?session=ID&token=TOKEN, as the service gave them.'), true);
  if (microphone && !navigator.mediaDevices?.getUserMedia) return say(t('This address is not secure'), true);
  let info = null;
  for (let pause = PAUSES[0]; !info; pause = Math.min(pause * 2, PAUSES[1])) {
    info = await fetch('/v1/info', { headers: token ? { authorization: `Bearer ${token}` } : keyHeader() }).then((r) => (r.ok ? r.json() : null)).catch(() => null);
    if (!info) {
      say(t('The server does not answer'));
      await sleep(pause);
    }
  }
  if (!session) {
    const { presenters = [], default: usual } = await fetch('/v1/presenters').then((r) => r.json()).catch(() => ({}));
    const shown = presenters.find((p) => p.id === (query.get('presenter') || usual));
    if (shown) {
      poster.src = shown.thumbnail;
      poster.hidden = false;
    }
  }
  await (session ? guest(info) : own(info));
}

begin();
