// The page of a study: claims with their intervals, quantities by setting, and curves that are means over seeds.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent), $ = (id) => document.getElementById(id);
  const groups = data.groups.map((group, i) => ({
    ...group, look: { colour: `--c${i % 8}`, dash: DASHES[Math.floor(i / 8) % DASHES.length] },
    columns: Object.fromEntries(["loss", "norm", "noise", "lr"].map((name) => [name, column(group.curves[name])])),
    at: new Map(group.curves.update.map((update, k) => [update, k])), heldoutAt: new Map(group.heldout),
  }));
  const x = [...new Set(groups.flatMap((group) => [...group.curves.update, ...group.heldout.map(([update]) => update)]))].sort((a, b) => a - b);
  const curves = (name) => groups.map((group) => ({ name: group.name, ...group.look, width: 1.6, values: x.map((update) => (group.at.has(update) ? group.columns[name][group.at.get(update)] : null)) }));
  const colour = (claim) => ({ supported: "good", contradicted: "bad" })[claim.verdict] || "look";

  // The interval on its own scale: a line, its middle, 0 and what was claimed.
  function drawn(claim) {
    if (claim.difference === null) return null;
    const svg = (tag, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
      return element;
    };
    const bounds = claim.expect === "about" ? [claim.value - claim.within, claim.value + claim.within] : [claim.expect === "higher" ? claim.by : -claim.by];
    const all = [0, claim.low, claim.high, ...bounds, ...claim.pairs.map((pair) => pair.difference)];
    const low = Math.min(...all), high = Math.max(...all), span = high - low || 1;
    const at = (value) => 20 + 560 * ((value - low) / span);
    const picture = svg("svg", { viewBox: "0 0 600 44", width: 600, height: 44, role: "img", "aria-label": `difference ${show(claim.difference)}, interval ${show(claim.low)} to ${show(claim.high)}` });
    picture.append(svg("line", { x1: at(0), x2: at(0), y1: 4, y2: 30, stroke: "currentColor", "stroke-width": 1 }));
    for (const bound of bounds) picture.append(svg("line", { x1: at(bound), x2: at(bound), y1: 4, y2: 30, stroke: "currentColor", "stroke-width": 1.5, "stroke-dasharray": "3 3" }));
    picture.append(svg("line", { x1: at(claim.low), x2: at(claim.high), y1: 17, y2: 17, stroke: "currentColor", "stroke-width": 3 }));
    picture.append(svg("circle", { cx: at(claim.difference), cy: 17, r: 6, fill: "currentColor" }));
    for (const pair of claim.pairs) picture.append(svg("circle", { cx: at(pair.difference), cy: 17, r: 3, fill: "none", stroke: "currentColor" }));
    const label = svg("text", { x: at(0), y: 42, "font-size": 11, "text-anchor": "middle", fill: "currentColor" });
    label.textContent = "0";
    picture.append(label);
    return make("div", { class: `scroll ${colour(claim)}` }, picture);
  }

  function pairTable(claim) {
    const named = (side) => (typeof side === "number" ? show(side) : Object.values(side).join(" "));
    const rows = claim.pairs.map((pair) => ({ cells: [pair.seed, show(pair.value), show(pair.against), claim.unit === "share" ? percent(pair.difference) : show(pair.difference)] }));
    return make("details", {}, make("summary", {}, "by seed"), table(["#seed", `#${named(claim.cell)}`, `#against ${named(claim.against)}`, "#difference"], rows));
  }

  function fill() {
    $("title").textContent = data.title;
    $("question").textContent = data.question;
    const equal = data.equal ? ` · cells have equal ${data.equal.replace("_", " ")}` : "";
    $("facts").textContent = `${groups.length} settings, seeds ${data.seeds.join(", ")}${equal}${data.beside > 1 ? ` · up to ${data.beside} cells beside each other, so times are not comparable` : ""}`;
    $("claim-list").replaceChildren(...data.claims.map((claim) => make("div", { class: `alert is-${colour(claim)}` },
      make("div", {}, make("b", { class: colour(claim) }, claim.verdict), ` · ${claim.says}`),
      make("div", { class: "quiet" }, `${claim.quantity} (${data.quantities[claim.quantity]?.words ?? "not measured"}): ${claim.why}`), drawn(claim), claim.pairs.length ? pairTable(claim) : null)));
    if (!data.claims.length) $("claim-list").append(make("p", { class: "none" }, "The study makes no claim."));
    if (data.cannot_say) $("claim-list").append(make("p", { class: "how" }, `What this cannot say: ${data.cannot_say}`));
    $("critical").hidden = !data.critical.length;
    $("critical-list").replaceChildren(...data.critical.flatMap((lines) => lines.map((line, i) => make("p", { class: i ? null : "quiet" }, line))));
    for (const measure of ["loss", "stability", "memory", "time"]) {
      const names = Object.keys(data.quantities).filter((name) => data.quantities[name].measure === measure);
      if (!names.length) continue;
      const text = (value) => make("div", {}, make("div", {}, `${show(value.mean)}${value.deviation === null ? "" : ` ± ${show(Number(value.deviation.toPrecision(2)))}`}`), make("div", { class: "quiet" }, Object.values(value.by_seed).map((one) => show(one)).join(" · ")));
      const lines = groups.map((group) => ({ cells: [group.name, group.finished, ...names.map((name) => text(group.values[name]))] }));
      $("cell-list").append(make("h3", {}, measure), make("div", { class: "scroll whole" }, table(["setting", "#seeds", ...names.map((name) => `#${data.quantities[name].words}, ${data.quantities[name].unit}`)], lines)));
    }
    if (data.missing.length) $("cell-list").append(make("h3", {}, "No result"), table(["cell", "why"], data.missing.map((cells) => ({ cells }))));
    $("memory-phases").hidden = !data.memory.length;
    $("memory-list").replaceChildren(table(["setting", "phase", "#predicted GiB", "#measured GiB"], data.memory.map(([name, phase, asked, got]) => ({ cells: [name, phase, show(asked), show(got)] }))));
    $("diverged").hidden = !data.diverged.length;
    $("diverged-list").replaceChildren(...data.diverged.map((one) => make("div", { class: "alert" }, make("b", {}, one.cell), ` · update ${one.update}, ${one.why} `, command(one.command), one.answer ? make("pre", {}, one.answer) : null)));
    $("asked-words").textContent = data.words.join("\n");
    $("foot").textContent = `From ${data.file}, by glassloop ${data.glassloop}, ${data.made}. ${data.places.map((place) => `${place}. `).join("")}Curves: uPlot (MIT).`;
  }

  function drawAll() {
    const parent = $("figures"), mean = "Mean over the seeds of a setting.";
    figure({ id: "heldout", wide: true, title: "Held-out loss", unit: "nats a token", how: `${mean} On rows that were never trained on.`, none: "No run has held-out rows.", series: groups.map((group) => ({ name: group.name, ...group.look, dots: true, joined: true, values: x.map((update) => group.heldoutAt.get(update) ?? null) })) }, parent);
    figure({ id: "loss", wide: true, height: 280, log: true, title: "Training loss", unit: "nats per supervised token", how: `${mean} A red cross: not finite.`, series: curves("loss") }, parent);
    figure({ id: "norm", wide: true, log: true, title: "Gradient norm", unit: "L2, before clipping", how: mean, series: curves("norm") }, parent);
    figure({ id: "noise", log: true, title: "Gradient noise scale", unit: "supervised tokens", how: mean, none: "Not known: it needs two parts of an update whose gradients are seen apart.", series: curves("noise").map((one) => ({ ...one, joined: true })) }, parent);
    figure({ id: "lr", title: "Learning rate", unit: "as applied", fromZero: true, series: curves("lr") }, parent);
  }

  let chosen = null;
  function choose(update) {
    chosen = x.includes(update) ? update : x[0];
    $("slider").value = String(x.indexOf(chosen));
    const words = groups.map((group) => `${group.name} ${show(group.columns.loss[group.at.get(chosen)])}`).join(" · ");
    $("chosen").replaceChildren(make("b", {}, `Update ${chosen}`), ` · training loss ${words}`);
    chooseInFigures(chosen, `update ${chosen}`);
  }

  fill();
  themes(() => { if (x.length) { redrawFigures(); choose(chosen); } });
  document.querySelector(".picker").hidden = !x.length;
  if (x.length) {
    onBoard({ x, marks: new Map(), epochs: [], onPick: choose, onZoom: (span) => { $("whole").hidden = span === null; } });
    drawAll();
    arrowKeys(picker(x, choose, () => chosen));
    choose(x.at(-1));
  }
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
