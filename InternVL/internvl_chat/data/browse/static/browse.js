"use strict";

// Replace an image that cannot be shown with the reason, which the server sends as text.
document.addEventListener("error", async (event) => {
  const image = event.target;
  if (!(image instanceof HTMLImageElement)) return;
  const reason = document.createElement("p");
  reason.className = "broken";
  reason.textContent = "cannot be shown";
  image.replaceWith(reason);
  const isSmall = reason.closest(".thumb") !== null; // without room for a sentence
  try {
    const answer = await fetch(image.src);
    if (!(answer.headers.get("content-type") || "").startsWith("text/plain")) return;
    reason[isSmall ? "title" : "textContent"] = await answer.text();
  } catch { /* The server has stopped. */ }
}, true);

// Highlight a tile both in the grid and in the list of tiles.
function mark(event) {
  const tile = event.target instanceof Element && event.target.closest("[data-tile]");
  for (const other of document.querySelectorAll("[data-tile].on")) other.classList.remove("on");
  if (!tile) return;
  for (const same of document.querySelectorAll(`[data-tile="${tile.dataset.tile}"]`)) same.classList.add("on");
}
document.addEventListener("pointerover", mark);
document.addEventListener("focusin", mark);

// The arrow keys open the previous and the next record or page.
document.addEventListener("keydown", (event) => {
  const relation = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  if (!relation || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest("input, select, textarea, .stream, pre")) return;
  const link = document.querySelector(`a[rel="${relation}"]`);
  if (link) link.click();
});

// Show the progress of the index while it is being built.
async function follow() {
  const notice = document.getElementById("indexing");
  if (!notice) return;
  try {
    const status = await (await fetch("/status")).json();
    document.getElementById("indexed").textContent = status.indexed.toLocaleString("en");
    document.getElementById("progress").value = status.indexed;
    if (status.finished || status.error) {
      document.getElementById("reload").hidden = false;
      return;
    }
  } catch {
    return;  // The server has stopped.
  }
  setTimeout(follow, 1000);
}
document.addEventListener("DOMContentLoaded", follow);
