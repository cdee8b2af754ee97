// Reads the scheduler's stream of server-sent events, and sends what is to be done.
//
// EventSource cannot send a token in a header, so the stream is read with fetch. The token comes
// with the link, behind the #, which a browser sends nowhere; it is kept for this tab alone.
"use strict";

const Treefold = {};

Treefold.feed = (() => {
  const KEPT = "treefold-token";
  const AGAIN_MS = 1000;

  function token() {
    const given = location.hash.slice(1);
    if (given) {
      sessionStorage.setItem(KEPT, given);
      history.replaceState(null, "", location.pathname);
    }
    return sessionStorage.getItem(KEPT) || "";
  }

  function headers() {
    return { Authorization: `Bearer ${token()}` };
  }

  function setToken(text) {
    sessionStorage.setItem(KEPT, text.includes("#") ? text.split("#").pop() : text.trim());
  }

  // Calls take(kind, document) for each event; returns when the stream is over.
  async function read(body, take) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const kind = /^event: (.*)$/m.exec(event);
        const data = /^data: (.*)$/m.exec(event);
        if (kind && data) take(kind[1], JSON.parse(data[1]));
      }
    }
  }

  // Stays connected until the job is over. `on` has take, connected, lost(text), refused.
  async function run(on) {
    let isOver = false;
    while (!isOver) {
      try {
        const answer = await fetch("feed", { headers: headers(), cache: "no-store" });
        if (answer.status === 401) return on.refused();
        if (!answer.ok) throw new Error((await answer.text()).trim());
        on.connected();
        await read(answer.body, (kind, document_) => {
          isOver = isOver || kind === "end";
          on.take(kind, document_);
        });
        if (!isOver) throw new Error("the stream ended");
      } catch (error) {
        if (isOver) return;
        on.lost(String(error.message || error));
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      }
    }
  }

  // Asks for a member to be drained; returns why not, or nothing.
  async function drain(member) {
    try {
      const path = `drain/${encodeURIComponent(member)}`;
      const answer = await fetch(path, { method: "POST", headers: headers() });
      const kind = answer.headers.get("Content-Type") || "";
      if (kind.startsWith("application/json")) return (await answer.json()).refusal;
      return (await answer.text()).trim();
    } catch (error) {
      return String(error.message || error);
    }
  }

  async function report() {
    const answer = await fetch("report", { headers: headers(), cache: "no-store" });
    if (!answer.ok) throw new Error((await answer.text()).trim());
    return answer.blob();
  }

  return { run, drain, report, setToken };
})();
