// Brings the parts of the page together.

import { announce } from "./announce.js";
import { apiKey, listModels } from "./api.js";
import { Composer } from "./composer.js";
import { openPair, path } from "./conversation.js";
import { byId, copyText, element } from "./dom.js";
import { importFile, openExport } from "./files.js";
import { Drawer, Follower, isNarrow, nextTheme, showTheme } from "./frame.js";
import { Keys } from "./keys.js";
import { onCopyClick } from "./markdown.js";
import { notify } from "./notices.js";
import { preferences } from "./preferences.js";
import { hideCard, legend, placeCard } from "./probabilities.js";
import { Session } from "./session.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { load, openStore, remove, save } from "./store.js";
import { Transcript } from "./transcript.js";

const EXAMPLES = [
  ["Explain it simply", "Explain to a ten-year-old why the sky is blue."],
  ["Think along", "What should I look at before I buy a used bicycle?"],
  ["Write", "Write a short, friendly note that thanks a neighbour for watering my plants."],
  ["Code", "Write a Python function that counts the words in a text, and show how to use it."],
];
const TIGHT = 0.85;

const session = new Session({ show, changed: (turn) => transcript.changed(turn), askKey });
const actions = {
  regenerate: (turn) => session.regenerate(turn),
  edit: (turn, text) => { session.edit(turn, text); follower.toEnd(); composer.focus(); },
  step: (turn, by) => session.step(turn, by),
  pick: (turn) => { session.pick(turn); composer.focus(); },
  reopen: (turn) => session.reopen(turn),
  askKey,
};
const follower = new Follower(byId("scroller"), byId("to-end"));
const transcript = new Transcript(byId("transcript"), actions, () => { follower.follow(); showFootnote(); });
const composer = new Composer({ send, stop: () => session.stop() });
const sidebarDrawer = new Drawer("sidebar", "search", true);
const settingsDrawer = new Drawer("settings", "system", false);
const sidebar = new Sidebar({ open: openConversation, rename, remove: removeConversation });
const settings = new Settings((values) => {
  session.change(values);
  if (values.parameters) preferences.parameters = values.parameters;
});

// Draws everything that depends on the conversation.
function show() {
  const { conversation } = session;
  const isEmpty = !path(conversation).length;
  transcript.showsTokens = preferences.probabilities;
  transcript.show(conversation);
  byId("welcome").hidden = !isEmpty;
  document.title = `${conversation.title || "Chat"} - groundup`;
  composer.showRunning(session.runningTurns().length > 0);
  showModels();
  showFootnote();
  sidebar.show(conversation.id);
  follower.follow();
}

function showModels() {
  const { conversation, models } = session;
  for (const [id, chosen] of [["model", conversation.model], ["second-model", conversation.second]]) {
    byId(id).replaceChildren(...models.map(({ name }) => element("option", { value: name }, name)));
    byId(id).value = chosen ?? "";
  }
  byId("versus").hidden = !conversation.second;
  byId("compare").setAttribute("aria-pressed", String(Boolean(conversation.second)));
  byId("blind").checked = preferences.blind;
  byId("probabilities").setAttribute("aria-pressed", String(preferences.probabilities));
  byId("legend").hidden = !preferences.probabilities;
  const context = session.contextOf(conversation.model);
  byId("welcome-model").textContent = conversation.model
    ? `${conversation.model}${context ? `, with a context of ${context.toLocaleString("en")} tokens` : ""}. What you write stays on this server and in this browser.`
    : "";
}

// How full the context was at the last answer.
function showFootnote() {
  const last = path(session.conversation).at(-1);
  const context = last && session.contextOf(last.model);
  const used = last?.stats?.prompt ? last.stats.prompt + last.stats.tokens : null;
  const isKnown = Boolean(used && context);
  byId("context").textContent = isKnown ? `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens of context used` : "";
  byId("context").classList.toggle("tight", isKnown && used > TIGHT * context);
}

function send(text) {
  const obstacle = session.obstacle();
  if (obstacle) {
    notify(obstacle);
    return false;
  }
  session.send(text);
  follower.toEnd();
  return true;
}

function newChat() {
  Drawer.closeOpen();
  session.fresh();
  settings.show(session.conversation);
  composer.focus();
}

async function openConversation(id) {
  Drawer.closeOpen();
  session.flush();
  await session.open(id);
  settings.show(session.conversation);
  follower.toEnd();
  // On a phone the focus would bring up the keyboard, which covers what one wants to read.
  if (isNarrow()) byId("scroller").focus();
  else composer.focus();
}

async function rename(id, title) {
  const conversation = session.conversation.id === id ? session.conversation : session.live.get(id) ?? (await load(id));
  Object.assign(conversation, { title, isNamed: true });
  await save(conversation);
  show();
}

async function removeConversation(id) {
  session.flush();
  const kept = session.live.get(id) ?? (await load(id));
  session.forget(id);
  await remove(id);
  if (session.conversation.id === id) {
    session.fresh();
    settings.show(session.conversation);
  }
  if (kept) notify(`“${kept.title || "New chat"}” is deleted.`, { label: "Undo", run: async () => { await save(kept); await openConversation(id); } });
}

function askKey() {
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

async function connect() {
  try {
    session.setModels(await listModels());
  } catch (error) {
    if (error.kind === "key") askKey();
    else notify(`${error.message} Is groundup serve still running?`, { label: "Try again", run: connect });
    return;
  }
  if (session.conversation && !session.conversation.model) session.change({ model: session.models[0]?.name ?? null });
  show();
}

function toggleCompare() {
  const { conversation, models } = session;
  if (!models.length) return;
  const other = models.find(({ name }) => name !== conversation.model) ?? models[0];
  session.change({ second: conversation.second ? null : other.name });
  showModels();
  announce(conversation.second ? `${conversation.model} and ${conversation.second} will both answer.` : "One model answers.");
}

function toggleProbabilities() {
  preferences.probabilities = !preferences.probabilities;
  hideCard();
  show();
  announce(preferences.probabilities ? "Token probabilities are shown." : "Token probabilities are hidden.");
}

const turns = () => path(session.conversation);
const lastAnswer = () => turns().findLast((turn) => turn.role === "assistant");

// The answer in which the focus is, or else the last.
function answerAtHand() {
  return turns().find((turn) => turn.role === "assistant" && transcript.viewOf(turn)?.root.contains(document.activeElement)) ?? lastAnswer();
}

function editLast() {
  const question = turns().findLast((turn) => turn.role === "user");
  if (!question) return false;
  return transcript.viewOf(question).edit();
}

function pickSide(side) {
  const last = turns().at(-1);
  const pair = last && openPair(session.conversation, last);
  const answer = pair && session.conversation.nodes[pair.nodes[side]];
  if (!answer?.content || session.runningTurns().length) return false;
  return actions.pick(answer);
}

function moveFocus(by) {
  const roots = [...byId("transcript").querySelectorAll(".turn")];
  const at = roots.findIndex((root) => root.contains(document.activeElement));
  const to = at < 0 ? (by > 0 ? 0 : roots.length - 1) : at + by;
  roots[to]?.focus();
  roots[to]?.scrollIntoView({ block: "nearest" });
}

function withAnswer(run) {
  return () => {
    const answer = answerAtHand();
    return answer ? run(answer) : false;
  };
}

function escape(isInField) {
  if (Drawer.closeOpen()) return;
  if (session.stop()) return;
  if (settingsDrawer.panel.contains(document.activeElement)) settingsDrawer.close();
  else if (isInField) byId("scroller").focus();
}

function search() {
  if (isNarrow()) sidebarDrawer.open();
  byId("search").focus();
  byId("search").select();
}

new Keys([
  ["This conversation", [
    ["Write", "/", () => composer.focus()], ["Another answer", "r", withAnswer((turn) => session.regenerate(turn))],
    ["Edit the last question", "e", editLast], ["Copy the answer", "y", withAnswer((turn) => copyText(turn.content).then(() => announce("Copied.")))],
    ["Previous version", "[", withAnswer((turn) => session.step(turn, -1))], ["Next version", "]", withAnswer((turn) => session.step(turn, 1))],
    ["Next turn", "j", () => moveFocus(1)], ["Previous turn", "k", () => moveFocus(-1)],
    ["Choose the first of two answers", "1", () => pickSide(0)], ["Choose the second", "2", () => pickSide(1)]]],
  ["Page", [
    ["New chat", "n", newChat], ["Search", "s", search], ["Model", "m", () => byId("model").focus()],
    ["Compare two models", "c", toggleCompare], ["Token probabilities", "p", toggleProbabilities],
    ["System prompt and parameters", ",", () => settingsDrawer.toggle()], ["Colours", "t", () => { nextTheme(); announce(byId("theme").title); }],
    ["Export", "x", () => openExport(exported)], ["This help", "?", () => byId("help-dialog").showModal()]]],
], { search, newChat, escape, editLast });

const exported = () => (turns().length ? session.conversation : null);

byId("new-chat").addEventListener("click", newChat);
byId("help").addEventListener("click", () => byId("help-dialog").showModal());
byId("theme").addEventListener("click", nextTheme);
byId("compare").addEventListener("click", toggleCompare);
byId("probabilities").addEventListener("click", toggleProbabilities);
byId("export").addEventListener("click", () => openExport(exported));
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", async ({ target }) => {
  if (target.files[0]) await importFile(target.files[0], openConversation);
  target.value = "";
});
byId("shade").addEventListener("click", () => Drawer.closeOpen());
byId("transcript").addEventListener("click", onCopyClick);
byId("scroller").addEventListener("scroll", placeCard, { passive: true });
byId("model").addEventListener("change", ({ target }) => {
  preferences.model = target.value;
  session.change({ model: target.value });
  showModels();
});
byId("second-model").addEventListener("change", ({ target }) => session.change({ second: target.value }));
byId("blind").addEventListener("change", ({ target }) => {
  preferences.blind = target.checked;
});
byId("key-form").addEventListener("submit", () => {
  apiKey.set(byId("key").value.trim());
  byId("key").value = "";
  connect();
});
byId("legend").append(...legend());
byId("examples").append(...EXAMPLES.map(([title, text]) =>
  element("button", { type: "button", onclick: () => { if (send(text)) composer.focus(); } }, element("small", {}, title), text)));
document.addEventListener("visibilitychange", () => { if (document.hidden) session.flush(); });

showTheme(preferences.theme);
const isKept = await openStore(() => session.conversation && sidebar.show(session.conversation.id), (id) => {
  session.forget(id);
  if (session.conversation.id === id) newChat();
});
if (!isKept) notify("This browser does not keep conversations. They are gone when the page is closed; export what you need.");
newChat();
await connect();
