// Which figures a run has. Values that a run does not have are absent, and the figure says why.
"use strict";

function drawFigures(run, parent) {
  const { columns, ranks, data } = run, pad = run.padded;
  const many = data.ranks > 1, none = "No value of this is on record.";
  const byRank = (name, width = 1.1) => (many ? ranks[name].map((values, r) => ({ name: `rank ${r}`, values: pad(values), colour: `--c${(r + 1) % 8}`, dash: DASHES[(r + 1) % DASHES.length], width })) : []);
  const heldout = run.x.map((update) => run.heldout.get(update) ?? null);
  const best = heldout.map((value, i) => (run.x[i] === data.best ? value : null));
  figure({
    id: "loss", wide: true, height: 260, log: true, title: "Loss", unit: "nats per supervised token", marks: true,
    how: `Of the rows of each update, before its step.${many ? " A rank's loss is the mean of its own rows." : ""} Dashed lines begin an epoch: from there rows repeat, which lowers the loss without learning; held-out rows are never trained on. Above a figure: ▼ noticed, ■ not applied; a red ✕ is a value that is not finite.`,
    series: [
      { name: many ? "all ranks" : "training rows", values: pad(columns.loss), colour: "--c0", width: 2.2 }, ...byRank("loss"),
      { name: "held-out rows", values: heldout, colour: "--ink", dots: true, joined: true, dash: [2, 4] },
      { name: "lowest of them, the run's result", values: best, colour: "--good", dots: true },
    ],
  }, parent);
  figure({
    id: "norm", wide: true, height: 240, log: true, title: "Gradient norm", unit: "L2, before clipping",
    how: `Of all adapter matrices together${many ? "; a rank's own share before ranks are summed" : ""}. The scale is logarithmic where it spans a factor of 8.`,
    lines: data.max_grad_norm ? [{ value: data.max_grad_norm, name: `clipped above ${data.max_grad_norm} (optimizer.max_grad_norm)` }] : [],
    series: [{ name: "whole gradient", values: pad(columns.norm), colour: "--c0", width: 2.2 }, ...byRank("norm")],
  }, parent);
  figure({
    id: "clip", title: "Clip coefficient", unit: "1 = not clipped", fromZero: true, how: "What the gradient was multiplied with before the step.",
    none: "The run does not clip: optimizer.max_grad_norm is null.",
    series: [{ name: "clip coefficient", values: pad(columns.clip), colour: "--c0" }],
  }, parent);
  const planned = run.plan ? run.x.map((update) => run.plan.lr[update - 1] ?? null) : [];
  figure({
    id: "lr", title: "Learning rate", unit: "as applied", fromZero: true, how: "The planned one lies beneath in dots, hidden where both agree.",
    series: [{ name: "planned", values: planned, colour: "--c1", dash: [2, 3], width: 1.8 }, { name: "applied", values: pad(columns.lr), colour: "--c0", width: 1.8 }],
  }, parent);
  figure({
    id: "cosine", title: "Agreement of ranks", unit: "mean cosine", how: "Between the ranks' shares of the gradient: 1 the same direction, 0 none in common.",
    none: many ? "Not known under ddp: it reduces gradients before ranks' shares can be read." : "The run has one rank.",
    series: [{ name: "cosine", values: pad(columns.cosine), colour: "--c2" }],
  }, parent);
  figure({
    id: "noise", title: "Gradient noise scale", unit: "supervised tokens", log: true,
    how: "Tokens an update at which noise and signal are equal, smoothed. Far above the tokens of an update: noise rules, more rows an update would help; far below: fewer would do.",
    none: "Not known: it needs at least two parts of an update whose gradients are seen apart.",
    series: [{ name: "noise scale", values: pad(columns.noise), colour: "--c3", joined: true }, { name: "tokens an update", values: pad(columns.supervised), colour: "--c6", dash: [6, 3] }],
  }, parent);
  const probed = (name) => run.x.map((update) => (run.probes && run.probeAt.has(update) ? run.probes[name][run.probeAt.get(update)] : null));
  const noProbe = "No matrix was probed: record.probe_every_updates says how often it is done.";
  figure({
    id: "ratio", title: "Update / weight", unit: "ratio of norms", log: true, none: noProbe, how: "Of all adapter matrices together, at probed updates: how large a step is beside what it changes.",
    series: [{ name: "ratio", values: probed("ratio"), colour: "--c0", joined: true, dots: true, width: 1.4 }],
  }, parent);
  figure({
    id: "unmoved", title: "Entries that did not move", unit: "share", percent: true, fromZero: true, none: noProbe,
    how: "Of all entries of the adapters, bit for bit the same after the step: a step too small for their precision.",
    series: [{ name: "did not move", values: probed("unmoved"), colour: "--c1", joined: true, dots: true, width: 1.4 }],
  }, parent);
  figure({
    id: "tokens", title: "Tokens", unit: "an update, all ranks", fromZero: true,
    how: "Slots are places computed, padding included; real ones belong to rows; supervised ones have a label and make the loss.",
    series: [
      { name: "slots", values: pad(run.slots), colour: "--c6", dash: [2, 3] }, { name: "real", values: pad(run.real), colour: "--c0", dash: [] },
      { name: "supervised", values: pad(columns.supervised), colour: "--c2", dash: [9, 3] },
    ],
  }, parent);
  const padding = (real, slots) => real.map((value, i) => (slots[i] > 0 && value !== null ? 1 - value / slots[i] : null));
  figure({
    id: "padding", title: "Padding", unit: "share of the places computed", percent: true, fromZero: true,
    how: `Places that belong to no row. The table of the selected update has them by ${many ? "rank and " : ""}micro-batch.`,
    series: [
      { name: many ? "all ranks" : "padding", values: pad(padding(run.real, run.slots)), colour: "--c0", width: 2.2 },
      ...(many ? ranks.real.map((real, r) => ({ name: `rank ${r}`, values: pad(padding(real, ranks.slots[r])), colour: `--c${(r + 1) % 8}`, dash: DASHES[(r + 1) % DASHES.length], width: 1.1 })) : []),
    ],
  }, parent);
  timeFigure(run, parent);
  machineFigures(run, parent);
  memoryFigure(run, parent, byRank);
  if (columns.loss_scale.some((value) => value !== null)) {
    figure({ id: "scale", title: "Loss scale", unit: "fp16", log: true, how: "Factor on the loss that keeps small gradients from vanishing in fp16.", none, series: [{ name: "loss scale", values: pad(columns.loss_scale), colour: "--c3" }] }, parent);
  }
}

// Parts of an update's wall time on rank 0, in the order in which they come; null where one is not on record.
function timesOf(run, i) {
  const { columns, ranks } = run, whole = columns.update_s[i], passes = ranks.passes_s?.[0]?.[i] ?? null;
  const slowest = passes === null ? null : Math.max(...ranks.passes_s.map((one) => one[i] ?? 0));
  const parts = passes === null
    ? [["compute, with the wait for other ranks", columns.compute_s[i], "--c0"]]
    : [["compute", passes, "--c0"], ["wait for other ranks", slowest - passes, "--c4"], ["gate", Math.max(0, columns.compute_s[i] - slowest), "--c3"]];
  parts.push(["reduce", columns.reduce_s[i], "--c1"], ["optimizer", columns.optimizer_s[i], "--c2"]);
  const rest = whole - parts.reduce((sum, [, value]) => sum + (value ?? 0), 0);
  parts.push(["the rest", rest > 1e-4 * whole ? rest : 0, "--c6"]);
  return parts;
}

function timeFigure(run, parent) {
  const times = run.updates.map((_, i) => timesOf(run, i)), names = times.length ? times[times.length - 1].map(([name, , colour]) => [name, colour]) : [];
  const stacked = names.map(([name], k) => times.map((parts) => {
    if (!parts.some(([one]) => one === name)) return null;
    let sum = 0;
    for (let j = 0; j <= k && j < parts.length; j++) sum += parts[j][1] ?? 0;
    return sum;
  }));
  const series = names.map(([name, colour], k) => ({ name, colour, values: run.padded(stacked[k]), fill: true, bars: true, width: 0.5 })).reverse();
  const one = figure({
    id: "time", wide: true, title: "Time of an update", unit: "s, wall time on rank 0", fromZero: true,
    how: "Parts stand on each other; the top is the whole update. Compute is forward and backward; in the gate ranks tell each other what they found. On a GPU the optimizer's kernels end in the next update's compute.", series,
  }, parent);
  if (one) one.panel.querySelectorAll(".value").forEach((node) => node.remove()); // sums, not the parts: those stand with the selected update
}

// What was read of the cards and the host, by rank. Figures of what nobody read are not drawn.
function machineFigures(run, parent) {
  const { data } = run, pad = run.padded;
  const figures = [
    ["clock", "Clock of the card", "MHz, mean of the update", "A card that is hot, or over its power, lowers it. The events name the likely cause of a slow update."],
    ["power", "Power of the card", "W, mean of the update", "A card at its power cap is usual under full load."],
    ["heat", "Heat of the card", "°C, highest of the update", ""],
    ["busy", "Card busy", "share of time with a kernel", "Far below the usual: the host did not keep the card busy."],
    ["host_gib", "Host memory", "GiB, resident, of each rank", "A line that keeps rising is a leak."],
  ];
  for (const [name, title, unit, how] of figures) {
    if (!data.machine[name]) continue;
    const series = data.machine[name].map((packed, r) => ({ name: data.ranks > 1 ? `rank ${r}` : name.replace("_gib", ""), values: pad(column(packed)), colour: `--c${(r + (data.ranks > 1)) % 8}`, dash: DASHES[(r + (data.ranks > 1)) % DASHES.length], joined: true }));
    figure({ id: name.replace("_", "-"), title, unit, how, percent: name === "busy", fromZero: name !== "clock" && name !== "heat", series }, parent);
  }
}

function memoryFigure(run, parent, byRank) {
  const memory = run.data.memory, predicted = memory?.phases.peak?.[0] ?? null;
  const own = run.data.ranks > 1 ? byRank("peak_gib", 1.8) : [{ name: "peak", values: run.padded(run.ranks.peak_gib[0]), colour: "--c0", width: 2 }];
  const lines = [];
  if (predicted !== null && predicted !== undefined) lines.push({ value: predicted, name: `predicted peak ${predicted} GiB` });
  const one = figure({
    id: "memory", wide: true, title: "GPU memory", unit: "GiB, largest allocation since the run began", fromZero: true, height: 180,
    how: memory?.card ? `The card has ${memory.card} GiB.` : "", lines, none: "Not measured: the run had no GPU.", series: own,
  }, parent);
  const phases = Object.entries(memory?.phases || {});
  if (one && phases.length) {
    one.panel.append(table(["phase", "#predicted GiB", "#measured GiB", "#off"], phases.map(([name, [asked, got]]) => ({ cells: [name, show(asked), show(got), asked ? percent(got / asked - 1) : "–"] }))));
  }
}
