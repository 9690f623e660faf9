// The panel with the system prompt and the parameters of the conversation.

import { byId, element } from "./dom.js";
import { PARAMETERS, parameterText, parseParameter } from "./parameters.js";

export class Settings {
  // `changed({system})` or `changed({parameters})`.
  constructor(changed) {
    this.changed = changed;
    this.fields = new Map();
    byId("parameters").append(...PARAMETERS.map((parameter) => this.#field(parameter)));
    byId("system").addEventListener("input", () => changed({ system: byId("system").value }));
    byId("parameters-reset").addEventListener("click", () => {
      this.#fill({});
      changed({ parameters: {} });
    });
  }

  show(conversation) {
    byId("system").value = conversation.system;
    this.#fill(conversation.parameters);
  }

  #fill(parameters) {
    for (const [name, field] of this.fields) field.set(parameterText(parameters[name]));
  }

  #field(parameter) {
    const { name, label, meaning, min, max, step, slider, lines } = parameter;
    const id = `parameter-${name}`;
    const about = { id, "aria-describedby": `${id}-meaning ${id}-problem`, placeholder: "default" };
    const input = lines
      ? element("textarea", { ...about, rows: "2" })
      : element("input", { ...about, type: "number", min, max, step: "any", inputmode: step === 1 ? "numeric" : "decimal" });
    const range = slider && element("input", { type: "range", min, max, step, "aria-label": label, tabindex: "-1" });
    const problem = element("p", { class: "problem", id: `${id}-problem`, hidden: true });
    const set = (text) => {
      input.value = text;
      if (range) range.value = text === "" ? (min + max) / 2 : text;
      range?.classList.toggle("unset", text === "");
      this.#check(parameter, input, problem);
    };
    this.fields.set(name, { input, set, parameter, problem });
    input.addEventListener("input", () => {
      if (range && input.value !== "") range.value = input.value;
      range?.classList.toggle("unset", input.value === "");
      this.#collect();
    });
    range?.addEventListener("input", () => {
      input.value = range.value;
      range.classList.remove("unset");
      this.#collect();
    });
    const name_ = element("label", { class: "field-name", for: id }, label);
    return element("div", { class: "parameter" },
      lines ? name_ : element("div", { class: "line" }, name_, input), range || null, lines ? input : null,
      element("p", { class: "meaning", id: `${id}-meaning` }, meaning), problem);
  }

  #check(parameter, input, problem) {
    try {
      // A number field hides text that is no number behind an empty value.
      if (input.validity.badInput) throw new Error(`${parameter.label} is a number.`);
      const value = parseParameter(parameter, input.value);
      problem.hidden = true;
      input.removeAttribute("aria-invalid");
      return value;
    } catch (error) {
      problem.textContent = `${error.message} Until then the server's own choice is used.`;
      problem.hidden = false;
      input.setAttribute("aria-invalid", "true");
      return null;
    }
  }

  #collect() {
    const parameters = {};
    for (const [name, { input, parameter, problem }] of this.fields) {
      const value = this.#check(parameter, input, problem);
      if (value !== null) parameters[name] = value;
    }
    this.changed({ parameters });
  }
}
