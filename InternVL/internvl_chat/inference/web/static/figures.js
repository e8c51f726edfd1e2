// The figures of the conversation: added by drop, paste or file picker, numbered, and shown with their tiles.

import { describeImage, planTiles } from "./api.js";
import { announce, button, byId, count, element } from "./elements.js";

const tilesOf = ([columns, rows, thumbnail]) => columns * rows + thumbnail;

export function countTiles(grids) {
  return grids.reduce((sum, grid) => sum + tilesOf(grid), 0);
}

function describeGrid([columns, rows, thumbnail]) {
  if (columns * rows === 1) return "1 tile";
  return `${columns} × ${rows} tiles${thumbnail ? " + thumbnail" : ""}`;
}

// An image under the outlines of its tiles.
function stage(figure, alt) {
  const [columns, rows] = figure.grids[0] ?? [1, 1];
  const grid = element("div", { class: "grid", "aria-hidden": "true" });
  grid.style.setProperty("--columns", columns);
  if (columns * rows > 1) grid.append(...Array.from({ length: columns * rows }, () => element("span")));
  return element("div", { class: "stage" }, element("img", { src: figure.preview, alt }), grid);
}

function readBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

export class Figures {
  // Each item: name, data (base64), bytes, width, height, preview, warnings, grids (one per model), and sent
  // (whether it belongs to a question).
  #items = [];
  #config;
  #onChange;
  #queue = Promise.resolve();
  #adding = 0; // number of batches of files in progress
  #version = 0; // of the tile plan

  constructor(config, onChange) {
    [this.#config, this.#onChange] = [config, onChange];
    byId("show-tiles").addEventListener("change", (event) =>
      document.body.classList.toggle("no-tiles", !event.target.checked));
  }

  get adding() { return this.#adding > 0; }
  get all() { return this.#items; }
  get sent() { return this.#items.filter((figure) => figure.sent); }
  get unsent() { return this.#items.filter((figure) => !figure.sent); }

  // Add files one after the other, so that they are numbered in the given order.
  add(files) {
    byId("figure-errors").replaceChildren();
    const items = this.#items;
    this.#adding += 1;
    this.#onChange();
    this.#queue = this.#queue.then(async () => {
      for (const file of files) {
        if (items !== this.#items) break; // a new conversation has begun
        await this.#addOne(file, items);
      }
      await this.#plan();
      this.#adding -= 1;
      this.#onChange();
    });
    return this.#queue;
  }

  async #addOne(file, items) {
    try {
      items.push(await this.#describe(file));
      this.#show();
    } catch (error) {
      this.#fail(error);
    }
  }

  async #describe(file) {
    const { maxImages, maxBytes } = this.#config;
    const bytes = this.#items.reduce((sum, figure) => sum + figure.bytes, file.size);
    if (this.#items.length >= maxImages) {
      throw new Error(`${file.name} was not added: a conversation is limited to ${count(maxImages, "figure")}.`);
    }
    if (bytes > maxBytes) {
      const limit = Math.floor(maxBytes / 2 ** 20);
      throw new Error(`${file.name} was not added: the figures of a conversation are limited to ${limit} MB.`);
    }
    const data = await readBase64(file);
    const described = await describeImage(file, file.name);
    announce(`Fig-${this.#items.length} added: ${file.name}`);
    return { name: file.name, data, bytes: file.size, grids: [], sent: false, ...described };
  }

  #fail(error) {
    byId("figure-errors").append(element("p", {}, error.message));
  }

  #remove(figure) {
    this.#items.splice(this.#items.indexOf(figure), 1);
    byId("figure-errors").replaceChildren();
    byId("picker").focus(); // the button is gone
    return this.#plan();
  }

  clear() {
    this.#items = [];
    byId("figure-errors").replaceChildren();
    return this.#plan();
  }

  mark(figures, sent) {
    figures.forEach((figure) => { figure.sent = sent; });
    this.#show();
  }

  // Plan the tiles, which depend on the number of figures.
  async #plan() {
    const version = ++this.#version;
    const items = this.#items;
    if (items.length) {
      try {
        const plans = await planTiles(items.map(({ width, height }) => [width, height]));
        if (version !== this.#version) return;
        items.forEach((figure, i) => { figure.grids = plans.map((grids) => grids[i]); });
      } catch (error) {
        this.#fail(error);
      }
    }
    this.#show();
  }

  // Show the grids that a model uses for the figures sent; a long conversation gets fewer tiles than planned.
  use(model, grids) {
    this.sent.forEach((figure, i) => { figure.grids[model] = grids[i]; });
    this.#show();
  }

  #show() {
    byId("figure-list").replaceChildren(...this.#items.map((figure, i) => this.#row(figure, `Fig-${i}`)));
    byId("plan").textContent = this.#summary();
    this.#onChange();
  }

  // One line if all models have the same text, otherwise one per model.
  #perModel(texts) {
    if (new Set(texts).size < 2) return texts.slice(0, 1);
    return texts.map((text, model) => `${this.#config.models[model]}: ${text}`);
  }

  #summary() {
    const planned = this.#items.filter((figure) => figure.grids.length);
    if (!planned.length) return "";
    const texts = this.#config.tokensPerTile.map((tokens, model) => {
      const tiles = countTiles(planned.map((figure) => figure.grids[model]));
      return `${count(tiles, "tile")}, ${count(tiles * tokens, "image token")}`;
    });
    const lines = this.#perModel(texts);
    return [count(planned.length, "figure"), ...lines].join(lines.length === 1 ? ": " : "\n");
  }

  #row(figure, label) {
    const tiles = this.#perModel(figure.grids.map(describeGrid));
    const alt = [`${label}: ${figure.name}`, ...tiles].join(", ");
    const enlarge = button("", () => this.#enlarge(figure, `${label}: ${figure.name}`), {
      class: "enlarge", title: "Enlarge",
    });
    enlarge.append(stage(figure, alt));
    const remove = button("Remove", () => this.#remove(figure), { "aria-label": `Remove ${label}` });
    return element("li", {},
      enlarge,
      element("div", { class: "caption" },
        element("b", {}, label),
        element("span", { class: "name", title: figure.name }, figure.name),
        element("span", { class: "muted" }, `${figure.width} × ${figure.height} pixels`),
        ...tiles.map((text) => element("span", { class: "muted" }, text)),
        ...figure.warnings.map((text) => element("span", { class: "warning" }, `${text}.`)), // begins with the name
        figure.sent ? "" : remove));
  }

  #enlarge(figure, title) {
    const viewer = byId("viewer");
    viewer.querySelector(".stage").replaceWith(stage(figure, title));
    byId("viewer-name").textContent = title;
    viewer.showModal();
  }
}
