// Puts the page together, and keeps one selected update that every panel follows.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent), run = readRun(data);
  const $ = (id) => document.getElementById(id), places = run.x.filter((update) => run.at.has(update) || update === 0);
  let chosen = null, noting = null;

  function choose(update) {
    if (!places.length) return;
    if (!places.includes(update)) update = places.reduce((best, one) => (Math.abs(one - update) < Math.abs(best - update) ? one : best));
    chosen = update;
    $("slider").value = String(places.indexOf(update));
    const words = wordsOf(update);
    $("chosen").replaceChildren(...words);
    $("slider").setAttribute("aria-valuetext", $("chosen").textContent);
    chooseInFigures(update, `update ${update}`);
    chooseInHeat(update);
    drawDetail(run, update);
    chooseInTables(update);
    document.documentElement.dataset.update = update;
    clearTimeout(noting);
    noting = setTimeout(() => history.replaceState(null, "", `#${update}`), 300); // a browser refuses hundreds of them in a row
  }

  function wordsOf(update) {
    const i = run.at.get(update);
    if (i === undefined) return [make("b", {}, "Before the first update")];
    const kind = run.marks.get(update), skipped = data.skipped[update] !== undefined, { columns } = run;
    const alarms = (data.alarms[update] || []).map((one) => one.replaceAll("_", " ")).join(", ");
    return [
      make("b", {}, `Update ${update} of ${data.planned}`), ` · epoch ${columns.epoch[i]} · `,
      make("span", { class: skipped ? "bad" : "quiet" }, skipped ? "not applied" : "applied"),
      ` · loss ${show(columns.loss[i])} · lr ${show(columns.lr[i])} · norm ${show(columns.norm[i])}`,
      kind ? make("b", { class: kindClass(kind) }, ` · ${alarms || kind.replaceAll("_", " ")}`) : "",
    ];
  }

  let step = null, theme = null;
  const marked = [...run.marks.keys()].filter((update) => places.includes(update)).sort((a, b) => a - b);
  const toMark = (by) => {
    const next = by > 0 ? marked.find((update) => update > chosen) : marked.findLast((update) => update < chosen);
    if (next !== undefined) choose(next);
  };

  function onKey(event) {
    const inField = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) && event.target.id !== "slider";
    if (inField || event.ctrlKey || event.metaKey || event.altKey) return;
    const action = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => choose(places[0]), End: () => choose(places.at(-1)), n: () => toMark(1), p: () => toMark(-1), 0: () => zoom(null) }[event.key];
    if (!action) return;
    if (["Home", "End"].includes(event.key) && event.target.id !== "slider" && !event.target.closest(".plot, .picker, canvas")) return; // they scroll the page
    event.preventDefault();
    action();
  }

  function start() {
    $("title").textContent = data.title;
    $("facts").textContent = `${data.folder} · ${data.planned} updates planned · ${data.ranks} ${data.ranks === 1 ? "rank" : "ranks"} · ${data.env.started || "start unknown"}`;
    theme = themes(() => { redrawFigures(); drawHeat(); choose(chosen); });
    onBoard({ x: run.x, marks: run.marks, epochs: run.epochs, onPick: choose, onZoom: (span) => { $("whole").hidden = span === null; } });
    drawTables(run, (update) => { choose(update); $("this").scrollIntoView({ block: "nearest" }); });
    if (run.x.length) drawFigures(run, $("figures"));
    $("norm")?.after($("this")); // beside the two curves that are looked at first
    heatFigure(run, $("figures"), choose);
    drawHeat();
    step = picker(places, choose, () => chosen);
    $("mark-before").addEventListener("click", () => toMark(-1));
    $("mark-after").addEventListener("click", () => toMark(1));
    $("mark-before").disabled = $("mark-after").disabled = !marked.length;
    document.addEventListener("keydown", onKey);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => theme.onPaper() || theme.set(event.matches, true));
    const asked = Number(location.hash.slice(1));
    choose(location.hash && places.includes(asked) ? asked : marked.find((update) => run.marks.get(update) !== "resumed") ?? places.at(-1));
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }
  start();
})();
