// Puts the page together: a live one from its feed, or a report from what is recorded in it.
"use strict";

(() => {
  const { model, feed, curves, lanes, cluster, tables } = Treefold;
  const { element, number, clock, setText } = Treefold.words;
  const at = (id) => document.getElementById(id);
  let isDue = false, lostAt = 0, tooks = [];

  function figures() {
    const { status } = model;
    const newest = (name) => {
      const points = model.series[name];
      return points && points.length ? number(points[points.length - 1][2]) : "";
    };
    const plan = status.plan && status.plan.end_round ? ` of ${number(status.plan.end_round)}` : "";
    return {
      job: status.phase,
      round: number(status.round) + plan,
      "rounds/s": newest("rounds/s"),
      "samples/s": newest("samples/s"),
      loss: newest("loss"),
      workers: `${model.live("worker").length} of ${status.expected.workers}`,
      servers: `${model.live("server").length} of ${status.expected.servers}`,
      view: number(status.view),
      slots: number(status.slots),
    };
  }

  function drawFigures() {
    for (const [name, text] of Object.entries(figures())) {
      const id = `figure-${name}`;
      if (!at(id)) {
        const value = element("dd");
        value.id = id;
        at("figures").append(element("div", [element("dt", name), value]));
      }
      setText(at(id), text);
    }
  }

  function drawNotice() {
    const { ending } = model.status;
    const text = ending ? `The job is over (${ending.outcome}): ${ending.text}` : "";
    const lost = lostAt ? `No answer from the scheduler since ${clock(lostAt)}. ` : "";
    at("notice").hidden = !(text || lost);
    setText(at("notice"), lost + text);
  }

  function draw() {
    isDue = false;
    const began = performance.now();
    drawFigures();
    drawNotice();
    lanes.draw();
    cluster.draw();
    curves.draw();
    tables.draw();
    tooks = [...tooks.slice(-59), performance.now() - began];
    document.body.dataset.drawMs = Math.max(...tooks).toFixed(1);
    document.body.dataset.draws = Number(document.body.dataset.draws || 0) + 1;
  }

  // A page that is not in sight draws when it is again.
  function drawSoon() {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(draw);
  }

  function say(text, kind) {
    setText(at("connection"), text);
    at("connection").className = `pill ${kind}`;
  }

  function begin(document_) {
    model.begin(document_);
    lanes.legend();
    drawSoon();
  }

  const on = {
    take(kind, document_) {
      if (kind === "rights") model.mayDrain = document_.may_drain;
      if (kind === "begin") begin(document_);
      if (kind === "news") {
        model.news(document_);
        drawSoon();
      }
      if (kind === "end") {
        model.mayDrain = false;
        say("over", "");
        drawSoon();
      }
    },
    connected() {
      lostAt = 0;
      at("entry").hidden = true;
      at("save").hidden = false;
      say("live", "live");
    },
    lost(text) {
      lostAt = lostAt || Date.now() / 1000;
      say("no connection", "lost");
      at("connection").title = text;
      if (model.status) drawSoon();
    },
    refused() {
      at("entry").hidden = false;
      say("token needed", "lost");
    },
  };

  async function save() {
    try {
      const link = element("a");
      link.href = URL.createObjectURL(await feed.report());
      link.download = "treefold-report.html";
      link.click();
    } catch (error) {
      at("notice").hidden = false;
      setText(at("notice"), `The report cannot be saved: ${error.message}`);
    }
  }

  lanes.begin();
  at("save").addEventListener("click", save);
  at("entry").addEventListener("submit", (event) => {
    event.preventDefault();
    feed.setToken(at("token").value);
    feed.run(on);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    curves.redraw();
    lanes.draw();
  });
  const recorded = at("recorded");
  if (recorded) {
    at("whole").checked = true;
    begin(JSON.parse(recorded.textContent));
    say(`report of ${new Date(model.at * 1000).toLocaleString()}`, "");
  } else {
    feed.run(on);
  }
})();
