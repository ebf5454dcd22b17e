// The selected update: its numbers, its time, its ranks and micro-batches, its rows, what was noticed and what to type next.
"use strict";

function drawDetail(run, update) {
  const box = document.getElementById("detail"), i = run.at.get(update);
  if (i === undefined) {
    const loss = run.heldout.get(update);
    box.replaceChildren(make("p", {}, loss === undefined ? "No record of this update." : `Before the first update: held-out loss ${show(loss, "nats a token")}.`));
    return;
  }
  box.replaceChildren(...[alerts(run, update), numbers(run, i), strip(run, i), rankTable(run, i, update), rowTable(run, update), planTable(run, i, update), earlier(run, update)].filter(Boolean));
}

function alerts(run, update) {
  const events = run.data.events.filter((event) => event.update === update && !["checkpoint", "started", "preflight", "memory", "capsule"].includes(event.kind));
  const reason = run.data.skipped[update];
  const found = [];
  if (reason) found.push(make("div", { class: "alert" }, make("b", { class: "bad" }, "Not applied: "), reason));
  for (const event of events) {
    if (event.kind === "skipped" && reason) { if (event.command) found.push(make("div", { class: "alert" }, "Type next: ", command(event.command))); continue; }
    found.push(make("div", { class: "alert" }, make("b", { class: kindClass(event.kind) }, `${event.kind}: `), event.message, event.command ? make("div", {}, "type: ", command(event.command)) : null));
  }
  return found.length ? make("div", {}, found) : null;
}

const kindClass = (kind) => (["failed", "skipped"].includes(kind) ? "bad" : kind === "finished" ? "good" : ["alarm", "warning", "clipped", "out_of_memory", "stopped", "slow"].includes(kind) ? "look" : "quiet");

function numbers(run, i) {
  const { columns } = run, slots = run.slots[i], real = run.real[i];
  const perSecond = columns.update_s[i] > 0 ? real / columns.update_s[i] : null;
  const cards = [
    ["loss, nats a token", show(columns.loss[i])], ["learning rate", show(columns.lr[i])], ["gradient norm", show(columns.norm[i])], ["clip coefficient", show(columns.clip[i])],
    ["cosine of ranks", show(columns.cosine[i])], ["noise scale, tokens", show(finite(columns.noise[i]) ? Math.round(columns.noise[i]) : columns.noise[i])], ["rows", show(columns.rows[i])], ["supervised tokens (N)", show(columns.supervised[i])],
    ["padding", slots > 0 ? percent(1 - real / slots) : "–"], ["whole update", show(columns.update_s[i], "s")], ["real tokens/s, all ranks", show(perSecond === null ? null : Math.round(perSecond))],
  ];
  return make("div", { class: "cards" }, cards.map(([name, value]) => make("div", {}, make("div", { class: "k" }, name), make("div", { class: "v" }, value))));
}

function strip(run, i) {
  const parts = timesOf(run, i).filter(([, value]) => value !== null), whole = parts.reduce((sum, [, value]) => sum + value, 0);
  if (!(whole > 0)) return null;
  const bar = make("div", { class: "strip", role: "img", "aria-label": parts.map(([name, value]) => `${name} ${show(value)} s`).join(", ") });
  for (const [name, value, colour] of parts) {
    const piece = make("span", { title: `${name}: ${show(value)} s` }, value / whole > 0.12 ? `${name} ${percent(value / whole)}` : "");
    piece.style.width = `${(100 * value) / whole}%`;
    piece.style.background = css(colour);
    bar.append(piece);
  }
  const words = parts.map(([name, value, colour]) => {
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = css(colour);
    return make("li", {}, swatch, `${name} ${show(value)} s`);
  });
  return make("div", {}, make("h3", {}, "Where its time went, on rank 0"), bar, make("ul", { class: "legend" }, words));
}

// Rank by rank; a rank's micro-batches beneath it where rows are on record.
function rankTable(run, i, update) {
  const { ranks, data, rows } = run, lines = [], indices = rows?.byUpdate.get(update) || [];
  for (let r = 0; r < data.ranks; r++) {
    const real = ranks.real[r][i], slots = ranks.slots[r][i], passes = ranks.passes_s?.[r]?.[i] ?? null;
    const slowest = passes === null ? null : Math.max(...ranks.passes_s.map((one) => one[i] ?? 0));
    lines.push({ cells: [make("b", {}, `rank ${r}`), show(ranks.passes[r][i]), show(ranks.loss[r][i]), show(ranks.norm[r][i]), show(ranks.supervised[r][i]), show(real), show(slots), slots ? percent(1 - real / slots) : "–", show(passes), slowest === null ? "–" : show(slowest - passes), show(ranks.peak_gib[r][i])] });
    const batches = new Map();
    for (const row of indices) if (rows.rank[row] === r) batches.set(rows.micro_batch[row], [...(batches.get(rows.micro_batch[row]) || []), row]);
    const own = [...batches].sort((a, b) => a[0] - b[0]).map(([batch, list]) => {
      const sum = (name) => list.reduce((total, row) => total + rows[name][row], 0);
      return { batch, rows: list.length, real: sum("real"), supervised: sum("supervised"), loss: list.reduce((total, row) => total + rows.loss[row], 0), slots: list.length * Math.max(...list.map((row) => rows.real[row])) };
    });
    const padded = own.reduce((sum, one) => sum + one.slots, 0) === slots; // only then are rows padded to the longest of their micro-batch
    if (own.length > 1) for (const one of own) {
      lines.push({ cells: [`\u2003micro-batch ${one.batch}, ${one.rows} ${one.rows === 1 ? "row" : "rows"}`, "", show(one.supervised ? one.loss / one.supervised : null), "", show(one.supervised), show(one.real), padded ? show(one.slots) : "–", padded ? percent(1 - one.real / one.slots) : "–", "", "", ""] });
    }
  }
  const heads = ["rank", "#passes", "#loss, nats/token", "#gradient norm", "#supervised", "#real", "#slots", "#padding", "#compute s", "#wait s", "#peak GiB"];
  const empty = heads.map((_, k) => k > 1 && lines.every(({ cells }) => ["–", ""].includes(cells[k])));
  return make("div", {}, make("h3", {}, "By rank and micro-batch"), make("div", { class: "scroll" }, table(heads.filter((_, k) => !empty[k]), lines.map(({ cells }) => ({ cells: cells.filter((_, k) => !empty[k]) })))));
}

function rowTable(run, update) {
  const { rows } = run, indices = rows?.byUpdate.get(update);
  if (!indices) return make("p", { class: "quiet" }, rows ? "No row of this update is on record." : "Rows are not on record (record.text = none).");
  const lines = indices.map((row) => ({ row, nats: rows.supervised[row] ? rows.loss[row] / rows.supervised[row] : null }));
  const share = ({ row, nats }) => (nats === null ? -1 : Number.isFinite(rows.loss[row]) ? rows.loss[row] : Infinity);
  lines.sort((a, b) => share(b) - share(a));
  const whole = lines.reduce((sum, { row }) => sum + (finite(rows.loss[row]) ? rows.loss[row] : 0), 0);
  const heads = ["row", "#loss, nats/token", "#share of the loss", "#supervised", "#real", "#rank", "#micro-batch", ...(hasTexts(run) ? ["text"] : [])];
  return make("div", {}, make("h3", {}, "Its rows, the largest share of the loss first"), make("div", { class: "scroll" }, table(
    heads,
    lines.map(({ row, nats }) => ({ cells: [rows.ids[rows.id[row]], show(nats), whole > 0 && finite(rows.loss[row]) ? percent(rows.loss[row] / whole) : "–", show(rows.supervised[row]), show(rows.real[row]), rows.rank[row], rows.micro_batch[row], ...(hasTexts(run) ? [rowText(run, rows.ids[rows.id[row]])] : [])] })))));
}

const hasTexts = (run) => Object.keys(run.data.texts.by_id).length > 0;

// A row's text behind a line to open; only what the run was allowed to record.
function rowText(run, id) {
  const text = run.data.texts.by_id[id];
  if (text === undefined) return "–";
  const short = text.replace(/\s+/g, " ");
  return make("details", {}, make("summary", {}, short.length > 70 ? `${short.slice(0, 70)}…` : short), make("pre", {}, text));
}

function planTable(run, i, update) {
  if (!run.plan || run.plan.lr[update - 1] === undefined) return null;
  const pairs = [["rows", run.plan.rows[update - 1], run.columns.rows[i]], ["supervised tokens", run.plan.supervised[update - 1], run.columns.supervised[i]], ["real tokens", run.plan.real[update - 1], run.real[i]], ["learning rate", run.plan.lr[update - 1], run.columns.lr[i]]];
  const lines = pairs.filter(([, planned]) => planned !== undefined).map(([name, planned, got]) => ({ cells: [name, show(planned), show(got), same(planned, got) ? "as planned" : make("b", { class: "bad" }, "differs")] }));
  return make("div", {}, make("h3", {}, "Plan and what happened"), table(["", "#planned", "#happened", ""], lines));
}

const same = (a, b) => a === b || (finite(a) && finite(b) && Math.abs(a - b) <= 1e-6 * Math.abs(a));

function earlier(run, update) {
  const found = run.data.replaced.filter((one) => one.update === update);
  if (!found.length) return null;
  return make("div", {}, table(["attempt", "#loss, nats/token", "#gradient norm", ""], found.map((one) => ({ cells: [one.attempt, show(asNumber(one.loss_nats)), show(asNumber(one.grad_norm_pre_clip)), one.action] })), "Earlier attempts, replaced after a resume"));
}
