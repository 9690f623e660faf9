// The list of conversations: by day, with search, renaming and deletion.

import { byId, element, iconButton } from "./dom.js";
import { list, search } from "./store.js";

const DAY_MS = 86_400_000;

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  return time >= midnight - 7 * DAY_MS ? "Last seven days" : "Earlier";
}

export class Sidebar {
  // `actions`: open(id), rename(id, title), remove(id).
  constructor(actions) {
    this.actions = actions;
    this.current = null;
    this.found = null;
    this.host = byId("conversations");
    this.host.addEventListener("keydown", (event) => this.#onKey(event));
    byId("search").addEventListener("input", () => this.#search());
    byId("search").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") this.host.querySelector(".title")?.focus();
    });
  }

  async #search() {
    const query = byId("search").value.trim();
    const found = query ? await search(query, () => byId("search").value.trim() === query) : null;
    if (byId("search").value.trim() !== query) return;
    this.found = found;
    this.show(this.current);
  }

  show(current) {
    this.current = current;
    // A name that is being typed must not lose its field to an answer that arrives.
    if (this.host.querySelector("input")) return;
    const focused = document.activeElement?.closest?.(".conversation")?.dataset.id;
    const shown = list().filter(({ id }) => !this.found || this.found.has(id));
    const days = Map.groupBy(shown, ({ updated }) => dayOf(updated));
    const parts = [...days].flatMap(([day, heads]) => [element("h2", {}, day), element("ul", {}, ...heads.map((head) => this.#item(head)))]);
    if (!parts.length) parts.push(element("p", { class: "side-note" }, this.found ? "Nothing is found." : "Your conversations will be listed here. They stay in this browser."));
    this.host.replaceChildren(...parts);
    if (focused) this.#title(focused)?.focus();
  }

  #title(id) {
    return this.host.querySelector(`[data-id="${CSS.escape(id)}"] .title`);
  }

  #item({ id, title }) {
    const name = title || "New chat";
    const found = this.found?.get(id);
    const button = element("button", { type: "button", class: "title", title: name, "aria-current": id === this.current && "true", onclick: () => this.actions.open(id) },
      name, found ? element("span", { class: "found" }, found) : null);
    return element("li", { class: id === this.current ? "conversation current" : "conversation", "data-id": id }, button,
      element("span", { class: "tools" },
        iconButton("edit", `Rename ${name}`, () => this.rename(id), { title: "Rename (F2)" }),
        iconButton("delete", `Delete ${name}`, () => this.remove(id), { title: "Delete (Delete key)" })));
  }

  remove(id) {
    const titles = [...this.host.querySelectorAll(".title")];
    const place = titles.findIndex((title) => title.parentNode.dataset.id === id);
    const next = (titles[place + 1] ?? titles[place - 1])?.parentNode.dataset.id;
    this.actions.remove(id);
    if (next) this.#title(next)?.focus();
    else byId("new-chat").focus();
  }

  rename(id) {
    const item = this.#title(id).parentNode;
    const before = this.#title(id).title;
    const input = element("input", { type: "text", "aria-label": "New name", maxlength: "200" });
    input.value = before;
    let isOver = false;
    const end = (title) => {
      if (isOver) return;
      isOver = true;
      input.remove();
      this.show(this.current);
      this.#title(id)?.focus();
      if (title && title !== before) this.actions.rename(id, title);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(input.value.trim());
      if (event.key === "Escape") end(null);
      event.stopPropagation();
    });
    input.addEventListener("blur", () => end(input.value.trim()));
    item.replaceChildren(input);
    input.select();
  }

  #onKey(event) {
    const titles = [...this.host.querySelectorAll(".title")];
    const at = titles.indexOf(document.activeElement);
    if (at < 0) return;
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: titles.length - 1 }[event.key];
    const { id } = titles[at].parentNode.dataset;
    if (to !== undefined) (titles[to] ?? (to < 0 ? byId("search") : titles[at])).focus();
    else if (event.key === "F2") this.rename(id);
    else if (event.key === "Delete") this.remove(id);
    else return;
    event.preventDefault();
  }
}
