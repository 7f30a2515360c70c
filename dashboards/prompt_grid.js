// Draws tokens by features. All texts become text nodes; nothing is read as markup.
const NARROWEST = 21, WIDEST = 40;
const shade = (s) => (s > 0 ? `rgba(235,122,28,${0.1 + 0.62 * Math.min(s, 1)})` : "");

function make(parent, kind, name, text) {
  const element = document.createElement(kind);
  element.className = name;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".grid");
  root.replaceChildren();
  const { tokens, features, cells } = data;
  const locked = { token: data.locked.token ?? null, feature: data.locked.feature ?? null };
  const names_width = Math.min(Math.max(root.clientWidth * 0.3, 110), 270);
  const room = Math.floor((root.clientWidth - names_width - 4) / tokens.length);
  const WIDTH = Math.max(NARROWEST, Math.min(WIDEST, room));
  const strip = make(root, "div", "strip");
  const table = make(root, "div", "table");
  const names = make(table, "div", "names");
  const right = make(table, "div", "cells");
  const heads = make(right, "div", "heads");
  const tip = make(root, "div", "tip");
  heads.style.width = `${tokens.length * WIDTH}px`;

  const say = (event, text) => {
    tip.textContent = text;
    tip.style.display = "block";
    const at = event.currentTarget.getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const below = at.bottom + 6 + box.height < innerHeight;
    tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - box.width - 8))}px`;
    tip.style.top = `${below ? at.bottom + 6 : at.top - box.height - 6}px`;
  };
  const hush = () => { tip.style.display = "none"; };

  // `over` is what the pointer is on; without it, what is locked counts
  const paint = (over) => {
    const feature = over ? over.feature : locked.feature;
    const token = over ? over.token : locked.token;
    const lit = new Map();
    for (const cell of cells) {
      const mine = feature == null || cell.feature === feature;
      if (mine) lit.set(cell.position, Math.max(lit.get(cell.position) ?? 0, cell.strength));
    }
    strips.forEach((each, n) => { each.style.background = shade(lit.get(tokens[n].position) ?? 0); });
    const fires = new Set(cells.filter((c) => c.position === token).map((c) => c.feature));
    const faint = features.map((f) => (token != null && !fires.has(f.feature)) || (token == null && feature != null && f.feature !== feature));
    rows.forEach((each, n) => each.classList.toggle("faint", faint[n]));
    labels.forEach((each, n) => each.classList.toggle("faint", faint[n]));
  };
  const lock = (change) => {
    for (const [kind, value] of Object.entries(change)) locked[kind] = locked[kind] === value ? null : value;
    setStateValue("locked", { ...locked });
    mark();
    paint(null);
  };
  const mark = () => {
    [strips, columns].forEach((list) => list.forEach((each, n) => each.classList.toggle("locked", tokens[n].position === locked.token)));
    [rows, labels].forEach((list) => list.forEach((each, n) => each.classList.toggle("locked", features[n].feature === locked.feature)));
  };
  const act = (element, over, change, text) => {
    element.tabIndex = 0;
    element.setAttribute("role", "button");
    element.onmouseenter = element.onfocus = (event) => { paint(over); say(event, text); };
    element.onmouseleave = element.onblur = () => { paint(null); hush(); };
    element.onclick = () => lock(change);
    element.onkeydown = (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); lock(change); }
    };
  };

  const strips = tokens.map((token) => {
    const element = make(strip, "span", token.read ? "token" : "token unread", token.text);
    act(element, { token: token.position, feature: null }, { token: token.position }, `${token.text}\n${token.tip}`);
    if (token.text.includes("↵")) strip.append("\n");
    return element;
  });
  const columns = tokens.map((token, n) => {
    const element = make(heads, "div", token.read ? "column" : "column unread", token.text.trim() || token.text);
    element.style.left = `${n * WIDTH + (WIDTH - NARROWEST) / 2}px`;
    act(element, { token: token.position, feature: null }, { token: token.position }, `${token.text}\n${token.tip}`);
    element.tabIndex = -1;
    return element;
  });
  const labels = features.map((each) => {
    const element = make(names, "div", "name");
    make(element, "b", "", String(each.feature));
    make(element, "span", "", each.name);
    act(element, { token: null, feature: each.feature }, { feature: each.feature }, `feature ${each.feature}\n${each.name}`);
    return element;
  });
  const rows = features.map((each) => {
    const element = make(right, "div", "row");
    element.style.width = `${tokens.length * WIDTH}px`;
    element.onclick = () => lock({ feature: each.feature });
    return element;
  });
  for (const cell of cells) {
    const element = make(rows[cell.row], "div", "cell");
    element.style.left = `${cell.column * WIDTH + 1}px`;
    element.style.width = `${WIDTH - 2}px`;
    element.style.background = shade(cell.strength);
    const { text } = tokens[cell.column];
    element.onmouseenter = (event) => {
      paint({ token: null, feature: cell.feature });
      say(event, `${text}\nfeature ${cell.feature} ${features[cell.row].name}\n${cell.tip}`);
    };
    element.onmouseleave = () => { paint(null); hush(); };
  }
  mark();
  paint(null);
}
