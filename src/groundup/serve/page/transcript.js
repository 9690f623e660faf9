// The conversation on the screen: its turns in order, two answers side by side where one is to be chosen.

import { branchPlace, openPair, path } from "./conversation.js";
import { element, iconButton, reconcile } from "./dom.js";
import { runs } from "./generate.js";
import { AnswerView, QuestionView } from "./turns.js";

export class Transcript {
  constructor(host, actions, afterFrame) {
    Object.assign(this, { host, actions, afterFrame, conversation: null, showsTokens: false });
    this.views = new Map();
    this.frames = new Map();
    this.dirty = new Set();
  }

  // Draws the whole conversation; elements of turns that are there already stay.
  show(conversation) {
    if (this.conversation !== conversation) {
      this.views.clear();
      this.frames.clear();
      this.conversation = conversation;
      this.host.replaceChildren();
    }
    reconcile(this.host, path(conversation).map((turn) => this.#elementOf(turn)));
  }

  // One turn has grown: it is drawn with the next frame.
  changed(turn) {
    if (!this.dirty.size) requestAnimationFrame(() => this.#draw());
    this.dirty.add(turn);
  }

  #draw() {
    for (const turn of this.dirty) if (this.views.has(turn.id)) this.#update(turn);
    this.dirty.clear();
    this.afterFrame();
  }

  viewOf(turn) {
    return this.views.get(turn.id);
  }

  #viewFor(turn) {
    if (!this.views.has(turn.id)) {
      const View = turn.role === "user" ? QuestionView : AnswerView;
      this.views.set(turn.id, new View(this.conversation, turn, this.actions));
    }
    return this.#update(turn);
  }

  #update(turn) {
    const view = this.views.get(turn.id);
    const pair = openPair(this.conversation, turn);
    const side = pair ? String(pair.nodes.indexOf(turn.id) + 1) : null;
    const isHidden = pair?.isBlind;
    view.update({ name: isHidden ? `Answer ${side}` : turn.model ?? "Answer", side, showsTokens: this.showsTokens });
    return view;
  }

  #elementOf(turn) {
    const pair = openPair(this.conversation, turn);
    if (!pair) return this.#viewFor(turn).root;
    if (!this.frames.has(turn.pair)) {
      this.frames.set(turn.pair, element("section", { class: "pair", "aria-label": "Two answers to compare" }));
    }
    const frame = this.frames.get(turn.pair);
    const roots = pair.nodes.map((id) => this.#viewFor(this.conversation.nodes[id]).root);
    reconcile(frame, [...roots, this.#pairTools(turn, frame)]);
    return frame;
  }

  #pairTools(turn, frame) {
    const tools = frame.querySelector(".pair-tools") ?? element("div", { class: "pair-tools" });
    const pair = this.conversation.pairs[turn.pair];
    if (pair.nodes.some((id) => runs.has(id))) tools.replaceChildren();
    else {
      const { options, place } = branchPlace(this.conversation, turn);
      const step = (name, label, by) => iconButton(name, label, () => this.actions.step(turn, by), { disabled: !options[place + by] });
      tools.replaceChildren(
        ...(options.length > 1 ? [step("left", "Previous version", -1), `${place + 1}/${options.length}`, step("right", "Next version", 1)] : []),
        element("button", { type: "button", class: "quiet-button", onclick: () => this.actions.regenerate(turn) }, "Ask both again"));
    }
    return tools;
  }
}
