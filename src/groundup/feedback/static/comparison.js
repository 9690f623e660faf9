// Human evaluation: two answers to a fixed prompt, seven points.

import { $, once } from "./app.js";
import { follow } from "./answers.js";
import { Draft, show, submit, whenComplete } from "./task.js";

const form = $("#work");

function answer(fields) {
  return { score: fields.score === undefined ? null : Number(fields.score), reason: fields.reason };
}

const draft = new Draft(form, answer);

async function watch() {
  if (await follow("responses/stream")) show(".judged", true);
}

if ($("#answers").dataset.wait) {
  watch();
  $("#retry").addEventListener("click", () => once($("#retry"), watch));
}
whenComplete($("#finish"), form, () => submit(answer(JSON.parse(draft.now())), draft));
