// The field in which one writes.

import { byId } from "./dom.js";

export class Composer {
  // `send(text)` returns whether the text was taken.
  constructor({ send, stop }) {
    this.field = byId("composer-text");
    const form = byId("composer");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.field.value.trim();
      if (text && send(text)) this.set("");
      this.field.focus();
    });
    byId("stop").addEventListener("click", () => {
      stop();
      this.field.focus();
    });
    this.field.addEventListener("keydown", (event) => {
      // While a word is being composed (Chinese, Japanese ...), Enter belongs to the input method.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    this.field.addEventListener("input", () => this.#fit());
  }

  set(text) {
    this.field.value = text;
    this.#fit();
  }

  focus() {
    this.field.focus();
    this.field.setSelectionRange(this.field.value.length, this.field.value.length);
  }

  showRunning(isRunning) {
    const hadFocus = document.activeElement === byId("stop");
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    if (hadFocus && !isRunning) this.field.focus();
  }

  // Browsers that know `field-sizing` do this themselves.
  #fit() {
    if (CSS.supports("field-sizing", "content")) return;
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }
}
