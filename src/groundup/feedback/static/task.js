// What all kinds of work share: the version of the item, drafts, the lease, sending once.

import { $, $$, Refused, once, say, send, trouble } from "./app.js";

const root = $("#task");
const AUTOSAVE_MS = 700, HEARTBEAT_MS = 60000, IDLE_MS = 120000, RETRY_MS = 8000;

let version = Number(root.dataset.version);
let queue = Promise.resolve();

export const url = (path) => `/tasks/${root.dataset.id}/${path}`;

/** One change after the other, each made to the version that the one before has left. */
export function change(method, path, data) {
  const next = queue.then(async () => {
    const answer = await send(method, url(path), { version, ...data });
    version = answer.version ?? version;
    return answer;
  });
  queue = next.catch(() => {});
  return next;
}

/** What a stream of the server told about the version. */
export const setVersion = (told) => { version = told ?? version; };

// ---- Drafts: on the server, and on this device until the server has them --------------------------------------------

/** The named fields of a form as they stand. */
export function fields(form) {
  const found = {};
  for (const field of form.elements) {
    if (!field.name || field.tagName === "BUTTON") continue;
    if (field.type !== "radio") found[field.name] = field.value;
    else if (field.checked) found[field.name] = field.value;
  }
  return found;
}

function fill(form, kept) {
  for (const field of form.elements) {
    if (!(field.name in kept)) continue;
    if (field.type === "radio") field.checked = field.value === kept[field.name];
    else field.value = kept[field.name];
  }
}

export class Draft {
  /** `answer` makes of the form's fields what the server keeps; `stage`: of a dialogue. */
  constructor(form, answer, stage = "") {
    this.form = form;
    this.key = `groundup-draft:${root.dataset.id}:${stage}`;
    this.answer = answer;
    this.timer = 0;
    this.isHeld = false;
    this.saved = this.now();
    this.restore();
    form.addEventListener("input", () => this.changed());
    addEventListener("online", () => this.save());
  }

  now() {
    return JSON.stringify(fields(this.form));
  }

  restore() {
    const kept = localStorage.getItem(this.key);
    if (!kept || kept === this.saved) return;
    fill(this.form, JSON.parse(kept));
    this.form.dispatchEvent(new Event("input", { bubbles: true }));
    this.changed();
    say("What you wrote on this device is back.");
  }

  changed() {
    const now = this.now();
    clearTimeout(this.timer);
    if (now === this.saved) return;
    localStorage.setItem(this.key, now);
    if (!this.isHeld) this.timer = setTimeout(() => this.save(), AUTOSAVE_MS);
  }

  async save() {
    clearTimeout(this.timer);
    const now = this.now();
    if (this.isHeld || now === this.saved) return;
    try {
      await change("PUT", "draft", { draft: this.answer(JSON.parse(now)) });
      this.saved = now;
      if (this.now() === now) localStorage.removeItem(this.key);
      $("#saved").textContent = "Draft saved";
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      $("#saved").textContent = error.status ? "Draft kept on this device only" : "Offline: draft kept on this device";
      if (error.status === 409 || error.status === 401) trouble(error.message);
      else this.timer = setTimeout(() => this.save(), RETRY_MS);
    }
  }

  /** Do what makes the draft superfluous; nothing is saved meanwhile. Where it fails, the draft goes on. */
  async handIn(action) {
    this.isHeld = true;
    clearTimeout(this.timer);
    try {
      await action();
    } catch (error) {
      this.isHeld = false;
      this.changed();
      throw error;
    }
    localStorage.removeItem(this.key);
  }
}

// ---- Handing in -----------------------------------------------------------------------------------------------------

const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Take the answer in, once, however often it is sent; then on to the next item. */
export async function submit(answer, draft) {
  await draft.handIn(() => change("POST", "submit", { key, answer }));
  await leave(() => $("#next").submit());
}

/** Go elsewhere; the button that led there stays pressed until the page has gone. */
export function leave(go) {
  go();
  return new Promise(() => {});
}

/** The same item in its next state. */
export const reload = () => leave(() => location.assign(`/tasks/${root.dataset.id}`));

/** A button that needs the form to be complete. Its first gap is shown and focused. */
export function whenComplete(button, form, action) {
  button?.addEventListener("click", () => {
    if (form.reportValidity()) once(button, action);
  });
}

// ---- The lease ------------------------------------------------------------------------------------------------------

let lastSign = Date.now();
for (const kind of ["keydown", "pointerdown", "scroll"]) addEventListener(kind, () => { lastSign = Date.now(); }, { passive: true });

let expires = Date.parse(root.dataset.expires);

function tellLease() {
  const minutes = Math.ceil((expires - Date.now()) / 60000);
  $("#lease").textContent = minutes > 3 ? "" : minutes > 0
    ? `This item waits for you for ${minutes} more ${minutes === 1 ? "minute" : "minutes"}`
    : "Your time for this item is over; somebody else may get it. What you wrote is kept.";
}

setInterval(async () => {
  tellLease();
  if (document.hidden || Date.now() - lastSign > IDLE_MS) return;
  try {
    expires = Date.parse((await send("POST", url("heartbeat"), {})).expires);
    tellLease();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 409) trouble(`${error.message} What you wrote is still on this page; copy what you need.`);
  }
}, HEARTBEAT_MS);
tellLease();

// ---- Small things ---------------------------------------------------------------------------------------------------

const skip = $("#skip");
$("#open-skip")?.addEventListener("click", () => skip.showModal());
$("#close-skip").addEventListener("click", () => skip.close());

/** Show or hide all that belongs to a state. */
export const show = (selector, isShown) => $$(selector).forEach((element) => { element.hidden = !isShown; });
