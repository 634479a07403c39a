// The overlay: a presenter over whatever lies below, for a browser source. See docs in the service's README.
//
// Query: session, token; view=auto|stacked|plain|green|#rrggbb; key=#rrggbb (keyed out of a plain picture), near, far;
// x, y, width, height (px, or % of the page); align=bottom-right…; crop=top,right,bottom,left (%); flip; volume=0…1;
// mute; words (says what it waits for).

import { Cutout, colourOf } from './matte.js';
import { play } from './player.js';
import { t } from './i18n.js';

const query = new URLSearchParams(location.search);
const $ = (id) => document.getElementById(id);
const [video, canvas, place, word] = ['video', 'cut', 'place', 'word'].map($);
const NAMED = { green: '#00b140', blue: '#0047bb', magenta: '#ff00ff', black: '#000000', white: '#ffffff' };

function say(text) {
  // Nobody who watches a show wants to read this; whoever sets it up may.
  word.textContent = text;
  word.hidden = !text || !query.has('words');
}

/** A length of the query: `320`, `320px` or `25%`. */
function lengthOf(name, usual) {
  const text = query.get(name);
  const found = /^(-?\d+(?:\.\d+)?)(px|%)?$/.exec(text ?? '');
  return found ? `${found[1]}${found[2] || 'px'}` : usual;
}

/** Where the presenter stands; `aspect` of what is shown. */
function lay(aspect) {
  const crop = (query.get('crop') || '').split(',').map((v) => Math.min(90, Math.max(0, Number(v) || 0)));
  while (crop.length < 4) crop.push(0);
  const [top, right, bottom, left] = crop;
  const kept = [Math.max(5, 100 - left - right) / 100, Math.max(5, 100 - top - bottom) / 100];
  const shape = (aspect * kept[0]) / kept[1];
  const set = (name, value) => { place.style[name] = value; };
  const [width, height] = [lengthOf('width', ''), lengthOf('height', '')];
  set('aspectRatio', String(shape));
  if (width) set('width', width);
  if (height) set('height', height);
  if (!width && !height) set(innerWidth / innerHeight > shape ? 'height' : 'width', '100%');
  if (width && !height) set('height', 'auto');
  if (height && !width) set('width', 'auto');
  const align = query.get('align') || 'bottom';
  const far = { left: align.includes('right'), top: align.includes('bottom') };
  const middle = { left: !/left|right/.test(align), top: !/top|bottom/.test(align) };
  for (const [near, other, name, axis] of [['left', 'right', 'x', 'X'], ['top', 'bottom', 'y', 'Y']]) {
    const offset = lengthOf(name, '0px');
    set(near, '');
    set(other, '');
    if (middle[near]) set(near, `calc(50% + ${offset})`);
    else set(far[near] ? other : near, offset);
    place.style.setProperty(`--shift-${axis}`, middle[near] ? '-50%' : '0');
  }
  place.style.transform = `translate(${place.style.getPropertyValue('--shift-X')}, ${place.style.getPropertyValue('--shift-Y')})${query.has('flip') ? ' scaleX(-1)' : ''}`;
  for (const picture of [canvas, ...(canvas.hidden ? [video] : [])]) {
    picture.style.width = `${100 / kept[0]}%`;
    picture.style.height = `${100 / kept[1]}%`;
    picture.style.marginLeft = `${-left / kept[0]}%`;
    // Margins in percent are of the width: this one is meant of the height.
    picture.style.transform = top ? `translateY(${-top}%)` : '';
  }
}

async function begin() {
  const session = query.get('session');
  if (!session) {
    word.hidden = false;
    word.textContent = t('This address names no session: add ?session=ID&token=TOKEN, as the service gave them.');
    return;
  }
  let info = null;
  for (let pause = 500; !info; pause = Math.min(pause * 2, 10_000)) {
    info = await fetch('/v1/info', { headers: { authorization: `Bearer ${query.get('token')}` } }).then((r) => (r.ok ? r.json() : null)).catch(() => null);
    if (!info) await new Promise((done) => setTimeout(done, pause));
  }
  let view = query.get('view') || 'auto';
  if (view === 'transparent') view = 'stacked';
  if (view === 'auto') view = query.has('key') || !info.engine.matte ? 'plain' : 'stacked';
  view = NAMED[view] ?? view;
  const keyed = NAMED[query.get('key')] ?? query.get('key');
  const key = keyed ? colourOf(keyed) : null;
  const cut = view === 'stacked' || key;
  canvas.hidden = !cut;
  const cutout = cut ? new Cutout(canvas, video, view === 'stacked' ? null : key, {
    near: Number(query.get('near')) || undefined, far: Number(query.get('far')) || undefined,
  }) : null;
  let aspect = info.engine.width / info.engine.height;
  lay(aspect);
  addEventListener('resize', () => lay(aspect));
  const shown = (now) => {
    if (Number.isFinite(now) && Math.abs(now - aspect) > 0.001) {
      aspect = now;
      lay(aspect);
    }
  };
  if (cutout) canvas.addEventListener('shown', (e) => shown(e.detail));
  else video.addEventListener('resize', () => shown(video.videoWidth / video.videoHeight));
  video.muted = query.has('mute');
  const volume = Number(query.get('volume'));
  if (query.has('volume') && Number.isFinite(volume)) video.volume = Math.min(1, Math.max(0, volume));

  const url = `/v1/sessions/${encodeURIComponent(session)}/whep?view=${encodeURIComponent(view)}`;
  const kept = play(video, { url, token: query.get('token'), iceServers: info.ice_servers });
  kept.addEventListener('state', ({ detail: { state, error } }) => {
    if (state === 'live') say('');
    else if (error) say(`${t('Waiting for the presenter…')} (${error.message})`);
    else say(t('Waiting for the presenter…'));
    // A face that stands still looks broken; an empty place does not.
    if (state === 'waiting') {
      cutout?.clear();
      video.style.visibility = 'hidden';
    } else if (state === 'live') {
      video.style.visibility = '';
    }
  });
  window.loquent = { kept, cutout, video, get view() { return view; } };
  addEventListener('pagehide', () => kept.stop());
  await kept.run();
}

begin();
