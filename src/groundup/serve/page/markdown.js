// Answers as HTML. The server makes it and lets only a few harmless elements through; here it is asked for seldom while
// an answer grows, and what came since is shown as plain text behind it.

import { renderMarkdown } from "./api.js";
import { copyText, element } from "./dom.js";
import { highlight } from "./highlight.js";

const CACHED = 200;
const BATCH_CHARACTERS = 60_000;
const BATCH_TEXTS = 32;
const LEAST_WAIT_MS = 150;

const cache = new Map();
let batch = [];

// HTML of a text; all that is asked for within one task goes into few requests.
function htmlOf(text) {
  if (cache.has(text)) return cache.get(text);
  const promise = new Promise((resolve, reject) => {
    if (!batch.length) queueMicrotask(sendBatch);
    batch.push({ text, resolve, reject });
  });
  cache.set(text, promise);
  promise.catch(() => cache.delete(text));
  if (cache.size > CACHED) cache.delete(cache.keys().next().value);
  return promise;
}

function sendBatch() {
  const waiting = batch;
  batch = [];
  while (waiting.length) {
    let characters = 0;
    let count = 0;
    while (count < Math.min(waiting.length, BATCH_TEXTS) && (count === 0 || characters + waiting[count].text.length <= BATCH_CHARACTERS)) {
      characters += waiting[count++].text.length;
    }
    const part = waiting.splice(0, count);
    renderMarkdown(part.map(({ text }) => text)).then(
      (html) => part.forEach(({ resolve }, place) => resolve(html[place])),
      (error) => part.forEach(({ reject }) => reject(error)),
    );
  }
}

export class MarkdownView {
  constructor() {
    this.root = element("div", { class: "text" });
    this.tail = element("span", { class: "tail" });
    this.text = "";
    this.rendered = "";
    this.timer = null;
    this.lastMs = 0;
  }

  // Shows the text as it is so far; the newest words at once, their form a little later.
  update(text) {
    this.text = text;
    this.#showTail();
    this.timer ??= setTimeout(() => this.#render(), Math.max(LEAST_WAIT_MS, 3 * this.lastMs));
  }

  finish(text) {
    this.text = text;
    if (this.rendered !== text) this.#showTail();
    clearTimeout(this.timer);
    return this.#render();
  }

  #showTail() {
    if (!this.text.startsWith(this.rendered)) this.#replace("", document.createDocumentFragment());
    this.tail.textContent = this.text.slice(this.rendered.length);
    if (!this.tail.isConnected || this.tail.parentNode === null) this.#placeFor().append(this.tail);
  }

  // Where text that continues the rendered part most likely belongs.
  #placeFor() {
    let place = this.root.lastElementChild;
    if (!place || /\n\s*\n\s*$/.test(this.rendered)) return this.root;
    const code = place.querySelector("code");
    if (place.classList.contains("code")) return code;
    while (["UL", "OL", "LI", "BLOCKQUOTE"].includes(place.tagName) && place.lastElementChild) place = place.lastElementChild;
    return ["P", "LI"].includes(place.tagName) ? place : this.root;
  }

  async #render() {
    const { text } = this;
    const start = performance.now();
    let html;
    try {
      html = await htmlOf(text);
    } catch {
      // The server is busy or gone: the text is all there, and the next try may succeed.
      this.timer = null;
      return;
    }
    this.lastMs = performance.now() - start;
    this.timer = null;
    // The only place where HTML enters the page; it comes from /page/render, whose allow-list has no script.
    const template = document.createElement("template");
    template.innerHTML = html;
    decorate(template.content);
    this.#replace(text, template.content);
    if (this.text !== text) this.update(this.text);
  }

  // Leaves the blocks at the beginning that are as they were: a selection in them stays.
  #replace(rendered, fragment) {
    this.tail.remove();
    this.rendered = rendered;
    const fresh = [...fragment.childNodes];
    const old = [...this.root.childNodes];
    let same = 0;
    while (same < fresh.length && same < old.length && old[same].isEqualNode(fresh[same])) same += 1;
    for (const node of old.slice(same)) node.remove();
    this.root.append(...fresh.slice(same));
  }
}

function decorate(fragment) {
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    if (!code) continue;
    const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
    highlight(code, language);
    pre.tabIndex = 0;
    const head = element("div", { class: "code-head" }, element("span", {}, language),
      element("button", { type: "button", class: "quiet-button", "data-copy": true }, "Copy"));
    const frame = element("div", { class: "code" }, head);
    pre.replaceWith(frame);
    frame.append(pre);
  }
}

export function onCopyClick(event) {
  const button = event.target.closest("[data-copy]");
  if (button) copyText(button.closest(".code").querySelector("code").textContent, button);
}
