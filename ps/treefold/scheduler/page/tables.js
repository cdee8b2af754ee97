// Chains, staleness, events: what is best read as words.
"use strict";

Treefold.tables = (() => {
  const EVENTS_MAX = 500;
  const { element, clock, number } = Treefold.words;
  let newest = { at: 0, number: 0 }, shown = null;

  function fill(id, heads, rows, empty) {
    const home = document.getElementById(id);
    const line = (kind, cells) => element("tr", cells.map((cell) => element(kind, cell)));
    const body = rows.length ? [line("th", heads), ...rows.map((row) => line("td", row))] : [];
    home.replaceChildren(...(body.length ? body : [line("td", [element("span", empty, "empty")])]));
  }

  // A shard's servers in the order in which contributions pass through them.
  function drawChains() {
    const rows = [];
    for (const table of Treefold.model.status.tables) {
      for (const shard of table.shards) {
        const moves = shard.joining.map((name) => element("span", ` ⇢ ${name} is being given it`, "moving"));
        const chain = [shard.server, ...shard.backups].join(" → ");
        rows.push([`${table.name}/${shard.shard}`, [chain, ...moves], number(shard.blocks)]);
      }
    }
    fill("chains", ["shard", "servers, the one that leads first", "blocks"], rows, "no table yet");
  }

  function drawStaleness() {
    const rows = [];
    for (const table of Treefold.model.status.tables) {
      for (const [worker, counts] of Object.entries(table.staleness)) {
        const known = [counts.median, counts.p99, counts.contributions].map(number);
        rows.push([`${table.name} (${table.consistency})`, worker, ...known]);
      }
    }
    if (rows.length) {
      const heads = ["table", "worker", "versions behind: half at most", "99 % at most", "contributions"];
      fill("staleness", heads, rows, "");
      return;
    }
    const behind = new Map();
    for (const member of Treefold.model.live("worker")) {
      const rounds = Math.max(0, Treefold.model.status.round - member.round);
      behind.set(rounds, (behind.get(rounds) || 0) + 1);
    }
    const counted = [...behind].sort(([one], [other]) => one - other);
    const told = counted.map(([rounds, workers]) => [number(rounds), number(workers)]);
    fill("staleness", ["rounds behind the first", "workers"], told, "no worker yet");
  }

  // Weights and gradients; what is not finite has a word, as it is what one looks for.
  function drawTensors() {
    const { tensors } = Treefold.model;
    document.getElementById("tensors-section").hidden = !tensors.length;
    if (tensors === shown) return;
    shown = tensors;
    const names = ["mean", "std", "min", "max", "norm"];
    const told = (sums) => names.map((name) => (!sums ? "" : sums[name] === null ? "not finite" : number(sums[name])));
    const rows = tensors.map((one) => [
      `${one.table}: ${one.name}`, one.shape.join("×") || "1", ...told(one.weights), ...told(one.gradient),
    ]);
    const heads = [...names.map((name) => `weights ${name}`), ...names.map((name) => `gradient ${name}`)];
    fill("tensors", ["tensor", "shape", ...heads], rows, "");
  }

  function drawEvents() {
    const home = document.getElementById("events");
    const events = Treefold.model.status.events || [];
    for (const event of events) {
      // A scheduler that was started again counts anew: what is later is new.
      if (event.at < newest.at || (event.at === newest.at && event.number <= newest.number)) continue;
      newest = event;
      home.prepend(element("li", [element("time", clock(event.at)), element("span", event.text)]));
    }
    while (home.children.length > EVENTS_MAX) home.lastElementChild.remove();
  }

  function draw() {
    drawChains();
    drawStaleness();
    drawEvents();
    drawTensors();
  }

  return { draw };
})();
