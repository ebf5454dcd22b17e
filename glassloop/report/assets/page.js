// Puts the page together, and keeps one selected update that every panel follows.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent), run = readRun(data);
  const $ = (id) => document.getElementById(id), places = run.x.filter((update) => run.at.has(update) || update === 0);
  let chosen = null, waiting = null, noting = null;

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

  const step = (by) => choose(places[Math.max(0, Math.min(places.length - 1, places.indexOf(chosen) + by))]);
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

  function setTheme(dark, keep) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    $("theme").textContent = dark ? "Light" : "Dark";
    $("theme").setAttribute("aria-pressed", String(dark));
    if (keep) { redrawFigures(); drawHeat(); choose(chosen); }
  }

  const isDark = () => document.documentElement.dataset.theme === "dark";
  let darkBefore = null;
  function toPaper() {
    if (darkBefore !== null) return;
    darkBefore = isDark();
    document.documentElement.classList.add("paper");
    setTheme(false, true);
  }
  function fromPaper() {
    if (darkBefore === null) return;
    document.documentElement.classList.remove("paper");
    setTheme(darkBefore, true);
    darkBefore = null;
  }

  function start() {
    $("title").textContent = data.title;
    $("facts").textContent = `${data.folder} · ${data.planned} updates planned · ${data.ranks} ${data.ranks === 1 ? "rank" : "ranks"} · ${data.env.started || "start unknown"}`;
    setTheme(matchMedia("(prefers-color-scheme: dark)").matches, false);
    onBoard({ x: run.x, marks: run.marks, epochs: run.epochs, onPick: choose, onZoom: (span) => { $("whole").hidden = span === null; } });
    drawTables(run, (update) => { choose(update); $("this").scrollIntoView({ block: "nearest" }); });
    if (run.x.length) drawFigures(run, $("figures"));
    $("norm")?.after($("this")); // beside the two curves that are looked at first
    heatFigure(run, $("figures"), choose);
    drawHeat();
    $("slider").max = String(Math.max(0, places.length - 1));
    $("slider").addEventListener("input", () => choose(places[Number($("slider").value)]));
    $("before").addEventListener("click", () => step(-1));
    $("after").addEventListener("click", () => step(1));
    $("mark-before").addEventListener("click", () => toMark(-1));
    $("mark-after").addEventListener("click", () => toMark(1));
    $("mark-before").disabled = $("mark-after").disabled = !marked.length;
    $("whole").addEventListener("click", () => zoom(null));
    $("theme").addEventListener("click", () => setTheme(!isDark(), true));
    document.addEventListener("keydown", onKey);
    addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => darkBefore === null && setTheme(isDark(), true), 150); });
    addEventListener("beforeprint", toPaper);
    addEventListener("afterprint", fromPaper);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => darkBefore === null && setTheme(event.matches, true));
    const asked = Number(location.hash.slice(1));
    choose(location.hash && places.includes(asked) ? asked : marked.find((update) => run.marks.get(update) !== "resumed") ?? places.at(-1));
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }
  start();
})();
