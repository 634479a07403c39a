// The designer, and what the page offers instead of a picture that the engine refuses. See run.mjs.

import path from 'node:path';
import { OUT, browser, serve, sleep, speech } from './lib.mjs';

const chosen = (page) => page.evaluate(() => document.querySelector('input[name="presenter"]:checked').value);
const talks = (page) => page.waitForSelector('.showing', { timeout: 30_000 });

export async function design(checks) {
  const service = await serve({ engine: 'pocket', seconds: 180 });
  const chromium = await browser(speech().file);
  try {
    for (const [size, width, height] of [['desk', 1280, 800], ['phone', 390, 844]]) {
      const page = await chromium.context.newPage();
      await page.setViewportSize({ width, height });
      await page.goto(`${service.base}/?lang=en`);
      await page.click('#designer summary');
      const drawn = () => page.waitForFunction(() => document.getElementById('design-picture').complete && document.getElementById('design-picture').naturalWidth === 256);
      await drawn();
      const first = await page.getAttribute('#design-picture', 'src');
      await page.selectOption('select[name="skin"]', 'dark');
      await page.selectOption('select[name="glasses"]', 'round');
      await drawn();
      const second = decodeURIComponent(await page.getAttribute('#design-picture', 'src'));
      checks.add(`${size}: traits change the picture`, second, 'both named', first !== second && second.includes('skin=dark') && second.includes('glasses=round'));
      await page.screenshot({ path: path.join(OUT, `design-${size}.png`), fullPage: true });
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      checks.add(`${size}: nothing is wider than the page`, wide, '0', wide <= 0);
      await page.click('#design-use');
      await page.click('#start');
      await talks(page);
      await sleep(2000);
      checks.add(`${size}: the design speaks`, await chosen(page), 'design:…', (await chosen(page)).startsWith('design:'));
      await page.screenshot({ path: path.join(OUT, `design-${size}-live.png`) });
      await page.click('#stop');
      await sleep(600);

      // A picture that is no drawn presenter: rings in the colours of a sunset.
      const picture = await page.evaluate(() => {
        const canvas = Object.assign(document.createElement('canvas'), { width: 300, height: 300 });
        const g = canvas.getContext('2d');
        for (let r = 210; r > 0; r -= 7) {
          g.fillStyle = `hsl(${r} 70% ${30 + r % 50}%)`;
          g.beginPath();
          g.arc(150, 150, r, 0, 7);
          g.fill();
        }
        return canvas.toDataURL('image/png').split(',')[1];
      });
      await page.check('#consent');
      await page.setInputFiles('#file', { name: 'rings.png', mimeType: 'image/png', buffer: Buffer.from(picture, 'base64') });
      await page.waitForFunction(() => document.querySelector('input[name="presenter"]:checked').value.startsWith('portrait:'));
      await page.click('#start');
      await page.waitForSelector('#nearest:not([hidden])', { timeout: 30_000 });
      const said = await page.textContent('#notice-text');
      checks.add(`${size}: what cannot be drawn is refused in words`, said, 'a sentence', /pocket engine cannot/.test(said));
      await page.screenshot({ path: path.join(OUT, `design-${size}-refused.png`), fullPage: true });
      await page.click('#nearest-use');
      await page.click('#start');
      await talks(page);
      checks.add(`${size}: the nearest look speaks`, await chosen(page), 'design:…', (await chosen(page)).startsWith('design:'));
      await page.close();
      await sleep(600);
    }
  } finally {
    await chromium.close();
    await service.stop();
  }
}
