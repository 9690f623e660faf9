// The parameters of sampling: what they are called, how far they go, and what they mean in words.

export const PARAMETERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, slider: true,
    meaning: "How freely words are drawn. 0 always takes the likeliest; about 0.7 is lively; above 1 it gets wild." },
  { name: "top_p", label: "Top-p", min: 0, max: 1, step: 0.01, slider: true,
    meaning: "Only the likeliest words that together reach this probability can be drawn. 1 allows all." },
  { name: "top_k", label: "Top-k", min: 0, max: 1_000_000, step: 1,
    meaning: "Only this many of the likeliest words can be drawn. 0 allows all." },
  { name: "max_tokens", label: "Longest answer", min: 1, max: 10_000_000, step: 1,
    meaning: "In tokens; a token is about four letters. Empty: as long as the context allows." },
  { name: "seed", label: "Seed", min: -Number.MAX_SAFE_INTEGER, max: Number.MAX_SAFE_INTEGER, step: 1,
    meaning: "With the same number, the same question gets the same answer again. Empty: a new draw each time." },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, slider: true,
    meaning: "Above 0, words that were used already become less likely: the answer moves on to new things." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, slider: true,
    meaning: "Above 0, a word becomes less likely each time it is used: less repetition." },
  { name: "stop", label: "Stop texts", lines: 4,
    meaning: "One a line, at most four. The answer ends before the first of them." },
];

// The value that a field's text stands for: null for an empty field. Throws what is wrong, as a sentence.
export function parseParameter({ label, min, max, step, lines }, text) {
  if (!text.trim()) return null;
  if (lines) {
    const stops = text.split("\n").filter((line) => line);
    if (stops.length > lines) throw new Error(`At most ${lines} stop texts.`);
    if (stops.some((stop) => stop.length > 256)) throw new Error("A stop text has at most 256 letters.");
    return stops;
  }
  const value = Number(text);
  if (!Number.isFinite(value) || value < min || value > max) throw new Error(`${label} is a number from ${min} to ${max}.`);
  if (step === 1 && !Number.isInteger(value)) throw new Error(`${label} is a whole number.`);
  return value;
}

export const parameterText = (value) => (value === undefined || value === null ? "" : Array.isArray(value) ? value.join("\n") : String(value));

// Of parameters from a file, those that we know with values that they may have.
export function cleanParameters(given) {
  const kept = {};
  for (const parameter of PARAMETERS) {
    const value = given[parameter.name];
    const fits = parameter.lines ? Array.isArray(value) && value.every((line) => typeof line === "string") : typeof value === "number";
    if (!fits) continue;
    try {
      kept[parameter.name] = parseParameter(parameter, parameterText(value));
    } catch {
      // Out of its range: the server's own choice is used instead.
    }
  }
  return kept;
}
