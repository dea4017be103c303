"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const NAME = 0, LABEL = 1, SPLIT = 2;
const words = (i) => D.items[i][LABEL] || (D.items[i][SPLIT] === "unlabelled" ? "unlabelled" : "");
const labelled = D.asked.some((i) => D.items[i][LABEL]);

function picture(i) {
  const image = make("img"), one = D.pictures[i];
  image.src = one.u; image.width = one.w; image.height = one.h; image.alt = ""; image.loading = "lazy"; image.decoding = "async";
  if (Math.max(one.w, one.h) <= 48) image.className = "crisp";
  return image;
}

/* ---- the map: one canvas, redrawn on resize, theme change, colouring and hiding ---- */
const canvas = $("map"), tip = $("tip"), pen = canvas.getContext("2d");
let colouring = D.colours[0], only = null, spots = [];
const style = () => getComputedStyle(document.documentElement);
const SHAPES = ["circle", "square", "triangle", "diamond"];
const colourOf = (css, code) => css.getPropertyValue(code < 0 ? "--unknown" : "--k" + (code % 10));
const shapeOf = (code) => (code < 0 ? "circle" : SHAPES[Math.floor(code / 10) % 4]);

function trace(shape, x, y, r) {
  pen.beginPath();
  if (shape === "circle") pen.arc(x, y, r, 0, 7);
  else if (shape === "square") pen.rect(x - r * .9, y - r * .9, r * 1.8, r * 1.8);
  else if (shape === "triangle") { pen.moveTo(x, y - r * 1.2); pen.lineTo(x + r * 1.1, y + r * .8); pen.lineTo(x - r * 1.1, y + r * .8); pen.closePath(); }
  else { pen.moveTo(x, y - r * 1.3); pen.lineTo(x + r * 1.3, y); pen.lineTo(x, y + r * 1.3); pen.lineTo(x - r * 1.3, y); pen.closePath(); }
}

function drawMap() {
  const css = style(), ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const { x, y, i } = D.points, pad = 22, foot = 30;
  const range = (v) => { let a = Infinity, b = -Infinity; for (const one of v) { if (one < a) a = one; if (one > b) b = one; } return b > a ? [a, b] : [a - 1, a + 1]; };
  const [x0, x1] = range(x), [y0, y1] = range(y);
  const r = i.length > 2000 ? 2.4 : i.length > 400 ? 3.2 : 4.4;
  spots = i.map((id, n) => ({
    id, code: colouring.codes[n],
    x: pad + (x[n] - x0) / (x1 - x0) * (width - 2 * pad),
    y: height - foot - (y[n] - y0) / (y1 - y0) * (height - pad - foot),
  }));
  const visible = (s) => only === null || s.code === only;
  pen.lineWidth = .8; pen.strokeStyle = css.getPropertyValue("--wash");
  const order = spots.slice().sort((a, b) => visible(a) - visible(b) || (a.code < 0 ? 0 : 1) - (b.code < 0 ? 0 : 1));
  for (const s of order) {
    pen.globalAlpha = visible(s) ? (i.length > 400 ? .8 : .92) : .1;
    pen.fillStyle = colourOf(css, s.code);
    trace(shapeOf(s.code), s.x, s.y, r); pen.fill(); pen.stroke();
  }
  pen.globalAlpha = 1; pen.fillStyle = css.getPropertyValue("--soft"); pen.font = "12px " + css.getPropertyValue("--sans");
  pen.fillText("first axis (" + D.explained[0] + " %) →", 10, height - 10);
  pen.save(); pen.translate(14, height - 24); pen.rotate(-Math.PI / 2); pen.fillText("second axis (" + D.explained[1] + " %) →", 0, 0); pen.restore();
}

function spotAt(event) {
  const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
  let best = null, distance = 18 ** 2;
  for (const s of spots) {
    const d = (s.x - px) ** 2 + (s.y - py) ** 2;
    if (d < distance && (only === null || s.code === only)) { best = s; distance = d; }
  }
  return best;
}

function point(event) {
  const s = spotAt(event);
  tip.hidden = !s;
  canvas.style.cursor = s && D.near[s.id] ? "pointer" : "";
  if (!s) return;
  tip.replaceChildren();
  if (D.pictures[s.id]) tip.append(picture(s.id));
  const text = make("div");
  text.append(make("b", "", words(s.id) || D.items[s.id][SPLIT]), make("br"), D.items[s.id][NAME]);
  tip.append(text);
  const box = canvas.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(s.x + 14, box.width - tip.offsetWidth - 4)) + "px";
  tip.style.top = (s.y + 14 + tip.offsetHeight > box.height ? s.y - tip.offsetHeight - 12 : s.y + 14) + "px";
}

function legend() {
  const css = style(), list = $("legend"), present = new Set(colouring.codes);
  list.replaceChildren();
  const entries = colouring.names.map((name, code) => [name, code]).filter(([, code]) => present.has(code));
  if (present.has(-1)) entries.push(["unknown", -1]);
  for (const [name, code] of entries) {
    const item = make("li"), button = make("button"), ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg"), mark = document.createElementNS(ns, "path");
    svg.setAttribute("width", 11); svg.setAttribute("height", 11); svg.setAttribute("viewBox", "0 0 12 12"); svg.setAttribute("aria-hidden", "true");
    mark.setAttribute("d", { circle: "M1 6a5 5 0 1 0 10 0a5 5 0 1 0-10 0", square: "M1.5 1.5h9v9h-9z", triangle: "M6 .5l5.6 10H.4z", diamond: "M6 0l6 6-6 6-6-6z" }[shapeOf(code)]);
    mark.style.fill = code < 0 ? "var(--unknown)" : "var(--k" + (code % 10) + ")";
    svg.append(mark);
    button.type = "button"; button.setAttribute("aria-pressed", only === null || only === code);
    button.append(svg, name);
    button.onclick = () => { only = only === code ? null : code; legend(); drawMap(); };
    item.append(button); list.append(item);
  }
}

D.colours.forEach((one, n) => $("colour").append(new Option(one.name, n)));
$("colour").onchange = (event) => { colouring = D.colours[event.target.value]; only = null; legend(); drawMap(); };
$("colour").closest(".bar").hidden = D.colours.length < 2;
canvas.onpointermove = point;
canvas.onpointerdown = point;
canvas.onpointerleave = (event) => { if (event.pointerType === "mouse") tip.hidden = true; };
canvas.onclick = (event) => { const s = spotAt(event); if (s && D.near[s.id] && event.pointerType !== "touch") reveal(s.id); };
new ResizeObserver(drawMap).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
const some = D.points.i.length < D.total ? D.points.i.length.toLocaleString("en") + " of " + D.total.toLocaleString("en") : "all " + D.total.toLocaleString("en");
$("map-note").textContent = "The first two principal axes of the features of " + some + " images. Point at one to see its name" + (D.colours.length ? "; click a word below to see only that group." : ".");
canvas.setAttribute("aria-label", "Scatter of " + some + " images on the first two principal axes of their features");
legend();

/* ---- the pictures: a dense grid in which the panel of neighbours takes a row of its own ---- */
const grid = $("grid"), panel = make("section", "panel"), PAGE = 120;
let shown = [], limit = PAGE, open = null;
const buttons = new Map();

function thumb(i) {
  const button = make("button", "thumb");
  button.type = "button"; button.title = D.items[i][NAME] + (words(i) ? ", " + words(i) : "");
  button.setAttribute("aria-expanded", "false"); button.setAttribute("aria-label", "neighbours of " + button.title);
  button.append(picture(i), make("span", "", words(i) || D.items[i][NAME]));
  button.onclick = () => (open === i ? close() : show(i));
  buttons.set(i, button);
  return button;
}

function close() {
  panel.remove();
  if (open !== null) buttons.get(open)?.setAttribute("aria-expanded", "false");
  open = null;
}

function show(i) {
  close();
  open = i;
  const button = buttons.get(i), item = D.items[i];
  button.setAttribute("aria-expanded", "true");
  const asked = make("div", "asked"), text = make("div");
  text.append(make("h3", "", item[NAME]), make("p", "", [words(i), item[SPLIT]].filter((w, n, all) => w && all.indexOf(w) === n).join(", ")));
  asked.append(picture(i), text);
  const near = make("div", "near");
  for (const [j, similarity] of D.near[i]) {
    const one = make("button", "thumb"), line = make("span"), same = words(j) === words(i);
    one.type = "button"; one.disabled = !D.near[j]; one.title = D.items[j][NAME] + (words(j) ? ", " + words(j) : "") + ", " + D.items[j][SPLIT];
    one.onclick = () => reveal(j);
    line.append(make("b", "", similarity.toFixed(3)));
    if (words(j)) line.append(" ", make("span", item[LABEL] && D.items[j][LABEL] ? (same ? "same" : "other") : "", words(j)));
    else line.append(make("span", "", D.items[j][NAME]));
    one.append(picture(j), line);
    near.append(one);
  }
  if (!D.near[i].length) near.append(make("p", "empty", "there is no other image"));
  panel.replaceChildren(asked, near);
  panel.setAttribute("aria-label", "nearest neighbours of " + item[NAME]);
  button.after(panel);
}

function reveal(i) {
  if (!shown.includes(i)) { $("filter").value = ""; $("search").value = ""; fill(); }
  const place = shown.indexOf(i);
  if (place >= limit) { limit = Math.ceil((place + 1) / PAGE) * PAGE; fill(false); }
  show(i);
  buttons.get(i).scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

function fill(choose = true) {
  if (choose) {
    const [kind, value] = ($("filter").value || " ").split(/:(.*)/s), text = $("search").value.trim().toLowerCase();
    const wanted = (i) => kind === "label" ? D.items[i][LABEL].split("|").includes(value) : kind === "split" ? D.items[i][SPLIT] === value : true;
    shown = D.asked.filter((i) => wanted(i) && (!text || (D.items[i][NAME] + " " + D.items[i][LABEL]).toLowerCase().includes(text)));
    limit = PAGE;
  }
  close(); buttons.clear();
  grid.replaceChildren(...shown.slice(0, limit).map(thumb));
  if (!shown.length) grid.append(make("p", "empty", "no picture fits"));
  $("count").textContent = shown.length < D.asked.length ? shown.length + " of " + D.asked.length : "";
  $("more").hidden = shown.length <= limit;
  $("more").textContent = "show " + Math.min(PAGE, shown.length - limit) + " more";
}

const labels = [...new Set(D.asked.flatMap((i) => (D.items[i][LABEL] ? D.items[i][LABEL].split("|") : [])))].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
const splits = [...new Set(D.asked.map((i) => D.items[i][SPLIT]))];
$("filter").append(new Option("everything", ""));
for (const name of labels) $("filter").append(new Option(name, "label:" + name));
if (splits.length > 1) for (const name of splits) $("filter").append(new Option(name + " images", "split:" + name));
$("filter").onchange = $("search").oninput = () => fill();
$("more").onclick = () => { limit += PAGE; fill(false); };
addEventListener("keydown", (event) => { if (event.key === "Escape" && open !== null) { const last = open; close(); buttons.get(last)?.focus(); } });
$("grid-note").textContent = (D.asked.length < D.total ? D.asked.length + " of " + D.total.toLocaleString("en") + " images, spread over " + (labelled ? "all labels" : "all splits") + ". " : "") + "Click a picture for the images most like it, found among all " + D.total.toLocaleString("en") + ".";
fill();

/* ---- near duplicates ---- */
$("twin-note").textContent = D.twinNote;
for (const [i, j, similarity, across] of D.twins) {
  const row = make("div", "twin"), text = make("div");
  text.append(make("b", "", similarity.toFixed(4)), " ");
  if (across) text.append(make("em", "", D.items[i][SPLIT] + " and " + D.items[j][SPLIT]));
  if (D.items[i][LABEL] && D.items[j][LABEL] && D.items[i][LABEL] !== D.items[j][LABEL]) text.append(across ? ", " : "", make("em", "", "labels differ: " + D.items[i][LABEL] + ", " + D.items[j][LABEL]));
  text.append(make("br"), D.items[i][NAME], make("br"), D.items[j][NAME]);
  row.append(picture(i), picture(j), text);
  $("twins").append(row);
}
