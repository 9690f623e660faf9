"""Checks that run inside a page: what is wrong with it for people who see it badly or use no mouse."""

STRUCTURE = """() => {
  const found = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  for (const one of all('input:not([type=hidden]), textarea, select, button, a[href]')) {
    if (!one.checkVisibility()) continue;
    const name = one.getAttribute('aria-label') || one.labels?.[0]?.textContent || one.textContent;
    if (!name.trim()) found.push('no name: ' + one.outerHTML);
  }
  const ids = all('[id]').map((one) => one.id);
  if (new Set(ids).size < ids.length) found.push('an id twice: ' + ids);
  for (const name of ['aria-labelledby', 'aria-describedby'])
    for (const one of all(`[${name}]`))
      if (!document.getElementById(one.getAttribute(name))) found.push('refers to nothing: ' + one.outerHTML);
  const headings = all('h1').filter((one) => one.checkVisibility()).length;
  if (headings !== 1) found.push(`main headings: ${headings}`);
  if (all('main').length !== 1 || !document.documentElement.lang) found.push('landmarks or language');
  return found;
}"""
"""Controls without a name, ids that are there twice or not at all, headings, landmarks."""

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => {
    const layers = [];
    for (let up = one; up; up = up.parentElement) {
      const color = rgba(getComputedStyle(up).backgroundColor);
      layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reverse().reduce((under, [r, g, b, a]) =>
      [r * a + under[0] * (1 - a), g * a + under[1] * (1 - a), b * a + under[2] * (1 - a)], [255, 255, 255]);
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !one.checkVisibility()) continue;
    if (one.closest('.visually-hidden, noscript, .skip')) continue;
    texts++;
    const back = behind(one), front = rgba(getComputedStyle(one).color);
    const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${one.outerHTML.slice(0, 120)}`);
  }
  return texts > 5 ? poor : ['no text'];
}"""
"""Texts with less contrast than WCAG AA asks for: 4.5 to 1."""

KEYS = """() => {
  const found = [], taken = new Set();
  const controls = 'button, a.button, summary, textarea, input:not([type=hidden])';
  for (const one of document.getElementById('task').querySelectorAll(controls)) {
    if (!one.checkVisibility()) continue;
    if (!one.dataset.key) found.push('no key: ' + one.outerHTML);
    for (const key of one.dataset.key?.split('|') ?? []) {
      if (taken.has(key)) found.push('a key twice: ' + one.outerHTML);
      taken.add(key);
    }
  }
  return taken.size > 3 ? found : ['no controls'];
}"""
"""Controls of the work that no key reaches, and keys that mean two things."""
