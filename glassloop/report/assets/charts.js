// A figure: title, sentence, legend with values, curves by uPlot. All figures share one cursor, one zoom and one selected update.
"use strict";

const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3], [12, 4], [4, 2, 1, 2], [1, 4], [8, 2, 2, 2, 2, 2]];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (i) => css(`--c${i % 8}`);

// Where all figures stand: x values, index of an update in them, marks, epoch boundaries, and what happens on a click.
const board = { x: [], index: new Map(), marks: new Map(), epochs: [], chosen: null, figures: [], onPick: () => {}, zoom: null, onZoom: () => {} };

function onBoard({ x, marks, epochs, onPick, onZoom }) {
  Object.assign(board, { x, marks, epochs, onPick, onZoom, index: new Map(x.map((value, i) => [value, i])) });
}

// spec: {id, title, how, unit, wide, height, log, series, lines, none}; series: {name, values, colour, dash, dots, fill, bars, hidden, format}.
// lines: [{value, name}] are level lines. values go along board.x, null where there is none.
function figure(spec, parent) {
  const heading = make("h2", { id: `${spec.id}-h` }, spec.title, spec.unit ? make("span", { class: "quiet" }, ` · ${spec.unit}`) : null);
  const panel = make("section", { id: spec.id, class: `panel ${spec.wide ? "wide" : ""}`, "aria-labelledby": `${spec.id}-h` }, heading);
  if (spec.how) panel.append(make("p", { class: "how" }, spec.how));
  parent.append(panel);
  const drawn = spec.series.filter((one) => one.values.some((value) => value !== null));
  if (!drawn.length) {
    panel.append(make("p", { class: "none" }, spec.none || "No value of this is on record."));
    return null;
  }
  const plot = make("div", { class: "plot", tabindex: "0", role: "img" });
  const one = { spec, panel, plot, drawn, log: wantsLog(spec, drawn), shown: drawn.map((s) => !s.hidden), values: [] };
  panel.append(legendOf(one), plot);
  build(one);
  board.figures.push(one);
  return one;
}

// A log axis where the figure asks for one, all values are above 0 and they span more than a factor of 8.
function wantsLog(spec, drawn) {
  if (!spec.log) return false;
  let low = Infinity, high = 0;
  for (const { values } of drawn) for (const value of values) if (finite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  return low > 0 && high / low > 8;
}

function legendOf(one) {
  const list = make("ul", { class: "legend" });
  one.drawn.forEach((series, i) => {
    const swatch = make("canvas", { width: 52, height: 20, "aria-hidden": "true" });
    const value = make("span", { class: "value" }, "–");
    const button = make("button", { type: "button", "aria-pressed": String(one.shown[i]), title: "show or hide" }, swatch, series.name, value);
    button.addEventListener("click", () => {
      one.shown[i] = !one.shown[i];
      button.setAttribute("aria-pressed", String(one.shown[i]));
      one.u.setSeries(i + 1, { show: one.shown[i] });
    });
    one.values.push({ swatch, value });
    list.append(make("li", {}, button));
  });
  return list;
}

function drawSwatch(canvas, series) {
  const g = canvas.getContext("2d");
  g.clearRect(0, 0, 52, 20);
  g.strokeStyle = g.fillStyle = css(series.colour);
  g.lineWidth = 4;
  if (series.dots) { g.beginPath(); g.arc(26, 10, 7, 0, 7); g.fill(); }
  if (series.dots && !series.joined) return;
  if (series.fill) { g.fillRect(4, 2, 44, 16); return; }
  g.setLineDash((series.dash || []).map((n) => 2 * n));
  g.beginPath(); g.moveTo(0, 10); g.lineTo(52, 10); g.stroke();
}

function build(one) {
  const { spec, plot, drawn } = one;
  one.u?.destroy();
  const width = Math.max(260, Math.floor(plot.clientWidth || plot.parentNode.clientWidth - 30));
  const axis = { stroke: css("--quiet"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
  const bars = uPlot.paths.bars({ size: [0.92, 60] });
  const options = {
    width, height: spec.height || 220,
    padding: [16, 26, 0, 0],
    legend: { show: false },
    cursor: {
      sync: { key: "run", scales: ["x", null] }, drag: { x: true, y: false, setScale: false, dist: 6 }, points: { size: 6 },
      dataIdx: (u, i, near) => near,
    },
    scales: { x: { time: false, range: (u, low, high) => board.zoom || widened(low, high) }, y: { distr: one.log ? 3 : 1, range: one.log ? logRange : spec.fromZero ? zeroRange : undefined } },
    axes: [
      { ...axis, label: "update", labelSize: 20, labelFont: axis.font, size: 32, gap: 3, values: (u, ticks) => ticks.map((t) => (Number.isInteger(t) ? t.toLocaleString("en") : "")) },
      { ...axis, size: roomFor, values: (u, ticks) => ticks.map((t) => (t === null ? "" : spec.percent ? `${+(100 * t).toPrecision(3)} %` : tick(t))) },
    ],
    series: [{}, ...drawn.map((s, i) => ({
      label: s.name, show: one.shown[i], stroke: css(s.colour), width: s.width || 1.6, dash: s.dash,
      fill: s.fill ? css(s.colour) : undefined, spanGaps: Boolean(s.joined),
      paths: s.bars ? bars : s.dots && !s.joined ? () => null : undefined,
      points: { show: s.dots ? true : undefined, size: s.dots ? 8 : 5, fill: s.dots ? css(s.colour) : undefined },
    }))],
    hooks: {
      drawAxes: [drawEpochs],
      draw: [(u) => drawLines(u, spec), (u) => drawBroken(u, drawn), drawMarks, drawChosen],
      setCursor: [(u) => showValues(one, u.cursor.idx)],
      setSelect: [(u) => zoomTo(u)],
    },
  };
  one.u = new uPlot(options, [board.x, ...drawn.map((s) => s.values.map((v) => (finite(v) ? v : null)))], plot);
  one.u.over.addEventListener("click", () => one.u.cursor.idx !== null && one.u.cursor.idx !== undefined && board.onPick(board.x[one.u.cursor.idx]));
  one.u.over.addEventListener("dblclick", () => zoom(null));
  drawn.forEach((s, i) => drawSwatch(one.values[i].swatch, s));
  showValues(one, null);
}

// Pixels for the longest label of an axis, its tick and gap.
const roomFor = (u, labels) => Math.max(50, ...(labels || []).map((label) => 20 + 7.2 * label.length));
const widened = (low, high) => (low === high ? [low - 0.5, high + 0.5] : [low - 0.5, high + 0.5]);
const zeroRange = (u, low, high) => [0, high > 0 ? high * 1.06 : 1];
const logRange = (u, low, high) => [low / 1.15, high * 1.15];

function tick(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return (+value.toPrecision(3)).toExponential().replace("e+", "e");
  return size >= 1000 ? value.toLocaleString("en") : String(+value.toPrecision(3));
}

// Values under the cursor; without a cursor those of the selected update.
function showValues(one, idx) {
  const i = idx ?? board.index.get(board.chosen);
  one.drawn.forEach((series, k) => {
    const value = i === undefined ? null : series.values[i];
    one.values[k].value.textContent = one.spec.percent ? percent(value) : show(value);
  });
}

function drawEpochs(u) {
  const g = u.ctx, ratio = devicePixelRatio, { left, top, width, height } = u.bbox;
  g.save();
  g.strokeStyle = g.fillStyle = css("--quiet");
  g.lineWidth = ratio;
  g.textAlign = "left";
  g.textBaseline = "alphabetic";
  g.setLineDash([3 * ratio, 4 * ratio]);
  g.font = `${11 * ratio}px system-ui, sans-serif`;
  const crowded = board.epochs.length > width / (60 * ratio);
  for (const [update, epoch] of board.epochs) {
    const x = u.valToPos(update - 0.5, "x", true);
    if (x < left || x > left + width || (crowded && board.epochs.length > width / (4 * ratio))) continue;
    g.beginPath(); g.moveTo(x, top); g.lineTo(x, top + height); g.stroke();
    if (!crowded) g.fillText(`epoch ${epoch}`, x + 3 * ratio, top + height - 4 * ratio);
  }
  g.restore();
}

function drawLines(u, spec) {
  const g = u.ctx, ratio = devicePixelRatio, { left, top, width, height } = u.bbox;
  g.save();
  g.strokeStyle = g.fillStyle = css("--ink");
  g.lineWidth = ratio;
  g.textAlign = "left";
  g.textBaseline = "alphabetic";
  g.setLineDash([8 * ratio, 4 * ratio]);
  g.font = `${11 * ratio}px system-ui, sans-serif`;
  for (const { value, name } of spec.lines || []) {
    const y = u.valToPos(value, "y", true);
    if (!(y >= top && y <= top + height)) continue;
    g.beginPath(); g.moveTo(left, y); g.lineTo(left + width, y); g.stroke();
    g.fillText(name, left + 6 * ratio, y - 4 * ratio);
  }
  g.restore();
}

// A cross at the upper edge where a value is there and no finite number.
function drawBroken(u, drawn) {
  const g = u.ctx, ratio = devicePixelRatio, r = 4 * ratio;
  g.save();
  g.setLineDash([]);
  g.strokeStyle = css("--bad");
  g.lineWidth = 2 * ratio;
  drawn.forEach(({ values }, k) => {
    if (!u.series[k + 1].show) return;
    values.forEach((value, i) => {
      if (value === null || Number.isFinite(value)) return;
      const x = u.valToPos(board.x[i], "x", true), y = u.bbox.top + 8 * ratio;
      g.beginPath(); g.moveTo(x - r, y - r); g.lineTo(x + r, y + r); g.moveTo(x - r, y + r); g.lineTo(x + r, y - r); g.stroke();
    });
  });
  g.restore();
}

// Marks stand above the plot: a triangle for what was noticed, a square for what was not applied.
function drawMarks(u) {
  const g = u.ctx, ratio = devicePixelRatio, { left, top, width } = u.bbox, r = 4.5 * ratio, y = top - 7 * ratio;
  g.save();
  for (const [update, kind] of board.marks) {
    const x = u.valToPos(update, "x", true);
    if (x < left - 1 || x > left + width + 1) continue;
    g.fillStyle = css(["skipped", "failed"].includes(kind) ? "--bad" : "--mark");
    g.beginPath();
    if (["skipped", "failed"].includes(kind)) g.rect(x - r, y - r, 2 * r, 2 * r);
    else { g.moveTo(x - r, y - r); g.lineTo(x + r, y - r); g.lineTo(x, y + r); }
    g.fill();
  }
  g.restore();
}

function drawChosen(u) {
  if (board.chosen === null) return;
  const x = u.valToPos(board.chosen, "x", true), { left, top, width, height } = u.bbox;
  if (x < left || x > left + width) return;
  const g = u.ctx;
  g.save();
  g.setLineDash([]);
  g.strokeStyle = css("--select");
  g.lineWidth = 1.5 * devicePixelRatio;
  g.beginPath(); g.moveTo(x, top); g.lineTo(x, top + height); g.stroke();
  g.restore();
}

function zoomTo(u) {
  const { left, width } = u.select;
  if (width < 6) return;
  const span = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
  u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  if (span[1] - span[0] >= 2) zoom(span);
}

function zoom(span) {
  board.zoom = span;
  for (const { u } of board.figures) u.setData(u.data, true);
  board.onZoom(span);
}

function chooseInFigures(update, words) {
  board.chosen = update;
  for (const one of board.figures) {
    one.u.redraw(false, false);
    showValues(one, null);
    const parts = one.drawn.map((s, i) => `${s.name} ${one.values[i].value.textContent}`);
    one.plot.setAttribute("aria-label", `${one.spec.title}${one.spec.unit ? `, ${one.spec.unit}` : ""}. ${words}: ${parts.join("; ")}`);
  }
}

// After a change of theme or width.
function redrawFigures() {
  for (const one of board.figures) { one.plot.style.minHeight = `${one.plot.clientHeight}px`; build(one); one.plot.style.minHeight = ""; }
}

// What stands around the figures of every page: light, dark and paper, and the row that picks an update.
const byId = (id) => document.getElementById(id);

// Wires the theme's button, resizing and printing. `redraw` draws again what colours or widths changed. Returns set(dark, keep), which redraws
// if `keep`, and onPaper().
function themes(redraw) {
  let darkBefore = null, waiting = null; // darkBefore: while the page is on paper
  const isDark = () => document.documentElement.dataset.theme === "dark";
  const onPaper = () => darkBefore !== null;

  function set(dark, keep) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    byId("theme").textContent = dark ? "Light" : "Dark";
    byId("theme").setAttribute("aria-pressed", String(dark));
    if (keep) redraw();
  }
  function toPaper() {
    if (onPaper()) return;
    darkBefore = isDark();
    document.documentElement.classList.add("paper");
    set(false, true);
  }
  function fromPaper() {
    if (!onPaper()) return;
    document.documentElement.classList.remove("paper");
    set(darkBefore, true);
    darkBefore = null;
  }

  byId("theme").addEventListener("click", () => set(!isDark(), true));
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => onPaper() || set(isDark(), true), 150); });
  addEventListener("beforeprint", toPaper);
  addEventListener("afterprint", fromPaper);
  set(matchMedia("(prefers-color-scheme: dark)").matches, false);
  return { set, onPaper };
}

// The slider over `places` and the buttons beside it. Returns step(by), which chooses a neighbour of current().
function picker(places, choose, current) {
  const step = (by) => choose(places[Math.max(0, Math.min(places.length - 1, places.indexOf(current()) + by))]);
  byId("slider").max = String(Math.max(0, places.length - 1));
  byId("slider").addEventListener("input", () => choose(places[Number(byId("slider").value)]));
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  byId("whole").addEventListener("click", () => zoom(null));
  return step;
}

// Arrow keys and 0, for pages that have nothing else to steer.
function arrowKeys(step) {
  document.addEventListener("keydown", (event) => {
    const action = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), 0: () => zoom(null) }[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
}
