// The cluster map: a tile for each server with its shards and its load, one for each worker with its
// slots and its speed. A click shows everything about a member, and the button that drains it.
"use strict";

Treefold.cluster = (() => {
  const MANY = 40; // workers from which on tiles are small
  const { element, number, bytes, setText } = Treefold.words;
  const tiles = new Map();
  let chosen = "", asked = "", said = "";

  function draw() {
    const held = holdings();
    for (const role of ["server", "worker"]) {
      const home = document.getElementById(`${role}s`);
      const members = Treefold.model.members(role);
      const isMany = members.length > MANY;
      home.classList.toggle("many", isMany);
      for (const member of members) {
        const tile = tileOf(home, member);
        const lines = role === "server" ? serverLines(member, held) : workerLines(member, isMany);
        lines.forEach((line, i) => setText(tile.lines[i], line));
        const isDraining = member.is_draining && member.state === "live";
        tile.root.className = `tile ${isDraining ? "draining" : member.state}`;
        tile.root.classList.toggle("chosen", member.name === chosen);
        tile.bar.style.width = `${Math.round(100 * Treefold.model.busy(member.name))}%`;
      }
    }
    drawChosen(held);
  }

  function tileOf(home, member) {
    if (!tiles.has(member.name)) {
      const lines = [element("b"), element("span"), element("span"), element("span")];
      const bar = element("i");
      const root = element("button", [...lines, bar], "tile");
      root.dataset.member = member.name;
      root.addEventListener("click", () => {
        chosen = chosen === member.name ? "" : member.name;
        asked = said = "";
        draw();
      });
      const after = [...home.children].find((one) => rank(one.dataset.member) > member.rank);
      home.insertBefore(root, after || null);
      tiles.set(member.name, { root, lines, bar });
    }
    return tiles.get(member.name);
  }

  function rank(name) {
    return Number(name.split("-").pop());
  }

  // Shards by server: which it leads, backs up, and is being given.
  function holdings() {
    const held = {};
    const of = (name) => (held[name] = held[name] || { leads: [], backs: [], joins: [], blocks: 0 });
    for (const table of Treefold.model.status.tables) {
      for (const shard of table.shards) {
        const name = `${table.name}/${shard.shard}`;
        of(shard.server).leads.push(name);
        of(shard.server).blocks += shard.blocks;
        for (const one of shard.backups) of(one).backs.push(name);
        for (const one of shard.joining) of(one).joins.push(name);
      }
    }
    return held;
  }

  function standing(member) {
    if (member.state !== "live") return ` (${member.state})`;
    return member.is_draining ? " (leaves)" : "";
  }

  function serverLines(member, held) {
    const { leads = [], backs = [], joins = [] } = held[member.name] || {};
    const copied = joins.length ? `, is given ${joins.length}` : "";
    return [
      member.name + standing(member),
      `leads ${leads.length}, backs up ${backs.length}${copied}`,
      `busy ${Math.round(100 * Treefold.model.busy(member.name))} %, ${bytes(member.rss_bytes)}`,
      leads.length ? leads.join(" ") : "holds no shard",
    ];
  }

  function workerLines(member, isMany) {
    const slots = member.slots.length;
    const held = isMany ? `${slots} ·` : `${slots} ${slots === 1 ? "slot" : "slots"},`;
    return [
      member.name + standing(member),
      `${held} ${number(Treefold.model.speeds[member.name] || 0)}/s`,
      `round ${member.round}${member.loss === null ? "" : `, loss ${number(member.loss)}`}`,
      member.waiting ? `waits: ${member.waiting}` : "",
    ];
  }

  // ---- one member -------------------------------------------------------------------------------

  function drawChosen(held) {
    const home = document.getElementById("member");
    const known = ["server", "worker"].flatMap((role) => Treefold.model.members(role));
    const member = known.find((one) => one.name === chosen);
    home.hidden = !member;
    if (!member) return;
    const { leads = [], backs = [], joins = [] } = held[member.name] || {};
    const facts = {
      "": `${member.name}${standing(member)}`,
      host: `${member.host}, process ${member.pid}`,
      slots: member.slots.join(" "),
      "ms per slot": member.slot_time_ms ? number(member.slot_time_ms) : "",
      "waits for": member.waiting,
      leads: leads.join(" "),
      "backs up": backs.join(" "),
      "is given": joins.join(" "),
      memory: bytes(member.rss_bytes),
      processor: `${number(member.cpu_percent)} %`,
      "last heard": `${number(member.seen_ms_ago / 1000)} s ago`,
    };
    const shown = Object.entries(facts).filter(([, text]) => text);
    const parts = shown.map(([name, text]) => element("span", name ? `${name}: ${text}` : [element("b", text)]));
    const isOffered = Treefold.model.mayDrain && member.state === "live" && !member.is_draining;
    if (isOffered) parts.push(drainButton(member.name));
    if (said) parts.push(element("span", said, "moving"));
    const before = home.querySelector("button");
    const hadFocus = before && before === document.activeElement;
    home.replaceChildren(...parts);
    if (hadFocus && isOffered) home.querySelector("button").focus();
  }

  // The first click asks, the second one does it.
  function drainButton(name) {
    const button = element("button", asked === name ? `Yes, drain ${name}` : `Drain ${name}`);
    button.id = "drain";
    button.addEventListener("click", async () => {
      if (asked !== name) {
        asked = name;
        said = `${name} would hand its work over and leave.`;
      } else {
        asked = "";
        const refusal = await Treefold.feed.drain(name);
        said = refusal ? `Not drained: ${refusal}` : `${name} hands its work over and leaves.`;
      }
      draw();
    });
    return button;
  }

  return { draw };
})();
