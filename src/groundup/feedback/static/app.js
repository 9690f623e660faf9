// What every page shares: shortcuts, help, colours, messages, drafts, sending. Nothing here knows a work type.

const KEYS_OFF = "groundup-keys-off";

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

// ---- Messages -------------------------------------------------------------------------------------------------------

/** Say something in passing; read out by screen readers. */
export function say(text) {
  const toast = document.createElement("p");
  toast.textContent = text;
  $("#toasts").append(toast);
  setTimeout(() => toast.remove(), 5000);
}

/** Tell what went wrong, above the work, until `trouble("")`. */
export function trouble(text) {
  const box = $("#trouble");
  box.hidden = !text;
  box.textContent = text;
  if (text) box.scrollIntoView({ block: "nearest" });
}

// ---- Sending --------------------------------------------------------------------------------------------------------

export class Refused extends Error {
  /** `status`: the server's; 0: it said nothing that could be read. */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const OFFLINE = "The server cannot be reached. What you wrote is kept on this device; try again when it is back.";

export const csrfToken = () => $('meta[name="csrf-token"]').content;

/** A request with the token against forged ones; the answer's JSON. Throws `Refused` with a sentence for the reader. */
export async function send(method, url, data) {
  let answer;
  try {
    answer = await fetch(url, {
      method,
      headers: { "content-type": "application/json", "x-csrf-token": csrfToken() },
      body: JSON.stringify(data),
    });
  } catch {
    throw new Refused(OFFLINE, 0);
  }
  return read(answer);
}

async function read(answer) {
  if (!answer.ok) throw await refusal(answer);
  try {
    return await answer.json();
  } catch {
    throw new Refused("The server's answer cannot be read. Nothing you wrote is lost; try again.", 0);
  }
}

/** What an answer that is no success says to the reader. */
export async function refusal(answer) {
  const status = answer.status, body = await answer.json().catch(() => ({}));
  if (status === 401)
    return new Refused("You are signed out. What you wrote is kept; sign in again in another tab, then load this page again.", 401);
  const told = body.message ?? (status < 500 ? body.error?.message : undefined);
  return new Refused(told ?? "Something went wrong on the server. What you wrote is kept; try again.", status);
}

/** Run an action of a button once at a time; trouble is told, the button comes back. */
export async function once(button, action) {
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true");
  trouble("");
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    trouble(error.message);
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

// ---- Shortcuts ------------------------------------------------------------------------------------------------------
// Whatever carries data-key can be reached by that key: "a", "Control+Enter", or a sequence such as "g h".
// data-help says what it does; without it the element's own words do.

const isTyping = (target) => target.matches?.("textarea, select, input:not([type=radio], [type=checkbox])");
const isShown = (element) => element.checkVisibility({ visibilityProperty: true }) && !element.closest("[inert]");

let prefix = "";

function pressed(event) {
  const parts = [];
  if (event.ctrlKey || event.metaKey) parts.push("Control");
  if (event.altKey) parts.push("Alt");
  if (event.shiftKey && event.key.length > 1) parts.push("Shift");
  parts.push(event.key);
  return parts.join("+");
}

function press(element) {
  if (element.matches("textarea, select, input:not([type=radio], [type=checkbox])")) {
    element.focus();
    return;
  }
  if (element.matches("summary, button, a[href], input")) element.click();
  if (element.matches("input")) element.focus({ preventScroll: true });
}

function onKey(event) {
  if (event.defaultPrevented || event.isComposing || event.repeat) return;
  if (event.key === "Escape" && isTyping(event.target)) {
    event.target.blur();
    $("#main").focus({ preventScroll: true });
    return;
  }
  const key = pressed(event);
  const single = !key.includes("Control+") && !key.includes("Alt+");
  if (single && (isTyping(event.target) || localStorage.getItem(KEYS_OFF))) return;
  if (single && event.target.matches("button, a[href], summary") && (event.key === "Enter" || event.key === " ")) return;
  const dialog = $("dialog[open]");
  const all = $$("[data-key]", dialog ?? document).filter(isShown);
  const sequence = prefix ? `${prefix} ${key}` : key;
  prefix = "";
  const found = all.find((element) => element.dataset.key.split("|").includes(sequence));
  if (found) {
    event.preventDefault();
    press(found);
  } else if (all.some((element) => element.dataset.key.startsWith(`${sequence} `))) prefix = sequence;
}

const KEY_NAMES = { Control: "Ctrl", ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Escape: "Esc", Enter: "Enter", " ": "Space" };

function keyCaps(key) {
  const caps = [];
  for (const step of key.split(/[ ](?=.)/)) {
    for (const part of step.split("+")) {
      const cap = document.createElement("kbd");
      cap.textContent = KEY_NAMES[part] ?? part;
      caps.push(cap, " ");
    }
  }
  return caps;
}

function words(element) {
  if (element.dataset.help) return element.dataset.help;
  const label = element.labels?.[0] ?? element;
  const copy = label.cloneNode(true);
  $$("kbd", copy).forEach((cap) => cap.remove());
  return copy.textContent.replace(/\s+/g, " ").trim();
}

function showHelp() {
  const list = $("#help-keys");
  $$(".from-page", list).forEach((row) => row.remove());
  const seen = new Set();
  for (const element of $$("[data-key]").filter((element) => isShown(element) && !element.closest("dialog"))) {
    const key = element.dataset.key;
    if (seen.has(key)) continue;
    seen.add(key);
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    key.split("|").forEach((one, at) => term.append(...(at ? ["or "] : []), ...keyCaps(one)));
    text.textContent = words(element);
    for (const row of [term, text]) row.className = "from-page";
    list.append(term, text);
  }
  $("#help").showModal();
}

for (const element of $$("[data-key]")) if (!element.dataset.key.includes(" ")) element.setAttribute("aria-keyshortcuts", element.dataset.key.replace("|", " "));
addEventListener("keydown", onKey);
$("#open-help").addEventListener("click", showHelp);
$("#help").addEventListener("keydown", (event) => event.key === "?" && $("#help").close());
const keysOn = $("#keys-on");
keysOn.checked = !localStorage.getItem(KEYS_OFF);
keysOn.addEventListener("change", () =>
  keysOn.checked ? localStorage.removeItem(KEYS_OFF) : localStorage.setItem(KEYS_OFF, "yes"));

// ---- Colours --------------------------------------------------------------------------------------------------------

const THEMES = { "": "as the system", light: "light", dark: "dark" };
const theme = $("#theme");
const nameTheme = () => theme.setAttribute("aria-label", `Colours: ${THEMES[document.documentElement.dataset.theme ?? ""]}`);
nameTheme();
theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  document.cookie = `groundup_theme=${next}; path=/; max-age=${next ? 31536000 : 0}; samesite=lax`;
  nameTheme();
  say(`Colours: ${THEMES[next]}`);
});

// The page's own script has run by then too.
addEventListener("DOMContentLoaded", () => { document.documentElement.dataset.ready = "yes"; });
