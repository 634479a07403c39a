// The designer: traits, a preview, and a presenter made of them. A look is a text (`7,skin=brown`), which is all the
// service needs to know.

import { t } from './i18n.js';

const $ = (id) => document.getElementById(id);
const words = (name) => t(name.replaceAll('_', ' '));

let seed = 1;

/** The look as it is chosen now. */
function look() {
  const named = [...$('traits').querySelectorAll('select')].filter((s) => s.value);
  return [seed, ...named.map((s) => `${s.name}=${s.value}`)].join(',');
}

function show() {
  const picture = $('design-picture');
  picture.src = pictureOf(look());
  picture.alt = t('The designed presenter');
}

const another = () => {
  seed = 1 + Math.floor(Math.random() * 1e6);
  show();
};

/** Address of a look's picture. */
export const pictureOf = (text) => `/v1/design/${encodeURIComponent(text.replace(/^design:/, ''))}.png`;

/** Fills the designer in; `use(presenter, picture)` is called with a look that was chosen. */
export async function openDesigner(use) {
  const response = await fetch('/v1/design');
  if (!response.ok) return;
  const { traits } = await response.json();
  for (const [name, choices] of Object.entries(traits)) {
    const field = document.createElement('label');
    const caption = Object.assign(document.createElement('span'), { textContent: words(name) });
    const select = Object.assign(document.createElement('select'), { name });
    select.append(new Option(t('any'), ''), ...choices.map((c) => new Option(words(c), c)));
    field.append(caption, select);
    $('traits').append(field);
  }
  $('traits').addEventListener('change', show);
  $('design-other').addEventListener('click', another);
  $('design-use').addEventListener('click', () => use(`design:${look()}`));
  // Nothing is drawn before somebody looks.
  $('designer').addEventListener('toggle', () => $('designer').open && !$('design-picture').src && another());
  $('designer').hidden = false;
}
