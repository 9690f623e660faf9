// Export and import: which conversations, into which file, and what became of it.

import { byId, element } from "./dom.js";
import { notify } from "./notices.js";
import { forEach, list, save } from "./store.js";
import { asFile, comparisons, download, readFile, record } from "./transfer.js";

const today = () => new Date().toISOString().slice(0, 10);
const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

async function collect(make) {
  const records = [];
  await forEach((conversation) => {
    records.push(...make(conversation));
  });
  return records;
}

async function exportRecords(name, what, records) {
  download(`groundup-${name}-${today()}.json`, asFile(records));
  notify(`${count(records.length, what)} exported.`);
}

// `current()`: the open conversation when anything was said in it, or null.
export async function openExport(current) {
  const open = current();
  const choices = await collect(comparisons);
  const entries = [
    [open, "This conversation", "The branch that is shown, as messages, and all branches", () => exportRecords("conversation", "conversation", [record(open)])],
    [list().length, "All conversations", `${list().length} in this browser`, async () => exportRecords("conversations", "conversation", await collect((one) => [record(one)]))],
    [choices.length, "Choices between two answers", `${choices.length}, as comparisons that reward models are trained on`, () => exportRecords("comparisons", "comparison", choices)],
  ];
  byId("export-choices").replaceChildren(...entries.map(([isThere, title, about, run]) =>
    element("button", { type: "button", disabled: !isThere, onclick: () => { byId("export-dialog").close(); run(); } }, title, element("small", {}, about))));
  byId("export-dialog").showModal();
}

// Calls `opened(id)` with the first of what came.
export async function importFile(file, opened) {
  let read;
  try {
    read = readFile(await file.text());
  } catch (error) {
    notify(`${file.name} cannot be read. ${error.message}`);
    return;
  }
  const { conversations, refused } = read;
  for (const conversation of conversations) await save(conversation);
  const left = refused ? ` ${count(refused, "record")} left out: no alternating messages of user and assistant.` : "";
  notify(`${count(conversations.length, "conversation")} imported.${left}`);
  if (conversations.length) opened(conversations[0].id);
}
