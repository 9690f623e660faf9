// Getting one answer: the request, its retries when the server is busy, what is measured, what went wrong.

import { apiKey, ApiError, streamAnswer } from "./api.js";
import { messagesTo } from "./conversation.js";
import { ALTERNATIVES, TokenReader } from "./probabilities.js";

const MOST_TRIES = 5;

const REMEDIES = {
  key: "Enter the server's API key, then try again.",
  busy: "It has more to do than it can queue. Wait a little and try again.",
  offline: "Is `groundup serve` still running? Start it again, then try again.",
  cut: "What came until then is kept. Try again for a whole answer.",
  server: "The server's log says more. Try again.",
  refused: "",
};
const TOKENS_REMEDY = "Lower Longest answer in the parameters, or empty it.";
const CONTEXT_REMEDY = "Start a new chat, go back to an earlier question and edit it, or shorten the system prompt.";

// Answers that are being written now: {turn id: Run}.
export const runs = new Map();

class Run {
  constructor(turn, changed) {
    this.turn = turn;
    this.controller = new AbortController();
    this.changed = changed;
    this.waitSeconds = 0;
  }

  stop() {
    this.controller.abort();
  }

  // Resolves when the time is over; rejects when the user stops.
  wait(seconds) {
    const { signal } = this.controller;
    return new Promise((resolve, reject) => {
      const tick = () => {
        if (signal.aborted) return reject(new DOMException("stopped", "AbortError"));
        this.waitSeconds = Math.ceil(seconds);
        this.changed(this.turn);
        if (seconds <= 0) return resolve();
        const step = Math.min(1, seconds);
        seconds -= step;
        return setTimeout(tick, step * 1000);
      };
      tick();
    });
  }
}

// Fills `turn`, an empty answer of the conversation; `changed(turn)` is called whenever it has changed.
export async function generate(conversation, turn, { probabilities, context, changed }) {
  const run = new Run(turn, changed);
  runs.set(turn.id, run);
  turn.finish = null;
  turn.temperature = conversation.parameters.temperature ?? null;
  try {
    await untilAccepted(run, () => answer(run, conversation, probabilities));
  } catch (error) {
    if (error.name === "AbortError") turn.finish = "stopped";
    else {
      turn.finish = "error";
      turn.error = describe(error);
    }
  } finally {
    runs.delete(turn.id);
    if (turn.finish === "length") turn.isContextFull = isFull(turn.stats, context);
    changed(turn);
  }
}

async function untilAccepted(run, attempt) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (error.kind !== "busy" || tries === MOST_TRIES || run.turn.content) throw error;
      await run.wait(error.retrySeconds);
    }
  }
}

async function answer(run, conversation, probabilities) {
  const { turn } = run;
  const reader = new TokenReader();
  const start = performance.now();
  let first = null;
  let pieces = 0;
  if (probabilities) turn.tokens = [];
  const { finish, usage } = await streamAnswer({
    model: turn.model,
    messages: messagesTo(conversation, conversation.nodes[turn.parent]),
    parameters: conversation.parameters,
    alternatives: probabilities ? ALTERNATIVES : 0,
    signal: run.controller.signal,
    onPiece: ({ text, tokens }) => {
      first ??= performance.now();
      pieces += 1;
      turn.content += text;
      if (probabilities) turn.tokens.push(...tokens.map((token) => reader.read(token)));
      turn.stats = statistics(start, first, pieces);
      run.changed(turn);
    },
  });
  turn.finish = finish ?? "stop";
  turn.stats = { ...statistics(start, first ?? performance.now(), usage?.completion_tokens ?? pieces), prompt: usage?.prompt_tokens ?? null };
}

// Times in milliseconds; the rate leaves out the wait for the first token, which belongs to reading the prompt.
function statistics(start, first, tokens) {
  const writing = performance.now() - first;
  return { tokens, firstMs: first - start, rate: tokens > 1 && writing > 0 ? ((tokens - 1) * 1000) / writing : null };
}

const isFull = (stats, context) => Boolean(context && stats?.prompt && stats.prompt + stats.tokens >= context);

const asSentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

function describe(error) {
  if (!(error instanceof ApiError)) return { kind: "server", message: "The answer could not be read.", remedy: REMEDIES.server };
  if (error.kind === "key" && apiKey.get()) apiKey.set("");
  let remedy = REMEDIES[error.kind];
  if (error.param === "max_tokens") remedy = TOKENS_REMEDY;
  else if (error.code === "context_length_exceeded") remedy = CONTEXT_REMEDY;
  return { kind: error.kind, message: asSentence(error.message), remedy };
}
