// A player for pages without controls: WHEP in, WHIP out, reconnecting for ever. No page elements here.

import { preferredVideo } from './live.js';

const SDP = 'application/sdp';
/** Pauses between two tries: the first, and the longest. */
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
/** Without a picture for so long the connection counts as dead, whatever the browser says. */
const STALL_MS = 6000;
/** From the offer to the first picture. */
const START_MS = 15_000;
/** For the answer to a goodbye. */
const GOODBYE_MS = 5000;

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

/** Waits until ICE has gathered, but not long: what is found later is a help, not a need. */
function gathered(pc) {
  if (pc.iceGatheringState === 'complete') return Promise.resolve();
  return Promise.race([sleep(1000), new Promise((done) => {
    pc.addEventListener('icegatheringstatechange', () => { if (pc.iceGatheringState === 'complete') done(); });
  })]);
}

/** One exchange with a WHIP or WHEP address; the resource's address. Throws what `wait` (seconds) may be read from. */
async function exchange(pc, url, token) {
  await pc.setLocalDescription(await pc.createOffer());
  await gathered(pc);
  const headers = { 'content-type': SDP };
  if (token) headers.authorization = `Bearer ${token}`;
  const response = await fetch(url, { method: 'POST', headers, body: pc.localDescription.sdp });
  if (response.status !== 201) {
    let code = String(response.status);
    try {
      code = (await response.json()).error?.code || code;
    } catch { /* not ours */ }
    const wait = Number(response.headers.get('retry-after')) || 0;
    throw Object.assign(new Error(`${url} answered ${response.status} (${code})`), { status: response.status, code, wait });
  }
  const location = response.headers.get('location');
  await pc.setRemoteDescription({ type: 'answer', sdp: await response.text() });
  return location ? new URL(location, response.url).href : null;
}

/**
 * Keeps one connection up, and makes a new one whenever it is lost.
 * `prepare(pc)` adds transceivers; `alive()` says when something last flowed (ms), or null if that is not known.
 */
class Kept extends EventTarget {
  constructor({ url, token, iceServers, prepare, alive }) {
    super();
    Object.assign(this, { url, token, iceServers, prepare, alive, stopped: false, tries: 0 });
  }

  tell(state, error) {
    this.dispatchEvent(new CustomEvent('state', { detail: { state, error } }));
  }

  async run() {
    let pause = FIRST_PAUSE_MS;
    addEventListener('online', this.hurry = () => this.skip?.());
    while (!this.stopped) {
      this.tries += 1;
      let wait = 0;
      const began = performance.now();
      try {
        await this.once();
      } catch (error) {
        wait = (error.wait || 0) * 1000;
        this.tell('waiting', error);
      }
      if (this.stopped) break;
      // What held for a while was no bad address: the next try may come soon again.
      if (performance.now() - began > START_MS) pause = FIRST_PAUSE_MS;
      const ms = Math.max(wait, pause * (0.75 + Math.random() / 2));
      await Promise.race([sleep(Math.min(ms, 60_000)), new Promise((done) => { this.skip = done; })]);
      pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
    }
  }

  /** One connection from beginning to end. */
  async once() {
    const pc = new RTCPeerConnection({ bundlePolicy: 'max-bundle', iceServers: this.iceServers || [] });
    this.pc = pc;
    let lost = false;
    try {
      await this.prepare(pc);
      this.tell('connecting');
      this.resource = await exchange(pc, this.url, this.token);
      const began = performance.now();
      let connected = false;
      while (!this.stopped && this.pc === pc) {
        await sleep(250);
        const now = performance.now();
        const state = pc.connectionState;
        lost = state === 'failed' || state === 'closed' || state === 'disconnected';
        if (lost && state !== 'disconnected') throw new Error(`the connection is ${state}`);
        const flowed = this.alive?.() ?? null;
        const fresh = flowed === null ? state === 'connected' : flowed > began && now - flowed < STALL_MS;
        if (fresh && !connected) {
          connected = true;
          this.tell('live');
        }
        if (!fresh && now - began > (connected ? STALL_MS : START_MS) && (flowed === null || now - Math.max(flowed, began) > STALL_MS)) {
          throw new Error('nothing comes any more');
        }
      }
    } finally {
      // A connection that was lost is gone at the other end too, and needs no goodbye.
      this.leave(pc, lost);
    }
  }

  /** Goodbye, once, and only then the close: by that alone the other end would let go, and find nothing to say goodbye to. */
  leave(pc, lost = false) {
    const { resource } = this;
    this.resource = null;
    if (!resource || lost) return pc?.close();
    pc.getReceivers().forEach((r) => r.track.stop());
    const headers = this.token ? { authorization: `Bearer ${this.token}` } : {};
    const answered = fetch(resource, { method: 'DELETE', headers, keepalive: true }).catch(() => {});
    return Promise.race([answered, sleep(GOODBYE_MS)]).then(() => pc.close());
  }

  stop() {
    this.stopped = true;
    removeEventListener('online', this.hurry);
    this.leave(this.pc);
    this.skip?.();
  }
}

/** Plays a WHEP address in `video`. Events: `state` with `{state: connecting | live | waiting, error}`. */
export function play(video, { url, token, iceServers }) {
  let flowed = 0;
  const seen = () => {
    flowed = performance.now();
    video.requestVideoFrameCallback(seen);
  };
  if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(seen);
  else video.addEventListener('timeupdate', () => { flowed = performance.now(); });
  return new Kept({
    url,
    token,
    iceServers,
    // A hidden page shows no frames; then the connection's own word must do.
    alive: () => (document.hidden ? null : flowed),
    prepare: (pc) => {
      pc.addTransceiver('audio', { direction: 'recvonly' });
      const screen = pc.addTransceiver('video', { direction: 'recvonly' });
      const codecs = preferredVideo();
      if (codecs && screen.setCodecPreferences) screen.setCodecPreferences(codecs);
      const media = new MediaStream();
      pc.ontrack = (e) => {
        media.addTrack(e.track);
        if (video.srcObject !== media) video.srcObject = media;
        sounding(video);
      };
    },
  });
}

/** Publishes a microphone to a WHIP address. `open()` gives its stream. */
export function publish(open, { url, token, iceServers }) {
  let stream = null;
  return new Kept({
    url,
    token,
    iceServers,
    prepare: async (pc) => {
      if (!stream?.getAudioTracks().some((t) => t.readyState === 'live')) stream = await open();
      pc.addTransceiver(stream.getAudioTracks()[0], { direction: 'sendonly', streams: [stream] });
    },
  });
}

/** Plays with sound; where the browser refuses that without a press, plays without and switches on at the first one. */
export function sounding(video) {
  video.play().catch(() => {
    video.muted = true;
    video.play().catch(() => {});
    const on = () => {
      video.muted = false;
      video.play().catch(() => {});
    };
    for (const type of ['pointerdown', 'keydown']) addEventListener(type, on, { once: true });
  });
}
