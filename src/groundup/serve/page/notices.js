// Short messages at the corner: something was done, perhaps with a way back.

import { byId, element, iconButton } from "./dom.js";

const SHOWN_MS = 8000;

// `action`: {label, run}. The notice stays while the pointer or the focus is in it.
export function notify(text, action = null) {
  const notice = element("div", { class: "notice" }, element("p", {}, text));
  const close = () => notice.remove();
  if (action) {
    notice.append(element("button", { type: "button", class: "quiet-button", onclick: () => { close(); action.run(); } }, action.label));
  }
  notice.append(iconButton("close", "Dismiss", close));
  byId("notices").append(notice);
  const expire = () => (notice.matches(":hover, :focus-within") ? setTimeout(expire, 1000) : close());
  setTimeout(expire, SHOWN_MS);
}
