// What does not change with the selection: the summary, events, worst rows, answers, held-out scores, the plan, config and environment.
"use strict";

const TOPICS = { ended: "ended", learned: "learned?", stable: "stable?", look: "look at" };
const SIGNS = { good: "✓", look: "!", bad: "✕", unknown: "?" };

function drawTables(run, pick) {
  const { data } = run, put = (id, ...nodes) => document.getElementById(id).replaceChildren(...nodes.filter(Boolean));
  put("said", ...data.summary.map((one) => said(one, pick)));
  put("event-list", eventTable(run, pick));
  put("worst-list", worstTable(run, pick));
  put("answer-list", ...answers(run));
  put("evaluation-list", evaluationTable(run, pick));
  put("plan-list", ...planOverview(run, pick));
  put("setting-list", settings("Config", data.config), settings("Environment", data.env));
  const cut = data.texts.cut || data.texts.left_out ? ` Rows' texts are cut at 4,000 characters (${data.texts.cut} of them); ${data.texts.left_out} had no room.` : "";
  put("foot", `Written by glassloop ${data.glassloop}, ${data.made}. Numbers are shown to 4 digits; curves hold 7.${cut} Curves: uPlot (MIT).`);
}

function toUpdate(update, pick, text = `update ${update}`) {
  return make("button", { type: "button", class: "link", onclick: () => pick(update) }, text);
}

function said(one, pick) {
  const tail = [];
  if (one.update !== null) tail.push(" ", toUpdate(one.update, pick, `show update ${one.update}`));
  if (one.command) tail.push(make("div", {}, "type: ", command(one.command)));
  return make("li", {}, make("span", { class: `tag ${one.verdict}` }, `${SIGNS[one.verdict]} ${TOPICS[one.topic]}`), make("div", {}, one.text, ...tail));
}

const absent = (text) => make("p", { class: "none" }, text);

function eventTable(run, pick) {
  const { events } = run.data;
  if (!events.length) return absent("No event is on record.");
  return table(["#update", "kind", "what", "type next"], events.map((event) => ({
    update: event.update, pick: () => pick(event.update),
    cells: [event.update, make("b", { class: kindClass(event.kind) }, event.kind), event.message, event.command ? command(event.command) : ""],
  })));
}

function worstTable(run, pick) {
  if (!run.rows) return absent(run.data.updates?.length === 0 ? "No row is on record." : "Rows are not on record (record.text = none, or no update yet).");
  return table(["row", "#worst, nats/token", "#last, nats/token", "#times trained", "#supervised", "#update", "#rank", "#micro-batch", ...(hasTexts(run) ? ["text"] : [])], run.rows.worst.map((one) => ({
    update: one.update, pick: () => pick(one.update),
    cells: [one.id, one.worst_nats === null ? make("b", { class: "bad" }, "not finite") : show(one.worst_nats), one.last_nats === null ? "not finite" : show(one.last_nats), one.times, show(one.supervised), one.update, one.rank, one.micro_batch, ...(hasTexts(run) ? [rowText(run, one.id)] : [])],
  })));
}

function answers(run) {
  const { samples, text } = run.data;
  if (!samples.length) return [absent(text ? "No answer was generated: evaluation.samples says how many are." : "Generated answers are left out.")];
  return samples.map((sample) => {
    const boxes = sample.answers.map((one) => make("div", {}, make("h3", {}, one.base ? "Before: the base model" : `After update ${one.update}: the adapter`, make("span", { class: "quiet" }, ` · ${show(one.answer_tokens)} tokens`)), make("pre", {}, one.answer || "(nothing)")));
    const there = (value) => value !== null && value !== undefined;
    if (there(sample.prompt)) boxes.unshift(make("div", {}, make("h3", {}, "Asked"), make("pre", {}, sample.prompt)));
    const expected = there(sample.expected) ? make("details", {}, make("summary", {}, "The row's own answer"), make("pre", {}, sample.expected)) : null;
    return make("div", {}, make("h3", {}, sample.id), make("div", { class: "side" }, boxes), expected);
  });
}

function evaluationTable(run, pick) {
  const { evaluations } = run.data;
  if (!evaluations.length) return absent("No row was held out: data.heldout says which ones are.");
  const base = evaluations[evaluations.length - 1].base, names = Object.keys(evaluations[evaluations.length - 1].scores).filter((name) => name !== "loss_nats" && evaluations.some((one) => one.scores[name] !== null));
  const cells = (scores) => names.map((name) => show(asNumber(scores[name])));
  const lines = evaluations.map((one) => ({ update: one.update, pick: () => pick(one.update), cells: [one.update === run.data.best ? make("span", { class: "good" }, `${one.update} ★ best`) : one.update, show(asNumber(one.loss_nats)), one.rows, show(one.supervised_tokens), ...cells(one.scores), show(one.seconds)] }));
  if (base && evaluations[0].update !== 0) lines.unshift({ cells: ["base", show(asNumber(base.loss_nats)), "", "", ...cells(base), ""] });
  return table(["#after update", "#loss, nats/token", "#rows", "#supervised tokens", ...names.map((name) => `#${name.replaceAll("_", " ")}`), "#s"], lines);
}

function planOverview(run, pick) {
  const { data, plan, updates } = run;
  if (!plan) return [absent("plan.json is missing.")];
  const counted = { rows: run.columns.rows, supervised: run.columns.supervised, real: run.real, lr: run.columns.lr };
  const names = { rows: "rows of each update", supervised: "supervised tokens of each update", real: "real tokens of each update", lr: "learning rate of each update" };
  const lines = Object.entries(names).filter(([name]) => plan[name].length).map(([name, words]) => {
    const off = updates.filter((update, i) => !data.skipped[update] && plan[name][update - 1] !== undefined && !same(plan[name][update - 1], counted[name][i]));
    return { cells: [words, off.length ? make("span", { class: "bad" }, `differs at ${off.length} of ${updates.length} updates, first `, toUpdate(off[0], pick)) : make("span", { class: "good" }, `as planned, ${updates.length} of ${updates.length} updates`)] };
  });
  const applied = updates.length - Object.keys(data.skipped).length;
  lines.unshift({ cells: ["updates", `${data.planned} planned, ${updates.length} carried out, ${applied} applied`] });
  return [table(["", "planned beside counted"], lines), make("details", {}, make("summary", {}, "Everything that the run was held to"), settings("", plan.numbers || data.plan.numbers))];
}

function settings(title, values) {
  const lines = Object.entries(values || {}).map(([name, value]) => ({ cells: [make("code", {}, name), value === null ? make("span", { class: "quiet" }, "null") : Array.isArray(value) ? value.map((one) => (typeof one === "object" && one ? JSON.stringify(one) : String(one))).join(" ") : String(value)] }));
  return make("div", {}, title ? make("h3", {}, title) : null, lines.length ? make("div", { class: "scroll" }, table(["field", "value"], lines)) : absent("Not on record."));
}

// The row of each table that belongs to the selected update.
function chooseInTables(update) {
  for (const row of document.querySelectorAll("tr[data-update]")) row.classList.toggle("now", Number(row.dataset.update) === update);
}
