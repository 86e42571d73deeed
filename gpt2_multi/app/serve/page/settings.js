// How to write, as its form has it; and what this browser keeps.

const FIELDS = { temperature: "value", "top-p": "value", length: "value", seed: "value", pause: "checked" };
const SHOWN = {
  temperature: (value) => value.toFixed(2),
  "top-p": (value) => value.toFixed(2),
  length: (value) => (value === 1 ? "1 token" : `${value} tokens`),
};
const SEED = /^\d{0,16}$/u;

export class Settings extends EventTarget {
  constructor(form) {
    super();
    this.fields = Object.fromEntries(Object.keys(FIELDS).map((name) => [name, form.querySelector(`#${name}`)]));
    const kept = stored(localStorage, "settings", {});
    for (const [name, part] of Object.entries(FIELDS)) if (typeof kept[name] === typeof this.fields[name][part]) this.fields[name][part] = kept[name];
    form.addEventListener("input", () => this.#changed());
    form.addEventListener("submit", (event) => event.preventDefault());
    this.show();
  }

  // What the next request is made with; a seed of null is a new one.
  get values() {
    const { temperature, "top-p": topP, length, seed, pause } = this.fields;
    return {
      temperature: temperature.valueAsNumber,
      topP: topP.valueAsNumber,
      length: length.valueAsNumber,
      seed: seed.value.trim() === "" ? null : Number(seed.value),
      pause: pause.checked,
    };
  }

  // What is wrong, in a sentence, if anything.
  get fault() {
    const seed = this.fields.seed.value.trim();
    const fits = SEED.test(seed) && Number(seed) <= Number.MAX_SAFE_INTEGER;
    return fits ? "" : `The seed has to be a whole number of at most ${Number.MAX_SAFE_INTEGER}, or empty for a new one.`;
  }

  set seed(value) {
    this.fields.seed.value = String(value);
    this.#changed();
  }

  // Let a suggestion take at most half of what the model reads.
  limit(tokens) {
    const { length } = this.fields;
    length.max = Math.min(100, Math.max(1, Math.floor(tokens / 2)));
    this.show();
  }

  show() {
    for (const [name, spelled] of Object.entries(SHOWN)) {
      const text = spelled(this.fields[name].valueAsNumber);
      document.getElementById(`${name}-shown`).textContent = text;
      this.fields[name].setAttribute("aria-valuetext", text);
    }
    this.fields.seed.setAttribute("aria-invalid", String(this.fault !== ""));
  }

  #changed() {
    this.show();
    const kept = Object.entries(FIELDS).map(([name, part]) => [name, this.fields[name][part]]);
    this.isKept = keep(localStorage, "settings", Object.fromEntries(kept));
    this.dispatchEvent(new Event("change"));
  }
}

const PREFIX = "gpt2-multi:";

// What was kept under a name, or another value where there is nothing that can be read.
export function stored(place, name, otherwise) {
  try {
    return JSON.parse(place.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// Keep a value; whether there was room for it.
export function keep(place, name, value) {
  try {
    place.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// Forget all that was kept.
export function forget() {
  for (const place of [localStorage, sessionStorage])
    for (const name of Object.keys(place)) if (name.startsWith(PREFIX)) place.removeItem(name);
}

export function isOurs(name) {
  return name?.startsWith(PREFIX);
}
