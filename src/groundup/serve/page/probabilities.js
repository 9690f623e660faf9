// An answer token by token, coloured by how likely the model found each; hover or focus shows what else it considered.

import { element } from "./dom.js";

export const ALTERNATIVES = 6;
// Probability below which a colour is used, the least likely first.
const BOUNDS = [0.1, 0.3, 0.5, 0.7, 0.9];
const percent = (probability) => (probability >= 0.9995 || probability < 0.0005 ? (probability * 100).toFixed(2) : (probability * 100).toFixed(1)) + " %";
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(nothing)";

// A token of the API as it is kept: {text, name, p, others: [[name, p]]}. The text of tokens that are no whole
// characters comes with the token that completes the character.
export class TokenReader {
  #decoder = new TextDecoder();

  read(token) {
    const text = token.bytes ? this.#decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.token;
    const others = (token.top_logprobs ?? []).map((other) => [other.token, Math.exp(other.logprob)]);
    return { text, name: token.token, p: Math.exp(token.logprob), others };
  }
}

export class TokensView {
  constructor(label) {
    this.shown = 0;
    this.root = element("div", { class: "tokens", role: "group", "aria-label": `${label}, token by token; the arrow keys go through it` });
    this.root.addEventListener("keydown", (event) => this.#onKey(event));
    this.root.addEventListener("pointerover", (event) => showCard(event.target.closest(".token")));
    this.root.addEventListener("pointerleave", hideCard);
    this.root.addEventListener("focusin", (event) => showCard(event.target.closest(".token")));
    this.root.addEventListener("focusout", hideCard);
  }

  update(tokens) {
    for (const token of tokens.slice(this.shown)) {
      const bucket = BOUNDS.findIndex((bound) => token.p < bound);
      // A token without text of its own (the end of the answer, part of a character) still has its probability.
      const mark = token.text === "" ? element("span", { class: "soft" }, "·") : token.text;
      const span = element("span", { class: bucket < 0 ? "token" : `token p${bucket}`, tabindex: this.shown ? "-1" : "0", role: "button", "aria-describedby": "token-card" }, mark);
      span.token = token;
      this.root.append(span);
      this.shown += 1;
    }
  }

  #onKey(event) {
    const spans = this.root.children;
    const at = [...spans].indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape" && card.isConnected) {
      hideCard();
      event.stopPropagation();
    }
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    spans[at].tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  }
}

const card = element("div", { id: "token-card", role: "tooltip" });

let shown = null;

function showCard(span) {
  if (!span) return;
  shown = span;
  const { name, p, others } = span.token;
  const rows = others.map(([other, share]) => {
    const bar = element("span", { class: "share" });
    bar.style.width = `${share * 100}%`;
    return element("div", { class: other === name ? "row chosen" : "row" }, bar, element("code", {}, visible(other)), element("span", {}, percent(share)));
  });
  card.replaceChildren(element("h3", {}, element("code", {}, visible(name)), element("span", {}, percent(p))), ...rows);
  document.body.append(card);
  placeCard();
}

// Beside its token, wherever that is by now.
export function placeCard() {
  if (!shown?.isConnected) {
    hideCard();
    return;
  }
  const [{ left, bottom, top }] = [...shown.getClientRects()].slice(-1);
  const hasRoom = window.innerHeight - bottom > card.offsetHeight + 12;
  card.style.left = `${Math.max(8, Math.min(left, window.innerWidth - card.offsetWidth - 8))}px`;
  card.style.top = `${hasRoom ? bottom + 6 : top - card.offsetHeight - 6}px`;
}

export function hideCard() {
  shown = null;
  card.remove();
}

export function legend() {
  const labels = ["< 10 %", "< 30 %", "< 50 %", "< 70 %", "< 90 %"];
  return ["How likely each token was:", ...labels.map((label, bucket) => element("span", { class: `p${bucket}` }, label))];
}
