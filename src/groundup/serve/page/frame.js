// The frame around the conversation: drawers on narrow screens, colours, following the end of the text, dialogs.

import { byId } from "./dom.js";
import { preferences } from "./preferences.js";

const narrow = matchMedia("(max-width: 56rem)");
const FOLLOW_PX = 60;

// A panel that is a column where there is room, and on narrow screens a drawer over the page.
export class Drawer {
  static #open = null;

  // `first`: what gets the focus where there is room. In a drawer it is the way out: a field would bring up the
  // keyboard of a phone over everything else.
  constructor(name, first, isColumn) {
    Object.assign(this, { name, first: byId(first), isColumn, panel: byId(name), opener: byId(`${name}-open`), closer: byId(`${name}-close`) });
    this.opener.addEventListener("click", () => this.toggle());
    this.closer.addEventListener("click", () => this.close());
    narrow.addEventListener("change", () => this.#leave());
    this.#leave();
  }

  // The state in which a screen of this width begins.
  #leave() {
    Drawer.#open = null;
    this.#apply(false);
    this.panel.hidden = !narrow.matches && !this.isColumn;
    this.panel.inert = narrow.matches;
  }

  get isOpen() {
    return narrow.matches ? Drawer.#open === this : !this.panel.hidden;
  }

  toggle() {
    if (this.isOpen) this.close();
    else this.open();
  }

  open() {
    if (narrow.matches) {
      Drawer.#open?.close();
      Drawer.#open = this;
      this.panel.hidden = false;
      this.panel.inert = false;
      this.#apply(true);
    } else {
      this.panel.hidden = false;
      this.opener.setAttribute("aria-expanded", "true");
    }
    (narrow.matches ? this.closer : this.first).focus();
  }

  close() {
    if (!this.isOpen) return false;
    if (narrow.matches) {
      Drawer.#open = null;
      this.panel.inert = true;
      this.#apply(false);
    } else this.panel.hidden = true;
    this.opener.setAttribute("aria-expanded", "false");
    if (this.panel.contains(document.activeElement) || document.activeElement === document.body) this.opener.focus();
    return true;
  }

  #apply(isOpen) {
    byId("shell").dataset.drawer = isOpen ? this.name : "";
    byId("main").inert = isOpen;
    byId("shade").hidden = !isOpen;
    this.opener.setAttribute("aria-expanded", String(isOpen));
  }

  static closeOpen() {
    return Drawer.#open?.close() ?? false;
  }
}

export const isNarrow = () => narrow.matches;

// Keeps the end in sight while text arrives, unless the reader has gone back.
export class Follower {
  constructor(scroller, button) {
    Object.assign(this, { scroller, button, follows: true });
    scroller.addEventListener("scroll", () => {
      this.follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < FOLLOW_PX;
      button.hidden = this.follows;
    }, { passive: true });
    button.addEventListener("click", () => this.toEnd());
    // Text also grows when its form arrives, when the window changes and when the field below gets more lines.
    const watcher = new ResizeObserver(() => this.follow());
    watcher.observe(scroller);
    watcher.observe(byId("transcript"));
  }

  follow() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  toEnd() {
    this.follows = true;
    this.button.hidden = true;
    this.follow();
  }
}

const THEMES = ["system", "light", "dark"];

export function nextTheme() {
  showTheme(THEMES[(THEMES.indexOf(preferences.theme) + 1) % THEMES.length]);
}

export function showTheme(theme) {
  preferences.theme = theme;
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const label = theme === "system" ? "Colours: as the system has them" : `Colours: ${theme}`;
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = `${label} (t)`;
  return label;
}

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    // A click on the backdrop has the dialog itself as its target.
    if (event.target.closest("[data-close]") || event.target === dialog) dialog.close();
  });
}
