// The server's API: models, streamed answers, Markdown. The key is kept for this tab alone.

const KEY = "api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

// What went wrong as a sentence, and as a `kind` that decides what is offered:
// "key", "busy" (try again in `retrySeconds`), "refused" (the request itself), "server", "offline", "cut".
export class ApiError extends Error {
  constructor(kind, message, { retrySeconds = null, code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { kind, retrySeconds, code, param });
  }
}

async function request(path, body, signal) {
  const headers = { Accept: "application/json" };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", "The server cannot be reached.");
  }
  if (response.ok) return response;
  throw await errorOf(response);
}

async function errorOf(response) {
  let said = {};
  try {
    said = (await response.json()).error ?? {};
  } catch {
    // Not from our server (a proxy's page): the status is all there is to tell.
  }
  const message = said.message || `The server answered with status ${response.status}.`;
  if (response.status === 401) return new ApiError("key", message);
  if (response.status === 429 || response.status === 503) {
    const seconds = Number(response.headers.get("Retry-After"));
    return new ApiError("busy", message, { retrySeconds: Number.isFinite(seconds) && seconds > 0 ? Math.min(seconds, 120) : 2 });
  }
  return new ApiError(response.status < 500 ? "refused" : "server", message, { code: said.code, param: said.param });
}

// [{name, context}], context in tokens or null where the server does not say.
export async function listModels() {
  const { data } = await (await request("/v1/models")).json();
  return data.map((model) => ({ name: model.id, context: model.context_length ?? model.max_model_len ?? null }));
}

// Safe HTML for each of the texts.
export async function renderMarkdown(texts) {
  return (await (await request("/page/render", { texts })).json()).html;
}

// Streams one answer; `onPiece({text, tokens})` gets what came, `tokens` only when `alternatives` were asked for.
// Returns {finish, usage}.
export async function streamAnswer({ model, messages, parameters, alternatives, signal, onPiece }) {
  const body = { model, messages, ...parameters, stream: true, stream_options: { include_usage: true } };
  if (alternatives) Object.assign(body, { logprobs: true, top_logprobs: alternatives });
  const response = await request("/v1/chat/completions", body, signal);
  let finish = null;
  let usage = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return { finish, usage };
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError("server", chunk.error.message, { code: chunk.error.code });
    usage = chunk.usage ?? usage;
    const [choice] = chunk.choices;
    if (!choice) continue;
    finish = choice.finish_reason ?? finish;
    const text = choice.delta.content ?? "";
    const tokens = choice.logprobs?.content ?? [];
    if (text || tokens.length) onPiece({ text, tokens });
  }
  throw new ApiError("cut", "The connection ended before the answer did.");
}

// The data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (buffer + value).split("\n");
      buffer = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("cut", "The connection broke before the answer ended.");
  } finally {
    // Tells the server that nobody reads any more.
    reader.cancel().catch(() => {});
  }
}
