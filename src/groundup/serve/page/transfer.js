// Conversations in and out as files. A record has `messages`, which `groundup` reads for fine-tuning, and under
// `conversation` the whole tree, which other readers ignore and which comes back with Import.

import { addTurn, newConversation, newId, path } from "./conversation.js";
import { cleanParameters } from "./parameters.js";

const MOST_CHARACTERS = 200_000_000;
const ROLES = new Set(["user", "assistant"]);

export function record(conversation) {
  const { id, title, system, created } = conversation;
  const turns = path(conversation).filter((turn) => turn.content.trim());
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const models = [...new Set(turns.map((turn) => turn.model).filter(Boolean))];
  return { id, source: "chat page", messages, metadata: { title, models, created: new Date(created).toISOString() }, conversation };
}

// The choices between two answers, as `groundup` reads comparisons for reward models.
export function comparisons(conversation) {
  const { system, nodes, pairs } = conversation;
  return Object.entries(pairs).filter(([, pair]) => pair.preferred !== null).map(([id, pair]) => {
    const chosen = nodes[pair.preferred];
    const rejected = nodes[pair.nodes.find((other) => other !== pair.preferred)];
    const prompt = [];
    for (let at = nodes[chosen.parent]; at; at = nodes[at.parent]) prompt.unshift({ role: at.role, content: at.content });
    if (system.trim()) prompt.unshift({ role: "system", content: system });
    const response = ({ content, model, temperature }) => ({ text: content, model, temperature: temperature ?? null });
    return { prompt, chosen: response(chosen), rejected: response(rejected), criterion: "helpfulness", id, source: "chat page", metadata: { blind: pair.isBlind } };
  });
}

// One record a line inside a list: JSON that is also easy to look at.
export const asFile = (records) => `[\n${records.map((one) => JSON.stringify(one)).join(",\n")}\n]\n`;

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// The conversations of a file, and how many of its records are none.
export function readFile(text) {
  if (text.length > MOST_CHARACTERS) throw new Error("The file is too large.");
  const conversations = [];
  let refused = 0;
  for (const value of parseRecords(text)) {
    const conversation = restore(value);
    if (conversation) conversations.push(conversation);
    else refused += 1;
  }
  return { conversations, refused };
}

function parseRecords(text) {
  try {
    const value = JSON.parse(text);
    return Array.isArray(value) ? value : [value];
  } catch {
    // JSON lines; a line that is no JSON is counted as refused.
    return text.split("\n").filter((line) => line.trim()).map((line) => {
      try {
        return JSON.parse(line);
      } catch {
        return null;
      }
    });
  }
}

function restore(value) {
  if (typeof value !== "object" || value === null) return null;
  return restoreTree(value.conversation) ?? fromMessages(value);
}

function fromMessages({ messages, metadata }) {
  if (!Array.isArray(messages) || !messages.length) return null;
  const turns = messages[0]?.role === "system" ? messages.slice(1) : messages;
  const fits = (turn, place) => turn?.role === (place % 2 ? "assistant" : "user") && typeof turn.content === "string";
  if (!turns.length || !turns.every(fits)) return null;
  const conversation = newConversation({ model: null, parameters: {} });
  if (turns !== messages) conversation.system = String(messages[0].content);
  let parent = null;
  for (const { role, content } of turns) {
    const more = role === "assistant" ? { model: null, finish: "stop" } : {};
    parent = addTurn(conversation, parent, role, content, more).id;
  }
  if (typeof metadata?.title === "string" && metadata.title) conversation.title = metadata.title;
  return conversation;
}

// A file may hold anything: only fields that we know come in, with the types that they must have.
function restoreTree(value) {
  if (typeof value?.nodes !== "object" || value.nodes === null) return null;
  const conversation = newConversation({ model: textOr(value.model, null), parameters: {} });
  conversation.title = textOr(value.title, "");
  conversation.isNamed = value.isNamed === true;
  conversation.system = textOr(value.system, "");
  conversation.created = numberOr(value.created, conversation.created);
  conversation.updated = numberOr(value.updated, conversation.updated);
  if (isObject(value.parameters)) conversation.parameters = cleanParameters(value.parameters);
  const names = new Map(Object.keys(value.nodes).map((id) => [id, newId()]));
  for (const [id, turn] of Object.entries(value.nodes)) {
    const isRooted = turn?.parent === null || (names.has(turn?.parent) && ROLES.has(value.nodes[turn.parent]?.role));
    if (!isObject(turn) || !ROLES.has(turn.role) || typeof turn.content !== "string" || !isRooted) return null;
    conversation.nodes[names.get(id)] = restoreTurn(turn, names.get(id), names.get(turn.parent) ?? null);
  }
  if (hasLoop(conversation.nodes) || !names.size) return null;
  for (const [parent, child] of Object.entries(isObject(value.chosen) ? value.chosen : {})) {
    if (names.has(child)) conversation.chosen[parent === "root" ? "root" : names.get(parent)] = names.get(child);
  }
  restorePairs(conversation, isObject(value.pairs) ? value.pairs : {}, value.nodes, names);
  return conversation;
}

function restoreTurn(turn, id, parent) {
  const { role, content } = turn;
  const made = { id, parent, role, content, created: numberOr(turn.created, 0) };
  if (role === "user") return made;
  const tokens = Array.isArray(turn.tokens) && turn.tokens.every(isToken) ? turn.tokens : undefined;
  return { ...made, tokens, model: textOr(turn.model, null), finish: textOr(turn.finish, "stop"), temperature: numberOr(turn.temperature, null) };
}

const isToken = (token) => isObject(token) && typeof token.text === "string" && typeof token.name === "string" &&
  typeof token.p === "number" && Array.isArray(token.others) && token.others.every((other) => typeof other?.[0] === "string" && typeof other?.[1] === "number");

function restorePairs(conversation, pairs, nodes, names) {
  for (const pair of Object.values(pairs)) {
    const both = Array.isArray(pair?.nodes) && pair.nodes.length === 2 && pair.nodes.every((id) => nodes[id]?.role === "assistant");
    if (!both || nodes[pair.nodes[0]].parent !== nodes[pair.nodes[1]].parent) continue;
    const id = newId();
    const preferred = pair.nodes.includes(pair.preferred) ? names.get(pair.preferred) : null;
    conversation.pairs[id] = { nodes: pair.nodes.map((node) => names.get(node)), preferred, isBlind: pair.isBlind === true };
    for (const node of pair.nodes) conversation.nodes[names.get(node)].pair = id;
  }
}

function hasLoop(nodes) {
  return Object.values(nodes).some((turn) => {
    let steps = 0;
    for (let at = turn; at; at = nodes[at.parent]) if (++steps > Object.keys(nodes).length) return true;
    return false;
  });
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const textOr = (value, otherwise) => (typeof value === "string" ? value : otherwise);
const numberOr = (value, otherwise) => (typeof value === "number" && Number.isFinite(value) ? value : otherwise);
