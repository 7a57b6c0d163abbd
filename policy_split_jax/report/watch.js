"use strict";
// Asks the server every few seconds for the page, and takes over what has changed; charts and rollouts renew themselves.
(() => {
  const SECONDS = 2;
  const parts = () => [...document.querySelectorAll("[data-live]")];
  // As the server sent them: scripts change what they find.
  const sent = new Map(parts().map((part) => [part.id, part.innerHTML]));
  const places = (page) => [...page.querySelectorAll(".plot")].map((plot) => plot.id).join();
  const state = document.getElementById("watch-state");
  let tag = null;

  const shape = (page) => [...page.querySelectorAll("[data-live]")].map(({ id }) => id).join() + (places(page) && "+");

  const take = (next) => {
    // From the page that waits to the one that shows, and back.
    if (shape(next) !== shape(document)) return location.reload();
    for (const part of parts()) {
      const fresh = next.getElementById(part.id);
      const changed = sent.get(part.id) !== fresh.innerHTML;
      sent.set(part.id, fresh.innerHTML);
      // Drawn charts stay, as long as they are the same ones.
      if (changed && !(places(part) && places(part) === places(fresh))) part.innerHTML = fresh.innerHTML;
    }
    document.title = next.title;
    document.dispatchEvent(new CustomEvent("renewed", { detail: next }));
  };

  const ask = async () => {
    try {
      const answer = await fetch("/", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      state.textContent = "watching";
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        take(new DOMParser().parseFromString(await answer.text(), "text/html"));
      }
    } catch {
      state.textContent = "the server has ended; this is the last that it showed";
    }
    setTimeout(ask, 1000 * SECONDS);
  };
  setTimeout(ask, 1000 * SECONDS);
})();
