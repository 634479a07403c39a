// Runs in the page before the page's own scripts: keeps hold of its connection and microphone, and writes down when
// which sound and which picture was there. Changes nothing the page sees, except where a test asks for it:
// `window.__options = { raw, levels, meter, mouth, rewrite }`.
(() => {
  const options = window.__options || {};
  const probe = { peers: [], frames: [], levels: [], answers: [], problems: [], waits: [] };
  window.__probe = probe;
  addEventListener('error', (e) => probe.problems.push(String(e.message)));
  addEventListener('unhandledrejection', (e) => probe.problems.push(String(e.reason)));

  const devices = navigator.mediaDevices;
  const open = devices.getUserMedia.bind(devices);
  devices.getUserMedia = async (wanted) => {
    // Echo cancellation and noise suppression are made for rooms, not for test tones.
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    probe.microphone = await open(options.raw ? { audio } : wanted);
    begin();
    return probe.microphone;
  };

  const Native = window.RTCPeerConnection;
  window.RTCPeerConnection = class extends Native {
    constructor(...args) {
      super(...args);
      probe.peers.push(this);
      this.addEventListener('track', (e) => {
        if (e.track.kind === 'audio') probe.voice = e.track;
        begin();
      });
    }
    async setRemoteDescription(description) {
      let { sdp } = description;
      if (options.rewrite) sdp = await window.__rewrite(sdp);
      probe.answers.push(sdp);
      return super.setRemoteDescription({ type: description.type, sdp });
    }
  };

  // ---- sound: loudness of the microphone and of the returned voice, on one clock ----------------------------------
  const WORKLET = `
    registerProcessor('levels', class extends AudioWorkletProcessor {
      constructor() { super(); this.rows = []; }
      level(input) {
        const samples = input[0];
        if (!samples) return 0;
        let sum = 0;
        for (const s of samples) sum += s * s;
        return Math.sqrt(sum / samples.length);
      }
      process(inputs) {
        this.rows.push([currentTime, this.level(inputs[0]), this.level(inputs[1])]);
        if (this.rows.length === 8) { this.port.postMessage(this.rows); this.rows = []; }
        return true;
      }
    });`;

  async function begin() {
    if (!options.levels || probe.context || !probe.microphone || !probe.voice) return;
    const context = probe.context = new AudioContext({ sampleRate: 48000, latencyHint: 'interactive' });
    await context.audioWorklet.addModule(URL.createObjectURL(new Blob([WORKLET], { type: 'text/javascript' })));
    const node = new AudioWorkletNode(context, 'levels', { numberOfInputs: 2, numberOfOutputs: 1 });
    context.createMediaStreamSource(probe.microphone).connect(node, 0, 0);
    context.createMediaStreamSource(new MediaStream([probe.voice])).connect(node, 0, 1);
    const silence = context.createGain();
    silence.gain.value = 0;
    node.connect(silence).connect(context.destination);
    // The earliest a block was ever seen after its context time: the two clocks' difference.
    probe.clock = Infinity;
    node.port.onmessage = (e) => {
      const last = e.data[e.data.length - 1][0] * 1000;
      probe.clock = Math.min(probe.clock, performance.now() - last);
      probe.levels.push(...e.data);
    };
  }

  // The service's own waiting, which moves when its machine is busy: no part of what the network adds.
  setInterval(() => {
    const wait = window.loquent?.numbers?.server?.playout_delay_ms;
    if (Number.isFinite(wait)) probe.waits.push([performance.now(), wait]);
  }, 250);

  // ---- pictures -----------------------------------------------------------------------------------------------------
  addEventListener('DOMContentLoaded', () => {
    const video = document.querySelector('video');
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [1, 160];
    const context = canvas.getContext('2d', { willReadFrequently: true });
    const tiny = document.createElement('canvas');
    [tiny.width, tiny.height] = [16, 12];
    const small = tiny.getContext('2d', { willReadFrequently: true });
    let rest = null;
    const seen = (now, frame) => {
      video.requestVideoFrameCallback(seen);
      let meter = 0;
      if (options.meter && video.videoWidth) {
        // The test card's level meter stands at x 14–38, y 22–182 of 256.
        const scale = video.videoWidth / 256;
        context.drawImage(video, 26 * scale, 22 * scale, scale, 160 * scale, 0, 0, 1, 160);
        const pixels = context.getImageData(0, 0, 1, 160).data;
        for (let y = 0; y < 160; y++) meter += pixels[4 * y] > 130 || pixels[4 * y + 1] > 110 ? 1 : 0;
      }
      let mouth = 0;
      if (options.mouth && video.videoWidth) {
        // How far the lower face is from what it looked like first, at rest: a mouth that opens, dark or teeth.
        const scale = video.videoWidth / 256;
        small.drawImage(video, 96 * scale, 132 * scale, 64 * scale, 48 * scale, 0, 0, 16, 12);
        const pixels = small.getImageData(0, 0, 16, 12).data;
        rest ??= pixels;
        for (let i = 0; i < pixels.length; i++) mouth += Math.abs(pixels[i] - rest[i]);
      }
      probe.frames.push([
        now, frame.presentationTime, frame.expectedDisplayTime, frame.receiveTime || 0, frame.rtpTimestamp || 0,
        frame.presentedFrames, meter / 160, video.videoWidth, mouth,
      ]);
    };
    if (video) video.requestVideoFrameCallback(seen);
  });

  probe.report = async () => {
    const peer = probe.peers[probe.peers.length - 1];
    const rows = [];
    if (peer) (await peer.getStats()).forEach((row) => rows.push(row));
    const numbers = window.loquent ? JSON.parse(JSON.stringify(window.loquent.numbers)) : {};
    return { now: performance.now(), rows, numbers, frames: probe.frames.length, problems: probe.problems };
  };
})();
