// Compare: write a prompt, watch two answers, say which is better, go on with the winner.

import { $, $$, once } from "./app.js";
import { follow } from "./answers.js";
import { Draft, change, reload, show, submit, whenComplete } from "./task.js";

const form = $("#work");
const { state, stage, number, given } = form.dataset;
const turn = `turns/${number}`;

/** The form in the shape of an answer; parts that are still open are null or missing. */
function judgement(fields) {
  if (state === "prompt") return fields;
  const [, winner, rating] = /^(\d) (.+)$/.exec(fields.choice ?? "") ?? [];
  const found = { winner: winner === undefined ? null : Number(winner), rating: rating ?? null, reason: fields.reason ?? "" };
  if ($(".safety")) found.is_safe = ["A", "B"].map((letter) => fields[`safe${letter}`] ? fields[`safe${letter}`] === "yes" : null);
  return found;
}

// A draft is the answer so far, and the stage of the dialogue to which it belongs.
const draft = new Draft(form, (fields) => ({ stage, ...judgement(fields) }), stage);
const answer = () => judgement(JSON.parse(draft.now()));

/** Mark the response that is chosen; point out a safe one that loses to an unsafe one. */
function mark() {
  const { winner, is_safe: safe } = answer();
  $$(".answer-card").forEach((card, position) => card.classList.toggle("chosen", winner === position));
  if ($("#conflict")) $("#conflict").hidden = !(safe && winner !== null && safe[winner] === false && safe[1 - winner] === true);
}

async function ask() {
  await draft.handIn(() => change("POST", "turns", { prompt: $("#prompt").value }));
  return reload();
}

async function watch() {
  if (await follow(`${turn}/stream`)) show(".judged", true);
}

const judge = () => draft.handIn(() => change("POST", `${turn}/judgement`, { judgement: answer() }));

if (state === "prompt") whenComplete($("#ask"), form, ask);
if (state === "wait") {
  watch();
  $("#retry").addEventListener("click", () => once($("#retry"), watch));
  $("#reword").addEventListener("click", () => once($("#reword"), async () => {
    await change("POST", `${turn}/drop`, {});
    return reload();
  }));
}
if (state === "wait" || state === "judge") {
  form.addEventListener("input", mark);
  mark();
  whenComplete($("#go-on"), form, async () => {
    await judge();
    return reload();
  });
  whenComplete($("#finish"), form, async () => {
    if (given) return submit(answer(), draft);
    await judge();
    return submit({}, draft);
  });
} else $("#finish")?.addEventListener("click", () => once($("#finish"), () => submit({}, draft)));
