// The conversation: questions and streamed answers, with a column per model.

import { sentence, streamAnswer } from "./api.js";
import { announce, button, byId, count, element } from "./elements.js";
import { countTiles } from "./figures.js";

const WAITING = "Reading the conversation …";
const ENDINGS = { length: "cut off at the maximum length", stopped: "stopped" };

// Change a part of the page; keep its end in view unless the user has scrolled away.
function keepingInView(node, change) {
  const visible = node.getBoundingClientRect().bottom <= innerHeight;
  change();
  if (visible) node.scrollIntoView({ block: "end" });
}

// One model's answer to a question.
class Answer {
  #shown = element("p", { class: "text" });
  #notes = element("div");
  #footer = element("footer", {}, WAITING);
  text = "";
  complete = false; // whether it can be part of the conversation

  constructor(model) {
    this.node = element("article", { class: "answer", "aria-busy": "true" },
      element("h3", {}, model), this.#shown, this.#notes, this.#footer);
  }

  // Stream the answer. `onGrids` receives the tile grids that the model uses.
  async run(request, signal, onGrids) {
    let usage = {};
    try {
      for await (const part of streamAnswer(request, signal)) {
        if (part.error) throw new Error(sentence(part.error));
        usage = { ...usage, ...part };
        keepingInView(this.node, () => {
          this.#receive(part, onGrids);
          this.#showUsage(usage);
        });
      }
      if (!usage.finishReason) throw new Error("The answer ended early. Ask again.");
      this.complete = true;
      if (!this.text) this.#shown.textContent = "(empty answer)";
    } catch (error) {
      const stopped = error.name === "AbortError";
      this.complete = stopped && this.text !== "";
      usage.finishReason = stopped ? "stopped" : "failed";
      if (!stopped) this.#note(error.message, { class: "error", role: "alert" });
    }
    this.node.setAttribute("aria-busy", "false");
    this.#showUsage(usage);
  }

  #receive(part, onGrids) {
    if (part.grids) {
      onGrids(part.grids);
      part.warnings.forEach((text) => this.#note(sentence(text), { class: "warning" }));
    }
    if (part.tilesLost) {
      const tiles = count(part.tilesLost, "tile");
      this.#note(`The figures were reduced by ${tiles}, because the conversation is long.`, { class: "warning" });
    }
    if (part.text) {
      this.text += part.text;
      this.#shown.append(part.text);
    }
  }

  #note(text, attributes) {
    this.#notes.append(element("p", attributes, text));
  }

  #showUsage({ promptTokens, imageTokens, answerTokens = 0, grids, finishReason }) {
    const parts = [];
    if (grids) {
      const images = imageTokens ? ` (${count(imageTokens, "image token")}, ${count(countTiles(grids), "tile")})` : "";
      parts.push(`prompt: ${count(promptTokens, "token")}${images}`, `answer: ${count(answerTokens, "token")}`);
    }
    if (ENDINGS[finishReason]) parts.push(ENDINGS[finishReason]);
    if (!finishReason && !this.text) parts.unshift(WAITING);
    this.#footer.replaceChildren(...parts.flatMap((part, i) => [i ? " · " : "", element("span", {}, part)]));
  }
}

export class Conversation {
  // Exchanges, each with the text of the question, the figures added with it, its answers (one per model), and its node.
  #items = [];
  #models;
  #figures;
  #settings;
  #onChange;
  #running = null; // AbortController of the answers in progress

  // `settings` returns the current settings of the page.
  constructor(models, figures, settings, onChange) {
    [this.#models, this.#figures, this.#settings, this.#onChange] = [models, figures, settings, onChange];
  }

  get running() { return this.#running !== null; }
  get empty() { return this.#items.length === 0; }
  // Whether each question has an answer of each model.
  get complete() { return this.#items.every(({ answers }) => answers.every((answer) => answer.complete)); }

  ask(text) {
    const node = element("section", { class: "exchange" });
    const exchange = { text, figures: this.#figures.unsent, answers: [], node };
    this.#items.push(exchange);
    byId("messages").append(exchange.node);
    this.#figures.mark(exchange.figures, true);
    return this.#answer(exchange);
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#running = null;
    this.#items = [];
    byId("messages").replaceChildren();
    this.#onChange();
  }

  // The conversation in the form that the server expects, without the answers.
  content() {
    return {
      system: this.#settings().system,
      questions: this.#items.map((exchange) => ({ text: exchange.text, images: exchange.figures.length })),
      images: this.#figures.sent.map((figure) => figure.data),
    };
  }

  // The answers of each model to the first questions.
  answers(end = this.#items.length) {
    return this.#models.map((_, model) => this.#items.slice(0, end).map((exchange) => exchange.answers[model].text));
  }

  async #answer(exchange) {
    const stopper = new AbortController();
    this.#running = stopper;
    exchange.answers = this.#models.map((model) => new Answer(model));
    this.#show(exchange);
    this.#onChange();
    announce("Answering");
    const content = { ...this.content(), ...this.#settings() };
    const earlier = this.answers(this.#items.length - 1);
    await Promise.all(exchange.answers.map((answer, model) => {
      const request = { ...content, model, answers: earlier[model] };
      return answer.run(request, stopper.signal, (grids) => {
        if (this.#running === stopper) this.#figures.use(model, grids);
      });
    }));
    if (this.#running !== stopper) return; // a new conversation has begun
    this.#running = null;
    keepingInView(exchange.node, () => this.#showActions(exchange));
    announce("Answered");
    this.#onChange();
  }

  #show(exchange) {
    document.querySelector(".actions")?.remove();
    const first = this.#figures.all.indexOf(exchange.figures[0]);
    const pictures = exchange.figures.map((figure, i) => element("figure", {},
      element("img", { src: figure.preview, alt: "" }), element("figcaption", {}, `Fig-${first + i}`)));
    exchange.node.replaceChildren(
      element("div", { class: "question" },
        ...(pictures.length ? [element("div", { class: "pictures" }, ...pictures)] : []),
        element("p", { class: "text" }, exchange.text)),
      element("div", { class: "answers" }, ...exchange.answers.map((answer) => answer.node)));
    exchange.node.scrollIntoView({ block: "end" });
  }

  // Only the last question can be asked again or changed.
  #showActions(exchange) {
    exchange.node.append(element("div", { class: "actions" },
      button("Ask again", () => this.#answer(exchange)),
      button("Change the question", () => this.#withdraw(exchange))));
  }

  #withdraw(exchange) {
    this.#items.pop();
    exchange.node.remove();
    this.#figures.mark(exchange.figures, false);
    const typed = byId("question").value;
    byId("question").value = typed ? `${exchange.text}\n${typed}` : exchange.text;
    byId("question").focus();
    if (!this.empty) this.#showActions(this.#items.at(-1));
    this.#onChange();
  }
}
