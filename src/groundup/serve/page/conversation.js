// A conversation is a tree of turns: editing a question or asking for another answer adds a branch and loses nothing.
// These functions know nothing of the page and of where conversations are kept.
//
// conversation: {id, title, isNamed, created, updated, system, model, second, parameters, nodes, chosen, pairs}
//   nodes   {id: turn}
//   chosen  {parent id or "root": the child that is shown}
//   pairs   {id: {nodes: [left, right], preferred: node id or null, isBlind}}: two models' answers to one question
// turn: {id, parent, role, content, created} and of an answer {model, temperature, finish, error, stats, tokens, pair}
//   finish  null while it is written, then "stop", "length", "stopped" (by the user), "interrupted" or "error"

export const newId = () => `${Date.now().toString(36)}-${crypto.getRandomValues(new Uint32Array(2)).join("")}`;

export function newConversation(defaults) {
  const now = Date.now();
  return {
    id: newId(), title: "", isNamed: false, created: now, updated: now, system: "",
    model: defaults.model, second: null, parameters: { ...defaults.parameters }, nodes: {}, chosen: {}, pairs: {},
  };
}

export function addTurn(conversation, parent, role, content, more = {}) {
  const turn = { id: newId(), parent, role, content, created: Date.now(), ...more };
  conversation.nodes[turn.id] = turn;
  conversation.chosen[parent ?? "root"] = turn.id;
  conversation.updated = turn.created;
  if (!conversation.isNamed && role === "user" && parent === null) conversation.title = titleOf(content);
  return turn;
}

export function addPair(conversation, question, models, isBlind) {
  // Which model stands on the left is drawn, so that nobody learns to expect one of them there.
  const order = isBlind && crypto.getRandomValues(new Uint8Array(1))[0] % 2 ? [...models].reverse() : models;
  const pair = newId();
  const answers = order.map((model) => addTurn(conversation, question.id, "assistant", "", { model, finish: null, pair }));
  conversation.pairs[pair] = { nodes: answers.map((answer) => answer.id), preferred: null, isBlind };
  return answers;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

export const children = (conversation, parent) =>
  Object.values(conversation.nodes).filter((turn) => turn.parent === parent).sort((a, b) => a.created - b.created);

// The pair that a turn belongs to while nobody has chosen between its two.
export function openPair(conversation, turn) {
  const pair = turn.pair && conversation.pairs[turn.pair];
  return pair && pair.preferred === null ? pair : null;
}

// The turns from the first to the last that is shown.
export function path(conversation) {
  const turns = [];
  let parent = null;
  while (true) {
    const options = children(conversation, parent);
    if (!options.length) return turns;
    const turn = options.find((option) => option.id === conversation.chosen[parent ?? "root"]) ?? options.at(-1);
    turns.push(turn);
    parent = turn.id;
  }
}

// The turns from the first to this one.
export function pathTo(conversation, turn) {
  const turns = [];
  for (let at = turn; at; at = conversation.nodes[at.parent]) turns.unshift(at);
  return turns;
}

// What one can step through in place of this turn; an open pair counts as one.
export function branches(conversation, turn) {
  const seen = new Set();
  return children(conversation, turn.parent).filter((option) => {
    if (!openPair(conversation, option)) return true;
    if (seen.has(option.pair)) return false;
    return seen.add(option.pair);
  });
}

export function branchPlace(conversation, turn) {
  const options = branches(conversation, turn);
  const place = options.findIndex((option) => option.id === turn.id || (openPair(conversation, turn) && option.pair === turn.pair));
  return { options, place };
}

export function choose(conversation, turn) {
  conversation.chosen[turn.parent ?? "root"] = turn.id;
}

export function prefer(conversation, turn) {
  conversation.pairs[turn.pair].preferred = turn.id;
  choose(conversation, turn);
  conversation.updated = Date.now();
}

// What a model is sent: the system prompt and the turns up to this one.
export function messagesTo(conversation, turn) {
  const turns = pathTo(conversation, turn).map(({ role, content }) => ({ role, content }));
  const system = conversation.system.trim();
  return system ? [{ role: "system", content: system }, ...turns] : turns;
}
