// How one turn looks: a question that can be edited, an answer with its form, its numbers and what can be done with it.

import { branchPlace, openPair } from "./conversation.js";
import { copyText, element, iconButton } from "./dom.js";
import { runs } from "./generate.js";
import { MarkdownView } from "./markdown.js";
import { TokensView } from "./probabilities.js";

const number = new Intl.NumberFormat("en");

function branchButtons(conversation, turn, actions) {
  const { options, place } = branchPlace(conversation, turn);
  if (options.length < 2) return null;
  const step = (by) => () => actions.step(turn, by);
  return element("span", { class: "branches", role: "group", "aria-label": "Versions" },
    iconButton("left", "Previous version", step(-1), { disabled: place === 0, title: "Previous version ([)", "data-step": "-1" }),
    element("span", { "aria-label": `Version ${place + 1} of ${options.length}` }, `${place + 1}/${options.length}`),
    iconButton("right", "Next version", step(1), { disabled: place === options.length - 1, title: "Next version (])", "data-step": "1" }));
}

// Replaces the buttons only when they differ: the one that has the focus keeps it.
function fill(host, key, make) {
  if (host.dataset.key === key) return;
  const step = document.activeElement?.closest?.("[data-step]");
  const wanted = step && host.contains(step) ? step.dataset.step : null;
  host.dataset.key = key;
  host.replaceChildren(...make().filter(Boolean));
  if (wanted) (host.querySelector(`[data-step="${wanted}"]:enabled`) ?? host.querySelector("[data-step]:enabled"))?.focus();
}

export class QuestionView {
  constructor(conversation, turn, actions) {
    Object.assign(this, { conversation, turn, actions });
    this.said = element("div", { class: "said" }, turn.content);
    this.tools = element("div", { class: "tools" });
    this.root = element("article", { class: "turn user", tabindex: "-1", "aria-label": "You" }, this.said, this.tools);
  }

  update() {
    const { conversation, turn, actions } = this;
    const { options, place } = branchPlace(conversation, turn);
    fill(this.tools, `${place}/${options.length}`, () => [
      branchButtons(conversation, turn, actions),
      iconButton("edit", "Edit the question", () => this.edit(), { title: "Edit (e)" }),
      iconButton("copy", "Copy the question", (event) => copyText(turn.content, event.currentTarget)),
    ]);
  }

  edit() {
    if (this.root.classList.contains("editing")) return;
    const field = element("textarea", { "aria-label": "Edit the question", rows: "2" });
    field.value = this.turn.content;
    const end = () => {
      this.root.classList.remove("editing");
      form.replaceWith(this.said, this.tools);
    };
    const cancel = () => {
      end();
      this.root.focus();
    };
    const form = element("form", { class: "edit-form", onsubmit: (event) => {
      event.preventDefault();
      if (!field.value.trim()) return;
      end();
      this.actions.edit(this.turn, field.value);
    } }, field, element("div", {}, element("button", { type: "button", class: "secondary", onclick: cancel }, "Cancel"),
      element("button", { type: "submit", class: "primary" }, "Ask again")));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) form.requestSubmit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.root.classList.add("editing");
    this.root.replaceChildren(form);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

export class AnswerView {
  constructor(conversation, turn, actions) {
    Object.assign(this, { conversation, turn, actions });
    this.markdown = null;
    this.tokens = null;
    this.speaker = element("div", { class: "speaker" });
    this.body = element("div", { class: "body" });
    this.remark = element("div", {});
    this.tools = element("div", { class: "tools" });
    this.root = element("article", { class: "turn answer", tabindex: "-1" }, this.speaker, this.body, this.remark, this.tools);
  }

  // `name`: how the one who answers is called; `side`: "1" or "2" while the answer is one of two to choose from.
  update({ name, side, showsTokens }) {
    const run = runs.get(this.turn.id);
    this.root.setAttribute("aria-label", name);
    this.root.setAttribute("aria-busy", String(Boolean(run)));
    this.speaker.textContent = name;
    this.#showBody(run, showsTokens);
    this.#showRemark(run, showsTokens);
    this.#showTools(run, side);
  }

  #showBody(run, showsTokens) {
    const { turn } = this;
    if (showsTokens && turn.tokens?.length) {
      this.tokens ??= new TokensView("Answer");
      this.tokens.update(turn.tokens);
      this.#place(this.tokens.root);
    } else if (turn.content) {
      this.markdown ??= new MarkdownView();
      if (run) this.markdown.update(turn.content);
      else if (this.markdown.rendered !== turn.content) this.markdown.finish(turn.content);
      this.#place(this.markdown.root);
    } else if (run) {
      this.waiting ??= element("div", { class: "waiting", role: "img", "aria-label": "Waiting for the answer" }, element("i"), element("i"), element("i"));
      this.#place(this.waiting);
    } else this.body.replaceChildren();
  }

  #place(content) {
    if (this.body.firstChild !== content || this.body.childNodes.length > 1) this.body.replaceChildren(content);
  }

  #showRemark(run, showsTokens) {
    const { turn, actions } = this;
    const said = this.#remarkText(run, showsTokens);
    fill(this.remark, said ?? "", () => {
      if (!said) return [];
      const retry = element("button", { type: "button", class: "secondary", onclick: () => actions.regenerate(turn) }, "Try again");
      const key = turn.error?.kind === "key" ? element("button", { type: "button", class: "secondary", onclick: actions.askKey }, "Enter the key") : null;
      const isRetried = !run && ["error", "interrupted"].includes(turn.finish);
      return [element("p", {}, said), key, isRetried ? retry : null];
    });
    this.remark.className = said ? (turn.finish === "error" ? "remark error" : "remark") : "";
    this.remark.setAttribute("role", turn.finish === "error" ? "alert" : "note");
  }

  #remarkText(run, showsTokens) {
    const { turn } = this;
    if (run) return run.waitSeconds ? `The server is busy. Trying again in ${run.waitSeconds} s.` : null;
    if (turn.finish === "error") {
      const { message = "The answer failed.", remedy = "" } = turn.error ?? {};
      return `${message} ${remedy}`.trim();
    }
    if (turn.finish === "interrupted") return "The page was left before this answer was complete.";
    if (turn.finish === "length") {
      return turn.isContextFull
        ? "The context of the model is full, so the answer ends here. Start a new chat, or go back to an earlier question and edit it."
        : "The answer reached its greatest length. Raise Longest answer in the parameters and ask again for a longer one.";
    }
    if (turn.finish === "stopped" && !turn.content) return "Stopped before the first word.";
    if (showsTokens && !turn.tokens && turn.content) return "This answer came without probabilities; another answer to the question will have them.";
    return null;
  }

  #showTools(run, side) {
    const { conversation, turn, actions } = this;
    const pair = turn.pair && conversation.pairs[turn.pair];
    // Speed would tell which model it is.
    const stats = side && pair.isBlind ? "" : statsText(turn, run);
    const { options, place } = branchPlace(conversation, turn);
    fill(this.tools, JSON.stringify([stats, Boolean(run), place, options.length, side, pair?.preferred]), () => {
      const numbers = element("span", { class: "stats" }, stats);
      if (run) return [numbers];
      const copy = iconButton("copy", "Copy the answer", (event) => copyText(turn.content, event.currentTarget), { title: "Copy (y)", disabled: !turn.content });
      if (side) return [copy, numbers];
      return [branchButtons(conversation, turn, actions), copy,
        iconButton("again", "Another answer", () => actions.regenerate(turn), { title: "Another answer (r)" }),
        pair ? iconButton("columns", "Show both answers again", () => actions.reopen(turn)) : null, numbers];
    });
    const isReady = side && !run && openPair(conversation, turn) && turn.content;
    if (isReady && !this.pick) {
      this.pick = element("button", { type: "button", class: "secondary pick", onclick: () => actions.pick(turn) }, "Go on with this one", element("kbd", {}, side));
      this.root.append(this.pick);
    } else if (!isReady && this.pick) {
      this.pick.remove();
      this.pick = null;
    }
  }
}

function statsText({ stats, finish }, run) {
  if (!stats) return "";
  const parts = [`${number.format(stats.tokens)} tokens`];
  if (stats.rate) parts.push(`${stats.rate.toFixed(1)} tokens/s`);
  parts.push(`first after ${(stats.firstMs / 1000).toFixed(2)} s`);
  if (!run && finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}
