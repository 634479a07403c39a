// One conversation with the server: offer and answer, trickle, ICE restart, statistics. No page elements here.

import { t, told } from './i18n.js';

/** What went wrong, in words for people; `retryAfter` seconds when trying again by oneself makes sense. */
export class LiveProblem extends Error {
  constructor(code, title, text, retryAfter = 0) {
    super(text);
    Object.assign(this, { code, title, text, retryAfter });
  }
}

/** The key in the page's address, /#key=KEY: what stands behind # never leaves the browser by itself. */
const key = new URLSearchParams(location.hash.slice(1)).get('key');
export const keyHeader = () => (key ? { authorization: `Bearer ${key}` } : {});

const FRAGMENT = 'application/trickle-ice-sdpfrag';
/** A disconnection shorter than this heals by itself more often than not. */
const PATIENCE_MS = 1500;
/** Time one ICE restart gets before the next is tried. */
const RESTART_MS = 5000;
const RESTARTS = 4;

/** What stands above the server's sentence when it ends a conversation. */
const TITLES = {
  portrait_refused: 'This picture cannot be used',
  engine_failed: 'The engine has failed',
  codec_failed: 'The engine has failed',
  prepare_timeout: 'The presenter was not ready in time',
  connect_timeout: 'No connection came about',
  service_closing: 'The service is closing',
  session_limit: 'The time is up',
  idle_limit: 'Nobody spoke for a long time',
};

/** H.264 constrained baseline first, with its retransmission format; null when this browser has none. */
export function preferredVideo() {
  const known = (RTCRtpReceiver.getCapabilities && RTCRtpReceiver.getCapabilities('video')) || { codecs: [] };
  const h264 = known.codecs.filter((c) => /^video\/h264$/i.test(c.mimeType) && !/packetization-mode=0/i.test(c.sdpFmtpLine || ''));
  if (!h264.length) return null;
  const rank = (c) => (/profile-level-id=42e0/i.test(c.sdpFmtpLine) ? 0 : /profile-level-id=42/i.test(c.sdpFmtpLine) ? 1 : 2);
  h264.sort((a, b) => rank(a) - rank(b));
  return [...h264, ...known.codecs.filter((c) => /^video\/rtx$/i.test(c.mimeType))];
}

/** Chrome and Safari list what they can decode; Firefox may fetch its H.264 add-on a little later. */
export function canPlay() {
  return typeof RTCPeerConnection === 'function' && preferredVideo() !== null;
}

const attribute = (sdp, name) => (sdp.match(new RegExp(`^a=${name}:(.*)$`, 'm')) || [])[1]?.trim();

/** Puts an ICE restart's fragment into the answer that stood before. */
export function withFragment(sdp, fragment) {
  const ufrag = attribute(fragment, 'ice-ufrag');
  const pwd = attribute(fragment, 'ice-pwd');
  if (!ufrag || !pwd) return null;
  const candidates = fragment.split(/\r?\n/).filter((l) => l.startsWith('a=candidate:') || l.startsWith('a=end-of-candidates'));
  const lines = sdp.split(/\r?\n/).filter((l) => l && !l.startsWith('a=candidate:') && !l.startsWith('a=end-of-candidates'));
  const out = [];
  let sections = 0;
  for (const line of lines) {
    // Bundled: all candidates belong to the first section.
    if (line.startsWith('m=') && ++sections === 2) out.push(...candidates);
    out.push(line.startsWith('a=ice-ufrag:') ? `a=ice-ufrag:${ufrag}` : line.startsWith('a=ice-pwd:') ? `a=ice-pwd:${pwd}` : line);
  }
  if (sections < 2) out.push(...candidates);
  return out.join('\r\n') + '\r\n';
}

async function problemOf(response) {
  let answer = {};
  try {
    answer = await response.json();
  } catch { /* not ours: a proxy's page, or nothing */ }
  const code = answer.error?.code || String(response.status);
  const text = told(code, answer.error?.message) || t('The server answered {status}.', { status: response.status });
  if (response.status === 503) {
    const after = Number(response.headers.get('retry-after')) || 5;
    if (code === 'full') return new LiveProblem(code, t('All places are taken'), text, after);
    if (code === 'draining') return new LiveProblem(code, t('The server is closing'), text);
    return new LiveProblem(code, t('The server cannot serve you now'), text);
  }
  return new LiveProblem(code, t('The server did not accept this'), text);
}

/**
 * Events: `phase` (detail: connecting | live | reconnecting), `media` (detail: MediaStream), `message` (detail: object
 * from the server), `ended` (detail: LiveProblem; `code` is `lost` when a new conversation may be tried).
 */
export class Live extends EventTarget {
  constructor({ presenter, stream, iceServers }) {
    super();
    Object.assign(this, { presenter, stream, iceServers, restarts: 0, waiting: [], before: null });
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  async open() {
    const video = preferredVideo();
    if (!video) {
      throw new LiveProblem('no_h264', t('This browser cannot play the video'),
        t('It offers no H.264 for calls. Use a current Chrome, Edge or Safari; Firefox fetches its H.264 add-on a minute after its first start.'));
    }
    this.tell('phase', 'connecting');
    const pc = new RTCPeerConnection({ bundlePolicy: 'max-bundle', iceServers: this.iceServers || [] });
    this.pc = pc;
    const [track] = this.stream.getAudioTracks();
    this.microphone = pc.addTransceiver(track, { direction: 'sendrecv', streams: [this.stream] }).sender;
    const screen = pc.addTransceiver('video', { direction: 'recvonly' });
    if (screen.setCodecPreferences) screen.setCodecPreferences(video);
    this.channel = pc.createDataChannel('loquent');
    this.channel.onmessage = (e) => this.heard(e.data);

    // One stream for voice and picture: the browser keeps their lips together only then.
    const media = new MediaStream();
    pc.ontrack = (e) => {
      media.addTrack(e.track);
      this.tell('media', media);
    };
    pc.onicecandidate = (e) => this.found(e.candidate);
    pc.onconnectionstatechange = () => this.changed();

    await pc.setLocalDescription(await pc.createOffer());
    const query = this.presenter ? `?presenter=${encodeURIComponent(this.presenter)}` : '';
    let response;
    try {
      response = await fetch(`/v1/live${query}`, {
        method: 'POST', headers: { 'content-type': 'application/sdp', ...keyHeader() }, body: pc.localDescription.sdp,
      });
    } catch {
      throw new LiveProblem('unreachable', t('The server does not answer'), t('Check that it is still running and that this device is online, then try again.'), 5);
    }
    if (response.status !== 201) throw await problemOf(response);
    this.location = response.headers.get('location');
    this.etag = response.headers.get('etag');
    const answer = await response.text();
    if (this.closed) {
      this.leave();
      return;
    }
    await pc.setRemoteDescription({ type: 'answer', sdp: answer });
    this.send();
    // ICE has its own deadlines, but an answer nobody can reach would otherwise only spin.
    this.deadline = setTimeout(() => {
      if (!this.connected) {
        this.end(new LiveProblem('no_path', t('No connection for sound and picture'),
          t('The page reached the server, but its media ports cannot be reached: a firewall or VPN may block UDP. Try another network, or ask whoever runs the server to enable ICE over TCP or a TURN server.')));
      }
    }, 15000);
  }

  /** A candidate was found; null means: that was all. */
  found(candidate) {
    this.waiting.push(candidate ? `a=${candidate.candidate}` : 'a=end-of-candidates');
    clearTimeout(this.batch);
    this.batch = setTimeout(() => this.send(), 40);
  }

  /** Trickles what was found so far. */
  async send() {
    if (!this.location || this.restarting || !this.waiting.length || this.closed) return;
    const lines = this.waiting.splice(0).filter((l) => l !== 'a=');
    try {
      await fetch(this.location, {
        method: 'PATCH', headers: { 'content-type': FRAGMENT, 'if-match': this.etag || '*' }, body: this.fragment(lines),
      });
    } catch { /* candidates are a help, not a need: the server learns our address from our checks */ }
  }

  fragment(lines) {
    const sdp = this.pc.localDescription.sdp;
    const head = [`a=ice-ufrag:${attribute(sdp, 'ice-ufrag')}`, `a=ice-pwd:${attribute(sdp, 'ice-pwd')}`];
    const section = [(sdp.match(/^m=.*$/m) || ['m=audio 9 UDP/TLS/RTP/SAVPF 0'])[0].trim(), `a=mid:${attribute(sdp, 'mid') || 0}`];
    return [...head, ...section, ...lines].join('\r\n') + '\r\n';
  }

  changed() {
    if (this.closed) return;
    const state = this.pc.connectionState;
    clearTimeout(this.patience);
    if (state === 'connected') {
      clearTimeout(this.deadline);
      this.connected = true;
      this.restarts = 0;
      this.tell('phase', 'live');
    } else if (state === 'disconnected') {
      this.patience = setTimeout(() => this.restart(), PATIENCE_MS);
    } else if (state === 'failed') {
      this.restart();
    }
  }

  /** Looks for a new path for the same conversation. */
  async restart() {
    if (this.closed || this.restarting) return;
    if (!this.connected || this.restarts >= RESTARTS) {
      this.end(new LiveProblem('lost', t('The connection was lost'), t('A new one is being tried.')));
      return;
    }
    this.restarts += 1;
    this.restarting = true;
    this.tell('phase', 'reconnecting');
    try {
      this.waiting = [];
      const before = this.pc.remoteDescription.sdp;
      await this.pc.setLocalDescription(await this.pc.createOffer({ iceRestart: true }));
      const response = await fetch(this.location, {
        method: 'PATCH', headers: { 'content-type': FRAGMENT, 'if-match': '*' }, body: this.fragment(this.waiting.splice(0).filter((l) => l !== 'a=')),
      });
      if (response.status === 404 || response.status === 410) {
        this.end(new LiveProblem('lost', t('The conversation ended'), t('The server had already closed it.')));
        return;
      }
      if (response.status !== 200) throw new Error(`restart answered ${response.status}`);
      this.etag = response.headers.get('etag') || this.etag;
      const answer = withFragment(before, await response.text());
      if (!answer) throw new Error('restart answered without credentials');
      await this.pc.setRemoteDescription({ type: 'answer', sdp: answer });
    } catch (error) {
      console.warn('ICE restart:', error);
      if (this.pc.signalingState === 'have-local-offer') await this.pc.setLocalDescription({ type: 'rollback' }).catch(() => {});
    } finally {
      this.restarting = false;
    }
    this.send();
    clearTimeout(this.patience);
    if (this.closed) return;
    if (this.pc.connectionState === 'connected') {
      // It had come back by itself meanwhile: no change of state will tell us.
      this.changed();
    } else {
      this.patience = setTimeout(() => this.restart(), navigator.onLine === false ? RESTART_MS * 2 : RESTART_MS);
    }
  }

  heard(text) {
    let message;
    try {
      message = JSON.parse(text);
    } catch {
      return;
    }
    if (message.type === 'closed') {
      const title = t(TITLES[message.reason] || 'The conversation has ended');
      this.end(new LiveProblem(message.reason || 'closed', title, told(message.reason, message.message) || t('The server closed it.')));
      return;
    }
    this.tell('message', message);
  }

  /** Stops what the presenter is saying. */
  interrupt() {
    if (this.channel?.readyState === 'open') this.channel.send(JSON.stringify({ type: 'interrupt' }));
  }

  async replace(stream) {
    this.stream = stream;
    await this.microphone?.replaceTrack(stream.getAudioTracks()[0]);
  }

  end(problem) {
    if (this.closed) return;
    this.close();
    this.tell('ended', problem);
  }

  /** Ends the conversation from this side; resolves when the server has given the place back. */
  close() {
    if (this.closed) return Promise.resolve();
    this.closed = true;
    [this.deadline, this.patience, this.batch].forEach(clearTimeout);
    const left = this.leave();
    this.pc?.close();
    return left;
  }

  async leave() {
    if (!this.location) return;
    const { location } = this;
    this.location = null;
    // keepalive: also sent while the page is going away, so that the place is free at once.
    await fetch(location, { method: 'DELETE', keepalive: true }).catch(() => {});
  }

  /** Numbers since the last call; null before there are two readings. */
  async sample() {
    if (!this.pc || this.closed) return null;
    const now = { at: performance.now() };
    (await this.pc.getStats()).forEach((r) => {
      if (r.type === 'inbound-rtp' && r.kind === 'video') now.video = r;
      if (r.type === 'inbound-rtp' && r.kind === 'audio') now.audio = r;
      if (r.type === 'remote-inbound-rtp' && r.kind === 'audio') now.remote = r;
      if (r.type === 'candidate-pair' && r.nominated && r.state === 'succeeded') now.pair = r;
    });
    const before = this.before;
    this.before = now;
    if (!before || !now.video || !before.video) return null;
    const seconds = (now.at - before.at) / 1000;
    const per = (key) => now.video[key] - before.video[key];
    const bytes = per('bytesReceived') + ((now.audio?.bytesReceived || 0) - (before.audio?.bytesReceived || 0));
    const emitted = per('jitterBufferEmittedCount');
    return {
      fps: per('framesDecoded') / seconds,
      bitrate: (bytes * 8) / seconds,
      lostDown: (now.video.packetsLost || 0) + (now.audio?.packetsLost || 0),
      lostUp: now.remote?.packetsLost,
      freezes: now.video.freezeCount,
      framesDecoded: now.video.framesDecoded,
      roundTripMs: now.pair?.currentRoundTripTime === undefined ? undefined : now.pair.currentRoundTripTime * 1000,
      // From the packet's arrival to the decoded frame; the page measures its display itself where it can.
      bufferMs: emitted > 0 ? (per('jitterBufferDelay') / emitted) * 1000 + (per('totalDecodeTime') / Math.max(1, per('framesDecoded'))) * 1000 : undefined,
    };
  }
}
