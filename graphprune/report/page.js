"use strict";
// Search, and a panel that tells of one axis. All text goes in as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const panel = document.getElementById("panel");
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes, ...children) {
  const drawn = ["svg", "rect", "line", "text"].includes(tag);
  const node = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const rounded = (value) => Number(value.toPrecision(4)).toString();

function histogram([low, high, kept, removed, cut, unseen]) {
  const wide = 400, tall = 96, step = wide / kept.length;
  const most = Math.max(...kept.map((n, k) => n + removed[k]), 1);
  const drawn = make("svg", { viewBox: `0 0 ${wide} ${tall + 20}`, role: "img", "aria-label": "scores" });
  kept.forEach((n, k) => {
    const stays = (n / most) * tall, goes = (removed[k] / most) * tall;
    const box = { x: k * step + 1, width: step - 2 };
    if (n) drawn.append(make("rect", { ...box, y: tall - stays, height: stays, class: "kept" }));
    if (removed[k]) drawn.append(make("rect", { ...box, y: tall - stays - goes, height: goes, class: "gone" }));
  });
  if (cut !== null) {
    const x = high > low ? ((cut - low) / (high - low)) * wide : 0;
    drawn.append(make("line", { class: "cut", x1: x, x2: x, y1: 0, y2: tall }));
  }
  drawn.append(make("text", { x: 0, y: tall + 14 }, rounded(low)));
  drawn.append(make("text", { x: wide, y: tall + 14, "text-anchor": "end" }, rounded(high)));
  const more = unseen ? [make("p", { class: "n" }, `${unseen} scores are infinite`)] : [];
  return [drawn, ...more];
}

function chain(through) {
  // One entry per line of code, however many calls it makes.
  const lines = [];
  for (const position of through) {
    const [op, module, source, code] = data.ops[position];
    const last = lines[lines.length - 1];
    const call = module ? `${op} in ${module}` : op;
    if (last && last.source === source && last.code === code) last.calls.push(call);
    else lines.push({ source, code, calls: [call] });
  }
  const list = make("ul");
  for (const { source, code, calls } of lines) {
    const said = calls.join(", ") + (source ? ` (${source})` : "");
    list.append(make("li", null, code ? make("code", null, code) : "", said));
  }
  return list;
}

function members(slots, count) {
  const list = make("ol");
  const alike = new Map(); // members that the same calls tie to the same one, together
  slots.forEach(([name, dim, to, through]) => {
    const key = `${to} ${through}`;
    if (to === null || !alike.has(key)) alike.set(to === null ? `${name} ${dim}` : key, { to, through, names: [] });
    alike.get(to === null ? `${name} ${dim}` : key).names.push(`${name}[${dim}]`);
  });
  for (const { to, through, names } of alike.values()) {
    const item = make("li", null, ...names.map((name) => make("code", { class: "member" }, name)));
    if (to !== null) item.append(make("span", { class: "n" }, `with ${slots[to][0]}[${slots[to][1]}] through`), chain(through));
    list.append(item);
  }
  if (count > slots.length) list.append(make("li", { class: "n" }, `and ${count - slots.length} more`));
  return list;
}

function counted(number, one) {
  return `${number} ${one}${number === 1 ? "" : "s"}`;
}

function told(axis) {
  if (axis >= data.groups.length) {
    const [name, size, count, reason, where] = data.pinned[axis - data.groups.length];
    const at = where ? [make("p", { class: "n" }, `at ${where}`)] : [];
    return [make("h2", null, name), make("p", null, `${size} channels in ${counted(count, "place")} stay: ${reason}`), ...at];
  }
  const [name, before, after, count, exactness, cause, criterion, whole, scores, slots] = data.groups[axis];
  const by = criterion || data.importance;
  const parts = [
    make("h2", null, name),
    make("p", null, `${before} → ${after} channels, ${exactness}${cause ? ` because of ${cause}` : ""}`),
  ];
  if (whole) parts.push(make("p", null, `What is left stays as it is: ${whole}`));
  if (scores) {
    parts.push(make("h3", null, `Scores${by ? ` by ${by}` : ""}`), ...histogram(scores));
    parts.push(make("p", { class: "n" }, make("i", { class: "key kept" }), `${after} kept`, make("i", { class: "key gone" }), `${before - after} removed`, scores[4] === null ? "" : `, cut at ${rounded(scores[4])}`));
  }
  parts.push(make("h3", null, `${counted(count, "member")}, and what ties them`), members(slots, count));
  return parts;
}

function pick(axis) {
  document.querySelectorAll(".picked").forEach((node) => node.classList.remove("picked"));
  if (axis === null || axis >= data.groups.length + data.pinned.length) {
    panel.hidden = true;
    return;
  }
  document.querySelectorAll(`li[data-a="${axis}"], .x[data-a="${axis}"]`).forEach((node) => node.classList.add("picked"));
  const close = make("button", { class: "close", "aria-label": "close" }, "×");
  close.onclick = () => pick(null);
  panel.replaceChildren(close, ...told(axis));
  panel.scrollTop = 0;
  panel.hidden = false;
}

function filter(input) {
  const section = document.getElementById(input.dataset.for);
  const wanted = input.value.toLowerCase();
  const rows = section.querySelectorAll(".rows li:not(.head), .lanes .r");
  let shown = 0;
  for (const row of rows) {
    const fits = row.querySelector("title, code").textContent.toLowerCase().includes(wanted);
    if (row.tagName === "LI") row.hidden = !fits;
    else row.style.opacity = fits ? "" : "0.2";
    shown += fits;
  }
  input.parentNode.querySelector(".count").textContent = wanted ? `${shown} of ${rows.length}` : `${rows.length} ${input.placeholder.split(" ")[1]}`;
  const first = wanted && [...section.querySelectorAll(".lanes .r")].find((row) => row.style.opacity === "");
  if (first) first.closest(".scroll").scrollTop = first.transform.baseVal.consolidate().matrix.f - 40;
}

document.addEventListener("click", (event) => {
  const node = event.target.closest("[data-a]");
  if (node) pick(Number(node.dataset.a));
  else if (!event.target.closest("#panel")) pick(null);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") pick(null);
});
for (const input of document.querySelectorAll("input[data-for]")) {
  input.addEventListener("input", () => filter(input));
  filter(input);
}
const named = decodeURIComponent(location.hash).match(/^#group=(.*)$/);
if (named) {
  const found = data.groups.findIndex((group) => group[0] === named[1]);
  if (found >= 0) pick(found);
}
