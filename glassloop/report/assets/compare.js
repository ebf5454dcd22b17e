// The page of a comparison: a colour a side, a dash a run.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent), $ = (id) => document.getElementById(id);
  const sides = [...new Set(data.runs.map((run) => run.side))], several = sides.length > 1;
  const runs = data.runs.map((run, i) => ({
    ...run, columns: Object.fromEntries(Object.entries(run.columns).map(([name, packed]) => [name, column(packed)])), at: new Map(run.update.map((update, k) => [update, k])), heldoutAt: new Map(run.heldout),
    look: { colour: `--c${(several ? sides.indexOf(run.side) : i) % 8}`, dash: DASHES[several ? data.runs.filter((one, k) => k < i && one.side === run.side).length % 8 : i % 8] },
  }));
  const x = [...new Set(runs.flatMap((run) => [...run.update, ...run.heldout.map(([update]) => update)]))].sort((a, b) => a - b);
  const named = (run) => (several ? `${run.side}: ${run.name}` : run.name);
  const curves = (name) => runs.map((run) => ({ name: named(run), ...run.look, width: 1.6, values: x.map((update) => (run.at.has(update) ? run.columns[name][run.at.get(update)] : null)) }));
  // Relative difference of every run to the first one, update by update.
  const off = (name) => runs.slice(1).map((run) => ({
    name: named(run), ...run.look, width: 1.4,
    values: x.map((update) => {
      const a = runs[0].columns[name][runs[0].at.get(update)], b = run.columns[name][run.at.get(update)];
      if (!finite(a) || !finite(b)) return null;
      const size = Math.max(Math.abs(a), Math.abs(b));
      return a === b ? null : Math.abs(a - b) / size;
    }),
  }));

  function drawAll() {
    const parent = $("figures"), floor = [{ value: data.floor, name: "noise floor" }];
    figure({ id: "loss", wide: true, height: 280, log: true, title: "Loss", unit: "nats per supervised token, all ranks", how: "Of the rows of each update, before its step. Triangles mark where two runs part first.", series: curves("loss") }, parent);
    figure({ id: "heldout", wide: true, title: "Held-out loss", unit: "nats a token", how: "After so many updates, on rows that were never trained on.", none: "No run has held-out rows.", series: runs.map((run) => ({ name: named(run), ...run.look, dots: true, joined: true, values: x.map((update) => run.heldoutAt.get(update) ?? null) })) }, parent);
    figure({ id: "norm", wide: true, log: true, title: "Gradient norm", unit: "L2, before clipping", series: curves("norm") }, parent);
    figure({ id: "off-loss", log: true, title: "Loss, apart", unit: "relative", how: `From ${runs[0].name}. Nothing is drawn where both are equal.`, none: "Every update's loss is equal.", lines: floor, series: off("loss") }, parent);
    figure({ id: "off-norm", log: true, title: "Gradient norm, apart", unit: "relative", how: `From ${runs[0].name}. Nothing is drawn where both are equal.`, none: "Every update's norm is equal.", lines: floor, series: off("norm") }, parent);
    figure({ id: "lr", title: "Learning rate", unit: "as applied", fromZero: true, series: curves("lr") }, parent);
    figure({ id: "time", title: "Time of an update", unit: "s, wall time on rank 0", fromZero: true, series: curves("update_s") }, parent);
  }

  let chosen = null;
  function choose(update) {
    chosen = x.includes(update) ? update : x[0];
    $("slider").value = String(x.indexOf(chosen));
    const words = runs.map((run) => `${named(run)} ${show(run.columns.loss[run.at.get(chosen)])}`).join(" · ");
    $("chosen").replaceChildren(make("b", {}, `Update ${chosen}`), ` · loss ${words}`);
    chooseInFigures(chosen, `update ${chosen}`);
  }
  $("title").textContent = data.title;
  $("facts").textContent = `${runs.length} runs on ${sides.length} ${several ? "sides" : "side"} · noise floor ${data.floor.toExponential(1)} relative, ${data.floor_from}`;
  $("verdicts").replaceChildren(...data.pairs.map((pair) => make("div", { class: "alert" },
    make("div", {}, make("b", { class: pair.verdict === "not resolved" ? "look" : "good" }, pair.verdict), ` on ${data.measure}: ${pair.why}`),
    make("div", { class: "quiet" }, `${pair.a} beside ${pair.b}, ${pair.compared} updates in common`), pair.lines.map((line) => make("div", { class: "mono" }, line)),
    pair.updates.length ? make("button", { type: "button", class: "link", onclick: () => choose(pair.updates.at(-1)) }, `show update ${pair.updates.at(-1)}`) : null)));
  $("run-list").replaceChildren(table(["side", "run", "#seed", "#updates", "#real tokens/s", `#${data.measure}`], runs.map((run) => ({ cells: [run.side, run.name, run.seed ?? "–", run.updates, show(run.tokens_per_s === null ? null : Math.round(run.tokens_per_s)), show(run.score)] }))));
  $("difference-list").replaceChildren(data.differences.length
    ? table(["field", ...runs.map(named)], data.differences.map(([name, values]) => ({ cells: [make("code", {}, name), ...values.map((value) => value ?? "–")] })))
    : make("p", { class: "none" }, "Nothing: config, versions, code and hardware are the same."));
  $("foot").textContent = `Written by glassloop ${data.glassloop}, ${data.made}. Curves: uPlot (MIT).`;
  themes(() => { redrawFigures(); choose(chosen); });
  const marks = new Map(data.pairs.flatMap((pair) => pair.updates).map((update) => [update, "parting"]));
  onBoard({ x, marks, epochs: runs[0].epochs, onPick: choose, onZoom: (span) => { $("whole").hidden = span === null; } });
  drawAll();
  arrowKeys(picker(x, choose, () => chosen));
  choose(data.pairs[0]?.updates.at(-1) ?? x.at(-1));
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
