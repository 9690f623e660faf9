// Answers of models while they come in: plain text at first, safe HTML of the server at the end.

import { $, Refused, csrfToken, refusal } from "./app.js";
import { setVersion, url } from "./task.js";

const FINISH = { length: "cut off at its length" };

/** The lines of a streamed answer as objects. */
async function* lines(path) {
  let answer;
  try {
    answer = await fetch(url(path), { method: "POST", headers: { "x-csrf-token": csrfToken() } });
  } catch {
    throw new Refused("The server cannot be reached. Nothing is lost; ask again.", 0);
  }
  if (!answer.ok) throw await refusal(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  } catch (error) {
    if (error instanceof SyntaxError) throw error;
    throw new Refused("The connection was lost. The models go on; ask again to see what they say.", 0);
  }
  throw new Refused("The server stopped in the middle. Nothing is lost; ask again.", 0);
}

const card = (position) => $(`[data-position="${position}"]`, $("#answers"));

function setState(position, words, kind = "") {
  const badge = $(".state", card(position));
  badge.hidden = !words;
  badge.textContent = words;
  badge.className = `badge state ${kind}`;
}

/** Show a stream in #answers; true once all of it is stored. What failed is said in #failed. */
export async function follow(path) {
  const root = $("#answers");
  const name = (position) => root.querySelectorAll("[data-position]").length > 1 ? `Response ${"AB"[position]}` : "The answer";
  $("#failed").hidden = true;
  root.setAttribute("aria-busy", "true");
  const failed = [];
  try {
    for await (const event of lines(path)) {
      if ("end" in event) {
        setVersion(event.version);
        if (!event.end) return fail(failed.join(" ") || event.message);
        // Made safe by the server (web/markdown.py), and under the page's policy besides.
        event.html.forEach((html, position) => { $(".answer", card(position)).innerHTML = html; });
        root.removeAttribute("data-wait");
        $("#heard").textContent = event.html.length > 1 ? "Both responses are here." : "The answer is here.";
        return true;
      }
      const place = $(".answer", card(event.position));
      if ("text" in event) {
        place.textContent = event.text;
        setState(event.position, event.text ? "writing" : "thinking", "accent");
      } else if ("more" in event) {
        place.append(event.more);
        setState(event.position, "writing", "accent");
      } else if ("failed" in event) {
        failed.push(`${name(event.position)}: ${event.failed}`);
        setState(event.position, "no answer", "bad");
      } else setState(event.position, FINISH[event.finish] ?? "", "warn");
    }
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return fail(error.message);
  } finally {
    root.removeAttribute("aria-busy");
  }
}

function fail(words) {
  $("#failed-words").textContent = `${words} Your prompt is kept.`;
  $("#failed").hidden = false;
  $("#retry").focus();
  return false;
}
