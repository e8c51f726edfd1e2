"use strict";
// Filter, sort and page through the items of an evaluation, or of several models side by side.
// Data: <script id="data"> {models, labels, items: [{task, index, question, reference, images, answers}]} and
// <script id="images"> {id: data URL}. Text is inserted as text nodes only.

const PAGE_SIZE = 25;
// Main metric of an item: the first of these that it has.
const HEADLINES = ["accuracy", "judge", "rougeL", "f1", "bertscore", "sts", "em"];
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const { models, labels, items } = read("data");
const single = models.length === 1;
const filters = document.getElementById("filters");
const viewer = document.getElementById("viewer");
let images = null; // parsed when the first thumbnail is shown
let page = 0;
let shown = [];

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const title = (metric) => labels[metric] ?? metric ?? "no score";
const percent = (score) => (100 * score).toFixed(1);
const scoreOf = (answer, metric) => answer.scores[metric] ?? null;
const headline = (scores) => HEADLINES.find((name) => name in scores) ?? Object.keys(scores)[0] ?? null;

// true or false if the answer is graded as correct or wrong, otherwise null.
function verdict(answer) {
  const score = answer.scores.accuracy ?? answer.scores.judge ?? null;
  return score === null ? null : score === 1;
}

function metricOf(item) {
  return filters.metric.value || headline(item.answers[0].scores);
}

// Scores of all models in the selected metric; empty if one of them is missing.
function scoresOf(item) {
  const scores = item.answers.map((answer) => scoreOf(answer, metricOf(item)));
  return scores.includes(null) ? [] : scores;
}

// Largest loss (sign -1) or gain (sign 1) of another model against the first one.
function change(item, sign) {
  const [first, ...others] = scoresOf(item);
  return others.length ? Math.max(...others.map((score) => sign * (score - first))) : -Infinity;
}

const SHOW = {
  "": ["all answers", () => true],
  wrong: [single ? "wrong" : "a wrong answer", (item) => item.answers.some((a) => verdict(a) === false)],
  correct: [single ? "correct" : "only correct answers", (item) => item.answers.every((a) => verdict(a))],
  unreadable: ["no option read", (item) => item.answers.some((a) => a.parsed === "")],
  truncated: ["cut off", (item) => item.answers.some((a) => a.truncated)],
  differ: ["scores differ", (item) => new Set(scoresOf(item)).size > 1],
  worse: [`worse than ${models[0]}`, (item) => change(item, -1) > 0],
  better: [`better than ${models[0]}`, (item) => change(item, 1) > 0],
};
const ORDER = {
  file: ["file order", null],
  worst: ["worst first", (item) => Math.min(...scoresOf(item))],
  best: ["best first", (item) => (scoresOf(item).length ? -Math.max(...scoresOf(item)) : Infinity)],
  loss: ["largest loss first", (item) => -change(item, -1)],
  gain: ["largest gain first", (item) => -change(item, 1)],
};
const COMPARED = ["differ", "worse", "better", "loss", "gain"];

function fillSelect(select, choices) {
  for (const [value, text] of choices) select.append(el("option", { value }, text));
}

function fillControls() {
  const tasks = new Map();
  const metrics = new Set();
  for (const item of items) {
    tasks.set(item.task, (tasks.get(item.task) ?? 0) + 1);
    for (const answer of item.answers) Object.keys(answer.scores).forEach((name) => metrics.add(name));
  }
  fillSelect(filters.task, [["", "all tasks"], ...[...tasks].map(([t, n]) => [t, `${t} (${n})`])]);
  const useful = ([key, [, test]]) =>
    key === "" || (!(single && COMPARED.includes(key)) && items.some(test));
  const names = [...metrics].map((name) => [name, title(name)]);
  fillSelect(filters.metric, [["", "main metric"], ...names]);
  fillSelect(filters.show, Object.entries(SHOW).filter(useful).map(([key, [text]]) => [key, text]));
  const orders = Object.entries(ORDER).filter(([key]) => !(single && COMPARED.includes(key)));
  fillSelect(filters.order, orders.map(([key, [text]]) => [key, text]));
  return [...tasks.keys()];
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

function overviewCard(task) {
  const own = items.filter((item) => item.task === task);
  const metric = headline(own[0].answers[0].scores);
  const bars = models.map((model, number) => {
    const value = mean(own.map((item) => scoreOf(item.answers[number], metric)).filter((s) => s !== null));
    const text = value === null ? "-" : percent(value);
    const label = single ? title(metric) : model;
    return el("span", { class: "row" }, el("span", { class: "name" }, label), el("b", {}, text), bar(value));
  });
  const count = `${own.length.toLocaleString("en")} item${own.length === 1 ? "" : "s"}`;
  const caption = single ? count : `${title(metric)}, ${count}`;
  const card = el("button", { type: "button", class: "card", "aria-pressed": "false" });
  card.append(el("strong", {}, task), ...bars, el("small", {}, caption));
  card.addEventListener("click", () => {
    filters.task.value = filters.task.value === task ? "" : task;
    update();
  });
  card.dataset.task = task;
  return card;
}

function bar(score) {
  const filled = Math.max(0, Math.min(1, score ?? 0));
  const inner = el("span", { style: `width:${percent(filled)}%` });
  return el("span", { class: "bar", "aria-hidden": "true" }, inner);
}

function thumbnail(item, number) {
  const { title: caption, id } = item.images[number];
  images ??= read("images");
  if (id === null) {
    const text = `${caption} (the image is not available)`;
    return el("figure", { class: "missing" }, el("figcaption", {}, text));
  }
  const picture = el("img", { src: images[id], alt: caption, loading: "lazy" });
  const open = el("button", { type: "button", class: "thumbnail", title: "Enlarge" }, picture);
  open.addEventListener("click", () => enlarge(item, number));
  return el("figure", {}, open, el("figcaption", {}, caption));
}

function enlarge(item, number) {
  const available = item.images.filter((image) => image.id !== null);
  let at = available.indexOf(item.images[number]);
  const show = (step) => {
    at = (at + step + available.length) % available.length;
    const { title: caption, id } = available[at];
    viewer.querySelector("img").src = images[id];
    viewer.querySelector("img").alt = caption;
    const position = available.length > 1 ? ` (${at + 1} of ${available.length})` : "";
    viewer.querySelector("figcaption").textContent = caption + position;
  };
  for (const [name, step] of [["previous", -1], ["next", 1]]) {
    const button = viewer.querySelector(`.${name}`);
    button.hidden = available.length < 2;
    button.onclick = () => show(step);
  }
  viewer.onkeydown = (event) => {
    if (event.key === "ArrowLeft") show(-1);
    if (event.key === "ArrowRight") show(1);
  };
  show(0);
  viewer.showModal();
}

function scoreLine(answer, metric) {
  const score = scoreOf(answer, metric);
  if (score === null || metric === "accuracy") return [];  // the badge shows the accuracy
  return [el("p", { class: "score" }, el("span", {}, title(metric)), bar(score), el("b", {}, percent(score)))];
}

function otherScores(answer, metric) {
  const others = Object.entries(answer.scores).filter(([name]) => name !== metric && name !== "accuracy");
  if (!others.length) return [];
  const list = el("ul", { class: "scores" });
  for (const [name, score] of others) {
    list.append(el("li", {}, title(name), " ", el("b", {}, percent(score))));
  }
  return [el("details", {}, el("summary", {}, "All scores"), list)];
}

function answerCard(item, number) {
  const answer = item.answers[number];
  const correct = verdict(answer);
  const kind = correct === null ? "" : correct ? " right" : " wrong";
  const badges = [];
  if (correct !== null) badges.push(el("span", { class: "badge" }, correct ? "✓ correct" : "✗ wrong"));
  if (answer.parsed === "") badges.push(el("span", { class: "badge plain" }, "no option read"));
  if (answer.truncated) badges.push(el("span", { class: "badge plain" }, "cut off"));
  const heading = el("h4", {}, single ? "Answer" : models[number], " ", ...badges);
  const text = el("p", { class: "text" }, answer.text.trim() ? answer.text : "(no answer)");
  const card = el("section", { class: `answer${kind}` }, heading, text);
  if (answer.parsed && answer.parsed !== answer.text.trim()) {
    card.append(el("p", { class: "parsed" }, `read as ${answer.parsed}`));
  }
  card.append(...scoreLine(answer, metricOf(item)), ...otherScores(answer, metricOf(item)));
  return card;
}

function itemCard(item) {
  const card = el("article", { class: "item" });
  card.append(el("h3", {}, item.task, " ", el("span", {}, `#${item.index}`)));
  if (item.images.length) {
    card.append(el("div", { class: "figures" }, ...item.images.map((_, number) => thumbnail(item, number))));
  }
  const expected = el("p", { class: "text" }, item.reference);
  const reference = el("section", { class: "reference" }, el("h4", {}, "Reference"), expected);
  const answers = el("div", { class: single ? "answers" : "answers several" }, reference);
  answers.style.setProperty("--models", models.length);
  answers.append(...item.answers.map((_, number) => answerCard(item, number)));
  const question = el("p", { class: "question" }, item.question);
  card.append(el("div", {}, question, answers));
  return card;
}

function searchedText(item) {
  const images = item.images.map((image) => image.title), answers = item.answers.map((answer) => answer.text);
  const texts = [item.task, `#${item.index}`, item.question, item.reference, ...images, ...answers];
  return texts.join("\n").toLowerCase();
}

function matches(item) {
  if (filters.task.value && item.task !== filters.task.value) return false;
  if (!SHOW[filters.show.value][1](item)) return false;
  const { least, most } = filters;
  if (least.value !== "" || most.value !== "") {
    const lower = Number(least.value || -Infinity), upper = Number(most.value || Infinity);
    if (!scoresOf(item).some((score) => 100 * score >= lower && 100 * score <= upper)) return false;
  }
  const words = filters.search.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return true;
  item.searched ??= searchedText(item);
  return words.every((word) => item.searched.includes(word));
}

function update() {
  shown = items.filter(matches);
  const value = ORDER[filters.order.value][1];
  if (value) {
    const keys = new Map(shown.map((item) => [item, value(item)]));
    shown.sort((a, b) => (keys.get(a) === keys.get(b) ? 0 : keys.get(a) < keys.get(b) ? -1 : 1));
  }
  for (const card of document.querySelectorAll(".card")) {
    card.setAttribute("aria-pressed", card.dataset.task === filters.task.value);
  }
  page = 0;
  render();
}

function render() {
  const start = page * PAGE_SIZE, end = Math.min(start + PAGE_SIZE, shown.length);
  document.getElementById("items").replaceChildren(...shown.slice(start, end).map(itemCard));
  const count = (number) => number.toLocaleString("en");
  const range = shown.length ? `${count(start + 1)}–${count(end)} of ${count(shown.length)}` : "No item matches";
  const all = shown.length < items.length ? ` (${count(items.length)} in total)` : "";
  document.getElementById("status").textContent = range + all;
  for (const name of ["previous", "next"]) {
    const button = document.getElementById(name);
    button.disabled = name === "next" ? end >= shown.length : page === 0;
  }
  document.getElementById("pages").hidden = shown.length <= PAGE_SIZE;
  const pages = Math.max(1, Math.ceil(shown.length / PAGE_SIZE));
  document.getElementById("position").textContent = `page ${page + 1} of ${pages}`;
}

function turn(step) {
  page += step;
  render();
  document.getElementById("browse").scrollIntoView();
}

document.getElementById("overview").append(...fillControls().map(overviewCard));
filters.addEventListener("input", update);
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("reset", () => setTimeout(update));
document.getElementById("previous").addEventListener("click", () => turn(-1));
document.getElementById("next").addEventListener("click", () => turn(1));
viewer.querySelector(".close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
update();
