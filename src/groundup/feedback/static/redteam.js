// Red-team sessions: talk with a model, label each answer, against the clock.

import { $, once } from "./app.js";
import { follow } from "./answers.js";
import { Draft, change, reload, show, submit, whenComplete } from "./task.js";

const form = $("#work");
const { state, stage, number } = form.dataset;
const turn = `turns/${number}`;

function labels(fields) {
  if (state === "prompt") return fields;
  return { ...fields, severity: fields.severity === undefined ? null : Number(fields.severity) };
}

// A draft is the answer so far, and the stage of the dialogue to which it belongs.
const draft = new Draft(form, (fields) => ({ stage, ...labels(fields) }), stage);

async function watch() {
  if (await follow(`${turn}/stream`)) show(".judged", true);
}

whenComplete($("#ask"), form, async () => {
  await draft.handIn(() => change("POST", "turns", { prompt: $("#prompt").value }));
  return reload();
});
$("#finish")?.addEventListener("click", () => once($("#finish"), () => submit({}, draft)));
if (state === "wait") {
  watch();
  $("#retry").addEventListener("click", () => once($("#retry"), watch));
  $("#reword").addEventListener("click", () => once($("#reword"), async () => {
    await change("POST", `${turn}/drop`, {});
    return reload();
  }));
}
whenComplete($("#go-on"), form, async () => {
  const judgement = labels(JSON.parse(draft.now()));
  await draft.handIn(() => change("POST", `${turn}/judgement`, { judgement }));
  return reload();
});

// The clock counts on from the server's time; it is for the eye, what counts is measured by the server.
const clock = $("#clock"), loaded = performance.now();
const violations = Number(clock.dataset.violations);

function tick() {
  const seconds = Number(clock.dataset.seconds) + (performance.now() - loaded) / 1000;
  clock.textContent = `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
  $("#gamma").textContent = violations ? ` · ${(violations / (seconds / 3600)).toFixed(1)} an hour` : "";
}
tick();
setInterval(tick, 1000);
$("#dialogue").lastElementChild?.scrollIntoView({ block: "nearest" });
