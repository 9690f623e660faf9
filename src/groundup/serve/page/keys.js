// Everything by keyboard: what each key does, and the overlay that tells it.

import { byId, element } from "./dom.js";
import { preferences } from "./preferences.js";

const ALWAYS = [
  ["Write", [
    ["Send", ["Enter"]], ["New line", ["Shift", "Enter"]], ["Edit the last question, in an empty field", ["↑"]],
    ["Stop the answer; leave the field", ["Esc"]]]],
  ["Anywhere", [["Search conversations", ["Ctrl", "K"]], ["New chat", ["Alt", "N"]]]],
  ["In the list of conversations", [["Move", ["↑", "↓"]], ["Open", ["Enter"]], ["Rename", ["F2"]], ["Delete, with a way back", ["Del"]]]],
  ["Among tokens", [["Next, previous", ["→", "←"]], ["First, last", ["Home", "End"]]]],
];

const isField = (target) => target.matches?.("input:not([type=checkbox], [type=range]), textarea, select");

export class Keys {
  // `singles`: [section, [[meaning, key, run]]]; `others`: {search, newChat, escape, editLast}.
  constructor(singles, others) {
    this.byKey = new Map(singles.flatMap(([, rows]) => rows.map(([, key, run]) => [key, run])));
    this.others = others;
    const shown = singles.map(([title, rows]) => [title, rows.map(([meaning, key]) => [meaning, [key]])]);
    byId("help-body").append(...[...shown, ...ALWAYS].map(([title, rows]) => section(title, rows)));
    byId("single-keys").checked = preferences.singleKeys;
    byId("single-keys").addEventListener("change", (event) => {
      preferences.singleKeys = event.target.checked;
    });
    document.addEventListener("keydown", (event) => this.#onKey(event));
  }

  #onKey(event) {
    if (event.defaultPrevented || event.isComposing) return;
    const run = this.#find(event);
    if (!run || run() === false) return;
    event.preventDefault();
  }

  #find(event) {
    const { key, target } = event;
    const hasDialog = document.querySelector("dialog[open]");
    if (key === "Escape") return hasDialog ? null : () => this.others.escape(isField(target));
    if (hasDialog) return null;
    if ((event.ctrlKey || event.metaKey) && !event.altKey && key.toLowerCase() === "k") return this.others.search;
    if (event.altKey && !event.ctrlKey && event.code === "KeyN") return this.others.newChat;
    if (event.ctrlKey || event.metaKey || event.altKey) return null;
    if (target === byId("composer-text") && key === "ArrowUp" && !target.value) return this.others.editLast;
    if (isField(target) || !preferences.singleKeys) return null;
    return this.byKey.get(key);
  }
}

function section(title, rows) {
  const lines = rows.flatMap(([meaning, keys]) => [element("dt", {}, meaning), element("dd", {}, ...keys.flatMap((key) => [" ", element("kbd", {}, key)]))]);
  return element("section", {}, element("h3", {}, title), element("dl", {}, ...lines));
}
