// The heat map: one row a matrix, one column a probe, A and B apart. Colours are cividis, which colour-blind eyes see alike.
"use strict";

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const QUANTITIES = {
  grad_norm: ["Gradient norm", "L2 norm of the matrix's gradient, before clipping"],
  update_norm: ["Update norm", "L2 norm of what the step changed in the matrix"],
  update_to_weight: ["Update / weight", "update norm over the norm of the matrix before the step"],
  unmoved_share: ["Entries that did not move", "share of the matrix's entries that are bit for bit the same after the step"],
  weight_norm: ["Weight norm", "L2 norm of the matrix before the step"],
  delta: ["Change of (alpha/r) B A", "Frobenius norm of what the step changed in the model's own weight, a row a module"],
};
const ORDERS = { projection: "projection, then layer", layer: "layer, then projection" };
const heat = { run: null, name: null, order: "projection", matrix: null, probe: null, maps: [], onPick: () => {} };

const parsed = CIVIDIS.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
function shade(share) {
  const place = Math.max(0, Math.min(1, share)) * (parsed.length - 1), i = Math.min(parsed.length - 2, Math.floor(place));
  return [0, 1, 2].map((k) => Math.round(parsed[i][k] + (place - i) * (parsed[i + 1][k] - parsed[i][k])));
}

// Value of a cell: null absent, NaN not finite.
function heatValue(map, row, columnIndex) {
  const code = map.cells[row * map.columns + columnIndex];
  if (code === 0) return null;
  if (code === 1) return 0;
  if (code === 2) return NaN;
  return map.low * Math.exp(((code - 3) / 65532) * Math.log(map.high / map.low));
}

function mapNamed(name) {
  const probes = heat.run.probes;
  const map = name === "delta" ? probes.delta : probes.maps[name];
  if (map && !map.cells) map.cells = decode(map.codes, Uint16Array);
  return map;
}

function heatFigure(run, parent, onPick) {
  heat.run = run;
  heat.onPick = onPick;
  const panel = make("section", { id: "heat", class: "panel wide", "aria-labelledby": "heat-h" }, make("h2", { id: "heat-h" }, "Layers over updates"));
  parent.append(panel);
  if (!run.probes) {
    panel.append(make("p", { class: "none" }, "Matrices were not probed in this run: record.probe_every_updates says how often they are."));
    return;
  }
  const names = [...Object.keys(run.probes.maps), ...(run.probes.delta ? ["delta"] : [])];
  const choice = make("select", { id: "quantity" }, names.map((name) => make("option", { value: name }, QUANTITIES[name][0])));
  choice.addEventListener("change", () => drawHeat(choice.value));
  heat.how = make("p", { class: "how" });
  heat.scale = make("div", { class: "scale" });
  heat.area = make("div", { class: "maps" });
  heat.readout = make("p", { class: "readout", "aria-live": "polite" });
  heat.profile = make("div", {});
  const order = make("select", { id: "order" }, Object.entries(ORDERS).map(([value, words]) => make("option", { value }, words)));
  order.addEventListener("change", () => { heat.order = order.value; drawHeat(); });
  panel.append(make("label", {}, "Show ", choice), " ", make("label", {}, "rows by ", order), heat.how, heat.scale, heat.area, heat.readout, heat.profile);
  heat.name = names[0];
}

function columnOf(map, probe) {
  return map.bins.findIndex(([first, last]) => probe >= first && probe <= last);
}

function drawHeat(name = heat.name) {
  if (!heat.run?.probes) return;
  heat.name = name;
  const map = mapNamed(name), probes = heat.run.probes;
  const labels = name === "delta" ? probes.modules : probes.matrices;
  const every = probes.update.length > 2 ? probes.update.at(-1) - probes.update.at(-2) : null;
  const joined = map.columns < probes.update.length ? ` ${probes.update.length.toLocaleString("en")} probes stand in ${show(map.columns)} columns, each the largest of its probes.` : "";
  heat.how.textContent = `${QUANTITIES[name][1]}. A row a matrix; ${show(probes.update.length)} probes${every > 1 ? `, every ${every} updates` : ""}.${joined}`;
  drawScale(map, name);
  const groups = name === "delta" ? [["Modules", labels.map((_, i) => i)]] : ["A", "B"].map((side) => [
    side === "A" ? "A, the first factor (r x in)" : "B, the second factor (out x r), 0 at first", labels.map((label, i) => (label.endsWith(`.${side}`) ? i : -1)).filter((i) => i >= 0)]);
  if (heat.order === "projection") for (const [, rows] of groups) rows.sort((a, b) => kinds(labels).indexOf(kindOf(labels[a])) - kinds(labels).indexOf(kindOf(labels[b])) || a - b);
  heat.area.className = `maps ${groups.length === 1 ? "one" : ""}`;
  heat.area.replaceChildren();
  heat.maps = groups.map(([title, rows]) => drawMap(title, rows, labels, map));
  if (heat.matrix === null || heat.matrix >= labels.length) heat.matrix = 0;
  outline();
}

function drawScale(map, name) {
  const bar = make("canvas", { width: 160, height: 1, "aria-hidden": "true" }), g = bar.getContext("2d");
  for (let i = 0; i < 160; i++) { g.fillStyle = `rgb(${shade(i / 159)})`; g.fillRect(i, 0, 1, 1); }
  const text = name === "unmoved_share" ? percent : show;
  heat.scale.replaceChildren(make("span", {}, text(map.low)), bar, make("span", {}, `${text(map.high)} (log scale)`),
    make("span", {}, make("span", { class: "swatch zero" }), "exactly 0"), make("span", {}, make("span", { class: "swatch" }), "no value"), make("span", {}, make("span", { class: "swatch broken" }), "not finite"));
}

function layerOf(label) {
  const found = /layers\.(\d+)\./.exec(label);
  return found ? Number(found[1]) : null;
}

// "q_proj" of "layers.3.self_attn.q_proj.A", and all of them in the order of the model.
const kindOf = (label) => label.replace(/\.[AB]$/, "").split(".").at(-1);
const kinds = (labels) => [...new Set(labels.map(kindOf))];
const bandOf = (label) => (heat.order === "layer" ? layerOf(label) : kindOf(label).replace(/_proj$/, ""));

function drawMap(title, rows, labels, map) {
  const picture = make("canvas", { width: map.columns, height: rows.length }), g = picture.getContext("2d"), image = g.createImageData(map.columns, rows.length);
  for (let r = 0; r < rows.length; r++) {
    for (let c = 0; c < map.columns; c++) {
      const code = map.cells[rows[r] * map.columns + c], at = 4 * (r * map.columns + c);
      if (code === 0) continue;
      const [red, green, blue] = code === 1 ? [141, 153, 166] : code === 2 ? [216, 27, 27] : shade((code - 3) / 65532);
      image.data[at] = red; image.data[at + 1] = green; image.data[at + 2] = blue; image.data[at + 3] = 255;
    }
  }
  g.putImageData(image, 0, 0);
  const canvas = make("canvas", { tabindex: "0", role: "img" });
  const box = make("div", { class: "map" }, make("h3", {}, title), canvas);
  heat.area.append(box);
  const one = { title, rows, labels, map, picture, canvas, left: heat.order === "layer" ? 34 : 44, bottom: 30 };
  one.height = Math.round(Math.max(150, Math.min(460, rows.length * (rows.length > 100 ? 2 : 6))));
  canvas.addEventListener("mousemove", (event) => { const cell = cellAt(one, event); cell && readOut(one, cell.row, cell.column); });
  canvas.addEventListener("mouseleave", () => outline());
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(one, event);
    if (!cell) return;
    heat.matrix = one.rows[cell.row];
    heat.onPick(heat.run.probes.update[map.bins[cell.column][1]]);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = Math.max(0, one.rows.indexOf(heat.matrix));
    heat.matrix = one.rows[Math.max(0, Math.min(one.rows.length - 1, now + step))];
    outline();
  });
  return one;
}

function cellAt(one, event) {
  const box = one.canvas.getBoundingClientRect(), width = box.width - one.left;
  const column = Math.floor(((event.clientX - box.left - one.left) / width) * one.map.columns), row = Math.floor(((event.clientY - box.top) / one.height) * one.rows.length);
  return column >= 0 && column < one.map.columns && row >= 0 && row < one.rows.length ? { column, row } : null;
}

function readOut(one, row, columnIndex) {
  const { bins } = one.map, updates = heat.run.probes.update, [first, last] = bins[columnIndex].map((probe) => updates[probe]);
  const value = heatValue(one.map, one.rows[row], columnIndex);
  const text = heat.name === "unmoved_share" ? percent(value) : show(value);
  heat.readout.textContent = `${one.labels[one.rows[row]]}, ${first === last ? `update ${first}` : `largest of updates ${first} to ${last}`}: ${QUANTITIES[heat.name][0].toLowerCase()} ${text}`;
}

// Draws the maps with the selected probe and matrix.
function outline() {
  for (const one of heat.maps) paint(one);
  const one = heat.maps.find(({ rows }) => rows.includes(heat.matrix)) || heat.maps[0];
  const c = heat.probe === null ? one.map.columns - 1 : columnOf(one.map, heat.probe);
  readOut(one, Math.max(0, one.rows.indexOf(heat.matrix)), c);
  const probed = heat.run.probes.update[heat.probe];
  if (probed !== undefined && probed !== board.chosen) heat.readout.textContent += ` (update ${board.chosen} was not probed)`;
  for (const each of heat.maps) each.canvas.setAttribute("aria-label", `${QUANTITIES[heat.name][0]}, ${each.title}. ${heat.readout.textContent}. Up and down choose a matrix.`);
  profile();
}

function paint(one) {
  const { canvas, map, rows, left, height, bottom } = one, ratio = devicePixelRatio || 1, width = Math.max(200, canvas.parentNode.clientWidth);
  canvas.width = width * ratio;
  canvas.height = (height + bottom) * ratio;
  canvas.style.height = `${height + bottom}px`;
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  g.imageSmoothingEnabled = false;
  g.strokeStyle = css("--line");
  g.strokeRect(left - 0.5, 0.5, width - left, height);
  g.drawImage(one.picture, left, 0, width - left, height);
  g.fillStyle = css("--quiet");
  g.font = "11px system-ui, sans-serif";
  g.textAlign = "right";
  let lastY = -20;
  rows.forEach((row, i) => {
    const band = bandOf(one.labels[row]);
    if (band === null || (i > 0 && band === bandOf(one.labels[rows[i - 1]]))) return;
    const y = (i / rows.length) * height;
    if (y - lastY < 14) return;
    g.fillText(band, left - 6, y + 10);
    if (heat.order === "projection" && i > 0) g.fillRect(left - 6, y, 6, 1);
    lastY = y;
  });
  g.textAlign = "center";
  const updates = heat.run.probes.update, ticks = Math.min(map.columns, Math.max(2, Math.floor(width / 90)));
  for (let t = 0; t < ticks; t++) {
    const c = ticks === 1 ? 0 : Math.round((t * (map.columns - 1)) / (ticks - 1));
    g.textAlign = ticks > 1 && t === ticks - 1 ? "right" : "center";
    const x = t === ticks - 1 && ticks > 1 ? width : left + ((c + 0.5) / map.columns) * (width - left);
    g.fillText(updates[map.bins[c][1]].toLocaleString("en"), x, height + 13);
  }
  g.textAlign = "center";
  g.fillText("update", left + (width - left) / 2, height + 27);
  g.textAlign = "left";
  g.fillText(heat.order === "layer" ? "layer" : "", 0, height + 13);
  const cell = (width - left) / map.columns, tall = height / rows.length;
  if (heat.probe !== null) {
    const c = columnOf(map, heat.probe);
    g.strokeStyle = "#fff"; g.lineWidth = 3; g.strokeRect(left + c * cell, 0.5, Math.max(cell, 2), height - 1);
    g.strokeStyle = "#000"; g.lineWidth = 1; g.strokeRect(left + c * cell, 0.5, Math.max(cell, 2), height - 1);
  }
  const row = rows.indexOf(heat.matrix);
  if (row >= 0) {
    g.strokeStyle = "#fff"; g.lineWidth = 3; g.strokeRect(left, row * tall, width - left - 1, Math.max(tall, 2));
    g.strokeStyle = "#000"; g.lineWidth = 1; g.strokeRect(left, row * tall, width - left - 1, Math.max(tall, 2));
  }
}

// The five matrices with the largest value in the selected column.
function profile() {
  const map = heat.maps[0].map, labels = heat.maps[0].labels, c = heat.probe === null ? map.columns - 1 : columnOf(map, heat.probe);
  const found = labels.map((label, i) => [heatValue(map, i, c), label, i]).filter(([value]) => value !== null);
  found.sort((a, b) => (Number.isFinite(b[0]) ? b[0] : Infinity) - (Number.isFinite(a[0]) ? a[0] : Infinity));
  const text = heat.name === "unmoved_share" ? percent : show;
  const items = found.slice(0, 5).map(([value, label]) => `${label} ${text(value)}`);
  heat.profile.replaceChildren(make("p", { class: "how" }, items.length ? `Largest here: ${items.join(", ")}` : "No value here."));
}

// The newest probe that is not after the update; the first one before that.
function chooseInHeat(update) {
  if (!heat.run?.probes) return;
  const updates = heat.run.probes.update;
  let i = updates.findIndex((one) => one > update);
  i = i < 0 ? updates.length - 1 : Math.max(0, i - 1);
  heat.probe = i;
  if (heat.maps.length) outline();
}
