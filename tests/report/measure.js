// Return a list of layout faults of the loaded page: cut off, sticking out, overlapping text, too little contrast.
(() => {
  const faults = [];
  const width = document.documentElement.clientWidth;
  const name = e => `<${e.tagName.toLowerCase()} class="${e.getAttribute('class') || ''}"> "${(e.textContent || '').trim().slice(0, 40)}"`;
  const shown = e => e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true, contentVisibilityAuto: true }) && !e.closest('.unseen, .skip');
  // Visually hidden on purpose: the heads of stacked tables.
  const hidden = e => { for (let n = e; n && n !== document.body; n = n.parentElement) if (getComputedStyle(n).clipPath !== 'none') return true; return false; };
  const elements = [...document.body.querySelectorAll('*')].filter(e => shown(e) && !hidden(e));

  if (document.documentElement.scrollWidth > width) faults.push(`page scrolls sideways: ${document.documentElement.scrollWidth} > ${width}`);
  for (const e of elements) {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (!(e instanceof SVGElement) && style.display !== 'inline') {
      if (e.scrollWidth > e.clientWidth + 1) faults.push(`wider than its box: ${name(e)} ${e.scrollWidth} > ${e.clientWidth}`);
      if (style.overflowY !== 'visible' && e.scrollHeight > e.clientHeight + 1) faults.push(`cut off below: ${name(e)}`);
    }
    if (box.width && (box.left < -1 || box.right > width + 1)) faults.push(`sticks out of the window: ${name(e)} ${box.left.toFixed(0)}..${box.right.toFixed(0)}`);
  }

  // Every line of every text, as boxes with the element that holds it.
  const lines = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const usable = new Set(elements);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const holder = node.parentElement;
    if (!usable.has(holder) || !node.textContent.trim() || ['title', 'style'].includes(holder.tagName.toLowerCase())) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) if (box.width > 0.5 && box.height > 0.5) lines.push({ box, holder, node });
  }
  lines.sort((a, b) => a.box.top - b.box.top);
  const slack = 2.5;
  for (let i = 0; i < lines.length; i++) {
    const a = lines[i];
    for (let j = i + 1; j < lines.length && lines[j].box.top < a.box.bottom - slack; j++) {
      const b = lines[j];
      if (a.node === b.node) continue;
      const across = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const down = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
      // Line boxes are taller than letters: lines of one paragraph may touch, letters may not.
      if (across > 1 && down > Math.max(slack, 0.3 * Math.min(a.box.height, b.box.height))) faults.push(`texts overlap: ${name(a.holder)} and ${name(b.holder)}`);
    }
    if (a.box.left < -0.5 || a.box.right > width + 0.5) faults.push(`text sticks out of the window: ${name(a.holder)}`);
    const frame = a.holder.closest('.card, figure, td, th, .notices li, svg, .badge');
    if (frame) {
      const outer = frame.getBoundingClientRect();
      if (a.box.right > outer.right + 1 || a.box.left < outer.left - 1 || a.box.bottom > outer.bottom + 2 || a.box.top < outer.top - 2) faults.push(`text leaves its frame: ${name(a.holder)} in ${name(frame)}`);
    }
  }

  // A short word broken over two lines is a column too narrow.
  let words = 0;
  for (const { node, holder } of new Map(lines.map(l => [l.node, l])).values()) {
    if (getComputedStyle(holder).whiteSpace === 'pre' || holder.closest('.code, code, mark')) continue;
    for (const match of node.textContent.matchAll(/[\p{L}\p{N}.,]{2,12}/gu)) {
      const before = node.textContent[match.index - 1], after = node.textContent[match.index + match[0].length];
      if ([before, after].some(c => c && !/\s/.test(c)) || ++words > 6000) continue;
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      if (new Set([...range.getClientRects()].filter(b => b.width > 0.5).map(b => Math.round(b.top))).size > 1) faults.push(`short word broken: ${match[0]} in ${name(holder)}`);
    }
  }

  const parse = c => (c.match(/[\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const checked = new Set();
  for (const { holder } of lines) {
    if (checked.has(holder)) continue;
    checked.add(holder);
    const style = getComputedStyle(holder);
    const ink = parse(holder instanceof SVGElement ? style.fill : style.color), back = ground(holder);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faults.push(`contrast ${((a + 0.05) / (b + 0.05)).toFixed(2)}: ${name(holder)}`);
    const scale = holder instanceof SVGElement ? holder.getScreenCTM().a : 1;
    if (parseFloat(style.fontSize) * scale < 10) faults.push(`too small to read, ${(parseFloat(style.fontSize) * scale).toFixed(1)} px: ${name(holder)}`);
  }
  return [...new Set(faults)];
})()
