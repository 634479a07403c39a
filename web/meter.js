// The microphone: asking for it, its level, its devices.

import { t } from './i18n.js';

/** A sentence for whatever getUserMedia threw. */
export function microphoneProblem(error) {
  switch (error && error.name) {
    case 'NotAllowedError':
    case 'SecurityError':
      return { title: t('The microphone was refused'),
        text: t('Allow it with the icon beside the address (or in the browser’s settings for this site), then press Start again.') };
    case 'NotFoundError':
      return { title: t('No microphone was found'), text: t('Connect one, or switch it on, then press Start again.') };
    case 'NotReadableError':
    case 'AbortError':
      return { title: t('The microphone cannot be opened'), text: t('Another program may be using it. Close that program, then press Start again.') };
    case 'OverconstrainedError':
      return { title: t('The chosen microphone is gone'), text: t('Choose another one in the list, then press Start again.') };
    default:
      return { title: t('The microphone does not work'), text: t('The browser says: {words}. Try another microphone or another browser.', { words: (error && error.message) || error }) };
  }
}

/** Opens a microphone; `deviceId` empty = the browser's choice. */
export function openMicrophone(deviceId) {
  const audio = { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 };
  if (deviceId) audio.deviceId = { exact: deviceId };
  return navigator.mediaDevices.getUserMedia({ audio });
}

/** Microphones by name; names are known only after permission was given. */
export async function microphones() {
  const all = await navigator.mediaDevices.enumerateDevices();
  return all.filter((d) => d.kind === 'audioinput' && d.deviceId);
}

/** Watches a stream's loudness and calls `show(level 0…1, clipped)` about 15 times a second. */
export class Meter {
  constructor(show) {
    this.show = show;
    this.heardAt = 0;
  }

  attach(stream) {
    this.detach();
    const Context = window.AudioContext || window.webkitAudioContext;
    if (!Context) return;
    this.context = this.context || new Context();
    this.context.resume().catch(() => {});
    this.source = this.context.createMediaStreamSource(stream);
    const analyser = this.context.createAnalyser();
    analyser.fftSize = 1024;
    this.source.connect(analyser);
    const samples = new Float32Array(analyser.fftSize);
    let shown = 0;
    this.attachedAt = this.heardAt = performance.now();
    this.timer = setInterval(() => {
      analyser.getFloatTimeDomainData(samples);
      let sum = 0;
      let peak = 0;
      for (const s of samples) {
        sum += s * s;
        peak = Math.max(peak, Math.abs(s));
      }
      const decibels = 10 * Math.log10(sum / samples.length + 1e-10);
      // -60 dB is a quiet room, -10 dB a loud voice.
      const level = Math.min(1, Math.max(0, (decibels + 60) / 50));
      shown = Math.max(level, shown * 0.82);
      if (decibels > -65) this.heardAt = performance.now();
      this.show(shown, peak > 0.98);
    }, 66);
  }

  /** Seconds since anything at all was heard. */
  silentFor() {
    return this.timer ? (performance.now() - this.heardAt) / 1000 : 0;
  }

  detach() {
    clearInterval(this.timer);
    this.timer = 0;
    if (this.source) this.source.disconnect();
    this.source = null;
    this.show(0, false);
  }
}
