// The page of the web demo. The conversation exists only here; each request sends all of it.

import { exportConversation, fetchFile } from "./api.js";
import { byId, element } from "./elements.js";
import { Figures } from "./figures.js";
import { Conversation } from "./conversation.js";

const config = JSON.parse(byId("config").textContent);
const figures = new Figures(config, update);
const conversation = new Conversation(config.models, figures, settings, update);
const question = byId("question");

function settings() {
  return {
    system: byId("system").value.trim() || null,
    temperature: byId("temperature").valueAsNumber,
    max_new_tokens: byId("length").valueAsNumber,
  };
}

// Show and enable the controls that can be used now.
function update() {
  const { running, empty, complete } = conversation;
  byId("welcome").hidden = !empty || figures.all.length > 0;
  byId("ask").hidden = running;
  byId("stop").hidden = !running;
  byId("ask").disabled = !complete || figures.adding;
  byId("ask").title = complete ? "" : "Ask the last question again or change it first";
  byId("export").disabled = running || empty || !complete;
}

function addFiles(list) {
  const byName = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });
  figures.add([...list].sort(byName));
}

function clear() {
  conversation.clear();
  figures.clear();
  question.value = "";
  question.focus();
}

async function startExample(node, number) {
  const paths = Array.from({ length: node.dataset.images }, (_, i) => `/examples/${number}/${i}`);
  question.value = node.dataset.question;
  try {
    const files = await Promise.all(paths.map((path, i) => fetchFile(path, `example ${i + 1}.jpg`)));
    await figures.add(files);
  } catch (error) {
    byId("figure-errors").replaceChildren(element("p", {}, error.message));
  }
  question.focus();
}

async function download() {
  byId("export-error").textContent = "";
  try {
    const content = { ...conversation.content(), answers: conversation.answers() };
    const url = URL.createObjectURL(await exportConversation(content));
    element("a", { href: url, download: "conversation.zip" }).click();
    URL.revokeObjectURL(url);
  } catch (error) {
    byId("export-error").textContent = `Not exported: ${error.message}`;
  }
}

// Drop, paste or choose figures anywhere on the page.
let dragged = 0; // entered elements
const showDrop = (change) => {
  dragged = change ? dragged + change : 0;
  document.body.classList.toggle("dropping", dragged > 0);
};
addEventListener("dragenter", (event) => { event.preventDefault(); showDrop(1); });
addEventListener("dragleave", () => showDrop(-1));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  showDrop(0);
  addFiles(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  addFiles(event.clipboardData.files);
});
byId("picker").addEventListener("change", (event) => {
  addFiles(event.target.files);
  event.target.value = "";
});

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || conversation.running || !conversation.complete || figures.adding) return;
  question.value = "";
  conversation.ask(text);
});
// A closed <details> would hide an invalid setting.
byId("settings").addEventListener("invalid", () => { byId("settings").open = true; }, true);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("viewer").open) conversation.stop();
});
byId("stop").addEventListener("click", () => conversation.stop());
byId("new").addEventListener("click", clear);
byId("export").addEventListener("click", download);
document.querySelectorAll(".example").forEach((node, number) =>
  node.addEventListener("click", () => startExample(node, number)));
update();
