// The conversation that is open, and what one can do in it. Answers go on being written when another one is opened.

import { announce, Narrator } from "./announce.js";
import { addPair, addTurn, branchPlace, choose, newConversation, openPair, path, prefer } from "./conversation.js";
import { generate, runs } from "./generate.js";
import { notify } from "./notices.js";
import { preferences } from "./preferences.js";
import { load, save } from "./store.js";

const SAVE_MS = 1000;

export class Session {
  // `show()` draws the whole conversation again, `changed(turn)` one turn; `askKey()` opens the dialog for the key.
  constructor({ show, changed, askKey }) {
    Object.assign(this, { show, changed, askKey });
    this.models = [];
    this.conversation = null;
    this.live = new Map();
    this.saves = new Map();
  }

  // A conversation that is kept only when something is said in it.
  fresh() {
    const names = this.models.map(({ name }) => name);
    const model = names.includes(preferences.model) ? preferences.model : names[0] ?? null;
    this.conversation = newConversation({ model, parameters: preferences.parameters });
    this.show();
  }

  async open(id) {
    const conversation = this.live.get(id) ?? (await load(id));
    if (!conversation) return;
    for (const turn of Object.values(conversation.nodes)) {
      if (turn.finish === null && !runs.has(turn.id)) turn.finish = "interrupted";
    }
    this.conversation = conversation;
    this.#checkModels();
    this.show();
  }

  // Models come and go with the server; a conversation outlives them.
  #checkModels() {
    const { conversation } = this;
    const names = this.models.map(({ name }) => name);
    if (!names.length) return;
    if (!names.includes(conversation.model)) {
      if (conversation.model) notify(`${conversation.model} is not loaded now. The conversation goes on with ${names[0]}.`);
      [conversation.model] = names;
    }
    if (conversation.second && !names.includes(conversation.second)) conversation.second = null;
  }

  setModels(models) {
    this.models = models;
    if (this.conversation) this.#checkModels();
  }

  contextOf(name) {
    return this.models.find((model) => model.name === name)?.context ?? null;
  }

  runningTurns() {
    return Object.values(this.conversation.nodes).filter((turn) => runs.has(turn.id));
  }

  stop() {
    const turns = this.runningTurns();
    for (const turn of turns) runs.get(turn.id).stop();
    return turns.length > 0;
  }

  // Why nothing can be sent now, as a sentence; null when something can.
  obstacle() {
    const last = path(this.conversation).at(-1);
    if (!this.models.length) return "No model is there to answer. Is the server running?";
    if (this.runningTurns().length) return "An answer is being written. Stop it first (Escape).";
    if (last && openPair(this.conversation, last)) return "Choose the answer to go on with (1 or 2).";
    if (last?.role === "assistant" && !last.content.trim()) return "The last question has no answer yet. Try it again, or edit it.";
    return null;
  }

  send(text) {
    const last = path(this.conversation).at(-1);
    // A question without any answer (all were refused, the page was left) is asked in the new words.
    const parent = last?.role === "user" ? last.parent : last?.id ?? null;
    this.#ask(addTurn(this.conversation, parent, "user", text));
  }

  edit(question, text) {
    if (this.runningTurns().length) this.stop();
    this.#ask(addTurn(this.conversation, question.parent, "user", text));
  }

  #ask(question) {
    const { conversation } = this;
    if (conversation.second) this.#run(addPair(conversation, question, [conversation.model, conversation.second], preferences.blind));
    else this.#run([addTurn(conversation, question.id, "assistant", "", { model: conversation.model, finish: null })]);
  }

  regenerate(answer) {
    const { conversation } = this;
    if (runs.has(answer.id)) return;
    const question = conversation.nodes[answer.parent];
    const hasFailed = answer.finish === "error" || answer.finish === "interrupted" || !answer.content;
    if (hasFailed) {
      Object.assign(answer, { content: "", tokens: undefined, stats: undefined, error: undefined });
      // Of two answers to compare, the other one stays what it is; elsewhere the model may be another one by now.
      if (!openPair(conversation, answer)) answer.model = conversation.model;
      this.#run([answer]);
    } else if (openPair(conversation, answer) || conversation.second) this.#ask(question);
    else this.#run([addTurn(conversation, question.id, "assistant", "", { model: conversation.model, finish: null })]);
  }

  step(turn, by) {
    const { options, place } = branchPlace(this.conversation, turn);
    if (!options[place + by]) return;
    choose(this.conversation, options[place + by]);
    this.#keep();
    announce(`Version ${place + by + 1} of ${options.length}`);
  }

  pick(answer) {
    prefer(this.conversation, answer);
    announce("Chosen.");
    this.#keep();
  }

  reopen(answer) {
    this.conversation.pairs[answer.pair].preferred = null;
    this.#keep();
  }

  // New settings of the conversation.
  change(values) {
    Object.assign(this.conversation, values);
    if (path(this.conversation).length) this.save(this.conversation);
  }

  #keep() {
    this.save(this.conversation);
    this.show();
  }

  #run(answers) {
    const { conversation } = this;
    this.live.set(conversation.id, conversation);
    const finished = answers.map((answer) => this.#runOne(conversation, answer, answers.length === 1));
    this.show();
    this.save(conversation);
    Promise.all(finished).then(() => {
      if (!Object.values(conversation.nodes).some((turn) => runs.has(turn.id))) this.live.delete(conversation.id);
      this.save(conversation, 0);
      if (this.conversation === conversation) this.show();
      if (answers.length > 1) announce("Both answers are complete. Choose with 1 or 2.");
      if (answers.some((answer) => answer.error?.kind === "key")) this.askKey();
    });
  }

  async #runOne(conversation, answer, isAlone) {
    const narrator = new Narrator();
    await generate(conversation, answer, {
      probabilities: preferences.probabilities,
      context: this.contextOf(answer.model),
      changed: (turn) => {
        if (isAlone && turn.finish === null) narrator.follow(turn.content);
        this.save(conversation);
        if (this.conversation === conversation) this.changed(turn);
      },
    });
    if (isAlone) narrator.end(answer.content, { stopped: "Stopped.", error: "The answer failed." }[answer.finish] ?? "End of the answer.");
  }

  // Soon, and not more often than once a second.
  save(conversation, delay = SAVE_MS) {
    if (delay > 0 && this.saves.has(conversation.id)) return;
    clearTimeout(this.saves.get(conversation.id));
    this.saves.set(conversation.id, setTimeout(() => this.#write(conversation), delay));
  }

  async #write(conversation) {
    this.saves.delete(conversation.id);
    try {
      await save(conversation);
    } catch (error) {
      if (error?.name !== "QuotaExceededError") throw error;
      notify("The browser has no more room for conversations. Export them, and delete what you do not need.");
    }
  }

  // What is not written yet, now: the page may be gone in a moment.
  flush(conversations = [this.conversation, ...this.live.values()]) {
    for (const conversation of conversations) if (this.saves.has(conversation.id)) this.save(conversation, 0);
  }

  // Nothing more of this conversation is written.
  forget(id) {
    clearTimeout(this.saves.get(id));
    this.saves.delete(id);
    const conversation = this.live.get(id);
    if (conversation) for (const turnId of Object.keys(conversation.nodes)) runs.get(turnId)?.stop();
  }
}
