// What the page knows: the newest status, the past as far as it was sent, and speeds made of both.
"use strict";

Treefold.model = (() => {
  const COLUMNS_MAX = 2400; // of lanes; older ones are forgotten by this page
  const POINTS_MAX = 6000; // of a curve
  const SPEED_S = 4; // samples/s is a mean over so long

  const model = {
    at: 0,
    status: null,
    series: {}, // name: [[time, round, value], ...]
    columns: [], // when each column of the lanes ended
    lanes: {}, // name: { role, cells: one per column, null where nobody was there }
    activities: {}, // role: names
    speeds: {}, // name: samples/s
    tensors: [], // statistics, as servers have last told of them
    isLive: false,
    mayDrain: false,
    isOver: false,
  };
  let seen = []; // { at, samples: { incarnation: samples } }, the newest last

  // A page that was there before keeps what a scheduler that was started again does not know.
  function begin(document_) {
    for (const [name, points] of Object.entries(document_.series)) {
      model.series[name] = [...before(model.series[name] || [], points, (one) => one[0]), ...points];
    }
    const columns = before(model.columns, document_.columns, (at) => at);
    const lanes = {};
    for (const name of [...Object.keys(model.lanes), ...Object.keys(document_.lanes)]) {
      const [known, fresh] = [model.lanes[name], document_.lanes[name]];
      const old = columns.map((_, i) => (known ? known.cells[i] : null));
      const cells = fresh ? fresh.cells : document_.columns.map(() => null);
      lanes[name] = { role: (fresh || known).role, cells: [...old, ...cells] };
    }
    model.columns = [...columns, ...document_.columns];
    model.lanes = lanes;
    model.activities = document_.activities;
    model.isLive = document_.is_live;
    model.tensors = document_.tensors;
    seen = [];
    takeStatus(document_);
  }

  // What is known from before a list begins.
  function before(known, fresh, timeOf) {
    const first = fresh.length ? timeOf(fresh[0]) : Infinity;
    return known.filter((one) => timeOf(one) < first);
  }

  function news(document_) {
    for (const [name, point] of Object.entries(document_.points)) {
      const points = (model.series[name] = model.series[name] || []);
      points.push(point);
      if (points.length > POINTS_MAX) points.splice(0, POINTS_MAX / 4);
    }
    if (document_.tensors) model.tensors = document_.tensors;
    takeColumns(document_.columns, document_.lanes);
    takeStatus(document_);
  }

  // The last columns come whole each time: what they show may still fill up.
  function takeColumns(columns, lanes) {
    const last = model.columns.length ? model.columns[model.columns.length - 1] : 0;
    const added = columns.filter((at) => at > last);
    model.columns.push(...added);
    for (const lane of Object.values(model.lanes)) lane.cells.push(...added.map(() => null));
    for (const [name, { role, cells }] of Object.entries(lanes)) {
      if (!model.lanes[name]) {
        model.lanes[name] = { role, cells: model.columns.map(() => null) };
      }
      const known = model.lanes[name].cells;
      const count = Math.min(cells.length, known.length);
      known.splice(known.length - count, count, ...cells.slice(cells.length - count));
    }
    if (model.columns.length > COLUMNS_MAX) {
      const cut = COLUMNS_MAX / 4;
      model.columns.splice(0, cut);
      for (const lane of Object.values(model.lanes)) lane.cells.splice(0, cut);
    }
  }

  function takeStatus(document_) {
    model.at = document_.at;
    model.status = document_.status;
    const samples = {};
    for (const member of model.status.members) samples[member.incarnation] = member.samples;
    seen.push({ at: model.at, samples });
    while (seen.length > 2 && model.at - seen[1].at > SPEED_S) seen.shift();
    model.speeds = {};
    for (const member of live("worker")) {
      const then = seen.find((one) => member.incarnation in one.samples);
      const took = model.at - then.at;
      const done = member.samples - then.samples[member.incarnation];
      model.speeds[member.name] = took > 0 && done > 0 ? done / took : 0;
    }
  }

  // One member per name, the newest: who took a place over stands where the other one stood.
  function members(role) {
    const byName = new Map();
    for (const member of model.status.members) {
      if (member.role !== role) continue;
      const known = byName.get(member.name);
      if (!known || known.incarnation < member.incarnation) byName.set(member.name, member);
    }
    return [...byName.values()].sort((one, other) => one.rank - other.rank);
  }

  function live(role) {
    return model.status.members.filter((one) => one.role === role && one.state === "live");
  }

  // The share of the last full seconds that a member was at something, 0 to 1.
  function busy(name) {
    const lane = model.lanes[name];
    const cells = lane ? lane.cells.slice(-4).filter((cell) => cell) : [];
    if (!cells.length) return 0;
    const names = model.activities[lane.role];
    const share = (cell) => cell.reduce((sum, part, i) => sum + (names[i] === "wait" ? 0 : part), 0);
    return cells.reduce((sum, cell) => sum + share(cell), 0) / cells.length / 100;
  }

  return Object.assign(model, { begin, news, members, live, busy });
})();

// ---- words --------------------------------------------------------------------------------------

Treefold.words = (() => {
  const compact = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

  function number(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
    return compact.format(value);
  }

  function bytes(value) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
    return `${number(value)} ${units[unit]}`;
  }

  function clock(seconds) {
    return new Date(seconds * 1000).toTimeString().slice(0, 8);
  }

  // An element with text or elements in it. Whatever comes from a process is text, never HTML.
  function element(kind, content, className) {
    const made = document.createElement(kind);
    if (className) made.className = className;
    made.append(...[].concat(content === undefined ? [] : content));
    return made;
  }

  function setText(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }

  return { number, bytes, clock, element, setText };
})();
