// The page's data: columns as float32, rows as whole numbers, texts as they are. Nothing here touches the page.
"use strict";

function decode(text, Kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
}

// A column as numbers: null where there is no value, NaN or an infinity where the value is one.
function column(packed) {
  const real = new Set(packed.nan);
  return Array.from(decode(packed.f32, Float32Array), (value, i) => (Number.isNaN(value) && !real.has(i) ? null : value));
}

function wholes(packed) {
  if (packed.u32) return decode(packed.u32, Uint32Array);
  return packed.u16 ? decode(packed.u16, Uint16Array) : decode(packed.u8 || "", Uint8Array);
}

const finite = (value) => value !== null && value !== undefined && Number.isFinite(value);

// What a number looks like: 4 digits that count; "–" where there is none.
function show(value, unit = "") {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "not a number" : value > 0 ? "infinite" : "-infinite";
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value) && size < 1e15) text = value.toLocaleString("en");
  else if (size >= 1e5 || size < 1e-3) text = value.toExponential(2);
  else text = size >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(4);
  return unit ? `${text} ${unit}` : text;
}

const percent = (value) => (finite(value) ? `${(100 * value).toFixed(value > 0 && value < 0.01 ? 2 : 1)} %` : "–");

// Everything of a run, by index into `updates`; x of a figure begins with 0 where held-out rows were looked at before the first update.
function readRun(data) {
  const columns = Object.fromEntries(Object.entries(data.columns).map(([name, packed]) => [name, column(packed)]));
  const ranks = Object.fromEntries(Object.entries(data.by_rank).map(([name, list]) => [name, list.map(column)]));
  const updates = data.update;
  const at = new Map(updates.map((update, i) => [update, i]));
  const fromZero = data.evaluations.some((one) => one.update === 0) && updates[0] !== 0;
  const x = fromZero ? [0, ...updates] : updates.slice();
  const run = { data, columns, ranks, updates, at, x, fromZero, marks: marksOf(data) };
  run.sum = (name) => updates.map((_, i) => ranks[name].reduce((sum, one) => sum + (one[i] ?? 0), 0));
  run.real = run.sum("real");
  run.slots = run.sum("slots");
  run.padded = (values) => (fromZero ? [null, ...values] : values);
  run.epochs = updates.map((update, i) => [update, columns.epoch[i]]).filter(([, epoch], i) => i > 0 && epoch !== columns.epoch[i - 1]);
  run.rows = data.rows ? readRows(data.rows) : null;
  run.heldout = new Map(data.evaluations.map((one) => [one.update, asNumber(one.loss_nats)]));
  if (data.plan) run.plan = Object.fromEntries(["lr", "rows", "supervised", "real"].map((name) => [name, column(data.plan[name])]));
  if (data.probes) {
    run.probes = { ...data.probes, ratio: column(data.probes.ratio), unmoved: column(data.probes.unmoved) };
    run.probeAt = new Map(data.probes.update.map((update, i) => [update, i]));
  }
  return run;
}

const asNumber = (value) => (value === null || value === undefined ? null : typeof value === "string" ? Number(value.replace("inf", "Infinity")) : value);

// Updates that deserve a mark, with its kind: the strongest of what happened there.
function marksOf(data) {
  const marks = new Map();
  for (const event of data.events) {
    if (["alarm", "clipped", "loss_scale", "out_of_memory", "warning", "resumed", "slow"].includes(event.kind)) marks.set(event.update, event.kind);
  }
  for (const update of Object.keys(data.alarms)) marks.set(Number(update), "alarm");
  for (const update of Object.keys(data.skipped)) marks.set(Number(update), "skipped");
  for (const event of data.events) if (event.kind === "failed") marks.set(event.update, "failed");
  return marks;
}

function readRows(rows) {
  const found = { ids: rows.ids, worst: rows.worst, loss: column(rows.loss_sum), byUpdate: new Map() };
  for (const name of ["id", "update", "rank", "micro_batch", "supervised", "real"]) found[name] = wholes(rows[name]);
  found.update.forEach((update, i) => {
    if (!found.byUpdate.has(update)) found.byUpdate.set(update, []);
    found.byUpdate.get(update).push(i);
  });
  return found;
}

// The element that `parts` describe: make("td", {class: "n"}, "text", child). Text is always text, never markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// A table. heads: names, those with a leading # are numbers. lines: {cells, pick, now}.
function table(heads, lines, caption) {
  const numeric = heads.map((head) => head.startsWith("#"));
  const body = lines.map((line) => {
    const cells = line.cells.map((cell, i) => make("td", { class: numeric[i] ? "n" : "wrap" }, cell instanceof Node ? cell : String(cell)));
    const row = make("tr", { class: [line.pick && "pick", line.now && "now"].filter(Boolean).join(" ") || null }, cells);
    if (line.pick) {
      row.tabIndex = 0;
      row.addEventListener("click", (event) => event.target.closest("button, summary, details") || line.pick());
      row.addEventListener("keydown", (event) => event.key === "Enter" && event.target === row && line.pick());
    }
    if (line.update !== undefined) row.dataset.update = line.update;
    return row;
  });
  const head = make("tr", {}, heads.map((name, i) => make("th", { class: numeric[i] ? "n" : null, scope: "col" }, name.replace(/^#/, ""))));
  return make("table", {}, caption ? make("caption", {}, caption) : null, make("thead", {}, head), make("tbody", {}, body));
}

// A command to type, with a button that copies it.
function command(text) {
  const button = make("button", { type: "button" }, "copy");
  button.addEventListener("click", () => {
    const done = () => { button.textContent = "copied"; };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => selectText(button.previousSibling));
    else selectText(button.previousSibling);
  });
  return make("span", { class: "command" }, make("code", {}, text), button);
}

function selectText(node) {
  const range = document.createRange();
  range.selectNodeContents(node);
  const selection = getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
}
