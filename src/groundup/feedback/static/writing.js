// Work that is one form: writing, reviewing, entrance tests.

import { $, $$ } from "./app.js";
import { Draft, fields, submit, whenComplete } from "./task.js";

const form = $("#work");

function answer(found) {
  if (form.dataset.entrance) return { answer: found.answer === undefined ? null : Number(found.answer) };
  if (!form.dataset.review) return found;
  const { decision, response, feedback } = found;
  return { decision: decision ?? null, feedback, ...(decision === "edit" ? { response } : {}) };
}

const draft = new Draft(form, answer);

/** Only what the decision needs is there; a rejection needs words. */
function follow() {
  const { decision } = fields(form);
  for (const part of $$("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(decision);
  const feedback = $("#feedback", form), response = $("#response", form);
  if (feedback) feedback.required = decision === "reject";
  if (form.dataset.review) response.required = decision === "edit";
}

function count() {
  const words = ($("#response", form)?.value.match(/\S+/g) ?? []).length;
  $("#words").textContent = `${words} ${words === 1 ? "word" : "words"}`;
}

form.addEventListener("input", follow);
follow();
if ($("#words")) {
  form.addEventListener("input", count);
  count();
}
whenComplete($("#finish"), form, () => submit(answer(fields(form)), draft));
