// Curves: one small plot for each series, drawn by uPlot.
"use strict";

Treefold.curves = (() => {
  const HEIGHT = 130;
  const FIRST = ["loss", "samples/s", "rounds/s"];
  const { element, number, clock, setText } = Treefold.words;
  const plots = new Map();
  let home;

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function make(name) {
    const value = element("span");
    const box = element("div", [element("h3", [name, value])]);
    const order = FIRST.indexOf(name);
    box.style.order = order < 0 ? FIRST.length : order;
    home.append(box);
    const axis = {
      stroke: () => colour("--faint"),
      grid: { stroke: () => colour("--line"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui",
    };
    const options = {
      width: box.clientWidth || 320,
      height: HEIGHT,
      cursor: { y: false, points: { size: 5 } },
      legend: { show: false },
      axes: [
        { ...axis, size: 24, space: 70, values: (_, ticks) => ticks.map(clock) },
        { ...axis, size: 52, values: (_, ticks) => ticks.map(number) },
      ],
      series: [
        {},
        { label: name, stroke: () => colour("--accent"), width: 1.5, spanGaps: true, points: { show: false } },
      ],
      hooks: { setCursor: [(plot) => show(name, plot.cursor.idx)] },
    };
    const plot = new uPlot(options, [[], []], box);
    new ResizeObserver(() => plot.setSize({ width: box.clientWidth, height: HEIGHT })).observe(box);
    plots.set(name, { plot, value });
  }

  // The value under the cursor, else the newest.
  function show(name, index) {
    const points = Treefold.model.series[name];
    const { value } = plots.get(name) || {};
    if (!points || !points.length || !value) return;
    const isPointed = index !== null && index !== undefined && index < points.length;
    const [, round, y] = points[isPointed ? index : points.length - 1];
    setText(value, isPointed ? `${number(y)} in round ${round}` : number(y));
  }

  function draw() {
    home = home || document.getElementById("curves");
    for (const [name, points] of Object.entries(Treefold.model.series)) {
      if (!points.length) continue;
      if (!plots.has(name)) make(name);
      const { plot } = plots.get(name);
      plot.setData([points.map((one) => one[0]), points.map((one) => one[2])]);
      show(name, plot.cursor.idx);
    }
  }

  function redraw() {
    for (const { plot } of plots.values()) plot.redraw(false, true);
  }

  return { draw, redraw };
})();
