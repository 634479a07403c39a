// The page for whoever runs the service: what /v1/status says, every two seconds. A key comes as /status#key=KEY.

import { keyHeader } from './live.js';
import { language, t, told } from './i18n.js';

const $ = (id) => document.getElementById(id);
const PAUSE_MS = 2000;

const STATES = { ready: 'Ready', draining: 'The server is closing', engine_restarting: 'The engine is being built anew', engine_failed: 'The engine has failed', cluster_unreachable: 'Other machines cannot be reached' };

for (const element of document.querySelectorAll('[data-t]')) element.textContent = t(element.dataset.t);
document.title = t('Loquent status');
document.documentElement.lang = language;

function time(seconds) {
  const [d, h, m] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (d) return `${d} d ${h} h`;
  return h ? `${h} h ${m} min` : m ? `${m} min ${seconds % 60} s` : `${seconds} s`;
}
const ms = (value) => (value == null ? '–' : `${value} ms`);
const kbit = (bits) => `${Math.round(bits / 1000)} kbit/s`;

/** Pairs of a word and a value; a third entry marks what is wrong. */
function list(place, facts) {
  place.replaceChildren(...facts.flatMap(([word, value, bad]) => {
    const [dt, dd] = [document.createElement('dt'), document.createElement('dd')];
    dt.textContent = t(word);
    dd.textContent = value;
    dd.classList.toggle('bad', Boolean(bad));
    const pair = document.createElement('div');
    pair.append(dt, dd);
    return pair;
  }));
}

function cells(row, name, values) {
  row.replaceChildren(...values.map((value) => {
    const cell = document.createElement(name);
    cell.textContent = value;
    return cell;
  }));
  return row;
}

const COLUMNS = ['Id', 'State', 'Presenter', 'Since', 'Watching', 'Pictures a second', 'Delay', 'Held and skipped', 'Waiting speech', 'Bitrate', 'Lost in and out'];
const LIVES = { connecting: 'Connecting', preparing: 'Preparing', idle: 'Silent', speaking: 'Speaking', draining: 'Ending', closed: 'Ended' };

const NODE_COLUMNS = ['Node', 'State', 'Places taken', 'Heard', 'Address', 'Version'];
const NODES = { ready: 'Ready', draining: 'Ending', failed: 'The engine has failed', left: 'Has left', dead: 'Dead', unknown: 'Not known' };

/** What this node knows of the others; it is one of them. */
function others(c) {
  $('cluster').hidden = !c;
  if (!c) return;
  list($('bus'), [
    ['This node', c.id],
    ['NATS', c.reachable ? t('Connected') : t('Away for {time}', { time: time(c.away_s ?? 0) }), !c.reachable],
    ...(c.why ? [['Why', c.why, true]] : []),
    ['Nodes alive', c.known > c.nodes.length ? t('{alive} ({listed} are listed)', { alive: c.alive, listed: c.nodes.length }) : c.alive],
    ['Places taken', `${c.slots_used} / ${c.slots}`, c.slots > 0 && c.slots_used >= c.slots],
  ]);
  cells($('node-heads'), 'th', NODE_COLUMNS.map((name) => t(name)));
  $('nodes').replaceChildren(...c.nodes.map((n) => {
    const ago = t('{seconds} s ago', { seconds: (n.heard_ms / 1000).toFixed(1) });
    const row = cells(document.createElement('tr'), 'td', [n.id, t(NODES[n.state] || n.state), `${n.slots_used} / ${n.slots}`, ago, n.address || '–', n.version]);
    row.classList.toggle('here', n.id === c.id);
    row.classList.toggle('bad', n.state === 'dead' || n.state === 'failed');
    return row;
  }));
}

function show(s) {
  const e = s.engine;
  $('state').textContent = t(STATES[s.state] || s.state);
  $('dot').className = `dot ${s.state === 'ready' ? 'good' : 'bad'}`;
  $('word').hidden = !s.why;
  $('word').textContent = s.why || '';
  list($('service'), [
    ['Version', s.version], ['Running for', time(s.up_s)],
    ['Conversations so far', s.sessions_started],
    ['Ended', Object.entries(s.sessions_ended).map(([why, n]) => `${why} ${n}`).join(', ') || '–'],
    ['HTTP connections', s.http_connections], ['WebSockets', s.websockets], ['Players and publishers', s.media_connections],
    ['Uploaded pictures', s.portraits], ['Memory free', s.memory_free_mb == null ? '–' : `${s.memory_free_mb} MB`],
  ]);
  list($('engine'), [
    ['Engine', `${e.name}, ${e.size}, ${e.fps}/s`],
    ['Places taken', `${e.slots_used} / ${e.slots}`, e.slots_used >= e.slots],
    ['Real-time factor', e.real_time_factor, e.real_time_factor > 1],
    ['Block (median, 95 %)', `${e.block_median_ms} / ${e.block_p95_ms} ms`, e.block_p95_ms > e.block_ms],
    ['A block lasts', ms(e.block_ms)],
    ['Hearing, drawing, decoding', `${e.stages_ms.features} / ${e.stages_ms.generation} / ${e.stages_ms.decode} ms`],
    ['Lag now, worst', `${e.lag_ms} / ${e.worst_lag_ms} ms`], ['Blocks made', e.blocks],
    ...(e.cards_free_mb?.length ? [['Memory free on the cards', e.cards_free_mb.map((mb) => `${mb} MB`).join(', ')]] : []),
    ['Built anew', e.rebuilds, e.rebuilds > 0],
  ]);
  others(s.cluster);
  cells($('heads'), 'th', COLUMNS.map((c) => t(c)));
  $('rows').replaceChildren(...s.sessions.map(({ id, state, presenter, age_s: age, metrics: m }) => cells(document.createElement('tr'), 'td', [
    id, t(LIVES[state] || state), presenter, time(age), m.sinks, m.fps, ms(m.delay_ms), `${m.frames_held} / ${m.frames_skipped}`,
    ms(m.speech_buffered_ms), kbit(m.bitrate), `${m.lost_in} / ${m.lost_out}`,
  ])));
  $('none').hidden = s.sessions.length > 0;
}

function trouble(words) {
  $('dot').className = 'dot bad';
  $('state').textContent = '';
  $('word').hidden = false;
  $('word').textContent = words;
}

for (;;) {
  try {
    const response = await fetch('/v1/status', { headers: keyHeader() });
    const answer = await response.json();
    if (response.ok) show(answer);
    else trouble(told(answer.error?.code, answer.error?.message));
  } catch {
    trouble(t('The server does not answer'));
  }
  await new Promise((done) => { setTimeout(done, PAUSE_MS); });
}
