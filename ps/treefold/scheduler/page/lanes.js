// Lanes: what everybody's time went into. A lane per member, time from left to right; of each
// interval the shares of its activities are stacked from the bottom, and what is left is idle: white.
// Only the rows that are in sight are drawn.
"use strict";

Treefold.lanes = (() => {
  const COLOURS = {
    compute: "#3b6fb6", push: "#d1495b", pull: "#e9a23b", wait: "#b9bfca",
    fold: "#2a9d8f", optimizer: "#3b6fb6", publish: "#e9a23b", checkpoint: "#7b5ea7",
  };
  const IDLE = "#ffffff";
  const RECENT_S = 120;
  const LEAST_S = 20; // a job that has just begun
  const NAMES_PX = 84;
  const WAITS_PX = 230;
  const AXIS_PX = 18;
  const { clock, element } = Treefold.words;
  let box, canvas, filler, tip, rows = [], height = 0;

  function rowHeight(count) {
    return count <= 24 ? 18 : count <= 64 ? 11 : 7;
  }

  function begin() {
    box = document.getElementById("lanes");
    [canvas, filler] = box.children;
    tip = document.getElementById("tip");
    box.addEventListener("scroll", draw);
    new ResizeObserver(draw).observe(box);
    document.getElementById("whole").addEventListener("change", draw);
    canvas.addEventListener("mousemove", point);
    canvas.addEventListener("mouseleave", () => (tip.hidden = true));
  }

  function legend() {
    const home = document.getElementById("legend");
    const shown = (name) => {
      const swatch = element("i");
      swatch.style.background = COLOURS[name] || IDLE;
      return element("span", [swatch, name]);
    };
    home.replaceChildren();
    for (const [role, names] of Object.entries(Treefold.model.activities)) {
      home.append(element("b", `${role}s:`), ...names.map(shown));
    }
    home.append(shown("idle"));
  }

  function span() {
    const { columns } = Treefold.model;
    const last = columns.length ? columns[columns.length - 1] : 1;
    const isWhole = document.getElementById("whole").checked;
    const first = columns.length ? columns[0] : 0;
    const from = isWhole ? first - 1 : Math.max(last - RECENT_S, Math.min(first - 1, last - LEAST_S));
    return { from, to: Math.max(last, from + 1) };
  }

  // Thin and short lanes have no room for words beside them: there the tip says who waits for whom.
  function areaOf(width) {
    const hasWords = height >= 11 && width >= 3 * WAITS_PX;
    const right = hasWords ? WAITS_PX : 12;
    return { left: NAMES_PX, width: Math.max(50, width - NAMES_PX - right), hasWords, ...span() };
  }

  // Which lanes there are, workers first, by rank.
  function order() {
    const { lanes } = Treefold.model;
    const rank = (name) => Number(name.split("-").pop());
    const place = (name) => (lanes[name].role === "worker" ? 0 : 1e6) + rank(name);
    return Object.keys(lanes).sort((one, other) => place(one) - place(other));
  }

  function draw() {
    if (!Treefold.model.status) return;
    rows = order();
    height = rowHeight(rows.length);
    const total = rows.length * height + AXIS_PX;
    const visible = Math.min(total, 460);
    const width = box.clientWidth;
    const scale = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(visible * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(visible * scale);
      canvas.style.height = `${visible}px`;
    }
    filler.style.height = `${total - visible}px`;
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, visible);
    const area = areaOf(width);
    pen.fillStyle = IDLE;
    pen.fillRect(area.left, 0, area.width, visible - AXIS_PX);
    const top = box.scrollTop;
    const begun = Math.floor(top / height);
    const ended = Math.min(rows.length, Math.ceil((top + visible - AXIS_PX) / height));
    const style = getComputedStyle(document.documentElement);
    const ink = { text: style.getPropertyValue("--ink"), faint: style.getPropertyValue("--faint") };
    const waits = waiting();
    for (let row = begun; row < ended; row += 1) {
      drawRow(pen, rows[row], row * height - top, area);
      drawWords(pen, rows[row], row, row * height - top, area, ink, waits);
    }
    drawAxis(pen, area, visible, ink);
  }

  function drawRow(pen, name, y, area) {
    const { columns, lanes, activities } = Treefold.model;
    const lane = lanes[name];
    const names = activities[lane.role];
    const scale = area.width / (area.to - area.from);
    const full = height - 2;
    for (let i = columns.length - 1; i >= 0 && columns[i] > area.from; i -= 1) {
      const cell = lane.cells[i];
      const began = i ? columns[i - 1] : columns[i] - 1;
      const x = area.left + Math.max(0, began - area.from) * scale;
      const width = area.left + (columns[i] - area.from) * scale - x + 0.5;
      if (!cell) {
        pen.fillStyle = "#e3e5ea";
        pen.fillRect(x, y + full / 2, width, 1);
        continue;
      }
      let bottom = y + 1 + full;
      for (let part = 0; part < cell.length; part += 1) {
        if (!cell[part]) continue;
        const tall = (full * cell[part]) / 100;
        bottom -= tall;
        pen.fillStyle = COLOURS[names[part]];
        pen.fillRect(x, bottom, width, tall);
      }
    }
  }

  function drawWords(pen, name, row, y, area, ink, waits) {
    const every = Math.ceil(11 / height); // thin lanes have a name now and then
    if (row % every) return;
    const middle = Math.max(6, y + height / 2);
    pen.font = "11px system-ui";
    pen.textBaseline = "middle";
    pen.fillStyle = ink.text;
    pen.fillText(name, 0, middle, NAMES_PX - 6);
    const text = area.hasWords ? waits[name] : "";
    if (text) {
      pen.fillStyle = ink.faint;
      pen.fillText(clip(pen, `waits: ${text}`, WAITS_PX - 10), area.left + area.width + 8, middle);
    }
  }

  function clip(pen, text, width) {
    if (pen.measureText(text).width <= width) return text;
    let length = Math.floor((text.length * width) / pen.measureText(text).width);
    while (length > 4 && pen.measureText(`${text.slice(0, length)}…`).width > width) length -= 1;
    return `${text.slice(0, length)}…`;
  }

  function drawAxis(pen, area, visible, ink) {
    pen.clearRect(0, visible - AXIS_PX, box.clientWidth, AXIS_PX);
    pen.font = "11px system-ui";
    pen.fillStyle = ink.faint;
    pen.textBaseline = "bottom";
    const steps = Math.max(1, Math.floor(area.width / 140));
    for (let step = 0; step <= steps; step += 1) {
      const at = area.from + ((area.to - area.from) * step) / steps;
      const text = clock(at);
      const wide = pen.measureText(text).width;
      const x = area.left + (area.width * step) / steps - (step === 0 ? 0 : step === steps ? wide : wide / 2);
      pen.fillText(text, x, visible - 1);
    }
  }

  // Whom everybody waits for, by name.
  function waiting() {
    const found = {};
    for (const role of ["worker", "server"]) {
      for (const member of Treefold.model.live(role)) found[member.name] = member.waiting;
    }
    return found;
  }

  function point(event) {
    const { columns, lanes, activities } = Treefold.model;
    const area = areaOf(box.clientWidth);
    const name = rows[Math.floor((event.offsetY + box.scrollTop) / height)];
    const at = area.from + ((event.offsetX - area.left) / area.width) * (area.to - area.from);
    const index = columns.findIndex((end) => end >= at);
    tip.hidden = !name;
    if (!name) return;
    const cell = index >= 0 && event.offsetX >= area.left ? lanes[name].cells[index] : null;
    const shares = cell ? told(activities[lanes[name].role], cell) : "";
    const waits = waiting()[name];
    tip.textContent = [
      cell ? `${name}, ${clock(columns[index])}: ${shares}` : name,
      waits ? `now waits: ${waits}` : "",
    ].filter((one) => one).join("; ");
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 390)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  }

  function told(names, cell) {
    const idle = 100 - cell.reduce((sum, part) => sum + part, 0);
    return [...names.map((name, i) => [name, cell[i]]), ["idle", idle]]
      .filter(([, share]) => share > 0)
      .map(([name, share]) => `${name} ${share} %`)
      .join(", ");
  }

  return { begin, legend, draw };
})();
