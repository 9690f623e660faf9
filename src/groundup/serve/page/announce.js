// Reads streamed answers out to screen readers: whole sentences, not every token.

import { byId } from "./dom.js";

const LEAST_MS = 1200;
const waiting = [];
let timer = null;

export function announce(text) {
  waiting.push(text);
  timer ??= setTimeout(speak, 50);
}

function speak() {
  byId("announcer").textContent = waiting.splice(0).join(" ");
  timer = setTimeout(() => {
    timer = null;
    if (waiting.length) speak();
  }, LEAST_MS);
}

// Follows one growing answer.
export class Narrator {
  #said = 0;

  follow(text) {
    const rest = text.slice(this.#said);
    const end = rest.search(/[.!?:\n][^.!?:\n]*$/) + 1;
    if (end <= 0) return;
    announce(rest.slice(0, end).trim());
    this.#said += end;
  }

  end(text, how) {
    announce(`${text.slice(this.#said).trim()} ${how}`);
  }
}
