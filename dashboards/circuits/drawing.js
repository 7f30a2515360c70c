// Draws an attribution graph. All texts become text nodes; nothing is read as markup.
const SLOT = 17, GAP = 7, NARROWEST = 25, ROOMY = 90, HEADS = 84;
const LINES = [17, 19], BETWEENS = [1.5, 8], HIGHEST = 980, OF_WINDOW = 0.82; // least and most; as .scroller has them
const BOX = 148, BOX_HIGH = 38, APART = 18, RISE = 62, LISTED = 12, BASE = 150;
const WORDS = { feature: "feature", error: "error", embedding: "token", logit: "output" };

function make(parent, kind, name, text) {
  const element = document.createElement(kind);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function svg(parent, kind, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

// the outline of a kind's mark around (x, y): circle, diamond, square, triangle
function outline(kind, x, y, r) {
  if (kind === "error") return `M${x} ${y - r * 1.2}L${x + r * 1.2} ${y}L${x} ${y + r * 1.2}L${x - r * 1.2} ${y}Z`;
  if (kind === "embedding") return `M${x - r} ${y - r}H${x + r}V${y + r}H${x - r}Z`;
  if (kind === "logit") return `M${x} ${y - r * 1.2}L${x + r * 1.15} ${y + r * 0.85}H${x - r * 1.15}Z`;
  return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
}

function mark(parent, kind, x, y, size) {
  const r = 4 + 3.2 * size;
  svg(parent, "circle", { class: "ring", cx: x, cy: y, r: 9.4 });
  const path = svg(parent, "path", { class: "mark", d: outline(kind, x, y, r) });
  svg(parent, "path", { class: "ink", d: outline(kind, x, y, r * Math.max(size, 0.25)) });
  return path;
}

const colour = (weight, strength) =>
  `rgba(${weight > 0 ? "235,122,28" : "61,126,196"},${(0.15 + 0.75 * strength).toFixed(3)})`;
const number = (value) => {
  const size = Math.abs(value);
  const text = size >= 1000 || (size && size < 0.01) ? size.toExponential(1) : size.toPrecision(3);
  return `${value < 0 ? "−" : "+"}${text}`;
};
const percent = (share) => (share >= 0.0995 ? `${Math.round(100 * share)} %` : `${(100 * share).toFixed(1)} %`);

export default function drawn({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".circuit");
  const kept = { ...root.kept };
  root.replaceChildren();
  const { nodes, columns, rows, links } = data;
  const index = new Map(nodes.map((node, n) => [node.id, n]));
  const into = nodes.map(() => []), from = nodes.map(() => []);
  links.source.forEach((source, n) => {
    into[links.target[n]].push(n);
    from[source].push(n);
  });
  const strongest = (list) => list.sort((a, b) => Math.abs(links.weight[b]) - Math.abs(links.weight[a]));
  into.forEach(strongest);
  from.forEach(strongest);
  let selected = index.get(data.selected) ?? null;
  const pinned = new Set(data.pinned.map((id) => index.get(id)).filter((n) => n !== undefined));
  let reach = Infinity;
  const hidden = (n) => (nodes[n].reach ?? 0) > reach && !pinned.has(n);

  const legend = make(root, "div", "legend");
  const both = make(root, "div", "both");
  const left = make(both, "div", "left"), side = make(both, "div", "side");
  const scroller = make(left, "div", "scroller");
  const tip = make(root, "div", "tip");

  // ---- where things are
  const NAMES = Math.min(140, 16 + 6.3 * Math.max(7, ...rows.map((row) => row.name.length)));
  // columns take what room there is, up to a bound
  const needs = columns.map((column) => Math.max(NARROWEST, column.slots * SLOT) + GAP);
  const free = left.clientWidth - NAMES - GAP - 4 - needs.reduce((a, b) => a + b, 0);
  const more = Math.max(0, Math.min(free / columns.length, ROOMY - NARROWEST));
  const starts = [];
  let wide = NAMES + GAP;
  for (const need of needs) {
    starts.push(wide);
    wide += need + more;
  }
  const middle = (n) => starts[n] + (needs[n] + more) / 2;
  // rows are as far apart as fits all of them above the heads, within bounds
  const count = rows.reduce((sum, row) => sum + row.lines, 0);
  const room = Math.min(OF_WINDOW * innerHeight, HIGHEST) - HEADS - 3;
  const within = ([least, most], value) => Math.max(least, Math.min(most, value));
  const BETWEEN = within(BETWEENS, (room - count * LINES[1]) / (rows.length + 1));
  const LINE = within(LINES, (room - BETWEEN * (rows.length + 1)) / count);
  const tops = [];
  let high = BETWEEN;
  for (const row of rows) {
    tops.push(high);
    high += row.lines * LINE + BETWEEN;
  }
  const place = nodes.map((node) => ({
    x: middle(node.column) + (node.slot - (columns[node.column].slots - 1) / 2) * SLOT,
    y: tops[node.row] + (node.line + 0.5) * LINE,
  }));

  // ---- the picture
  const plane = make(scroller, "div", "plane");
  plane.style.width = `${wide}px`;
  plane.style.height = `${high + HEADS}px`;
  const sheet = svg(plane, "svg", { width: wide, height: high, role: "group" });
  sheet.setAttribute("aria-label", "Graph: arrow keys go from node to node, Enter selects, P pins, Escape lets go");
  const bands = svg(sheet, "g", {}), lines = svg(sheet, "g", {}), marks = svg(sheet, "g", {});
  const names = make(plane, "div", "names");
  names.style.height = `${high}px`;
  names.style.width = `${NAMES}px`;
  rows.forEach((row, n) => {
    if (n % 2) svg(bands, "rect", { class: "band", x: 0, width: wide, y: tops[n] - BETWEEN / 2, height: row.lines * LINE + BETWEEN });
    make(names, "div", "", row.name).style.top = `${tops[n] + (row.lines * LINE) / 2}px`;
  });
  const heads = make(plane, "div", "heads");
  make(heads, "span", "corner").style.width = `${NAMES}px`;
  columns.forEach((column, n) => {
    const head = make(heads, "div", "", column.text);
    head.style.left = `${middle(n)}px`;
    head.title = `${column.text}\nposition ${n}`;
  });

  const say = (at, text) => {
    tip.textContent = text;
    tip.style.display = "block";
    const box = tip.getBoundingClientRect();
    const below = at.bottom + 6 + box.height < innerHeight;
    tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - box.width - 8))}px`;
    tip.style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - box.height - 6)}px`;
  };
  const hush = () => { tip.style.display = "none"; };
  const line = (n, kind, width, opacity) => {
    const a = place[links.source[n]], b = place[links.target[n]];
    const bend = (a.y + b.y) / 2;
    const path = svg(lines, "path", { class: `link ${kind}`, d: `M${a.x} ${a.y}C${a.x} ${bend} ${b.x} ${bend} ${b.x} ${b.y}`, "stroke-width": width });
    if (opacity !== undefined) path.style.opacity = opacity;
  };
  const seen = (n) => !hidden(links.source[n]) && !hidden(links.target[n]);

  // the links of one node, or, of none, those among what is pinned, or the ones that carry most
  const paint = (over) => {
    const node = over ?? selected;
    lines.replaceChildren();
    const lit = new Map();
    if (node != null) {
      const own = [...into[node], ...from[node]].filter(seen);
      const most = Math.max(...own.map((n) => Math.abs(links.weight[n])), 1e-30);
      for (const n of own.reverse()) {
        const weight = links.weight[n], strength = Math.abs(weight) / most;
        const other = links.source[n] === node ? links.target[n] : links.source[n];
        line(n, weight > 0 ? "plus" : "minus", 0.7 + 4 * strength, 0.25 + 0.7 * strength);
        lit.set(other, colour(weight, strength));
      }
    } else {
      const all = links.source.map((_, n) => n).filter(seen);
      const among = all.filter((n) => pinned.has(links.source[n]) && pinned.has(links.target[n]));
      if (among.length) for (const n of among.slice(0, 400)) line(n, links.weight[n] > 0 ? "plus" : "minus", 1.6, 0.6);
      else for (const n of all.slice(0, BASE)) line(n, "base", 1.2);
    }
    shapes.forEach((shape, n) => {
      shape.group.style.display = hidden(n) ? "none" : "";
      shape.path.style.fill = n === node ? "currentColor" : lit.get(n) ?? "";
      shape.group.classList.toggle("faint", node != null && n !== node && !lit.has(n) && !pinned.has(n));
      shape.group.classList.toggle("selected", n === selected);
      shape.group.classList.toggle("pinned", pinned.has(n));
      shape.group.setAttribute("aria-pressed", pinned.has(n));
    });
  };

  const tell = () => setStateValue("chosen", { selected: selected == null ? null : nodes[selected].id, pinned: [...pinned].map((n) => nodes[n].id) });
  const select = (n) => {
    selected = n === selected ? null : n;
    if (selected != null) rove(selected);
    paint();
    detail();
    tell();
  };
  const pin = (n) => {
    if (!pinned.delete(n)) pinned.add(n);
    paint();
    detail();
    tell();
  };

  // ---- nodes, and the keyboard among them
  let roving = 0;
  const rove = (n) => {
    shapes[roving]?.group.setAttribute("tabindex", "-1");
    roving = n;
    shapes[n]?.group.setAttribute("tabindex", "0");
  };
  const go = (n, key) => {
    const here = place[n], { row, line: own } = nodes[n];
    const level = (each) => nodes[each].row * 1000 + nodes[each].line;
    const others = nodes.map((_, each) => each).filter((each) => each !== n && !hidden(each));
    let found;
    if (key === "ArrowLeft" || key === "ArrowRight") {
      const way = key === "ArrowLeft" ? -1 : 1;
      found = others.filter((each) => level(each) === row * 1000 + own && (place[each].x - here.x) * way > 0);
    } else {
      const way = key === "ArrowUp" ? -1 : 1;
      const ahead = others.filter((each) => (level(each) - level(n)) * way > 0);
      const next = Math.min(...ahead.map((each) => Math.abs(level(each) - level(n))));
      found = ahead.filter((each) => Math.abs(level(each) - level(n)) === next);
    }
    found.sort((a, b) => Math.abs(place[a].x - here.x) - Math.abs(place[b].x - here.x));
    if (!found.length) return;
    rove(found[0]);
    shapes[found[0]].group.focus();
    reveal(found[0]);
  };
  const reveal = (n) => {
    const { x, y } = place[n];
    if (x < scroller.scrollLeft + NAMES + 12) scroller.scrollLeft = x - NAMES - 40;
    if (x > scroller.scrollLeft + scroller.clientWidth - 12) scroller.scrollLeft = x - scroller.clientWidth + 40;
    if (y < scroller.scrollTop + 12) scroller.scrollTop = y - 40;
    if (y > scroller.scrollTop + scroller.clientHeight - HEADS - 12) scroller.scrollTop = y - scroller.clientHeight + HEADS + 40;
  };
  const shapes = nodes.map((node, n) => {
    const group = svg(marks, "g", { class: `node ${node.kind}`, tabindex: "-1", role: "button", "data-node": node.id });
    group.setAttribute("aria-label", `${node.name}, ${node.words}, ${node.facts}`);
    const path = mark(group, node.kind, place[n].x, place[n].y, node.size);
    const enter = () => { paint(n); say(group.getBoundingClientRect(), `${node.name}\n${node.words}\n${node.facts}`); };
    const leave = () => { paint(); hush(); };
    group.addEventListener("mouseenter", enter);
    group.addEventListener("mouseleave", leave);
    group.addEventListener("focus", enter);
    group.addEventListener("blur", leave);
    group.addEventListener("click", (event) => (event.shiftKey || event.ctrlKey || event.metaKey ? pin(n) : select(n)));
    group.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Enter" || event.key === " ") select(n);
      else if (event.key === "p" || event.key === "P") pin(n);
      else if (event.key === "Escape") { if (selected != null) select(selected); }
      else if (event.key.startsWith("Arrow")) go(n, event.key);
      else return;
      event.preventDefault();
    });
    return { group, path };
  });

  // ---- what is said beside it
  const entry = (parent, n, link) => {
    const row = make(parent, "button", "row");
    const text = make(row, "span", "", nodes[n].name);
    make(text, "small", "", `${rows[nodes[n].row].name} · ${columns[nodes[n].column].text}`);
    row.title = `${nodes[n].name}\n${nodes[n].words}`;
    if (link !== undefined) {
      const weight = make(row, "em", "", number(links.weight[link]));
      weight.style.background = colour(links.weight[link], 0.25);
      make(row, "em", "quiet", percent(links.share[link]));
    }
    row.addEventListener("mouseenter", () => paint(n));
    row.addEventListener("mouseleave", () => paint());
    row.addEventListener("click", () => { hush(); if (n !== selected) select(n); reveal(n); });
  };
  const list = (title, of, end) => {
    const found = of.filter(seen);
    make(side, "b", "head", found.length ? title : `${title}: none`);
    found.slice(0, LISTED).forEach((n) => entry(side, links[end][n], n));
    if (found.length > LISTED) make(side, "p", "", `and ${found.length - LISTED} weaker ones`);
  };
  const detail = () => {
    side.replaceChildren();
    if (selected == null) {
      make(side, "p", "", "Point at a node to see its links; click one to keep it. Shift-click, P or the button pins it.");
    } else {
      const node = nodes[selected];
      make(side, "h6", "", node.name);
      make(side, "p", "", node.words);
      make(side, "p", "", node.facts);
      const acts = make(side, "div", "acts");
      make(acts, "button", "pin", pinned.has(selected) ? "Unpin" : "Pin").addEventListener("click", () => pin(selected));
      if (node.url) {
        const link = make(acts, "a", "", "Feature page");
        link.href = node.url;
        link.target = "_blank";
      }
      list("Strongest inputs", into[selected], "source");
      list("Strongest outputs", from[selected], "target");
      make(side, "p", "", "Beside each: the link, and its share of all that its target gets.");
    }
    if (pinned.size) {
      make(side, "b", "head", `Pinned (${pinned.size})`);
      const pins = make(side, "div", "pins");
      for (const n of pinned) entry(pins, n);
    }
  };

  // ---- pinned nodes and supernodes, with summed links
  const boxes = ({ boxes: all, links: sums }) => {
    make(left, "div", "title", "What is pinned, and summed links");
    const sub = make(left, "div", "sub");
    const levels = Math.max(...all.map((box) => box.level)) + 1;
    const at = [];
    let across = 0;
    for (let level = 0; level < levels; level++) {
      const own = all.map((box, n) => [box, n]).filter(([box]) => box.level === level);
      own.sort((a, b) => a[0].column - b[0].column);
      own.forEach(([, n], place_) => { at[n] = { x: 10 + place_ * (BOX + APART), y: 10 + level * (BOX_HIGH + RISE) }; });
      across = Math.max(across, 10 + own.length * (BOX + APART));
    }
    sub.style.height = `${levels * (BOX_HIGH + RISE) - RISE + 38}px`;
    const sheet_ = svg(sub, "svg", { width: across, height: levels * (BOX_HIGH + RISE) });
    const most = Math.max(...sums.map((sum) => Math.abs(sum.weight)), 1e-30);
    for (const sum of sums) {
      const a = at[sum.source], b = at[sum.target], strength = Math.abs(sum.weight) / most;
      const [x1, y1, x2, y2] = [a.x + BOX / 2, a.y, b.x + BOX / 2, b.y + BOX_HIGH];
      const path = svg(sheet_, "path", { class: `link ${sum.weight > 0 ? "plus" : "minus"}`, d: `M${x1} ${y1}L${x2} ${y2}`, "stroke-width": 0.8 + 4 * strength });
      path.style.opacity = 0.3 + 0.6 * strength;
    }
    for (const sum of sums) {
      const a = at[sum.source], b = at[sum.target];
      const text = svg(sheet_, "text", { x: 0.4 * (a.x - b.x) + b.x + BOX / 2, y: 0.4 * (a.y - b.y - BOX_HIGH) + b.y + BOX_HIGH + 4, "text-anchor": "middle" });
      text.textContent = number(sum.weight);
    }
    all.forEach((box, n) => {
      const element = make(sub, "button", `box ${box.kind}`, box.members.length > 1 ? `${box.name} (${box.members.length})` : box.name);
      element.style.left = `${at[n].x}px`;
      element.style.top = `${at[n].y}px`;
      const enter = () => say(element.getBoundingClientRect(), box.words);
      element.addEventListener("mouseenter", enter);
      element.addEventListener("focus", enter);
      element.addEventListener("mouseleave", hush);
      element.addEventListener("blur", hush);
      element.addEventListener("click", () => { const first = index.get(box.members[0]); if (first !== selected) select(first); });
    });
  };

  for (const kind of Object.keys(WORDS)) {
    const item = make(legend, "span", "");
    const sign = svg(item, "svg", { viewBox: "0 0 15 15" });
    mark(svg(sign, "g", { class: "node" }), kind, 7.5, 7.5, 0.5);
    make(item, "span", "", WORDS[kind]);
  }
  for (const [word, weight] of [["raises", 1], ["lowers", -1]]) {
    const item = make(legend, "span", "");
    make(item, "i", "").style.background = colour(weight, 1);
    make(item, "span", "", word);
  }
  if (data.slider) {
    const item = make(legend, "label", "", "nodes that have");
    const input = make(item, "input", "");
    Object.assign(input, { type: "range", min: 5, max: 100, value: 100 });
    const shown = make(item, "span", "", "100 % of the influence");
    input.addEventListener("input", () => {
      reach = input.value >= 100 ? Infinity : input.value / 100;
      shown.textContent = `${input.value} % of the influence`;
      paint();
      detail();
    });
  }
  paint();
  detail();
  if (data.subgraph) boxes(data.subgraph);
  if (nodes.length) rove(selected ?? nodes.findIndex((node) => node.row === 0));
  scroller.scrollLeft = kept.end ?? true ? scroller.scrollWidth : kept.left;
  scroller.scrollTop = kept.top ?? 0;
  // columns take another room, if they have one now
  const width = root.clientWidth;
  root.watch?.disconnect();
  root.watch = new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - width) < 30) return;
    const own = { selected: selected == null ? null : nodes[selected].id, pinned: [...pinned].map((n) => nodes[n].id) };
    drawn({ data: { ...data, ...own }, parentElement, setStateValue });
  });
  root.watch.observe(root);
  const keep = (change) => { root.kept = { ...root.kept, ...change }; };
  scroller.addEventListener("scroll", () => keep({
    left: scroller.scrollLeft,
    top: scroller.scrollTop,
    end: scroller.scrollLeft + scroller.clientWidth > scroller.scrollWidth - 4,
  }));
  both.addEventListener("focusin", ({ target }) => keep({ focus: target.dataset.node ?? (target.className === "pin" ? "" : null) }));
  both.addEventListener("focusout", () => keep({ focus: null }));
  // drawn anew because of what was chosen here: the keyboard goes on where it was
  if (kept.focus === "") side.querySelector(".pin")?.focus();
  else if (kept.focus && index.has(kept.focus)) {
    rove(index.get(kept.focus));
    shapes[index.get(kept.focus)].group.focus({ preventScroll: true });
  }
}
