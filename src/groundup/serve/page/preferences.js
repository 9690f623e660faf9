// What the page remembers besides conversations; a browser that keeps nothing gets the defaults each time.

const DEFAULTS = { model: null, parameters: {}, probabilities: false, singleKeys: true, blind: false, theme: "system" };

function read(name) {
  try {
    const stored = localStorage.getItem(name);
    if (stored === null) return DEFAULTS[name];
    return name === "theme" ? stored : JSON.parse(stored);
  } catch {
    return DEFAULTS[name];
  }
}

export const preferences = new Proxy({}, {
  get: (_, name) => read(name),
  set: (_, name, value) => {
    try {
      localStorage.setItem(name, name === "theme" ? value : JSON.stringify(value));
    } catch {
      // Storage is switched off or full: the choice holds until the page is left.
      DEFAULTS[name] = value;
    }
    return true;
  },
});
